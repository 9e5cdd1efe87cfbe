// Curves as SVG, with the same numbers in a table below for screen readers.

import { h, heads, s } from "./dom.js";
import { figure, score } from "./format.js";

const WIDE = innerWidth < 700 ? 380 : 640;
const HIGH = innerWidth < 700 ? 240 : 280;
const LEFT = 54;
const RIGHT = 14;
const TOP = 14;
const BOTTOM = 36;

/** series: [{name, tone, points: [{x, y, label}]}]; gaps: [{x, label}] are drawn as dotted lines. */
export function chart({ title, series, xTitle, log = false, gaps = [], seriesTitle = "Run", none = "No round has reported this metric yet." }) {
  if (log) series = series.map((one) => ({ ...one, points: one.points.filter((point) => point.y > 0) }));
  const points = series.flatMap((one) => one.points);
  const readout = h("span", { class: "readout" }, " ");
  if (points.length === 0) return h("figure", { class: "chart" }, h("figcaption", {}, title), h("p", { class: "muted" }, none));
  const [x0, x1] = spread(points.map((one) => one.x), true);
  const scale = log ? Math.log10 : (value) => value;
  const [y0, y1] = spread(points.map((one) => scale(one.y)), false, log);
  const x = (value) => LEFT + ((value - x0) / (x1 - x0)) * (WIDE - LEFT - RIGHT);
  const y = (value) => HIGH - BOTTOM - ((scale(value) - y0) / (y1 - y0)) * (HIGH - TOP - BOTTOM);
  const drawing = s("svg", { viewBox: `0 0 ${WIDE} ${HIGH}`, role: "img", "aria-label": `${title}: ${series.length} curve${series.length === 1 ? "" : "s"}, ${points.length} points` });
  for (const tick of log ? powers(y0, y1) : ticks(y0, y1, 5)) {
    drawing.append(s("line", { class: "grid", x1: LEFT, x2: WIDE - RIGHT, y1: y(tick), y2: y(tick) }), s("text", { class: "tick", x: LEFT - 8, y: y(tick) + 4, "text-anchor": "end" }, figure(tick)));
  }
  for (const tick of ticks(x0, x1, 8).filter(Number.isInteger)) {
    drawing.append(s("text", { class: "tick", x: x(tick), y: HIGH - BOTTOM + 18, "text-anchor": "middle" }, String(tick)));
  }
  for (const gap of gaps) {
    drawing.append(s("line", { class: "joint", x1: x(gap.x), x2: x(gap.x), y1: TOP, y2: HIGH - BOTTOM }), s("text", { class: "tick", x: x(gap.x) + 4, y: TOP + 8 }, gap.label));
  }
  drawing.append(s("line", { class: "axis", x1: LEFT, x2: WIDE - RIGHT, y1: HIGH - BOTTOM, y2: HIGH - BOTTOM }), s("text", { class: "tick", x: (LEFT + WIDE - RIGHT) / 2, y: HIGH - 4, "text-anchor": "middle" }, xTitle));
  series.forEach((one) => {
    const path = one.points.map((point, at) => `${at ? "L" : "M"}${x(point.x).toFixed(1)} ${y(point.y).toFixed(1)}`).join("");
    drawing.append(s("path", { class: `curve t${one.tone}`, d: path }));
    if (one.points.length <= 40) for (const point of one.points) drawing.append(s("circle", { class: `dot t${one.tone}`, cx: x(point.x), cy: y(point.y), r: 3 }));
  });
  const mark = s("circle", { class: "mark", r: 6, visibility: "hidden" });
  drawing.append(mark);
  drawing.addEventListener("pointermove", (event) => {
    const box = drawing.getBoundingClientRect();
    const at = { x: ((event.clientX - box.left) / box.width) * WIDE, y: ((event.clientY - box.top) / box.height) * HIGH };
    let best = null;
    for (const one of series) for (const point of one.points) {
      const far = (x(point.x) - at.x) ** 2 + (y(point.y) - at.y) ** 2;
      if (!best || far < best.far) best = { far, one, point };
    }
    mark.setAttribute("visibility", "visible");
    mark.setAttribute("cx", x(best.point.x));
    mark.setAttribute("cy", y(best.point.y));
    readout.textContent = `${best.one.name}, ${best.point.label}: ${score(best.point.y)}`;
  });
  const keys = h("ul", { class: "keys" }, series.map((one) => h("li", {}, h("span", { class: `swatch t${one.tone}`, "aria-hidden": "true" }), one.name)));
  const table = h("details", {}, h("summary", {}, `${title} as a table`), h("div", { class: "scroll short", tabindex: 0, role: "region", "aria-label": `${title}, as a table` }, h("table", {}, heads(seriesTitle, "Round", [title, "number"]),
    h("tbody", {}, series.flatMap((one) => one.points.map((point) => h("tr", {}, h("td", {}, one.name), h("td", {}, point.label), h("td", { class: "number" }, score(point.y)))))))));
  return h("figure", { class: "chart" }, h("figcaption", {}, log ? `${title}, logarithmic` : title, readout), drawing, keys, table);
}

/** The range of *values* with a margin; it starts at zero or above if no value is negative. */
function spread(values, exact, log = false) {
  let low = Infinity;
  let high = -Infinity;
  for (const value of values) {
    low = Math.min(low, value);
    high = Math.max(high, value);
  }
  const room = (high - low || Math.abs(high) || 1) * (exact ? 0 : 0.08);
  if (high === low && exact) return [low - 0.5, high + 0.5];
  return [low >= 0 && !exact && !log ? Math.max(0, low - room) : low - room, high + room];
}

/** Ticks of a logarithmic scale from *low* to *high*: the more powers of ten, the fewer ticks for each. */
function powers(low, high) {
  const steps = high - low > 3 ? [1] : high - low > 1 ? [1, 2, 5] : [1, 2, 3, 4, 6, 8];
  const all = [];
  for (let power = Math.floor(low); power <= high; power++) all.push(...steps.map((step) => +(step * 10 ** power).toPrecision(3)));
  const inside = all.filter((tick) => Math.log10(tick) >= low && Math.log10(tick) <= high);
  return inside.length > 1 ? inside : ticks(10 ** low, 10 ** high, 5);
}

function ticks(low, high, count) {
  const raw = (high - low) / count;
  const size = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((one) => one * size).find((one) => one >= raw * 0.75);
  const values = [];
  for (let at = Math.ceil(low / step) * step; at <= high + 1e-12; at += step) values.push(+at.toPrecision(12));
  return values;
}
