// The Events page: all messages as they arrive, with filters, decoded, linked to causes and traces.

import { h, put } from "./dom.js";
import { VirtualTable } from "./table.js";
import { clip, clock, gist, stateName, who } from "./format.js";

export class EventsPage {
  title = "Events";

  constructor(store, app, _, query) {
    this.store = store;
    this.app = app;
    this.filter = { word: query.get("word") ?? "", client: query.get("client") ?? "", task: query.get("task") ?? "", text: query.get("text") ?? "" };
    this.pausedRows = null;
    this.matching = [];
    this.matchedCount = 0;
    const field = (name, label) => h("input", { type: "search", name, value: this.filter[name], placeholder: label, "aria-label": label, oninput: (event) => this.setFilter({ [name]: event.target.value }) });
    this.types = h("select", { "aria-label": "Message type", onchange: (event) => this.setFilter({ word: event.target.value }) });
    this.pauseButton = h("button", { type: "button", "aria-pressed": "false", onclick: () => this.toggle() }, "Pause");
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
      h("div", { class: "head" }, h("h1", {}, "Events"), h("form", { class: "filters", role: "search", onsubmit: (event) => event.preventDefault() }, this.types, field("client", "Client"), field("task", "Task"), field("text", "Text"), this.pauseButton)),
      this.count, this.table.root);
  }

  leave() {}

  setFilter(change) {
    Object.assign(this.filter, change);
    this.app.remember(this.filter);
    this.matchedCount = 0;
    this.update();
  }

  toggle() {
    this.pausedRows = this.pausedRows ? null : this.matching.slice();
    this.pauseButton.setAttribute("aria-pressed", String(this.pausedRows !== null));
    this.pauseButton.textContent = this.pausedRows ? "Resume" : "Pause";
    this.update();
  }

  update(change) {
    if (change?.type === "presence") return;
    if (change?.type === "reset") this.matchedCount = 0;
    this.match();
    this.drawTypes();
    const rows = this.pausedRows ?? this.matching;
    this.table.update(rows);
    const suffix = this.pausedRows && this.matching.length ? ", paused" : "";
    this.count.textContent = `${rows.length} shown of the last ${this.store.recent.length}${suffix}`;
    if (!change) this.app.speak(this.count.textContent, true);
  }

  /** Match only new records, unless the filter has changed. */
  match() {
    const added = Math.min(this.store.count - this.matchedCount, this.store.recent.length);
    if (this.matchedCount === 0) this.matching = [];
    this.matchedCount = this.store.count;
    const matching = added ? this.store.recent.slice(-added).filter((one) => this.matches(one)) : [];
    this.matching = [...matching.reverse(), ...this.matching].slice(0, 5000);
  }

  matches(record) {
    const { word, client, task, text } = this.filter;
    return (!word || name(record) === word)
      && (!client || record.subject.split(".").some((token) => token === client) || record.body.client === client || record.subject.includes(client))
      && (!task || record.body.task?.includes(task))
      && (!text || JSON.stringify(record).toLowerCase().includes(text.toLowerCase()));
  }

  drawTypes() {
    const names = this.names ?? (this.names = new Set([this.filter.word].filter(Boolean)));
    const count = names.size;
    for (const one of this.store.recent.slice(names.size ? -500 : 0)) names.add(name(one));
    if (names.size === count && this.types.options.length) return;
    put(this.types, h("option", { value: "" }, "All types"), [...names].sort().map((word) => h("option", { value: word, selected: word === this.filter.word }, word.replaceAll("_", " "))));
  }

  empty() {
    return this.store.recent.length
      ? h("p", {}, "No recent event matches the filter.")
      : h("div", {}, h("h2", {}, "No events yet"), h("p", {}, "Events appear here when agents publish them. Start agents with ", h("code", {}, "fedbus up"), "."));
  }
}

export const key = (record) => `${record.s}${record.n}`;
const name = (record) => (record.word === "transition" ? record.body.facts.kind : record.word);
const isFailure = (record) => /fail|refused|lost|declined|turned_down/.test(record.word) || ["failed", "cancelled", "terminated"].includes(record.body.target);

const COLUMNS = [
  { key: "at", title: "Time", cell: (row) => h("time", { datetime: row.at }, clock(row.at, true)), class: "time" },
  { key: "word", title: "Type", cell: (row) => h("span", { class: `word ${row.word === "transition" ? "life" : ""} ${isFailure(row) ? "bad" : ""}` }, (row.word === "transition" ? `${stateName(name(row))} transition` : stateName(row.word))) },
  { key: "who", title: "Source", cell: (row) => clip(who(row.source), 48), class: "spare" },
  { key: "about", title: "Entity", cell: (row) => clip(row.word === "transition" ? row.subject.split(".").slice(4).join(".") : row.about, 60) },
  { key: "gist", title: "Data", cell: (row) => h("span", { title: clip(gist(row), 600) }, gist(row)), class: "wide" },
];
