// What training comes to: loss and accuracy of all rounds joined across runs, or runs laid over each other.

import { h, put } from "./dom.js";
import { chart } from "./chart.js";
import { badge, clip, figure, metric } from "./words.js";

const FIGURES = [["loss", "Loss"], ["accuracy", "Accuracy"]];
const TONES = 6;

export class TrainingPage {
  title = "Training";

  constructor(store, app, _, query) {
    this.store = store;
    this.app = app;
    this.task = query.get("task") ?? "";
    this.laid = false;
    this.chosen = new Set();
    this.tasks = h("select", { "aria-label": "The task", onchange: (event) => { this.task = event.target.value; this.chosen.clear(); this.update(); } });
    this.ways = h("div", { class: "choice", role: "group", "aria-label": "How runs are drawn" });
    this.charts = h("div", { class: "charts" });
    this.runs = h("div");
    this.root = h("div", { class: "page" }, h("div", { class: "head" }, h("h1", {}, "Training"), h("div", { class: "filters" }, this.tasks, this.ways)), this.charts, this.runs);
  }

  leave() {}

  update() {
    const tasks = this.store.tasks();
    const task = tasks.includes(this.task) ? this.task : tasks[0] ?? "";
    put(this.tasks, tasks.map((one) => h("option", { value: one, selected: one === task }, one)));
    this.tasks.hidden = tasks.length < 2;
    put(this.ways, [["Joined", false], ["Compared", true]].map(([name, laid]) => h("button", { type: "button", "aria-pressed": String(this.laid === laid), onclick: () => { this.laid = laid; this.last = ""; this.update(); } }, name)));
    const all = this.store.runList().filter((one) => one.body.task === task && one.body.facts.rounds.length).reverse();
    const runs = this.chosen.size ? all.filter((one) => this.chosen.has(one.body.facts.run)) : all.slice(-50);
    const now = JSON.stringify([task, this.laid, runs.map((one) => [one.body.facts.run, one.n])]);
    if (now === this.last) return;
    this.last = now;
    if (!all.length) {
      put(this.charts, h("div", { class: "blank" }, h("h2", {}, "Nothing was trained yet"), h("p", {}, "When the first round of a run is over, its loss and accuracy stand here. Start a run with ", h("code", {}, "fedbus run start"), ".")));
      put(this.runs);
      return;
    }
    put(this.charts, FIGURES.map(([name, title]) => chart({ title, xTitle: this.laid ? "round of the run" : "rounds, all runs joined", ...this.curves(runs, name) })));
    put(this.runs, h("h2", {}, "Runs"), h("p", { class: "muted" }, "Tick some to look at those alone."), this.list(all));
  }

  curves(runs, name) {
    const series = [];
    const gaps = [];
    let x = 0;
    runs.forEach((one, at) => {
      const { run, rounds } = one.body.facts;
      const points = [];
      if (!this.laid && at) gaps.push({ x, label: "" });
      for (const round of rounds) {
        const value = metric(round, name);
        const place = this.laid ? round.round : x + round.round;
        if (value !== null && isFinite(value)) points.push({ x: place, y: value, label: `round ${round.round}` });
      }
      x += Math.max(0, ...rounds.map((round) => round.round));
      if (points.length) series.push({ name: run, tone: at % TONES, points });
    });
    return { series, gaps };
  }

  list(all) {
    return h("div", { class: "card flush scroll medium", tabindex: 0, role: "region", "aria-label": "Runs and what they came to" }, h("table", {}, h("thead", {}, h("tr", {}, ["", "Run", "State", "Rounds", "Loss, first → last", "Accuracy, first → last", "Settings"].map((name) => h("th", { scope: "col" }, name || h("span", { class: "unseen" }, "Chosen"))))),
      h("tbody", {}, [...all].reverse().map((one) => {
        const { run, rounds, plan } = one.body.facts;
        const box = h("input", { type: "checkbox", "aria-label": `Look at ${run}`, checked: this.chosen.has(run), onchange: (event) => { event.target.checked ? this.chosen.add(run) : this.chosen.delete(run); this.update(); } });
        return h("tr", {}, h("td", {}, box), h("td", {}, h("a", { href: `#/runs/${encodeURIComponent(run)}` }, run)), h("td", {}, badge(one.body.target)), h("td", { class: "number" }, rounds.at(-1).round),
          FIGURES.map(([name]) => h("td", { class: "number" }, `${figure(metric(rounds[0], name))} → ${figure(metric(rounds.at(-1), name))}`)), h("td", {}, clip(Object.entries(plan.config).map(([key, value]) => `${key}=${value}`).join(" "), 120) || "–"));
      }))));
  }
}
