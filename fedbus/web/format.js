// Text for times, sizes and states. A state has a colour and always its name.

import { h } from "./dom.js";

const TONES = {
  serving: "good", finished: "good", waiting: "good", steady: "good", watching: "good",
  learning: "busy", training: "busy", running: "busy", publishing: "busy",
  recruiting: "wait", recovering: "wait", pending: "wait", pending_application: "wait", updating: "wait",
  syncing: "wait", rolling: "wait", due: "wait", requested: "wait", model_init: "wait",
  failed: "bad", terminated: "bad",
};

const NAMES = { s0: "starting", pending_application: "applying a model", model_init: "building a model" };

export const tone = (state) => TONES[state] ?? "none";
export const stateName = (state) => NAMES[state] ?? clip((state || "unknown").replaceAll("_", " "), 40);

/** A state as a badge. */
export function badge(state, title = "") {
  return h("span", { class: `badge ${tone(state)}`, title: title || null }, stateName(state));
}

const two = (number) => String(number).padStart(2, "0");

/** The time of day, with milliseconds where *fine*. */
export function clock(iso, fine = false) {
  const at = new Date(iso);
  if (isNaN(at)) return "";
  const day = at.toDateString() === new Date().toDateString() ? "" : `${at.getFullYear()}-${two(at.getMonth() + 1)}-${two(at.getDate())} `;
  const text = `${day}${two(at.getHours())}:${two(at.getMinutes())}:${two(at.getSeconds())}`;
  return fine ? `${text}.${String(at.getMilliseconds()).padStart(3, "0")}` : text;
}

/** The time since *iso*. */
export function ago(iso) {
  const seconds = (Date.now() - new Date(iso)) / 1000;
  return isNaN(seconds) ? "never" : seconds < 2 ? "now" : `${span(seconds < 10 ? Math.floor(seconds) : seconds).replace(".0", "")} ago`;
}

/** A future time, and the time until then. */
export function until(iso) {
  const seconds = (new Date(iso) - Date.now()) / 1000;
  return seconds > 1 ? `at ${clock(iso)}, in ${span(Math.round(seconds)).replace(".0", "")}` : `at ${clock(iso)}`;
}

/** A duration. */
export function span(seconds) {
  if (seconds < 1) return `${Math.round(seconds * 1000)} ms`;
  if (seconds < 10) return `${seconds.toFixed(1)} s`;
  if (seconds < 90) return `${Math.round(seconds)} s`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min`;
  if (seconds < 129600) return `${Math.round(seconds / 3600)} h`;
  return `${Math.round(seconds / 86400)} d`;
}

export function bytes(count) {
  for (const unit of ["B", "kB", "MB", "GB"]) {
    if (count < 1000 || unit === "GB") return `${+count.toPrecision(3)} ${unit}`;
    count /= 1000;
  }
}

/** A loss or an accuracy with a fixed number of decimals, so that a column is aligned. */
export const score = (value) => (typeof value !== "number" ? value ?? "–" : value !== 0 && Math.abs(value) < 0.001 || Math.abs(value) >= 1000 ? figure(value) : value.toFixed(4));
export const figure = (value) => (typeof value === "number" ? String(+value.toPrecision(4)) : value ?? "–");
export const short = (version) => (!version ? "–" : version.startsWith("sha256:") ? version.slice(7, 15) : version.slice(0, 8));
export const shown = (value) => (value === null || value === undefined || value === "" ? "–" : value);
/** *text*, at most *length* characters; the rest is in the title and in the details. */
export const clip = (text, length = 200) => (String(text).length > length ? `${String(text).slice(0, length)}…` : String(text));

/** The loss or accuracy of a round: measured on the server, else by evaluation, else in training; as RoundResult does. */
export function metric(round, name) {
  for (const key of [name, `eval_${name}`, `train_${name}`]) {
    const value = round.metrics?.[key];
    if (typeof value === "number") return value;
  }
  return null;
}

/** The name of an agent, and its client. */
export function who(source) {
  const [, , agent = "", owner = ""] = String(source).split("/");
  return owner === "server" ? agent : `${agent} ${owner}`;
}

/** Fields that other columns show, or that only agents need; the details have them. */
const ELSEWHERE = new Set(["task", "run", "client", "round", "message_id", "reply_to", "created_at", "content", "ttl_s"]);

/** The data of a message in one line. */
export function gist(record) {
  const body = record.body;
  if (record.word === "transition") {
    const reason = body.reason ? `: ${body.reason}` : "";
    const kind = body.event === "store_unavailable" && body.facts.trouble ? ` (${body.facts.trouble})` : "";
    return `${body.source || "•"} → ${body.target} on ${body.event}${kind}${reason}`;
  }
  const parts = [];
  for (const [name, value] of Object.entries(body)) {
    if (ELSEWHERE.has(name) || value === null || value === "" || value === false || (typeof value === "object" && !Object.keys(value).length)) continue;
    parts.push(`${name}=${typeof value === "object" ? brief(value) : plainly(value)}`);
    if (parts.length > 8) break;
  }
  return clip(parts.join(" "), 300);
}

function brief(value) {
  if (Array.isArray(value)) return value.length > 4 ? `[${value.length}]` : value.map((one) => (typeof one === "object" ? "{…}" : one)).join(",");
  if (value.version && value.sha256) return `v${value.version}`;
  if (value.sha256) return value.sha256.slice(0, 8);
  const figures = Object.entries(value).filter(([, one]) => typeof one === "number").slice(0, 4);
  return `{${(figures.length ? figures.map(([name, one]) => `${name} ${figure(one)}`) : Object.keys(value).slice(0, 4)).join(", ")}}`;
}

/** One value: digests and commits shortened, times as time of day. */
function plainly(value) {
  if (typeof value !== "string") return figure(value);
  if (/^(sha256:)?[0-9a-f]{40,64}$/.test(value)) return short(value);
  return /^\d{4}-\d\d-\d\dT/.test(value) ? clock(value) || value : value;
}
