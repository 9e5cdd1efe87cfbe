// Model versions and code versions: which came from which, which is served, and a way back.

import { h, heads, put, s } from "./dom.js";
import { ago, bytes, badge, clip, clock, score, short } from "./words.js";

const STEP = 104;
const LANE = 74;
const TOP = 28;
const FIGURES = 24;

export class ModelsPage {
  title = "Models & code";

  constructor(store, app, _, query) {
    this.store = store;
    this.app = app;
    this.task = query.get("task") ?? "";
    this.chosen = null;
    this.found = null;
    this.tasks = h("select", { "aria-label": "The task", onchange: (event) => { this.task = event.target.value; this.chosen = null; this.read(); } });
    this.graph = h("div", { class: "card scroll lineage", tabindex: 0, role: "region", "aria-label": "Which version came from which" });
    this.detail = h("section", { "aria-label": "The chosen version" });
    this.codeFacts = h("div", { class: "card" });
    this.codeWish = h("div", { class: "filters" });
    this.code = h("section", { class: "stack", "aria-label": "Code", hidden: true }, h("div", { class: "head" }, h("h2", {}, "Code"), this.codeWish), this.codeFacts);
    this.root = h("div", { class: "page" }, h("div", { class: "head" }, h("h1", {}, "Models & code"), h("div", { class: "filters" }, this.tasks)), h("h2", {}, "Lineage"), this.graph, this.detail, this.code);
  }

  leave() {}

  update(change) {
    const tasks = this.store.tasks();
    const task = tasks.includes(this.task) ? this.task : tasks[0] ?? "";
    put(this.tasks, tasks.map((one) => h("option", { value: one, selected: one === task }, one)));
    this.tasks.hidden = tasks.length < 2;
    const server = this.store.servers.get(task);
    const now = `${task} ${server?.body.facts.term} ${server?.body.facts.model?.version} ${server?.body.facts.candidate?.version}`;
    if (!task) {
      put(this.graph, h("div", { class: "blank" }, h("h2", {}, "No task has a server here"), h("p", {}, "Start one with ", h("code", {}, "fedbus server up"), ".")));
      return;
    }
    if (now !== this.now || change?.type === "reset") {
      this.now = now;
      this.task = task;
      this.read();
    }
    this.tellCode(task);
  }

  async read() {
    const task = this.task;
    if (this.found?.task !== task) {
      put(this.graph, h("p", { class: "blank" }, "Reads the model repository…"));
      put(this.detail);
    }
    try {
      const found = await this.store.get(`api/models/${encodeURIComponent(task)}`);
      if (task !== this.task) return;
      this.found = { ...found, task };
    } catch (error) {
      this.found = { versions: [], champion: null, error: error.message, task };
    }
    this.draw();
  }

  draw() {
    const { versions, champion, error } = this.found;
    const served = champion?.version ?? this.store.servers.get(this.task)?.body.facts.model?.version;
    if (error || !versions.length) {
      put(this.graph, h("div", { class: "blank" }, h("h2", {}, error ? "The model repository cannot be read from here" : "No version yet"), h("p", {}, error || "The server makes the first one when it starts.")));
      put(this.detail);
      return;
    }
    const places = place(versions);
    const lanes = Math.max(...[...places.values()].map((one) => one.lane)) + 1;
    const wide = versions.length * STEP + 40;
    const drawing = s("svg", { width: wide, height: (lanes - 1) * LANE + 2 * TOP, role: "group", "aria-label": `${versions.length} model versions, version ${served} is served` });
    for (const one of versions) {
      const from = places.get(one.parent);
      const to = places.get(one.version);
      if (from) drawing.append(s("path", { class: "edge", d: `M${from.x + 34} ${from.y}C${from.x + 64} ${from.y} ${to.x - 64} ${to.y} ${to.x - 34} ${to.y}` }));
    }
    const picked = this.chosen ?? served;
    for (const one of versions) {
      const { x, y } = places.get(one.version);
      const below = one.version === served ? "served" : under(one);
      const says = `v${one.version} ${below}${one.run ? `, of ${one.run}` : ""}`;
      const node = s("g", { class: `version ${one.version === served ? "served" : ""} ${one.version === picked ? "picked" : ""}`, transform: `translate(${x} ${y})`, tabindex: 0, role: "button", "aria-label": says, "aria-pressed": String(one.version === picked) },
        s("rect", { x: -34, y: -20, width: 68, height: 40, rx: 10 }), s("text", { "text-anchor": "middle", y: -1 }, `v${one.version} `), s("text", { class: "small", "text-anchor": "middle", y: 13 }, below));
      const choose = () => { this.chosen = one.version; this.draw(); };
      node.addEventListener("click", choose);
      node.addEventListener("keydown", (event) => { if (event.key === "Enter" || event.key === " ") { choose(); event.preventDefault(); } });
      drawing.append(node);
    }
    const at = this.graph.scrollLeft;
    const fresh = !this.graph.querySelector("svg");
    put(this.graph, drawing);
    this.graph.scrollLeft = fresh ? (places.get(served)?.x ?? wide) - this.graph.clientWidth / 2 : at;
    this.tell(versions.find((one) => one.version === picked) ?? versions.at(-1), served, champion);
  }

  tell(one, served, champion) {
    const may = this.store.mayAct;
    put(this.detail, h("div", { class: "card" },
      h("div", { class: "head" }, h("h2", { class: "named" }, `Version ${one.version}`, one.version === served ? h("span", { class: "badge good" }, "served") : null, one.seal ? h("span", { class: "badge none" }, "signed") : h("span", { class: "badge none" }, "not signed")),
        h("div", { class: "filters" },
          may && one.version !== served ? h("button", { type: "button", class: "primary", onclick: () => this.promote(one.version) }, `Serve v${one.version}`) : null,
          may && champion?.before?.length ? h("button", { type: "button", class: "danger", onclick: () => this.back(champion.before[0]) }, `Go back to v${champion.before[0]}`) : null,
          !may && this.store.about.acts ? this.locked("To serve a version or go back to one") : null)),
      h("dl", { class: "across" }, pair("Made", h("time", { datetime: one.created, title: ago(one.created) }, clock(one.created))), pair("From", one.parent ? `v${one.parent}` : "the code's first model"), pair("Run", one.run ? h("a", { href: `#/runs/${encodeURIComponent(one.run)}` }, one.run) : "–"), pair("Rounds", one.rounds || "–"),
        pair("Lineage", one.lineage), pair("Size", bytes(one.size_bytes)), pair("Code", h("code", { title: one.code_version }, short(one.code_version))), pair("Clients", Object.keys(one.participants).length || "–"), pair("Digest", h("code", { title: one.sha256 }, short(one.sha256))), pair("Key", one.seal ? h("code", {}, one.seal.key) : "–")),
      Object.keys(one.metrics).length ? [h("h3", {}, "Figures"), h("dl", { class: "across figures" }, Object.entries(one.metrics).slice(0, FIGURES).map(([name, value]) => pair(clip(name, 60), clip(score(value), 40))))] : null,
      one.version === served && champion?.reason ? h("p", { class: "muted" }, `Served since ${clock(champion.since)}: ${champion.reason}`) : null));
  }

  /** The way to the token, where it would be of use. */
  locked(wish) {
    return h("span", { class: "muted" }, `${wish}, `, h("button", { type: "button", class: "link", onclick: () => this.app.askToken() }, "unlock actions"));
  }

  async promote(version) {
    if (await this.app.confirm(`Serve version ${version}?`, "Every client fetches it, tries it beside its own, and changes over without a gap.", `Serve v${version}`)) this.app.act("promote_model", { task: this.task, model_version: version, reason: "promoted from the dashboard" });
  }

  async back(version) {
    if (await this.app.confirm(`Go back to version ${version}?`, "It was served before this one, and will be again on every client.", `Go back to v${version}`)) this.app.act("roll_back_model", { task: this.task, reason: "rolled back from the dashboard" });
  }

  /** What can be asked for where a repository is followed. The field outlives redraws, so that nobody is typed away. */
  codeActions(task, facts) {
    if (!facts?.source || !this.store.about.acts) return null;
    if (!this.store.mayAct) return this.locked("To roll out code or revert it");
    if (this.wish?.task !== task) {
      const version = h("input", { type: "text", placeholder: "commit, tag or branch", "aria-label": "The code version to roll out", required: true, maxlength: 200 });
      const form = h("form", { class: "filters", onsubmit: (event) => { event.preventDefault(); this.rollOut(task, version.value.trim()); } }, version, h("button", { type: "submit", class: "primary" }, "Roll out"), h("button", { type: "button", class: "danger", onclick: () => this.revert(task) }, "Revert"));
      this.wish = { task, form };
    }
    return this.wish.form;
  }

  async rollOut(task, version) {
    if (version && await this.app.confirm(`Roll out ${clip(version, 60)}?`, "The clients get it stage by stage, as the task says; if trainings fail more often with it, everybody goes back by itself.", "Roll out")) this.app.act("roll_out_code", { task, code_version: version });
  }

  async revert(task) {
    const rolling = this.store.codes.get(task)?.body.facts.candidate;
    if (await this.app.confirm(rolling ? `End the rollout of ${short(rolling)}?` : "Go back to the code before?", rolling ? "Everybody goes back to the version from before it, which will not be rolled out by itself again." : "Every client fetches the version before this one, and changes over between runs.", "Revert")) this.app.act("revert_code", { task, reason: "reverted from the dashboard" });
  }

  tellCode(task) {
    const record = this.store.codes.get(task);
    const facts = record?.body.facts;
    const clients = [...this.store.clients.values()].filter((one) => one.task === task);
    const versions = new Map();
    for (const one of clients) {
      const version = one.client?.body.facts.code_version ?? "";
      versions.set(version, (versions.get(version) ?? 0) + 1);
    }
    const rejected = Object.entries(facts?.rejected ?? {});
    this.code.hidden = false;
    put(this.codeWish, this.codeActions(task, facts));
    put(this.codeFacts,
      facts ? [h("p", {}, badge(record.body.target), " ", facts.source ? ["follows ", h("code", {}, clip(facts.source, 120))] : "no repository is followed"),
        facts.candidate ? h("p", {}, "rolls out ", h("code", { title: facts.candidate }, short(facts.candidate)), ` stage ${facts.stage + 1} of ${facts.stages.length}: ${facts.ready.length} of ${facts.clients.length} clients are ready`) : null,
        rejected.length ? h("details", {}, h("summary", {}, `${rejected.length} rejected commits`), h("ul", {}, rejected.map(([commit, reason]) => h("li", {}, h("code", {}, short(commit)), ` ${reason}`)))) : null] : h("p", { class: "muted" }, "The server follows no repository; the code is what it was started with."),
      h("table", {}, heads("Code version", ["Clients", "number"], h("span", { class: "unseen" }, "What it is")), h("tbody", {}, [...versions].map(([version, count]) => h("tr", {}, h("td", {}, version ? h("code", { title: version }, clip(version, 72)) : "not told yet"), h("td", { class: "number" }, count), h("td", {}, version && version === facts?.candidate ? "candidate" : version === (facts?.code_version || this.store.servers.get(task)?.body.facts.code_version) ? "current" : ""))))));
  }
}

/** A word below a version: how well it does, or which line of models it begins. */
function under({ metrics, lineage }) {
  const value = metrics.accuracy ?? metrics.eval_accuracy ?? metrics.loss;
  return value === undefined ? `lineage ${lineage}` : score(value);
}

const pair = (name, value) => h("div", {}, h("dt", {}, name), h("dd", {}, value instanceof Node ? value : String(value)));

/** Versions from left to right; a version whose parent has a child already goes a lane down. */
function place(versions) {
  const places = new Map();
  const taken = new Set();
  let lowest = 0;
  versions.forEach((one, at) => {
    const parent = places.get(one.parent);
    let lane = parent ? parent.lane : places.size ? ++lowest : 0;
    if (parent && taken.has(one.parent)) lane = ++lowest;
    taken.add(one.parent);
    places.set(one.version, { lane, x: 54 + at * STEP, y: TOP + lane * LANE });
  });
  return places;
}
