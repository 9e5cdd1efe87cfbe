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

/** Put *children* in the place of what *node* holds; what is kept, keeps the focus. */
export function put(node, ...children) {
  const here = document.activeElement;
  node.replaceChildren(...children.flat(Infinity).filter((one) => one !== null && one !== undefined && one !== false));
  if (here !== document.activeElement && node.contains(here)) here.focus({ preventScroll: true });
  return node;
}

/** Run *work* once in the next frame, however often it is asked for; hidden pages wait. */
export function inFrame(work) {
  let asked = false;
  return () => {
    if (asked) return;
    asked = true;
    requestAnimationFrame(() => {
      asked = false;
      work();
    });
  };
}
