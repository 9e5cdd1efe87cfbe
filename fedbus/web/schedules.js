// When runs begin by themselves, and a way to begin one now.

import { h, put } from "./dom.js";
import { ago, badge, clip, clock, shown, stateName } from "./words.js";

export class SchedulesPage {
  title = "Schedules";

  constructor(store, app) {
    this.store = store;
    this.app = app;
    this.cards = h("div", { class: "cards" });
    this.root = h("div", { class: "page" }, h("div", { class: "head" }, h("h1", {}, "Schedules")), this.cards);
    this.forms = new Map();
  }

  leave() {}

  update(change) {
    if (change?.type === "heard") return;
    const tasks = this.store.tasks();
    put(this.cards, tasks.length ? tasks.map((task) => this.card(task)) : h("div", { class: "blank" }, h("h2", {}, "No task yet"), h("p", {}, "A task's schedule stands in its ", h("code", {}, "pyproject.toml"), ", under ", h("code", {}, "[tool.fedbus.schedule]"), ".")));
  }

  card(task) {
    const record = this.store.schedules.get(task);
    const facts = record?.body.facts;
    const runs = this.store.runList().filter((one) => one.body.task === task);
    const begun = new Map();
    for (const one of runs) begun.set(one.body.facts.trigger, (begun.get(one.body.facts.trigger) ?? 0) + 1);
    const open = this.store.openRun(task);
    return h("article", { class: "card" },
      h("div", { class: "head" }, h("h2", {}, task), record ? badge(record.body.target) : null),
      facts ? h("dl", { class: "across" }, pair("Due to", clip(facts.cause || "–", 200)), pair("Due since", facts.due_since ? clock(facts.due_since) : "–"), pair("Started so far", facts.started), pair("Last run", facts.run ?? "–"), pair("Counts since", clock(facts.since)), pair("Scheduler", facts.holder || "–")) : h("p", { class: "muted" }, "The scheduler has told of no schedule: runs begin when somebody asks, or as the server was started with."),
      record?.body.waits_for ? h("p", { class: "note wait" }, `Waits for ${record.body.waits_for}`) : null,
      h("h3", {}, "What began its runs"),
      begun.size ? h("ul", { class: "said" }, [...begun].sort((a, b) => b[1] - a[1]).map(([trigger, count]) => h("li", {}, h("strong", {}, clip(trigger, 80)), ` ${count} ${count === 1 ? "run" : "runs"}`))) : h("p", { class: "muted" }, "None was begun yet."),
      h("h3", {}, "Newest runs"),
      h("ul", { class: "said" }, runs.slice(0, 5).map((one) => h("li", {}, h("a", { href: `#/runs/${encodeURIComponent(one.body.facts.run)}` }, one.body.facts.run), " ", badge(one.body.target), h("span", { class: "muted" }, ` ${ago(one.body.facts.requested_at)}, by ${clip(one.body.facts.trigger, 60)}`)))),
      this.start(task, open));
  }

  /** The form outlives redraws, so that nobody is typed away. */
  start(task, open) {
    if (!this.store.about.acts) return h("p", { class: "muted" }, "This dashboard only shows. Start a run with ", h("code", {}, "fedbus run start"), ".");
    if (!this.store.mayAct) return h("p", {}, h("button", { type: "button", onclick: () => this.app.askToken() }, "Unlock actions"));
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

const pair = (name, value) => h("div", {}, h("dt", {}, name), h("dd", {}, String(shown(value))));
