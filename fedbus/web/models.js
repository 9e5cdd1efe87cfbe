// The Models page: model versions and their lineage, the champion, code versions, promotion and rollback.

import { h, heads, put, s } from "./dom.js";
import { ago, bytes, badge, clip, clock, score, short } from "./format.js";

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
    this.repository = null;
    this.tasks = h("select", { "aria-label": "Task", onchange: (event) => { this.task = event.target.value; this.chosen = null; this.read(); } });
    this.graph = h("div", { class: "card scroll lineage", tabindex: 0, role: "region", "aria-label": "Lineage of the versions" });
    this.detail = h("section", { "aria-label": "Selected version" });
    this.codeFacts = h("div", { class: "card" });
    this.codeForm = h("div", { class: "filters" });
    this.code = h("section", { class: "stack", "aria-label": "Code", hidden: true }, h("div", { class: "head" }, h("h2", {}, "Code"), this.codeForm), this.codeFacts);
    this.root = h("div", { class: "page" }, h("div", { class: "head" }, h("h1", {}, "Models & code"), h("div", { class: "filters" }, this.tasks)), h("h2", {}, "Lineage"), this.graph, this.detail, this.code);
  }

  leave() {}

  update(change) {
    const tasks = this.store.tasks();
    const task = tasks.includes(this.task) ? this.task : tasks[0] ?? "";
    put(this.tasks, tasks.map((one) => h("option", { value: one, selected: one === task }, one)));
    this.tasks.hidden = tasks.length < 2;
    const server = this.store.servers.get(task);
    const state = `${task} ${server?.body.facts.term} ${server?.body.facts.model?.version} ${server?.body.facts.candidate?.version}`;
    if (!task) {
      put(this.graph, h("div", { class: "blank" }, h("h2", {}, "No server yet"), h("p", {}, "Start one with ", h("code", {}, "fedbus server up"), ".")));
      return;
    }
    if (state !== this.lastState || change?.type === "reset") {
      this.lastState = state;
      this.task = task;
      this.read();
    }
    this.drawCode(task);
  }

  async read() {
    const task = this.task;
    if (this.repository?.task !== task) {
      put(this.graph, h("p", { class: "blank" }, "Reading the model repository…"));
      put(this.detail);
    }
    try {
      const repository = await this.store.get(`api/models/${encodeURIComponent(task)}`);
      if (task !== this.task) return;
      this.repository = { ...repository, task };
    } catch (error) {
      this.repository = { versions: [], champion: null, error: error.message, task };
    }
    this.draw();
  }

  draw() {
    const { versions, champion, error } = this.repository;
    const served = champion?.version ?? this.store.servers.get(this.task)?.body.facts.model?.version;
    if (error || !versions.length) {
      put(this.graph, h("div", { class: "blank" }, h("h2", {}, error ? "Model repository unavailable" : "No version yet"), h("p", {}, error || "The server builds the first version when it starts.")));
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
      const label = `v${one.version} ${below}${one.run ? `, of ${one.run}` : ""}`;
      const node = s("g", { class: `version ${one.version === served ? "served" : ""} ${one.version === picked ? "picked" : ""}`, transform: `translate(${x} ${y})`, tabindex: 0, role: "button", "aria-label": label, "aria-pressed": String(one.version === picked) },
        s("rect", { x: -34, y: -20, width: 68, height: 40, rx: 10 }), s("text", { "text-anchor": "middle", y: -1 }, `v${one.version} `), s("text", { class: "small", "text-anchor": "middle", y: 13 }, below));
      const choose = () => { this.chosen = one.version; this.draw(); };
      node.addEventListener("click", choose);
      node.addEventListener("keydown", (event) => { if (event.key === "Enter" || event.key === " ") { choose(); event.preventDefault(); } });
      drawing.append(node);
    }
    const at = this.graph.scrollLeft;
    const isFirst = !this.graph.querySelector("svg");
    put(this.graph, drawing);
    this.graph.scrollLeft = isFirst ? (places.get(served)?.x ?? wide) - this.graph.clientWidth / 2 : at;
    this.drawVersion(versions.find((one) => one.version === picked) ?? versions.at(-1), served, champion);
  }

  drawVersion(one, served, champion) {
    const may = this.store.mayAct;
    put(this.detail, h("div", { class: "card" },
      h("div", { class: "head" }, h("h2", { class: "named" }, `Version ${one.version}`, one.version === served ? h("span", { class: "badge good" }, "served") : null, one.seal ? h("span", { class: "badge none" }, "signed") : h("span", { class: "badge none" }, "not signed")),
        h("div", { class: "filters" },
          may && one.version !== served ? h("button", { type: "button", class: "primary", onclick: () => this.promote(one.version) }, `Promote v${one.version}`) : null,
          may && champion?.before?.length ? h("button", { type: "button", class: "danger", onclick: () => this.back(champion.before[0]) }, `Roll back to v${champion.before[0]}`) : null,
          !may && this.store.about.acts ? this.locked("To promote or roll back a version") : null)),
      h("dl", { class: "across" }, pair("Created", h("time", { datetime: one.created, title: ago(one.created) }, clock(one.created))), pair("Parent", one.parent ? `v${one.parent}` : "first of its lineage"), pair("Run", one.run ? h("a", { href: `#/runs/${encodeURIComponent(one.run)}` }, one.run) : "–"), pair("Rounds", one.rounds || "–"),
        pair("Lineage", one.lineage), pair("Size", bytes(one.size_bytes)), pair("Code", h("code", { title: one.code_version }, short(one.code_version))), pair("Clients", Object.keys(one.participants).length || "–"), pair("Digest", h("code", { title: one.sha256 }, short(one.sha256))), pair("Key", one.seal ? h("code", {}, one.seal.key) : "–")),
      Object.keys(one.metrics).length ? [h("h3", {}, "Metrics"), h("dl", { class: "across figures" }, Object.entries(one.metrics).slice(0, FIGURES).map(([name, value]) => pair(clip(name, 60), clip(score(value), 40))))] : null,
      one.evaluation_failure ? h("p", { class: "note wait" }, clip(one.evaluation_failure, 300)) : null,
      one.version === served && champion?.reason ? h("p", { class: "muted" }, `Served since ${clock(champion.since)}: ${champion.reason}`) : null));
  }

  /** A link to the token dialog. */
  locked(purpose) {
    return h("span", { class: "muted" }, `${purpose}, `, h("button", { type: "button", class: "link", onclick: () => this.app.askToken() }, "unlock actions"));
  }

  async promote(version) {
    if (await this.app.confirm(`Promote version ${version}?`, "Every client downloads and tests it, and then swaps to it without interrupting predictions.", `Promote v${version}`)) this.app.act("promote_model", { task: this.task, model_version: version, reason: "promoted from the dashboard" });
  }

  async back(version) {
    if (await this.app.confirm(`Roll back to version ${version}?`, "Every client serves the previous champion again.", `Roll back to v${version}`)) this.app.act("roll_back_model", { task: this.task, reason: "rolled back from the dashboard" });
  }

  /** The rollout form, where a repository is followed. The same form survives redraws, so that input is not lost. */
  codeActions(task, facts) {
    if (!facts?.source || !this.store.about.acts) return null;
    if (!this.store.mayAct) return this.locked("To roll out code or revert it");
    if (this.form?.task !== task) {
      const version = h("input", { type: "text", placeholder: "commit, tag or branch", "aria-label": "Code version to roll out", required: true, maxlength: 200 });
      const form = h("form", { class: "filters", onsubmit: (event) => { event.preventDefault(); this.rollOut(task, version.value.trim()); } }, version, h("button", { type: "submit", class: "primary" }, "Roll out"), h("button", { type: "button", class: "danger", onclick: () => this.revert(task) }, "Revert"));
      this.form = { task, form };
    }
    return this.form.form;
  }

  async rollOut(task, version) {
    if (version && await this.app.confirm(`Roll out ${clip(version, 60)}?`, "Clients get it in the stages that the task defines. If too many trainings fail, all clients return to the deployed code.", "Roll out")) this.app.act("roll_out_code", { task, code_version: version });
  }

  async revert(task) {
    const rolling = this.store.codes.get(task)?.body.facts.candidate;
    if (await this.app.confirm(rolling ? `End the rollout of ${short(rolling)}?` : "Revert to the previous code?", rolling ? "All clients return to the deployed code, and the candidate is rejected." : "All clients return to the previous code version between two runs.", "Revert")) this.app.act("revert_code", { task, reason: "reverted from the dashboard" });
  }

  drawCode(task) {
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
    put(this.codeForm, this.codeActions(task, facts));
    put(this.codeFacts,
      facts ? [h("p", {}, badge(record.body.target), " ", facts.source ? ["follows ", h("code", {}, clip(facts.source, 120))] : "follows no repository"),
        facts.candidate ? h("p", {}, "rolling out ", h("code", { title: facts.candidate }, short(facts.candidate)), ` stage ${facts.stage + 1} of ${facts.stages.length}: ${facts.ready.length} of ${facts.clients.length} clients ready`) : null,
        rejected.length ? h("details", {}, h("summary", {}, `${rejected.length} rejected commits`), h("ul", {}, rejected.map(([commit, reason]) => h("li", {}, h("code", {}, short(commit)), ` ${reason}`)))) : null] : h("p", { class: "muted" }, "The server follows no repository; it runs the code that it was started with."),
      h("table", {}, heads("Code version", ["Clients", "number"], h("span", { class: "unseen" }, "Status")), h("tbody", {}, [...versions].map(([version, count]) => h("tr", {}, h("td", {}, version ? h("code", { title: version }, clip(version, 72)) : "unknown"), h("td", { class: "number" }, count), h("td", {}, version && version === facts?.candidate ? "candidate" : version === (facts?.code_version || this.store.servers.get(task)?.body.facts.code_version) ? "current" : ""))))));
  }
}

/** The label below a version: its metric, or its lineage. */
function under({ metrics, lineage }) {
  const value = metrics.accuracy ?? metrics.eval_accuracy ?? metrics.loss;
  return value === undefined ? `lineage ${lineage}` : score(value);
}

const pair = (name, value) => h("div", {}, h("dt", {}, name), h("dd", {}, value instanceof Node ? value : String(value)));

/** Positions: versions from left to right; a second child of a parent starts a new lane below. */
function place(versions) {
  const places = new Map();
  const parents = new Set();
  let lowest = 0;
  versions.forEach((one, at) => {
    const parent = places.get(one.parent);
    let lane = parent ? parent.lane : places.size ? ++lowest : 0;
    if (parent && parents.has(one.parent)) lane = ++lowest;
    parents.add(one.parent);
    places.set(one.version, { lane, x: 54 + at * STEP, y: TOP + lane * LANE });
  });
  return places;
}
