// The Training page: loss and accuracy of all rounds, joined across runs or with runs overlaid.

import { h, heads, put } from "./dom.js";
import { chart } from "./chart.js";
import { clientMetric, clientStats } from "./client_stats.js";
import { VirtualTable } from "./table.js";
import { badge, clip, figure, metric, score, span } from "./format.js";

const FIGURES = [["loss", "Loss"], ["accuracy", "Accuracy"]];
const TONES = 6;
const MAX_CURVES = 6;
/** Chart modes: the model over all runs, its runs overlaid, or each client. */
const MODES = [["Joined", { overlaid: false, scope: "all" }], ["Compared", { overlaid: true, scope: "all" }], ["By client", { overlaid: false, scope: "each" }]];

export class TrainingPage {
  title = "Training";

  constructor(store, app, _, query) {
    this.store = store;
    this.app = app;
    this.task = query.get("task") ?? "";
    this.overlaid = false;
    this.scope = "all";
    this.chosenRuns = new Set();
    this.pickedClients = new Set();
    this.tasks = h("select", { "aria-label": "Task", onchange: (event) => { this.task = event.target.value; this.chosenRuns.clear(); this.update(); } });
    this.modes = h("div", { class: "choice", role: "group", "aria-label": "Chart mode" });
    this.log = false;
    this.scale = h("button", { type: "button", "aria-pressed": "false", title: "Logarithmic scale for the loss, to see small differences", onclick: () => this.rescale() }, "Log loss");
    this.charts = h("div", { class: "charts" });
    this.clients = new VirtualTable(CLIENTS(this), {
      caption: "Clients and their rounds",
      class: "fitted",
      by: "client",
      key: (row) => row.client,
      empty: () => h("p", {}, "No client has trained yet."),
    });
    this.clientsSection = h("section", { class: "stack", "aria-label": "Clients" }, h("h2", {}, "Clients"),
      h("p", { class: "muted" }, `Loss and accuracy as reported by each client; times are averages per round. Select up to ${MAX_CURVES} clients to draw their curves.`),
      h("ul", { class: "keys" }, [["train", "training"], ["transfer", "transfer"], ["waits", "waiting for other clients"]].map(([name, label]) => h("li", {}, h("span", { class: `swatch ${name}`, "aria-hidden": "true" }), label))),
      this.clients.root);
    this.runs = h("section", { class: "stack", "aria-label": "Runs" });
    this.root = h("div", { class: "page" }, h("div", { class: "head" }, h("h1", {}, "Training"), h("div", { class: "filters" }, this.tasks, this.scale, this.modes)), this.charts, this.clientsSection, this.runs);
  }

  leave() {}

  rescale() {
    this.log = !this.log;
    this.scale.setAttribute("aria-pressed", String(this.log));
    this.update();
  }

  update() {
    const tasks = this.store.tasks();
    const task = tasks.includes(this.task) ? this.task : tasks[0] ?? "";
    put(this.tasks, tasks.map((one) => h("option", { value: one, selected: one === task }, one)));
    this.tasks.hidden = tasks.length < 2;
    const choose = (change) => { Object.assign(this, change); this.last = ""; this.update(); };
    put(this.modes, MODES.map(([name, mode]) => h("button", { type: "button", "aria-pressed": String(this.overlaid === mode.overlaid && this.scope === mode.scope), onclick: () => choose(mode) }, name)));
    const all = this.store.runList().filter((one) => one.body.task === task && one.body.facts.rounds.length).reverse();
    const runs = this.chosenRuns.size ? all.filter((one) => this.chosenRuns.has(one.body.facts.run)) : all.slice(-50);
    const state = JSON.stringify([task, this.overlaid, this.scope, this.log, [...this.pickedClients], runs.map((one) => [one.body.facts.run, one.n])]);
    if (state === this.last) return;
    this.last = state;
    this.clientsSection.hidden = !all.length;
    if (!all.length) {
      put(this.charts, h("div", { class: "blank" }, h("h2", {}, "No training yet"), h("p", {}, "Loss and accuracy appear here after the first round of a run. Start a run with ", h("code", {}, "fedbus run start"), ".")));
      put(this.runs);
      return;
    }
    const rows = clientStats(runs.flatMap((one) => one.body.facts.rounds));
    const drawn = this.drawn(rows);
    put(this.charts, FIGURES.map(([name, title]) => chart({ title: this.scope === "each" ? `${title} on each client` : title, log: this.log && name === "loss", xTitle: this.overlaid ? "round of the run" : "rounds, all runs joined", seriesTitle: this.scope === "each" ? "Client" : "Run",
      none: this.scope === "each" ? "The ClientApps do not report this metric." : undefined, ...(this.scope === "each" ? this.ofClients(runs, name, drawn) : this.curves(runs, name)) })));
    this.clients.update(rows);
    put(this.runs, h("h2", {}, "Runs"), h("p", { class: "muted" }, "Select runs to show only those."), this.list(all));
  }

  /** The clients whose curves are drawn: the selected ones, else the first by name. */
  drawn(rows) {
    const names = rows.map((one) => one.client).sort(COLLATE.compare);
    const picked = names.filter((name) => this.pickedClients.has(name));
    return (picked.length ? picked : names).slice(0, MAX_CURVES);
  }

  pick(client, on) {
    if (on) this.pickedClients.add(client);
    else this.pickedClients.delete(client);
    this.scope = "each";
    this.overlaid = false;
    this.update();
  }

  /** A curve for each client, over the rounds of all *runs*. */
  ofClients(runs, name, clients) {
    const points = new Map(clients.map((client) => [client, []]));
    const gaps = [];
    let x = 0;
    runs.forEach((one, at) => {
      const { run, rounds } = one.body.facts;
      if (at) gaps.push({ x, label: "" });
      for (const round of rounds) for (const client of clients) {
        const value = clientMetric(round, client, name);
        if (value !== null) points.get(client).push({ x: x + round.round, y: value, label: `${run}, round ${round.round}` });
      }
      x += Math.max(0, ...rounds.map((round) => round.round));
    });
    return { series: clients.map((client, at) => ({ name: client, tone: at % TONES, points: points.get(client) })).filter((one) => one.points.length), gaps };
  }

  curves(runs, name) {
    const series = [];
    const gaps = [];
    let x = 0;
    runs.forEach((one, at) => {
      const { run, rounds } = one.body.facts;
      const points = [];
      if (!this.overlaid && at) gaps.push({ x, label: "" });
      for (const round of rounds) {
        const value = metric(round, name);
        const place = this.overlaid ? round.round : x + round.round;
        if (value !== null && isFinite(value)) points.push({ x: place, y: value, label: `round ${round.round}` });
      }
      x += Math.max(0, ...rounds.map((round) => round.round));
      if (points.length) series.push({ name: run, tone: at % TONES, points });
    });
    return { series, gaps };
  }

  list(all) {
    return h("div", { class: "card flush scroll medium", tabindex: 0, role: "region", "aria-label": "Runs and their results" }, h("table", {}, heads(h("span", { class: "unseen" }, "Selected"), "Run", "State", ["Rounds", "number"], ["Loss, first → last", "number"], ["Accuracy, first → last", "number"], "Settings"),
      h("tbody", {}, [...all].reverse().map((one) => {
        const { run, rounds, plan } = one.body.facts;
        const box = h("input", { type: "checkbox", "aria-label": `Select ${run}`, checked: this.chosenRuns.has(run), onchange: (event) => { event.target.checked ? this.chosenRuns.add(run) : this.chosenRuns.delete(run); this.update(); } });
        return h("tr", {}, h("td", {}, box), h("td", {}, h("a", { href: `#/runs/${encodeURIComponent(run)}` }, run)), h("td", {}, badge(one.body.target)), h("td", { class: "number" }, rounds.at(-1).round),
          FIGURES.map(([name]) => h("td", { class: "number" }, `${score(metric(rounds[0], name))} → ${score(metric(rounds.at(-1), name))}`)), h("td", {}, clip(Object.entries({ ...plan.aggregation, ...plan.config }).map(([key, value]) => `${key}=${value}`).join(" "), 120) || "–"));
      }))));
  }
}

const COLLATE = new Intl.Collator(undefined, { numeric: true });
const sortable = (value) => (value === null ? -Infinity : value);
const firstToLast = (values) => (values.length ? `${score(values[0])} → ${score(values.at(-1))}` : "–");

const CLIENTS = (page) => [
  { key: "client", title: "Client", class: "name", sort: (row) => row.client, cell: (row) => h("label", { class: "tick" }, h("input", { type: "checkbox", checked: page.pickedClients.has(row.client), onchange: (event) => page.pick(row.client, event.target.checked) }), h("strong", {}, row.client)) },
  { key: "rounds", title: "Rounds", class: "number", sort: (row) => row.rounds, cell: (row) => row.rounds },
  { key: "failed", title: "Failed", class: "number", sort: (row) => row.failed, cell: (row) => row.failed },
  { key: "loss", title: "Loss", class: "number", sort: (row) => sortable(row.loss.at(-1) ?? null), cell: (row) => firstToLast(row.loss) },
  { key: "accuracy", title: "Accuracy", class: "number", sort: (row) => sortable(row.accuracy.at(-1) ?? null), cell: (row) => firstToLast(row.accuracy) },
  { key: "time", title: "Time per round", class: "times", sort: (row) => sortable(row.train_s) + sortable(row.transfer_s), cell: parts },
  { key: "staleness", title: "Staleness", class: "number", sort: (row) => sortable(row.staleness), cell: (row) => h("span", { title: "aggregations since the client got its model, on average" }, row.staleness === null ? "–" : row.staleness.toFixed(1)) },
  { key: "reliability", title: "Reliability", class: "number", sort: (row) => row.reliability, cell: (row) => `${Math.round(row.reliability * 100)} %` },
  { key: "contribution", title: "Contribution", class: "number", sort: (row) => sortable(row.contribution), cell: (row) => figure(row.contribution) },
];

/** A bar of three parts, with the durations as text. */
function parts(row) {
  if (row.train_s === null || row.transfer_s === null) return "–";
  const whole = row.train_s + row.transfer_s + row.wait_s || 1;
  const bar = h("span", { class: "parts", "aria-hidden": "true" }, [["train", row.train_s], ["transfer", row.transfer_s], ["waits", row.wait_s]].map(([name, seconds]) => {
    const part = h("span", { class: name });
    part.style.width = `${(100 * seconds) / whole}%`;
    return part;
  }));
  return h("span", { class: "timesplit", title: "training · transfer · waiting" }, bar, `${span(row.train_s)} · ${span(row.transfer_s)} · ${span(row.wait_s)}`);
}
