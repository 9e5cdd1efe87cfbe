// The Schedules page: the schedule of each task, the next run, what it waits for, and a form to start a run.

import { h, put } from "./dom.js";
import { ago, badge, clip, clock, shown, span, stateName, until } from "./format.js";

const OVERLAP = { skip: "is skipped", queue: "is queued", "cancel-running": "cancels the current run" };
const MISSED = { skip: "are skipped", once: "start one run", all: "start one run each" };

export class SchedulesPage {
  title = "Schedules";

  constructor(store, app) {
    this.store = store;
    this.app = app;
    this.cards = h("div", { class: "cards" });
    this.root = h("div", { class: "page" }, h("div", { class: "head" }, h("h1", {}, "Schedules")), this.cards);
    this.forms = new Map();
    this.every = setInterval(() => this.app.redraw(), 5000);
  }

  leave() {
    clearInterval(this.every);
  }

  update() {
    const tasks = this.store.tasks();
    put(this.cards, tasks.length ? tasks.map((task) => this.card(task)) : h("div", { class: "blank" }, h("h2", {}, "No task yet"), h("p", {}, "The schedule of a task is in its ", h("code", {}, "pyproject.toml"), ", under ", h("code", {}, "[tool.fedbus.schedule]"), ".")));
  }

  card(task) {
    const record = this.store.schedules.get(task);
    const runs = this.store.runList().filter((one) => one.body.task === task);
    const triggers = new Map();
    for (const one of runs) triggers.set(one.body.facts.trigger, (triggers.get(one.body.facts.trigger) ?? 0) + 1);
    return h("article", { class: "card" },
      h("div", { class: "head" }, h("h2", {}, task), record ? badge(record.body.target) : null),
      h("div", { class: "columns" }, h("div", {}, record ? schedule(record) : h("p", { class: "muted" }, "No schedule: runs start on request only.")),
      h("div", {}, h("h3", {}, "Triggers of its runs"),
      triggers.size ? h("ul", { class: "latest" }, [...triggers].sort((a, b) => b[1] - a[1]).map(([trigger, count]) => h("li", {}, h("strong", {}, clip(trigger, 80)), ` ${runCount(count)}`))) : h("p", { class: "muted" }, "No run yet."),
      h("h3", {}, "Newest runs"),
      runs.length ? h("ul", { class: "latest" }, runs.slice(0, 5).map((one) => h("li", {}, h("a", { href: `#/runs/${encodeURIComponent(one.body.facts.run)}` }, one.body.facts.run), " ", badge(one.body.target), h("span", { class: "muted" }, ` ${ago(one.body.facts.requested_at)}, by ${clip(one.body.facts.trigger, 60)}`)))) : h("p", { class: "muted" }, "No run yet."),
      this.start(task, this.store.openRun(task)))));
  }

  /** The form to start a run. The same form survives redraws, so that input is not lost. */
  start(task, open) {
    if (!this.store.about.acts) return h("p", { class: "muted" }, "This dashboard is read-only. Start a run with ", h("code", {}, "fedbus run start"), ".");
    if (!this.store.mayAct) return h("p", { class: "muted" }, "To start a run now, ", h("button", { type: "button", class: "link", onclick: () => this.app.askToken() }, "unlock actions"));
    if (!this.forms.has(task)) {
      const rounds = h("input", { type: "number", min: 1, placeholder: "task default", "aria-label": "Rounds" });
      const begin = h("button", { type: "submit", class: "primary" }, "Start a run");
      const form = h("form", { class: "filters", onsubmit: (event) => { event.preventDefault(); this.app.act("start_run", { task, rounds: rounds.value ? Number(rounds.value) : null, trigger: "dashboard" }); } }, h("label", {}, "Rounds ", rounds), begin);
      this.forms.set(task, { form, begin });
    }
    const { form, begin } = this.forms.get(task);
    begin.disabled = Boolean(open);
    begin.title = open ? `${open.body.facts.run} is ${stateName(open.body.target)}` : "";
    return form;
  }
}

const runCount = (count) => `${count} ${count === 1 ? "run" : "runs"}`;

/** The next run, the schedule, and its history. */
function schedule({ body }) {
  const { facts } = body;
  const { rule } = facts;
  return [
    next(body),
    rule ? [h("h3", {}, "Schedule"), h("dl", {}, [["When", h("code", {}, clip(rule.when, 400))], ["Time zone", rule.timezone], ["Quiet hours", rule.quiet && h("code", {}, clip(rule.quiet, 200))], ["Debounce", rule.debounce_s ? `no new event for ${span(rule.debounce_s)}` : ""],
      ["Overlap", `the next run ${OVERLAP[rule.overlap] ?? rule.overlap}`], ["Missed times", MISSED[rule.missed] ?? rule.missed], ["At most", rule.at_most ? runCount(rule.at_most) : ""]].filter(([, value]) => value).flatMap(([name, value]) => [h("dt", {}, name), h("dd", {}, value)]))] : null,
    h("h3", {}, "History"),
    h("dl", {}, [["Last run", facts.fired_at ? `${facts.run}, ${clock(facts.fired_at)} (${ago(facts.fired_at)})` : facts.run ?? "none yet"], ["Trigger", clip(facts.fired_for || "–", 300)], ["Runs started", String(shown(facts.started))], ["Scheduler", facts.holder || "–"]].flatMap(([name, value]) => [h("dt", {}, name), h("dd", {}, value)])),
  ];
}

function next(body) {
  const { facts, target, reason, deadline } = body;
  if (target === "due") return h("div", { class: "note wait" }, h("strong", {}, deadline ? `A run starts ${until(deadline)}` : "A run is due"), `; trigger: ${clip(facts.cause || "the schedule", 300)}. `, reason && reason !== facts.cause ? `Postponed: ${clip(reason, 300)}.` : "");
  const done = facts.rule?.at_most && facts.started >= facts.rule.at_most;
  if (done) return h("div", { class: "note none" }, h("strong", {}, "No further runs"), `: ${facts.rule.at_most} of ${facts.rule.at_most} started.`);
  const awaits = facts.awaits.filter((one) => !facts.next_at || one !== facts.rule?.when);
  return h("div", { class: "note good" }, h("strong", {}, facts.next_at ? `The next run starts ${until(facts.next_at)}` : "The next run starts when the trigger fires"), awaits.length ? ["; waiting for", h("ul", { class: "plain" }, awaits.map((one) => h("li", {}, clip(one, 200))))] : "");
}
