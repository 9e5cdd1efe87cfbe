// The pages put together: which is shown, the line to the gateway, the details of a message, and dialogs.

import { h, put, inFrame } from "./dom.js";
import { Store } from "./store.js";
import { FleetPage } from "./fleet.js";
import { RunsPage } from "./runs.js";
import { TrainingPage } from "./training.js";
import { EventsPage, key } from "./events.js";
import { ModelsPage } from "./models.js";
import { SchedulesPage } from "./schedules.js";
import { clip, clock, gist, stateName, who } from "./words.js";

const PAGES = { fleet: ["Fleet", FleetPage], runs: ["Runs", RunsPage], training: ["Training", TrainingPage], events: ["Events", EventsPage], models: ["Models", ModelsPage], schedules: ["Schedules", SchedulesPage] };
const THEMES = { auto: "As the system", light: "Light", dark: "Dark" };
const LINKS = { live: "live", lost: "not connected", connecting: "connecting" };
const SPOKEN_EVERY_MS = 10000;
const TYPED_MS = 700;
const LISTED = 500;
const at = (id) => document.getElementById(id);

class App {
  constructor(store) {
    this.store = store;
    this.shown = "";
    this.changes = [];
    this.drawer = h("aside", { class: "drawer", "aria-label": "The chosen message", hidden: true, tabindex: -1 });
    document.body.append(this.drawer);
    this.reads = h("p", { class: "blank" }, "Reads how the federation stands…");
    this.redraw = inFrame(() => this.drawChanges());
    store.addEventListener("change", ({ detail }) => {
      this.changes.push(detail);
      this.redraw();
    });
    store.addEventListener("link", () => this.drawLink());
    addEventListener("hashchange", () => this.go());
    document.querySelector(".skip").addEventListener("click", (event) => { // the address says which page it is
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
    this.bringIntoSight(at("pages").querySelector("[aria-current]"));
    document.title = `${this.page.title} · ${this.store.about.federation || "fedbus"}`;
    this.page.update({ type: "reset" });
    if (this.gone) at("main").focus({ preventScroll: true });
    this.gone = true;
    scrollTo(0, 0);
  }

  /** Show the page; before anything is known there is none, as it would tell of an empty federation. */
  enter() {
    const shown = this.store.cursor ? this.page.root : this.reads;
    if (at("main").firstChild !== shown) put(at("main"), shown);
  }

  /** On a narrow screen the names of the pages scroll, and a long list of runs does. Not scrollIntoView: that would have Tab begin there. */
  bringIntoSight(link, row = link?.closest("nav")) {
    if (!link) return;
    const [here, all] = [link.getBoundingClientRect(), row.getBoundingClientRect()];
    row.scrollLeft += Math.min(0, here.left - all.left) + Math.max(0, here.right - all.right);
    row.scrollTop += Math.min(0, here.top - all.top) + Math.max(0, here.bottom - all.bottom);
  }

  /** Put what the page is asked for into its address, so that a reload or a link finds it again. */
  remember(wish) {
    const query = new URLSearchParams(Object.entries(wish).filter(([, value]) => value)).toString();
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
    this.page.update(records.length ? { type: "news", records } : { type: "heard" });
  }

  /** Said to screen readers: seldom, but what was *asked* for always, when whoever types has come to the end. */
  speak(text, asked = false) {
    if (!asked && (text === this.spoken || Date.now() - (this.spokenAt ?? 0) < SPOKEN_EVERY_MS)) return;
    this.spoken = text;
    this.spokenAt = Date.now();
    clearTimeout(this.speaking);
    this.speaking = setTimeout(() => (at("spoken").textContent = text), asked ? TYPED_MS : 0);
  }

  // --- the line, the theme, the token --------------------------------------------------------------

  drawLink() {
    const { link, reason, about, token } = this.store;
    const line = at("link");
    line.dataset.state = link;
    tell(line, LINKS[link] + (about.federation ? ` · ${about.federation}` : ""));
    const banner = at("banner");
    banner.hidden = link !== "lost";
    if (link === "lost") tell(banner, `Not connected: ${reason}. What you see is of ${clock(this.store.lostAt)}; it is tried again, and nothing will be missed.`);
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
    const wrong = h("p", { id: "ask-wrong", class: "wrong", role: "alert" });
    const right = async () => {
      put(wrong);
      const refusal = await this.store.refuses(field.value.trim()).catch((error) => error.message);
      put(wrong, refusal);
      if (refusal) field.select();
      return !refusal;
    };
    const says = h("p", {}, "The token is what ", h("code", {}, "FEDBUS_GATEWAY_TOKEN"), " holds where the gateway runs. It stays in this tab.");
    if (await this.ask("Unlock actions", [says, h("label", { class: "field" }, "Token", field), wrong], "Unlock", right)) this.store.unlock(field.value.trim());
  }

  confirm(title, text, yes) {
    return this.ask(title, [h("p", {}, text)], yes);
  }

  /** Whether *yes* was chosen; it is only taken where *holds* comes to true. */
  ask(title, content, yes, holds = async () => true) {
    const dialog = at("ask");
    return new Promise((resolve) => {
      const done = (answer) => {
        dialog.close();
        resolve(answer);
      };
      const submit = async (event) => {
        event.preventDefault();
        if (await holds()) done(true);
      };
      put(dialog, h("form", { method: "dialog", onsubmit: submit }, h("h2", { id: "ask-title" }, title), content,
        h("div", { class: "buttons" }, h("button", { type: "button", onclick: () => done(false) }, "Leave it"), h("button", { type: "submit", class: "primary" }, yes))));
      dialog.oncancel = () => resolve(false);
      dialog.showModal();
    });
  }

  async act(word, wish) {
    try {
      await this.store.act(word, wish);
      this.toast(`${stateName(word)}: done`);
    } catch (error) {
      this.toast(error.message, "bad");
    }
  }

  toast(text, kind = "good") {
    const note = h("div", { class: `toast ${kind}`, role: "status" }, text);
    document.body.append(note);
    setTimeout(() => note.remove(), 8000);
  }

  // --- a message, whole ----------------------------------------------------------------------------

  /** A link to where traces are looked at, if that is an address of the web. */
  traceLink(trace, text = "Open the trace") {
    const template = this.store.about.trace_url;
    if (!trace || !/^https?:\/\//.test(template)) return null;
    return h("a", { class: "button", href: template.replaceAll("{trace_id}", encodeURIComponent(trace)), target: "_blank", rel: "noopener noreferrer" }, text);
  }

  /** *back* takes the focus when the message is closed; left out: what has it now does. */
  async show(record, back = null) {
    this.shown = key(record);
    if (this.drawer.hidden) {
      const before = document.activeElement;
      this.back = back ?? (() => before?.focus?.({ preventScroll: true }));
    }
    const body = h("pre", { tabindex: 0, "aria-label": "The body, as JSON" }, JSON.stringify(record.body, null, 2));
    const chain = h("div");
    put(this.drawer,
      h("div", { class: "head" }, h("h2", {}, record.word.replaceAll("_", " ")), h("button", { type: "button", class: "quiet", onclick: () => this.hide() }, "Close")),
      h("dl", {}, [["Time", clock(record.at, true)], ["Said by", who(record.source)], ["Subject", record.subject], ["About", record.about], ["Sequence", `${record.n} of ${record.s === "l" ? "life" : "events"}`], ["Id", record.id], ["Trace", record.trace || "none"]].flatMap(([name, value]) => [h("dt", {}, name), h("dd", {}, clip(value, 200))])),
      h("div", { class: "filters" }, h("button", { type: "button", class: "primary", onclick: () => this.causes(record, chain) }, "What led to it"),
        record.trace ? h("button", { type: "button", onclick: () => this.whole(record, chain) }, "All of its trace") : null, this.traceLink(record.trace)),
      chain, h("h3", {}, "Body"), body);
    this.drawer.hidden = false;
    this.drawer.focus({ preventScroll: true });
    try {
      const whole = await this.store.get(`api/messages/${record.s}/${record.n}`);
      if (this.shown === key(record)) body.textContent = JSON.stringify(whole.body, null, 2);
    } catch {
      // the stream has let it go: what the feed told of it is shown already
    }
  }

  /** What led to *record*, from what began it all: each message was said because of the one before. */
  causes(record, place) {
    return this.told(place, `api/causes/${record.s}/${record.n}`, ({ chain, whole }) => [
      h("h3", {}, chain.length > 1 ? `${chain.length - 1} ${chain.length === 2 ? "message" : "messages"} led to it` : "Nothing on the bus led to it"),
      chain.length === 1 && whole ? h("p", { class: "muted" }, "A person, a clock or its own beginning did.") : null,
      whole ? null : h("p", { class: "note wait" }, "What came before the first of these is not known: the streams let go of it, or it is too far back."),
      chain.length > 1 ? this.list(chain, record) : null,
    ]);
  }

  /** All messages of the same trace, in order. */
  whole(record, place) {
    return this.told(place, `api/traces/${record.trace}?around=${encodeURIComponent(record.at)}`, (found) => [
      h("h3", {}, `${found.length} messages of its trace`), this.list(found, record)]);
  }

  async told(place, path, say) {
    put(place, h("p", { class: "muted" }, "Reads the streams…"));
    try {
      put(place, say(await this.store.get(path)));
    } catch (error) {
      put(place, h("p", { class: "note bad" }, error.message));
    }
  }

  list(records, record) {
    return h("ol", { class: "chain" }, records.slice(-LISTED).map((one) => h("li", { "aria-current": key(one) === key(record) ? "true" : null },
      h("button", { type: "button", class: "link", onclick: () => this.show(one) }, one.word === "transition" ? `${stateName(one.body.facts.kind)} moves` : stateName(one.word)), h("span", { class: "muted" }, ` ${clock(one.at, true)} · ${clip(who(one.source), 40)}`), h("div", {}, clip(gist(one), 120)))));
  }

  hide() {
    if (this.drawer.hidden) return;
    this.drawer.hidden = true;
    this.shown = "";
    this.back();
  }
}

/** Said once: what a screen reader is to read aloud is touched only where it changes. */
function tell(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

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
// For whoever drives the page from outside: how far it has come.
Object.defineProperty(window, "fedbus", { value: { store, app } });
