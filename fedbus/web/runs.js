// The Runs page: the state of a run, its timeline, and the results of its rounds.

import { h, heads, put, s } from "./dom.js";
import { FINAL_STATES } from "./store.js";
import { ago, badge, clip, clock, metric, score, short, shown, span, stateName, tone } from "./format.js";

const HINT = "Point at a bar for details, or move between bars with the arrow keys.";
const ROW = 26;
const MAX_LISTED = 500;
const LEFT = 132;
const LANES = new Set(["client", "fl_client", "inference", "server"]);

export class RunsPage {
  title = "Runs";

  constructor(store, app, [run = ""]) {
    this.store = store;
    this.app = app;
    this.run = run;
    this.spans = new Map();
    this.folded = new Set();
    this.list = h("ul", { class: "runlist", "aria-label": "Runs" });
    this.body = h("section", { class: "run", "aria-label": "Selected run" });
    this.facts = h("div");
    this.rounds = h("div");
    this.drawing = s("svg", { class: "gantt", role: "group" });
    this.drawing.addEventListener("keydown", (event) => this.pressed(event));
    this.scroll = h("div", { class: "scroll ganttbox", role: "region", "aria-label": "Timeline", onscroll: () => this.draw() }, this.drawing);
    this.ruler = s("svg", { class: "gantt ruler", "aria-hidden": "true", height: 24 });
    this.readout = h("p", { class: "readout" }, HINT);
    this.bars = h("div");
    this.table = h("details", { ontoggle: () => this.listBars() }, h("summary", {}, "Timeline as a table"), this.bars);
    put(this.body, this.facts, h("h2", {}, "Timeline"), LEGEND(), h("div", { class: "card flush" }, this.ruler, this.scroll), this.readout, this.table, h("h2", {}, "Rounds"), this.rounds);
    this.root = h("div", { class: "page" }, h("div", { class: "head" }, h("h1", {}, "Runs")), h("div", { class: "withlist" }, this.list, this.body));
    new ResizeObserver(() => this.draw()).observe(this.scroll);
    this.every = setInterval(() => !this.isFinal && this.draw(), 1000);
  }

  leave() {
    clearInterval(this.every);
  }

  update(change) {
    const runs = this.store.runList();
    const selected = this.run || runs[0]?.body.facts.run || "";
    put(this.list, runs.slice(0, 200).map((one) => h("li", {}, h("a", { href: `#/runs/${encodeURIComponent(one.body.facts.run)}`, "aria-current": one.body.facts.run === selected ? "true" : null },
      h("strong", {}, one.body.facts.run), badge(one.body.target), h("span", { class: "muted" }, `${roundsText(one.body.facts)} · ${ago(one.body.facts.requested_at)}`)))));
    if (runs.length && this.scrolledTo !== selected) {
      this.app.scrollToLink(this.list.querySelector("[aria-current]"), this.list);
      this.scrolledTo = selected;
    }
    const record = this.store.runs.get(selected);
    this.body.hidden = !record;
    if (!record) {
      put(this.list, h("li", { class: "blank" }, h("h2", {}, selected ? `No run ${clip(selected, 80)}` : "No run yet"), h("p", {}, "Start one with ", h("code", {}, "fedbus run start"), ", or give the task a schedule.")));
      return;
    }
    this.record = record;
    this.isFinal = FINAL_STATES.has(record.body.target);
    if (this.shownRun !== selected || change?.type === "reset") this.load(selected);
    else if (change?.type === "news") this.add(change.records);
    this.drawFacts(record);
    this.draw();
    this.listBars();
  }

  /** Load the messages of *run*. New ones that arrive meanwhile are added afterwards: the feed sends each once. */
  async load(run) {
    const loading = (this.loading = { run, news: [] });
    this.shownRun = run;
    this.spans.clear();
    this.folded.clear();
    this.readout.textContent = "Loading the timeline…";
    let past = [];
    let text = HINT;
    try {
      past = await this.store.get(`api/runs/${encodeURIComponent(run)}`);
    } catch (error) {
      text = `Timeline unavailable: ${error.message}`;
    }
    if (loading !== this.loading) return;
    this.loading = null;
    this.readout.textContent = text;
    this.add([...past, ...loading.news]);
    this.draw();
    this.listBars();
  }

  /** Add spans to the lanes; a state lasts until the next transition of the same entity. */
  add(records) {
    if (this.loading) return this.loading.news.push(...records);
    const facts = this.record.body.facts;
    for (const record of records) {
      const { body } = record;
      const key = `${record.s}${record.n}`;
      if (this.folded.has(key)) continue;
      this.folded.add(key);
      if (body.task !== facts.task || (this.isFinal && record.at > after(this.record.at, 60))) continue;
      if (record.word === "transition" && LANES.has(body.facts.kind)) this.moved(record);
      else if (record.word === "round_reply" && body.run === facts.run) {
        const begin = after(record.at, -(body.train_s || 0));
        const failed = body.error_code !== null && body.error_code !== undefined;
        this.lane(body.client).push({ n: `e${record.n}`, from: begin, to: record.at, layer: "work", tone: failed ? "bad" : "work", text: `${body.client}: round ${shown(body.round)}, ${failed ? `failed: ${body.error_reason}` : `trained for ${span(body.train_s)}`}` });
      }
    }
  }

  moved(record) {
    const { facts, target, reason } = record.body;
    const lane = this.lane(facts.client ?? "server");
    const layer = facts.kind;
    const last = lane.findLast((one) => one.layer === layer && one.to === null);
    if (last && last.at >= record.n) return;
    if (last) last.to = record.at;
    const quiet = (layer === "client" && target === "serving") || (layer === "fl_client" && target === "waiting") || (layer === "inference" && target === "serving") || (layer === "server" && target === "waiting");
    lane.push({ n: `l${record.n}`, at: record.n, from: record.at, to: null, layer, tone: quiet ? "quiet" : tone(target), text: `${facts.client ?? "server"}: ${layer === "server" ? "" : `${layer.replace("_", " ")} `}${stateName(target)}${reason ? ` (${clip(reason)})` : ""}` });
  }

  lane(name) {
    if (!this.spans.has(name)) this.spans.set(name, []);
    return this.spans.get(name);
  }

  // --- drawing ------------------------------------------------------------------------------------

  draw() {
    if (!this.record || this.body.hidden) return;
    const begin = this.begin;
    const end = Math.max(this.isFinal ? +new Date(after(this.record.at, 2)) : Date.now(), begin + 1000);
    const wide = Math.max(320, this.scroll.clientWidth - 2);
    const x = (when) => LEFT + ((Math.min(Math.max(+new Date(when), begin), end) - begin) / (end - begin)) * (wide - LEFT - 8);
    const moments = this.moments(begin, end, wide);
    const names = this.lanes();
    const high = names.length * ROW + 6;
    this.scroll.style.height = `${Math.min(520, Math.max(60, high + 4))}px`;
    this.drawing.setAttribute("width", wide);
    this.drawing.setAttribute("height", high);
    this.drawing.setAttribute("aria-label", `${names.length} lanes over ${span((end - begin) / 1000)}: left and right move along a lane, up and down between lanes`);
    const focused = this.drawing.contains(document.activeElement);
    const chosen = this.chosen(names);
    this.ruler.setAttribute("width", wide);
    put(this.ruler, this.times(begin, moments, x, wide));
    const first = Math.max(0, Math.floor(this.scroll.scrollTop / ROW) - 4);
    const last = Math.min(names.length, first + Math.ceil((this.scroll.clientHeight || 520) / ROW) + 8);
    put(this.drawing, moments.map((seconds) => s("line", { class: "grid", x1: x(begin + seconds * 1000), x2: x(begin + seconds * 1000), y1: 0, y2: high })), names.slice(first, last).map((name, at) => this.row(name, (first + at) * ROW, x, end, chosen)));
    if (focused) this.drawing.querySelector('[tabindex="0"]')?.focus({ preventScroll: true });
  }

  get begin() {
    return +new Date(this.record.body.facts.requested_at);
  }

  /** The lanes that have bars, the server first. */
  lanes() {
    const clients = [...this.spans.keys()].filter((one) => one !== "server").sort((a, b) => COLLATE.compare(a, b));
    return ["server", ...clients].filter((name) => this.barsOf(name).length);
  }

  /** The bars of a lane, in the order in which they begin. */
  barsOf(name) {
    return (this.spans.get(name) ?? []).filter((one) => this.hasBar(one, this.begin)).sort((a, b) => a.from.localeCompare(b.from));
  }

  // --- keyboard and screen reader --------------------------------------------------------------------

  /** The bar in the Tab order: the one that had the focus last, else the first. */
  chosen(names) {
    const lane = names.includes(this.at?.lane) ? this.at.lane : names[0];
    const bars = lane ? this.barsOf(lane) : [];
    const n = bars.some((one) => one.n === this.at?.n) ? this.at.n : bars[0]?.n;
    return (this.at = { lane, n });
  }

  pressed(event) {
    const names = this.lanes();
    const { lane, n } = this.chosen(names);
    const bars = this.barsOf(lane);
    const at = bars.findIndex((one) => one.n === n);
    const next = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: bars.length - 1 }[event.key];
    const down = { ArrowUp: -1, ArrowDown: 1 }[event.key];
    if (next === undefined && down === undefined) return;
    event.preventDefault();
    if (down) this.goTo(names, names[names.indexOf(lane) + down], bars[at]);
    else if (bars[next]) this.goTo(names, lane, bars[next]);
  }

  /** Move the focus to the bar of *lane* whose start is nearest to that of *previous*, and scroll to it. */
  goTo(names, lane, previous) {
    if (!lane) return;
    const near = (one) => Math.abs(new Date(one.from) - new Date(previous.from));
    const bar = this.barsOf(lane).reduce((best, one) => (near(one) < near(best) ? one : best));
    this.at = { lane, n: this.barsOf(lane).includes(previous) ? previous.n : bar.n };
    const top = names.indexOf(lane) * ROW;
    if (top < this.scroll.scrollTop) this.scroll.scrollTop = top;
    else if (top + ROW > this.scroll.scrollTop + this.scroll.clientHeight) this.scroll.scrollTop = top + ROW - this.scroll.clientHeight;
    this.draw();
    this.drawing.querySelector('[tabindex="0"]')?.focus({ preventScroll: true });
  }

  /** All bars as table rows, for screen readers; drawn only while it is open. */
  listBars() {
    if (!this.table.open || !this.record) return;
    const rows = this.lanes().flatMap((name) => this.barsOf(name).map((one) => [name, one]));
    put(this.bars, h("div", { class: "card flush scroll medium", tabindex: 0, role: "region", "aria-label": "Timeline as a table" }, h("table", {}, heads("Participant", "Activity", "Start", ["Duration", "number"]),
      h("tbody", {}, rows.slice(0, MAX_LISTED).map(([name, one]) => h("tr", {}, h("th", { scope: "row" }, clip(name, 64)), h("td", {}, clip(one.text.slice(name.length + 2), 300)), h("td", { class: "time" }, clock(one.from, true)), h("td", { class: "number" }, durationText(one))))))),
      rows.length > MAX_LISTED ? h("p", { class: "muted" }, `The first ${MAX_LISTED} of ${rows.length}.`) : null);
  }

  /** True if a span gets a bar: it shows an activity, and it ends after the run begins. */
  hasBar(one, begin) {
    return one.tone !== "quiet" && !(one.layer !== "work" && one.tone === "good") && (one.to === null || +new Date(one.to) > begin + 1);
  }

  row(name, top, x, end, chosen) {
    return s("g", {},
      s("text", { class: "lane", x: 10, y: top + 17 }, clip(name, 16)),
      s("line", { class: "grid", x1: LEFT, x2: "100%", y1: top + ROW - 0.5, y2: top + ROW - 0.5 }),
      this.barsOf(name).map((one) => {
        const from = x(one.from);
        const [y, high] = { work: [7, 11], fl_client: [4, 17], inference: [20, 4], server: [4, 17] }[one.layer] ?? [1, 3];
        const bar = s("rect", { class: `bar ${one.layer} ${one.tone}`, x: from, y: top + y, width: Math.max(1.5, x(one.to ?? new Date(end).toISOString()) - from), height: high, rx: Math.min(3, high / 2), role: "img", "aria-label": describe(one), tabindex: chosen.lane === name && chosen.n === one.n ? 0 : -1 }, s("title", {}, one.text));
        bar.addEventListener("pointerenter", () => (this.readout.textContent = describe(one)));
        bar.addEventListener("focus", () => {
          this.at = { lane: name, n: one.n };
          this.readout.textContent = describe(one);
        });
        return bar;
      }));
  }

  /** The ticks of the ruler, in seconds since the start: round numbers, and not too many. */
  moments(begin, end, wide) {
    const all = (end - begin) / 1000;
    const step = STEPS_S.find((one) => all / one <= (wide - LEFT) / 90) ?? STEPS_S.at(-1) * Math.ceil((90 * all) / (wide - LEFT) / STEPS_S.at(-1));
    return Array.from({ length: Math.floor(all / step) + 1 }, (_, at) => at * step);
  }

  times(begin, moments, x, wide) {
    return moments.map((seconds) => {
      const place = x(begin + seconds * 1000);
      return s("text", { class: "tick", x: seconds ? place : 10, y: 16, "text-anchor": !seconds ? "start" : place > wide - 22 ? "end" : "middle" }, seconds ? `+${elapsed(seconds)}` : `from ${clock(new Date(begin).toISOString())}`);
    });
  }

  drawFacts(record) {
    const { facts, target, reason } = record.body;
    const trace = this.app.traceLink(facts.trace_id);
    const took = (new Date(this.isFinal ? record.at : Date.now()) - new Date(facts.requested_at)) / 1000;
    put(this.facts,
      h("div", { class: "head" }, h("h2", { class: "named" }, facts.run, badge(target)), h("div", { class: "filters" }, trace,
        !this.isFinal && this.store.mayAct ? h("button", { type: "button", class: "danger", onclick: () => this.stop(facts) }, "Stop this run") : null)),
      reason ? h("p", { class: `note ${facts.promoted === false ? "wait" : tone(target)}` }, reason) : null,
      h("div", { class: "meter", role: "progressbar", "aria-valuemin": 0, "aria-valuemax": total(facts) || null, "aria-valuenow": total(facts) ? done(facts) : null, "aria-valuetext": roundsText(facts), "aria-label": "Rounds done" }, bar(total(facts) ? done(facts) / total(facts) : Number(this.isFinal))),
      h("dl", { class: "across" }, pair("Rounds", total(facts) ? `${done(facts)} of ${total(facts)}` : done(facts)), pair(this.isFinal ? "Duration" : "Elapsed", span(took)), pair("Clients", facts.cohort.length || "–"), pair("Quorum", facts.plan.quorum), pair("Aggregation", clip(aggregation(facts), 80)),
        pair("Trigger", clip(facts.trigger, 60)), pair("Code", short(facts.code_version)), pair("Model version", facts.model ? `v${facts.model.version}${facts.promoted === false ? ", not promoted" : ""}` : "–"), pair("Requested", clock(facts.requested_at))));
    const rounds = facts.rounds;
    const isPaced = rounds.some((one) => one.mode);
    put(this.rounds, rounds.length
      ? h("div", { class: "card flush scroll medium", tabindex: 0, role: "region", "aria-label": "Rounds" }, h("table", {}, heads("Round", ...["Loss", "Accuracy", "Duration", "Clients", ...(isPaced ? ["Updates", "Late", "Dropped"] : [])].map((name) => [name, "number"]), ...(isPaced ? ["Staleness"] : []), "Failed"),
        h("tbody", {}, rounds.map((one) => h("tr", {}, h("td", {}, one.round === 0 ? "initial" : one.round), h("td", { class: "number" }, score(metric(one, "loss"))), h("td", { class: "number" }, score(metric(one, "accuracy"))), h("td", { class: "number" }, one.round ? span(one.seconds) : "–"),
          h("td", { class: "number" }, Object.keys(one.participants).length || "–"), isPaced ? updateCells(one) : null, h("td", {}, clip(Object.entries(one.failures).map(([client, reason]) => `${client}: ${reason}`).join("; "), 200) || "–"))))))
      : h("p", { class: "muted" }, "No round has finished yet."));
    if (change(this, target)) this.app.speak(`run ${facts.run} is ${stateName(target)}`);
  }

  async stop(facts) {
    if (await this.app.confirm(`Stop ${facts.run}?`, "The result of its last round is not published.", "Stop it")) this.app.act("stop_run", { task: facts.task, run: facts.run });
  }
}

/** The mode of the finished rounds, and the keys that the run overrides. */
function aggregation(facts) {
  const { mode = "", ...others } = facts.plan.aggregation ?? {};
  return [facts.rounds.findLast((one) => one.mode)?.mode || mode || "sync", ...Object.entries(others).map(([key, value]) => `${key}=${value}`)].join(", ");
}

/** The cells of an aggregation: updates, late and dropped ones, and the staleness of those that are late. */
function updateCells(one) {
  const stale = Object.entries(one.staleness ?? {}).filter(([, staleness]) => staleness).map(([client, staleness]) => `${client} ${staleness}`).join(", ");
  return [one.updates, one.late_merged, one.late_dropped].map((count) => h("td", { class: "number" }, one.mode && count ? count : "–")).concat(h("td", {}, clip(stale, 120) || "–"));
}

const STEPS_S = [1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 43200, 86400];
const elapsed = (seconds) => (seconds < 60 ? `${seconds} s` : seconds < 3600 ? `${Math.floor(seconds / 60)}:${pad(seconds % 60)}` : `${Math.floor(seconds / 3600)}:${pad(Math.floor(seconds / 60) % 60)}:${pad(seconds % 60)}`);
const pad = (number) => String(number).padStart(2, "0");
const COLLATE = new Intl.Collator(undefined, { numeric: true });
const done = (facts) => facts.rounds.reduce((most, one) => Math.max(most, one.round), 0);
/** The number of rounds of a run; 0 if only the app knows it, or has another number than it declares. */
const total = (facts) => {
  if (facts.model && !facts.plan.rounds) return done(facts);
  const planned = facts.plan.rounds || facts.plan.app_rounds || 0;
  return done(facts) <= planned ? planned : 0;
};
const roundsText = (facts) => (total(facts) ? `${done(facts)} of ${total(facts)} rounds` : done(facts) === 1 ? "1 round" : `${done(facts)} rounds`);
const after = (iso, seconds) => new Date(+new Date(iso) + seconds * 1000).toISOString();
const durationText = (one) => (one.to ? span((new Date(one.to) - new Date(one.from)) / 1000) : "ongoing");
const describe = (one) => `${one.text}, ${clock(one.from, true)}, ${one.to ? `for ${durationText(one)}` : "ongoing"}`;
const pair = (name, value) => h("div", {}, h("dt", {}, name), h("dd", {}, String(value)));

function change(page, state) {
  const changed = page.lastState !== undefined && page.lastState !== state;
  page.lastState = state;
  return changed;
}

function bar(share) {
  const filled = h("span");
  filled.style.width = `${Math.min(100, Math.round(share * 100))}%`;
  return filled;
}

const LEGEND = () => h("ul", { class: "keys" }, [["wait", "preparing"], ["busy", "in the run"], ["work", "training"], ["bad", "failed"]].map(([name, label]) => h("li", {}, h("span", { class: `swatch ${name}`, "aria-hidden": "true" }), label)));
