// The application: the current page, the connection to the gateway, message details, and dialogs.

import { h, put, inFrame } from "./dom.js";
import { Store } from "./store.js";
import { FleetPage } from "./fleet.js";
import { RunsPage } from "./runs.js";
import { TrainingPage } from "./training.js";
import { EventsPage, key } from "./events.js";
import { ModelsPage } from "./models.js";
import { SchedulesPage } from "./schedules.js";
import { clip, clock, gist, stateName, who } from "./format.js";

const PAGES = { fleet: ["Fleet", FleetPage], runs: ["Runs", RunsPage], training: ["Training", TrainingPage], events: ["Events", EventsPage], models: ["Models", ModelsPage], schedules: ["Schedules", SchedulesPage] };
const THEMES = { auto: "System", light: "Light", dark: "Dark" };
const LINKS = { live: "live", lost: "not connected", connecting: "connecting" };
const ANNOUNCE_INTERVAL_MS = 10000;
const TYPING_PAUSE_MS = 700;
const MAX_LISTED = 500;
const at = (id) => document.getElementById(id);

class App {
  constructor(store) {
    this.store = store;
    this.shown = "";
    this.changes = [];
    this.drawer = h("aside", { class: "drawer", "aria-label": "Selected message", hidden: true, tabindex: -1 });
    document.body.append(this.drawer);
    this.loading = h("p", { class: "blank" }, "Loading the state of the federation…");
    this.redraw = inFrame(() => this.drawChanges());
    store.addEventListener("change", ({ detail }) => {
      this.changes.push(detail);
      this.redraw();
    });
    store.addEventListener("link", () => this.drawLink());
    addEventListener("hashchange", () => this.go());
    document.querySelector(".skip").addEventListener("click", (event) => { // the fragment of the address selects the page
      event.preventDefault();
      at("main").focus();
    });
    addEventListener("keydown", (event) => event.key === "Escape" && !at("ask").open && this.hide());
    at("unlock").addEventListener("click", () => (store.token ? store.unlock("") : this.askToken()));
    at("theme").addEventListener("click", () => this.nextTheme());
    this.theme(localStorage.getItem("fedbus-theme") ?? "auto");
    this.drawLink();
    this.go();
  }

  // --- pages ---------------------------------------------------------------------------------

  go() {
    const [path, query = ""] = location.hash.replace(/^#\/?/, "").split("?");
    const [name = "", ...rest] = path.split("/").map(plain);
    const [, Page] = PAGES[name] ?? PAGES.fleet;
    this.name = PAGES[name] ? name : "fleet";
    this.page?.leave();
    this.hide();
    this.page = new Page(this.store, this, rest, new URLSearchParams(query));
    this.enter();
    put(at("pages"), Object.entries(PAGES).map(([one, [title]]) => h("li", {}, h("a", { href: `#/${one}`, "aria-current": one === this.name ? "page" : null }, title))));
    this.scrollToLink(at("pages").querySelector("[aria-current]"));
    document.title = `${this.page.title} · ${this.store.about.federation || "fedbus"}`;
    this.page.update({ type: "reset" });
    if (this.gone) at("main").focus({ preventScroll: true });
    this.gone = true;
    scrollTo(0, 0);
  }

  /** Show the page. While the state is loading there is none: it would show an empty federation. */
  enter() {
    const shown = this.store.cursor ? this.page.root : this.loading;
    if (at("main").firstChild !== shown) put(at("main"), shown);
  }

  /** Scroll *link* into view in its row or list. scrollIntoView would also move the start of the Tab order. */
  scrollToLink(link, row = link?.closest("nav")) {
    if (!link) return;
    const [here, all] = [link.getBoundingClientRect(), row.getBoundingClientRect()];
    row.scrollLeft += Math.min(0, here.left - all.left) + Math.max(0, here.right - all.right);
    row.scrollTop += Math.min(0, here.top - all.top) + Math.max(0, here.bottom - all.bottom);
  }

  /** Write the filter of the page to its address, so that a reload or a link restores it. */
  remember(filter) {
    const query = new URLSearchParams(Object.entries(filter).filter(([, value]) => value)).toString();
    history.replaceState(null, "", `#/${this.name}${query ? `?${query}` : ""}`);
  }

  drawChanges() {
    const changes = this.changes.splice(0);
    const kinds = new Set(changes.map((one) => one.type));
    if (kinds.has("reset")) {
      document.title = `${this.page.title} · ${this.store.about.federation || "fedbus"}`;
      this.drawLink();
      this.enter();
      this.page.update({ type: "reset" });
      return;
    }
    const records = changes.flatMap((one) => one.records ?? []);
    this.page.update(records.length ? { type: "news", records } : { type: "presence" });
  }

  /** Announce *text* to screen readers, at most every ANNOUNCE_INTERVAL_MS; text *onInput* always, after a pause in typing. */
  speak(text, onInput = false) {
    if (!onInput && (text === this.spoken || Date.now() - (this.spokenAt ?? 0) < ANNOUNCE_INTERVAL_MS)) return;
    this.spoken = text;
    this.spokenAt = Date.now();
    clearTimeout(this.speaking);
    this.speaking = setTimeout(() => (at("spoken").textContent = text), onInput ? TYPING_PAUSE_MS : 0);
  }

  // --- connection, theme, token --------------------------------------------------------------

  drawLink() {
    const { link, reason, about, token } = this.store;
    const line = at("link");
    line.dataset.state = link;
    setText(line, LINKS[link] + (about.federation ? ` · ${about.federation}` : ""));
    const banner = at("banner");
    banner.hidden = link !== "lost";
    if (link === "lost") setText(banner, `Not connected: ${reason}. The page shows the state at ${clock(this.store.lostAt)}. Reconnecting; no event will be lost.`);
    const unlock = at("unlock");
    unlock.hidden = !about.acts;
    unlock.textContent = token ? "Lock actions" : "Unlock actions";
  }

  theme(name) {
    this.themeName = name in THEMES ? name : "auto";
    if (this.themeName === "auto") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = this.themeName;
    localStorage.setItem("fedbus-theme", this.themeName);
    at("theme").textContent = { auto: "◐", light: "☀", dark: "☾" }[this.themeName];
    at("theme").setAttribute("aria-label", `Colours: ${THEMES[this.themeName]}. Change`);
    at("theme").title = `Colours: ${THEMES[this.themeName]}`;
  }

  nextTheme() {
    const names = Object.keys(THEMES);
    this.theme(names[(names.indexOf(this.themeName) + 1) % names.length]);
  }

  async askToken() {
    const field = h("input", { type: "password", autocomplete: "off", required: true, "aria-describedby": "ask-wrong" });
    const error = h("p", { id: "ask-wrong", class: "wrong", role: "alert" });
    const isAccepted = async () => {
      put(error);
      const refusal = await this.store.refuses(field.value.trim()).catch((failure) => failure.message);
      put(error, capitalize(refusal));
      if (refusal) field.select();
      return !refusal;
    };
    const help = h("p", {}, "The token is the value of ", h("code", {}, "FEDBUS_GATEWAY_TOKEN"), " in the environment of the gateway. It is stored in this tab only.");
    if (await this.ask("Unlock actions", [help, h("label", { class: "field" }, "Token", field), error], "Unlock", isAccepted)) this.store.unlock(field.value.trim());
  }

  confirm(title, text, yes) {
    return this.ask(title, [h("p", {}, text)], yes);
  }

  /** Resolve to true if the user chose *yes* and *isValid* accepts it. */
  ask(title, content, yes, isValid = async () => true) {
    const dialog = at("ask");
    return new Promise((resolve) => {
      const done = (answer) => {
        dialog.close();
        resolve(answer);
      };
      const submit = async (event) => {
        event.preventDefault();
        if (await isValid()) done(true);
      };
      put(dialog, h("form", { method: "dialog", onsubmit: submit }, h("h2", { id: "ask-title" }, title), content,
        h("div", { class: "buttons" }, h("button", { type: "button", onclick: () => done(false) }, "Cancel"), h("button", { type: "submit", class: "primary" }, yes))));
      dialog.oncancel = () => resolve(false);
      dialog.showModal();
    });
  }

  async act(name, request) {
    try {
      await this.store.act(name, request);
      this.toast(`${stateName(name)}: done`);
    } catch (error) {
      this.toast(capitalize(error.message), "bad");
    }
  }

  toast(text, kind = "good") {
    const note = h("div", { class: `toast ${kind}`, role: "status" }, text);
    document.body.append(note);
    setTimeout(() => note.remove(), 8000);
  }

  // --- message details ----------------------------------------------------------------------------

  /** A link to the trace viewer, if its address is http or https. */
  traceLink(trace, text = "Open the trace") {
    const template = this.store.about.trace_url;
    if (!trace || !/^https?:\/\//.test(template)) return null;
    return h("a", { class: "button", href: template.replaceAll("{trace_id}", encodeURIComponent(trace)), target: "_blank", rel: "noopener noreferrer" }, text);
  }

  /** Show *record*. When it is closed, *back* restores the focus; default: the element that has it now. */
  async show(record, back = null) {
    this.shown = key(record);
    if (this.drawer.hidden) {
      const before = document.activeElement;
      this.back = back ?? (() => before?.focus?.({ preventScroll: true }));
    }
    const body = h("pre", { tabindex: 0, "aria-label": "Body as JSON" }, JSON.stringify(record.body, null, 2));
    const chain = h("div");
    put(this.drawer,
      h("div", { class: "head" }, h("h2", {}, record.word.replaceAll("_", " ")), h("button", { type: "button", class: "quiet", onclick: () => this.hide() }, "Close")),
      h("dl", {}, [["Time", clock(record.at, true)], ["Source", who(record.source)], ["Subject", record.subject], ["Entity", record.about], ["Sequence", `${record.n} in the ${record.s === "l" ? "lifecycle" : "event"} stream`], ["Id", record.id], ["Trace", record.trace || "none"]].flatMap(([name, value]) => [h("dt", {}, name), h("dd", {}, clip(value, 200))])),
      h("div", { class: "filters" }, h("button", { type: "button", class: "primary", onclick: () => this.causes(record, chain) }, "Show causes"),
        record.trace ? h("button", { type: "button", onclick: () => this.whole(record, chain) }, "Show trace") : null, this.traceLink(record.trace)),
      chain, h("h3", {}, "Body"), body);
    this.drawer.hidden = false;
    this.drawer.focus({ preventScroll: true });
    try {
      const whole = await this.store.get(`api/messages/${record.s}/${record.n}`);
      if (this.shown === key(record)) body.textContent = JSON.stringify(whole.body, null, 2);
    } catch {
      // the stream no longer has it; the record of the feed is already shown
    }
  }

  /** Show the chain of causes of *record*, root cause first. */
  causes(record, place) {
    return this.load(place, `api/causes/${record.s}/${record.n}`, ({ chain, whole }) => [
      h("h3", {}, chain.length > 1 ? `Caused by ${chain.length - 1} ${chain.length === 2 ? "message" : "messages"}` : "No message caused it"),
      chain.length === 1 && whole ? h("p", { class: "muted" }, "The cause is a user, a timer or the start of an agent.") : null,
      whole ? null : h("p", { class: "note wait" }, "Earlier causes are not known: the streams have deleted them, or the chain is too long."),
      chain.length > 1 ? this.list(chain, record) : null,
    ]);
  }

  /** Show all messages of the trace, in order. */
  whole(record, place) {
    return this.load(place, `api/traces/${record.trace}?around=${encodeURIComponent(record.at)}`, (found) => [
      h("h3", {}, `${found.length} messages in its trace`), this.list(found, record)]);
  }

  async load(place, path, render) {
    put(place, h("p", { class: "muted" }, "Reading the streams…"));
    try {
      put(place, render(await this.store.get(path)));
    } catch (error) {
      put(place, h("p", { class: "note bad" }, capitalize(error.message)));
    }
  }

  list(records, record) {
    return h("ol", { class: "chain" }, records.slice(-MAX_LISTED).map((one) => h("li", { "aria-current": key(one) === key(record) ? "true" : null },
      h("button", { type: "button", class: "link", onclick: () => this.show(one) }, one.word === "transition" ? `${stateName(one.body.facts.kind)} transition` : stateName(one.word)), h("span", { class: "muted" }, ` ${clock(one.at, true)} · ${clip(who(one.source), 40)}`), h("div", {}, clip(gist(one), 120)))));
  }

  hide() {
    if (this.drawer.hidden) return;
    this.drawer.hidden = true;
    this.shown = "";
    this.back();
  }
}

/** Set the text only if it differs: a screen reader announces every write. */
function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

const capitalize = (text) => text.charAt(0).toUpperCase() + text.slice(1);

function plain(part) {
  try {
    return decodeURIComponent(part);
  } catch {
    return part;
  }
}

const store = new Store();
const app = new App(store);
store.begin();
// For tests: the state of the page.
Object.defineProperty(window, "fedbus", { value: { store, app } });
