// When runs begin by themselves: the rule, the next time, what is waited for; and a way to begin one now.

import { h, put } from "./dom.js";
import { ago, badge, clip, clock, shown, span, stateName, until } from "./words.js";

const OVERLAP = { skip: "is left out", queue: "waits for the end of that one", "cancel-running": "has that one stopped" };
const MISSED = { skip: "are let go", once: "are made up for by one run", all: "are each made up for" };

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
    put(this.cards, tasks.length ? tasks.map((task) => this.card(task)) : h("div", { class: "blank" }, h("h2", {}, "No task yet"), h("p", {}, "A task's schedule stands in its ", h("code", {}, "pyproject.toml"), ", under ", h("code", {}, "[tool.fedbus.schedule]"), ".")));
  }

  card(task) {
    const record = this.store.schedules.get(task);
    const runs = this.store.runList().filter((one) => one.body.task === task);
    const begun = new Map();
    for (const one of runs) begun.set(one.body.facts.trigger, (begun.get(one.body.facts.trigger) ?? 0) + 1);
    return h("article", { class: "card" },
      h("div", { class: "head" }, h("h2", {}, task), record ? badge(record.body.target) : null),
      h("div", { class: "columns" }, h("div", {}, record ? schedule(record) : h("p", { class: "muted" }, "No schedule: a run begins when somebody asks for one.")),
      h("div", {}, h("h3", {}, "What began its runs"),
      begun.size ? h("ul", { class: "said" }, [...begun].sort((a, b) => b[1] - a[1]).map(([trigger, count]) => h("li", {}, h("strong", {}, clip(trigger, 80)), ` ${count} ${count === 1 ? "run" : "runs"}`))) : h("p", { class: "muted" }, "None was begun yet."),
      h("h3", {}, "Newest runs"),
      runs.length ? h("ul", { class: "said" }, runs.slice(0, 5).map((one) => h("li", {}, h("a", { href: `#/runs/${encodeURIComponent(one.body.facts.run)}` }, one.body.facts.run), " ", badge(one.body.target), h("span", { class: "muted" }, ` ${ago(one.body.facts.requested_at)}, by ${clip(one.body.facts.trigger, 60)}`)))) : h("p", { class: "muted" }, "None yet."),
      this.start(task, this.store.openRun(task)))));
  }

  /** The form outlives redraws, so that nobody is typed away. */
  start(task, open) {
    if (!this.store.about.acts) return h("p", { class: "muted" }, "This dashboard only shows. Start a run with ", h("code", {}, "fedbus run start"), ".");
    if (!this.store.mayAct) return h("p", { class: "muted" }, "To start a run now, ", h("button", { type: "button", class: "link", onclick: () => this.app.askToken() }, "unlock actions"));
    if (!this.forms.has(task)) {
      const rounds = h("input", { type: "number", min: 1, placeholder: "as the task says", "aria-label": "Rounds" });
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

/** What comes next, what the rule is, and what became of it so far. */
function schedule({ body }) {
  const { facts } = body;
  const { rule } = facts;
  return [
    next(body),
    rule ? [h("h3", {}, "The rule"), h("dl", {}, [["A run begins", h("code", {}, clip(rule.when, 400))], ["Times are of", rule.timezone], ["Not while", rule.quiet && h("code", {}, clip(rule.quiet, 200))], ["Waits for calm", rule.debounce_s ? `until devices have said nothing new for ${span(rule.debounce_s)}` : ""],
      ["While one runs", `the next one ${OVERLAP[rule.overlap] ?? rule.overlap}`], ["Missed moments", MISSED[rule.missed] ?? rule.missed], ["At most", rule.at_most ? `${rule.at_most} runs` : ""]].filter(([, value]) => value).flatMap(([name, value]) => [h("dt", {}, name), h("dd", {}, value)]))] : null,
    h("h3", {}, "So far"),
    h("dl", {}, [["Last begun", facts.fired_at ? `${facts.run}, ${clock(facts.fired_at)} (${ago(facts.fired_at)})` : facts.run ?? "none yet"], ["Because of", clip(facts.fired_for || "–", 300)], ["Begun in all", String(shown(facts.started))], ["Scheduler", facts.holder || "–"]].flatMap(([name, value]) => [h("dt", {}, name), h("dd", {}, value)])),
  ];
}

function next(body) {
  const { facts, target, reason, deadline } = body;
  if (target === "due") return h("div", { class: "note wait" }, h("strong", {}, deadline ? `A run begins ${until(deadline)}` : "A run is due"), `, because of ${clip(facts.cause || "the schedule", 300)}. `, reason && reason !== facts.cause ? `It is held back: ${clip(reason, 300)}.` : "");
  const done = facts.rule?.at_most && facts.started >= facts.rule.at_most;
  if (done) return h("div", { class: "note none" }, h("strong", {}, "No run begins any more"), `: all ${facts.rule.at_most} were begun.`);
  const awaits = facts.awaits.filter((one) => !facts.next_at || one !== facts.rule?.when);
  return h("div", { class: "note good" }, h("strong", {}, facts.next_at ? `The next run begins ${until(facts.next_at)}` : "The next run begins as soon as it happens"), awaits.length ? ["; it waits for", h("ul", { class: "plain" }, awaits.map((one) => h("li", {}, clip(one, 200))))] : "");
}
