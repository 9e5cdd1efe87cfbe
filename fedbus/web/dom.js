// Elements built from data, never from markup: the content of a message becomes text.

const SVG = "http://www.w3.org/2000/svg";

/** Create an HTML element. Properties `on…` are listeners, all others are attributes. */
export function h(tag, props = {}, ...children) {
  return fill(document.createElement(tag), props, children);
}

/** Create an SVG element. */
export function s(tag, props = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), props, children);
}

function fill(node, props, children) {
  for (const [name, value] of Object.entries(props ?? {})) {
    if (value === false || value === null || value === undefined) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "value" || name === "checked" || name === "selected") node[name] = value;
    else node.setAttribute(name, value === true ? "" : String(value));
  }
  node.append(...children.flat(Infinity).filter((one) => one !== null && one !== undefined && one !== false));
  return node;
}

/** Replace the children of *node*; focus, scroll positions and open details are preserved. */
export function put(node, ...children) {
  const here = document.activeElement;
  const focused = here !== node && node.contains(here) ? mark(here) : "";
  const saved = [...node.querySelectorAll("[role=region], details")].filter((one) => one.open || one.scrollTop || one.scrollLeft).map((one) => [mark(one), one.scrollTop, one.scrollLeft]);
  node.replaceChildren(...children.flat(Infinity).filter((one) => one !== null && one !== undefined && one !== false));
  for (const [name, top, left] of saved) {
    const one = [...node.querySelectorAll("[role=region], details")].find((other) => mark(other) === name);
    if (one?.tagName === "DETAILS") one.open = true;
    else if (one) Object.assign(one, { scrollTop: top, scrollLeft: left });
  }
  if (focused && here !== document.activeElement) (node.contains(here) ? here : [...node.querySelectorAll(here.tagName)].find((other) => mark(other) === focused))?.focus({ preventScroll: true });
  return node;
}

/** The name that identifies an element after it was recreated; empty if it has none. */
function mark(one) {
  const name = one.getAttribute("href") ?? one.getAttribute("aria-label") ?? (one.tagName === "DETAILS" ? one.firstElementChild : one).textContent;
  return name && `${one.tagName} ${name}`;
}

/** The head of a table; each title has the class of its column, so that numbers are aligned. */
export function heads(...titles) {
  return h("thead", {}, h("tr", {}, titles.map((one) => [one].flat()).map(([title, kind]) => h("th", { scope: "col", class: kind }, title))));
}

/** Nothing is redrawn while a mouse button or the space bar is down: the pressed element must exist until the release. */
let pressed = false;
const waiting = new Set();
const press = (now) => {
  pressed = now;
  if (!now) setTimeout(() => pressed || [...waiting].forEach((work) => waiting.delete(work) && work()));
};
addEventListener("pointerdown", () => press(true), true);
for (const end of ["pointerup", "pointercancel"]) addEventListener(end, () => press(false), true);
for (const [event, now] of [["keydown", true], ["keyup", false]]) addEventListener(event, ({ key }) => key === " " && press(now), true);
addEventListener("blur", () => press(false));

/** Run *work* once in the next frame, no matter how often it is requested; hidden pages wait. */
export function inFrame(work) {
  let isRequested = false;
  const run = () => {
    if (pressed) return waiting.add(run);
    isRequested = false;
    work();
  };
  return () => {
    if (isRequested) return;
    isRequested = true;
    requestAnimationFrame(run);
  };
}
