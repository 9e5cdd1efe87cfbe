// Elements, made of data and never of markup: whatever a message says becomes text.

const SVG = "http://www.w3.org/2000/svg";

/** An element with properties and children; `on…` listen, `class` and the rest are attributes. */
export function h(tag, props = {}, ...children) {
  return fill(document.createElement(tag), props, children);
}

/** The same for drawings. */
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

/** Put *children* in the place of what *node* holds; what has the focus, is scrolled or open there, still is afterwards. */
export function put(node, ...children) {
  const here = document.activeElement;
  const focused = here !== node && node.contains(here) ? mark(here) : "";
  const held = [...node.querySelectorAll("[role=region], details")].filter((one) => one.open || one.scrollTop || one.scrollLeft).map((one) => [mark(one), one.scrollTop, one.scrollLeft]);
  node.replaceChildren(...children.flat(Infinity).filter((one) => one !== null && one !== undefined && one !== false));
  for (const [name, top, left] of held) {
    const one = [...node.querySelectorAll("[role=region], details")].find((other) => mark(other) === name);
    if (one?.tagName === "DETAILS") one.open = true;
    else if (one) Object.assign(one, { scrollTop: top, scrollLeft: left });
  }
  if (focused && here !== document.activeElement) (node.contains(here) ? here : [...node.querySelectorAll(here.tagName)].find((other) => mark(other) === focused))?.focus({ preventScroll: true });
  return node;
}

/** By what an element is known again when it was made anew; nothing where it has no name. */
function mark(one) {
  const name = one.getAttribute("href") ?? one.getAttribute("aria-label") ?? (one.tagName === "DETAILS" ? one.firstElementChild : one).textContent;
  return name && `${one.tagName} ${name}`;
}

/** The head of a table: each title with the class of its column, so that figures stand below theirs. */
export function heads(...titles) {
  return h("thead", {}, h("tr", {}, titles.map((one) => [one].flat()).map(([title, kind]) => h("th", { scope: "col", class: kind }, title))));
}

/** While a button of the mouse or the space bar is down nothing is drawn anew: what it went down on must still be there when it comes up. */
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

/** Run *work* once in the next frame, however often it is asked for; hidden pages wait. */
export function inFrame(work) {
  let asked = false;
  const run = () => {
    if (pressed) return waiting.add(run);
    asked = false;
    work();
  };
  return () => {
    if (asked) return;
    asked = true;
    requestAnimationFrame(run);
  };
}
