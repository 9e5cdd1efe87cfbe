// What is said, as it is said: filtered, decoded, and followed along its trace.

import { h, put } from "./dom.js";
import { VirtualTable } from "./table.js";
import { clip, clock, gist, stateName, who } from "./words.js";

export class EventsPage {
  title = "Events";

  constructor(store, app, _, query) {
    this.store = store;
    this.app = app;
    this.wish = { word: query.get("word") ?? "", client: query.get("client") ?? "", task: query.get("task") ?? "", text: query.get("text") ?? "" };
    this.held = null;
    this.matching = [];
    this.looked = 0;
    const field = (name, says) => h("input", { type: "search", name, value: this.wish[name], placeholder: says, "aria-label": says, oninput: (event) => this.want({ [name]: event.target.value }) });
    this.words = h("select", { "aria-label": "Only this word", onchange: (event) => this.want({ word: event.target.value }) });
    this.hold = h("button", { type: "button", "aria-pressed": "false", onclick: () => this.toggle() }, "Hold");
    this.count = h("span", { class: "muted" });
    this.table = new VirtualTable(COLUMNS, {
      caption: "Events and transitions, the newest first",
      class: "tall",
      rowHeight: 34,
      key,
      picked: () => this.app.shown,
      onpick: (row) => { this.app.show(row, () => this.table.focus({ key: key(row), at: 0 })); this.table.draw(); },
      empty: () => this.empty(),
    });
    this.root = h("div", { class: "page" },
      h("div", { class: "head" }, h("h1", {}, "Events"), h("form", { class: "filters", role: "search", onsubmit: (event) => event.preventDefault() }, this.words, field("client", "Client"), field("task", "Task"), field("text", "Any text"), this.hold)),
      this.count, this.table.root);
  }

  leave() {}

  want(change) {
    Object.assign(this.wish, change);
    this.app.remember(this.wish);
    this.looked = 0;
    this.update();
  }

  toggle() {
    this.held = this.held ? null : this.matching.slice();
    this.hold.setAttribute("aria-pressed", String(this.held !== null));
    this.hold.textContent = this.held ? "Go on" : "Hold";
    this.update();
  }

  update(change) {
    if (change?.type === "heard") return;
    if (change?.type === "reset") this.looked = 0;
    this.look();
    this.offer();
    const rows = this.held ?? this.matching;
    this.table.update(rows);
    const coming = this.held && this.matching.length ? ", held" : "";
    this.count.textContent = `${rows.length} shown of the last ${this.store.recent.length}${coming}`;
    if (!change) this.app.speak(this.count.textContent, true);
  }

  /** Only what is new is looked at, unless the filter has changed. */
  look() {
    const fresh = Math.min(this.store.count - this.looked, this.store.recent.length);
    if (this.looked === 0) this.matching = [];
    this.looked = this.store.count;
    const found = fresh ? this.store.recent.slice(-fresh).filter((one) => this.matches(one)) : [];
    this.matching = [...found.reverse(), ...this.matching].slice(0, 5000);
  }

  matches(record) {
    const { word, client, task, text } = this.wish;
    return (!word || name(record) === word)
      && (!client || record.subject.split(".").some((token) => token === client) || record.body.client === client || record.subject.includes(client))
      && (!task || record.body.task?.includes(task))
      && (!text || JSON.stringify(record).toLowerCase().includes(text.toLowerCase()));
  }

  offer() {
    const known = this.known ?? (this.known = new Set([this.wish.word].filter(Boolean)));
    const before = known.size;
    for (const one of this.store.recent.slice(known.size ? -500 : 0)) known.add(name(one));
    if (known.size === before && this.words.options.length) return;
    put(this.words, h("option", { value: "" }, "Every word"), [...known].sort().map((word) => h("option", { value: word, selected: word === this.wish.word }, word.replaceAll("_", " "))));
  }

  empty() {
    return this.store.recent.length
      ? h("p", {}, "Nothing of late matches the filter.")
      : h("div", {}, h("h2", {}, "Nothing was said yet"), h("p", {}, "Whatever the agents say appears here at once. Start some with ", h("code", {}, "fedbus up"), "."));
  }
}

export const key = (record) => `${record.s}${record.n}`;
const name = (record) => (record.word === "transition" ? record.body.facts.kind : record.word);
const grave = (record) => /fail|refused|lost|declined|turned_down/.test(record.word) || ["failed", "cancelled", "terminated"].includes(record.body.target);

const COLUMNS = [
  { key: "at", title: "Time", cell: (row) => h("time", { datetime: row.at }, clock(row.at, true)), class: "time" },
  { key: "word", title: "Word", cell: (row) => h("span", { class: `word ${row.word === "transition" ? "life" : ""} ${grave(row) ? "bad" : ""}` }, (row.word === "transition" ? `${stateName(name(row))} moves` : stateName(row.word))) },
  { key: "who", title: "Said by", cell: (row) => clip(who(row.source), 48), class: "spare" },
  { key: "about", title: "About", cell: (row) => clip(row.word === "transition" ? row.subject.split(".").slice(4).join(".") : row.about, 60) },
  { key: "gist", title: "What it says", cell: (row) => h("span", { title: clip(gist(row), 600) }, gist(row)), class: "wide" },
];
