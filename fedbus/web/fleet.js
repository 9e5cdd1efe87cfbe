// The Fleet page: the state of each client in its three lifecycles, and why it does not train.

import { h, put } from "./dom.js";
import { VirtualTable } from "./table.js";
import { ago, badge, bytes, clip, clock, figure, short, shown, stateName } from "./format.js";
import { FINAL_STATES } from "./store.js";

const LATE_S = 60;

export class FleetPage {
  title = "Fleet";

  constructor(store, app) {
    this.store = store;
    this.app = app;
    this.chosen = "";
    this.text = "";
    this.state = "";
    this.summary = h("div", { class: "tiles" });
    this.search = h("input", { type: "search", placeholder: "Client, task or reason", "aria-label": "Filter the clients", oninput: (event) => this.filter({ text: event.target.value.toLowerCase() }) });
    this.states = h("select", { "aria-label": "Filter by state", onchange: (event) => this.filter({ state: event.target.value }) });
    this.details = h("aside", { class: "details", "aria-label": "Selected client", hidden: true });
    this.table = new VirtualTable(COLUMNS(this), {
      caption: "Clients, their states and versions",
      by: "name",
      key: (row) => row.key,
      picked: () => this.chosen,
      onpick: (row) => this.choose(row.key),
      empty: () => this.empty(),
    });
    this.root = h("div", { class: "page" },
      h("div", { class: "head" }, h("h1", {}, "Fleet"), h("div", { class: "filters" }, this.search, this.states)),
      this.summary,
      h("div", { class: "split" }, this.table.root, this.details));
    this.every = setInterval(() => this.table.draw(), 5000);
  }

  leave() {
    clearInterval(this.every);
  }

  filter(change) {
    Object.assign(this, change);
    this.update();
  }

  choose(key) {
    this.chosen = this.chosen === key ? "" : key;
    this.detail();
    this.table.draw();
  }

  update(change) {
    const clients = [...this.store.clients.values()];
    const states = new Map();
    for (const one of clients) states.set(clientState(one), (states.get(clientState(one)) ?? 0) + 1);
    const training = clients.filter((one) => ["pending", "training"].includes(one.fl_client?.body.target)).length;
    const serving = clients.filter((one) => ["serving", "updating"].includes(one.inference?.body.target)).length;
    const silent = clients.filter((one) => late(this.store, one)).length;
    const tasks = this.store.tasks();
    const clientTasks = new Set(clients.map((one) => one.task));
    const open = tasks.map((task) => this.store.openRun(task)?.body.facts.run).filter(Boolean);
    put(this.summary,
      tile("Clients", clients.length, !clients.length ? "none yet" : clientTasks.size === 1 ? `of task ${clip([...clientTasks][0], 40)}` : `of ${clientTasks.size} tasks`),
      tile("Serving", serving, !clients.length ? "no clients" : serving === clients.length ? "all clients" : `${clients.length - serving} not serving`, serving === clients.length ? "none" : "wait"),
      tile("Training", training, open.length ? `in ${open.join(", ")}` : "no run in progress", training ? "busy" : "none"),
      tile("Silent", silent, `for ${LATE_S} s during a run`, silent ? "wait" : "none"),
      tasks.map((task) => this.server(task)));
    put(this.states, h("option", { value: "" }, "All states"), [...states].sort().map(([state, count]) => h("option", { value: state, selected: state === this.state }, `${stateName(state)} (${count})`)));
    const rows = clients.filter((one) => (!this.state || clientState(one) === this.state) && this.matches(one));
    this.filtered = rows.length < clients.length;
    this.table.update(rows);
    this.detail();
    if (change) this.app.speak(`${clients.length} clients, ${training} training, ${silent} silent`);
    else this.app.speak(`${rows.length} of ${clients.length} clients shown`, true);
  }

  matches(one) {
    return !this.text || `${one.name} ${one.task} ${why(this.store, one).text}`.toLowerCase().includes(this.text);
  }

  server(task) {
    const server = this.store.servers.get(task);
    const facts = server?.body.facts;
    const model = facts?.model ? `champion v${facts.model.version}` : server?.body.event === "model_not_built" ? `no model: ${clip(server.body.reason, 300)}` : "no model yet";
    const trouble = facts?.trouble ? ` · model repository ${facts.trouble}` : "";
    return tile(`Server of ${clip(task, 40)}`, badge(server?.body.target ?? ""), `${model} · code ${short(facts?.code_version)}${trouble}`);
  }

  empty() {
    return this.filtered
      ? h("p", {}, "No client matches the filter.")
      : h("div", {}, h("h2", {}, "No client yet"), h("p", {}, "Start one on a device with ", h("code", {}, "fedbus client up c1"), ", or three on this machine with ", h("code", {}, "fedbus up --clients 3"), "."));
  }

  detail() {
    const one = this.store.clients.get(this.chosen);
    this.details.hidden = !one;
    if (!one) return;
    const records = ["client", "fl_client", "inference"].map((kind) => [kind, one[kind]]).filter(([, record]) => record);
    const reason = why(this.store, one);
    put(this.details,
      h("div", { class: "head" }, h("h2", {}, one.name), h("button", { type: "button", class: "quiet", onclick: () => this.choose(one.key) }, "Close")),
      h("p", { class: "muted" }, `task ${one.task}, last message ${ago(this.store.lastSeen.get(one.name))}`),
      h("p", { class: `note ${reason.tone}` }, reason.text || "Takes part in the current run."),
      h("dl", {}, records.flatMap(([kind, record]) => [
        h("dt", {}, NAMES[kind]),
        h("dd", {}, badge(record.body.target), h("div", { class: "muted" }, `since ${clock(record.at)}`), record.body.reason ? h("div", { class: "muted" }, record.body.reason) : null, record.body.waits_for ? h("div", { class: "muted" }, `waits for ${record.body.waits_for}`) : null),
      ]), h("dt", {}, "Model"), h("dd", {}, version(one) ? `v${version(one)}` : "–", notServed(one) ? h("div", { class: "muted" }, notServed(one)) : null), h("dt", {}, "Code"), h("dd", {}, h("code", { title: code(one) }, short(code(one))))),
      capture(one.latest),
      device(this.store.devices.get(one.name)),
      h("h3", {}, "Latest messages"),
      h("ul", { class: "latest" }, Object.values(one.latest).sort((a, b) => b.at.localeCompare(a.at)).slice(0, 12).map((record) => h("li", {},
        h("button", { type: "button", class: "link", onclick: () => this.app.show(record) }, record.word.replaceAll("_", " ")), h("span", { class: "muted" }, ` ${ago(record.at)} `), clip(record.body.reason ?? "", 160)))),
      h("p", {}, h("a", { href: `#/events?client=${encodeURIComponent(one.name)}` }, "All its events")));
  }
}

const NAMES = { client: "Client manager", fl_client: "Training", inference: "Predictions" };

const COLUMNS = (page) => [
  { key: "name", title: "Client", sort: (row) => row.name, cell: (row) => h("strong", {}, row.name), class: "name" },
  { key: "task", title: "Task", sort: (row) => row.task, cell: (row) => row.task, class: "spare" },
  { key: "state", title: "State", sort: clientState, cell: (row) => badge(clientState(row)) },
  { key: "training", title: "Training", sort: (row) => row.fl_client?.body.target ?? "", cell: (row) => (row.fl_client ? badge(row.fl_client.body.target) : "–") },
  { key: "why", title: "Why it does not train", sort: (row) => why(page.store, row).text, cell: (row) => { const reason = why(page.store, row); return h("span", { class: `why ${reason.tone}`, title: clip(reason.text, 1000) }, clip(reason.text, 160) || "–"); }, class: "wide" },
  { key: "inference", title: "Predictions", sort: (row) => row.inference?.body.target ?? "", cell: (row) => (notServed(row) && !version(row) ? h("span", { class: "muted", title: clip(notServed(row), 1000) }, "not served") : row.inference ? badge(row.inference.body.target, row.inference.body.facts.endpoint) : "–"), class: "aside" },
  { key: "model", title: "Model", sort: (row) => version(row) ?? -1, cell: (row) => (version(row) ? `v${version(row)}` : "–"), class: "number aside" },
  { key: "code", title: "Code", sort: (row) => code(row), cell: (row) => h("code", { title: code(row) }, short(code(row))), class: "spare" },
  { key: "seen", title: "Last seen", sort: (row) => page.store.lastSeen.get(row.name) ?? "", cell: (row) => h("span", { class: late(page.store, row) ? "late" : null }, ago(page.store.lastSeen.get(row.name))), class: "seen" },
  { key: "resources", title: "Resources", sort: (row) => load(page.store, row)[0], cell: (row) => load(page.store, row)[1], class: "spare" },
];

const clientState = (one) => one.client?.body.target ?? "s0";
const version = (one) => one.inference?.body.facts.model?.version; // the model that answers, not one that is tried or was rejected
/** Why the version that the client has taken is not served; empty if it is. */
const notServed = (one) => one.inference?.body.facts.not_served || one.client?.body.facts.not_served || "";
const code = (one) => one.client?.body.facts.code_version ?? "";
const late = (store, one) => !(Date.now() - new Date(store.lastSeen.get(one.name) ?? 0) < LATE_S * 1000) && clientState(one) === "learning";

/** The load of the device: a number to sort by, and a text. */
function load(store, one) {
  const report = store.devices.get(one.name);
  if (!report) return [-1, "–"];
  const heat = report.temperature_c === null ? "" : ` · ${figure(report.temperature_c)} °C`;
  return [report.cpu, `${percent(report.cpu)} CPU · ${percent(report.memory)} memory${heat}`];
}

const percent = (share) => `${Math.round(share * 100)} %`;

/** A note if the device has paused data capture; it still trains, but without new data. */
function capture({ capture_paused: paused, capture_resumed: resumed }) {
  if (!paused || resumed?.at > paused.at) return null;
  return h("p", { class: "note wait" }, `Data capture paused since ${clock(paused.at)}: ${clip(shown(paused.body.reason), 300)}`);
}

/** The last report of the device, for the details. */
function device(report) {
  if (!report) return null;
  const gpus = report.gpus.map((one) => `${clip(one.name, 40)} ${percent(one.utilization)}, ${bytes(one.memory_bytes)}`).join("; ");
  const down = Object.entries(report.agents).filter(([, runs]) => !runs).map(([name]) => name).join(", ");
  return [h("h3", {}, "Device"), h("dl", {}, [["CPU", percent(report.cpu)], ["Memory", percent(report.memory)], ["Disk", percent(report.disk)], ["Temperature", report.temperature_c === null ? "" : `${figure(report.temperature_c)} °C`], ["GPU", gpus], ["Not running", down], ["Last error", report.last_error]]
    .filter(([, value]) => value).flatMap(([name, value]) => [h("dt", {}, name), h("dd", {}, clip(value, 300))]))];
}

/** Messages that are a reason: the name, the label, the tone, and the message that ends the reason. */
const REASONS = [["declined", "Declined", "wait"], ["fail_train", "Failed", "bad"], ["code_refused", "Rejected the code", "bad", "code_ready"]];

/** Why *one* does not train: the newest reason that it published, else what it waits for. */
export function why(store, one) {
  const state = clientState(one);
  if (["pending", "training"].includes(one.fl_client?.body.target)) return { text: "", tone: "none" };
  if (state === "terminated") return { text: `Terminated: ${shown(one.client.body.reason)}`, tone: "bad" };
  if (state === "s0") return { text: "Starting: waits for the server and the model repository", tone: "wait" };
  const open = store.openRun(one.task);
  const reasons = REASONS.map(([word, name, tone, over]) => ({ record: one.latest[word], name, tone, over: one.latest[over] }))
    .filter(({ record, over }) => record && !(one.latest.joined?.at > record.at) && !(over?.at > record.at))
    .sort((a, b) => b.record.at.localeCompare(a.record.at));
  if (reasons.length) {
    const { record, name, tone } = reasons[0];
    return { text: `${name}${record.body.run ? ` ${record.body.run}` : ""}: ${shown(record.body.reason)}`, tone: open?.body.facts.run === record.body.run || !record.body.run ? tone : "none" };
  }
  if (state === "syncing") return { text: "Fetching the task's code", tone: "wait" };
  if (state === "pending_application") return { text: "Applying a new model", tone: "wait" };
  if (!open || FINAL_STATES.has(open.body.target)) return { text: "No run in progress", tone: "none" };
  return { text: `Has not joined ${open.body.facts.run} yet`, tone: "wait" };
}

function tile(name, value, below, tone = "none") {
  return h("div", { class: `tile ${tone}` }, h("span", { class: "label" }, name), h("span", { class: "value" }, value), h("span", { class: "label" }, below));
}
