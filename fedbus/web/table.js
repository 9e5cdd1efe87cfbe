// A table that draws only the visible rows, so that a thousand rows cost as much as thirty.

import { h, put, inFrame } from "./dom.js";

const ABOVE = 8;

/**
 * columns: {key, title, cell(row) → node or text, sort(row) → comparable, class}
 * options: caption, rowHeight, key(row), onpick(row), picked() → key, empty → node
 */
export class VirtualTable {
  constructor(columns, options) {
    this.columns = columns;
    this.options = { rowHeight: 40, ...options };
    this.rows = [];
    this.by = options.by ?? null;
    this.down = options.down ?? false;
    this.draw = inFrame(() => this.drawNow());
    this.head = h("tr", { "aria-rowindex": 1 });
    this.body = h("tbody");
    this.table = h("table", { class: "rows" }, h("caption", { class: "unseen" }, options.caption), h("thead", {}, this.head), this.body);
    this.node = h("div", { class: `scroll ${options.class ?? ""}`, tabindex: 0, role: "region", "aria-label": options.caption, onscroll: this.draw }, this.table);
    this.blank = h("div", { class: "blank", hidden: true });
    this.root = h("div", { class: "tablebox" }, this.node, this.blank);
    new ResizeObserver(this.draw).observe(this.node);
    if (options.onpick) this.body.addEventListener("focusin", ({ target }) => this.setTabRow(target.closest("tr")));
    this.drawHead();
  }

  drawHead() {
    put(this.head, this.columns.map((column) => {
      const sorted = this.by === column.key ? (this.down ? "descending" : "ascending") : null;
      const label = column.sort
        ? h("button", { type: "button", onclick: () => this.sortBy(column.key) }, column.title, h("span", { class: "arrow", "aria-hidden": "true" }, sorted ? (this.down ? "▾" : "▴") : ""))
        : column.title;
      return h("th", { scope: "col", class: column.class, "aria-sort": sorted }, label);
    }));
  }

  sortBy(key) {
    this.down = this.by === key ? !this.down : false;
    this.by = key;
    this.drawHead();
    this.head.querySelector("[aria-sort] button")?.focus();
    this.update(this.rows);
  }

  update(rows) {
    const column = this.columns.find((one) => one.key === this.by);
    this.rows = column?.sort ? sorted(rows, column.sort, this.down) : rows;
    this.draw();
  }

  drawNow() {
    const { rowHeight, key, onpick, picked, empty } = this.options;
    const count = this.rows.length;
    this.blank.hidden = count > 0;
    this.node.hidden = count === 0;
    if (count === 0) {
      put(this.blank, empty());
      return;
    }
    const first = Math.max(0, Math.floor(this.node.scrollTop / rowHeight) - ABOVE);
    const last = Math.min(count, first + Math.ceil((this.node.clientHeight || 600) / rowHeight) + 2 * ABOVE);
    const focused = this.focused();
    const chosen = picked?.();
    if (focused) this.at = focused.key;
    const entry = this.entry(first, last);
    this.table.setAttribute("aria-rowcount", count + 1);
    put(
      this.body,
      this.gap(first * rowHeight),
      this.rows.slice(first, last).map((row, at) => {
        const name = key(row);
        const line = h("tr", { "aria-rowindex": first + at + 2, "data-key": name, class: onpick ? "pick" : null, "aria-selected": onpick ? String(name === chosen) : null },
          this.columns.map((column) => h("td", { class: column.class, "data-title": column.title }, column.cell(row))));
        if (onpick) {
          line.tabIndex = row === entry ? 0 : -1;
          line.onclick = () => onpick(row);
          line.onkeydown = (event) => this.pressed(event, row);
        }
        return line;
      }),
      this.gap((count - last) * rowHeight),
    );
    if (focused) this.focus(focused);
  }

  /** The row in the Tab order: the one that had the focus last, else the first visible row. Arrow keys start there. */
  entry(first, last) {
    const drawn = this.rows.slice(first, last);
    return drawn.find((row) => this.options.key(row) === this.at) ?? this.rows[Math.min(this.rows.length - 1, Math.ceil(this.node.scrollTop / this.options.rowHeight))];
  }

  /** Put *line* in the Tab order at once, and not only with the next frame: Tab must leave the table from there. */
  setTabRow(line) {
    for (const one of this.body.rows) if (one.dataset.key) one.tabIndex = one === line ? 0 : -1;
    this.at = line.dataset.key;
  }

  /** The row that has the focus, and the index of the focused control in it. */
  focused() {
    const line = this.body.contains(document.activeElement) && document.activeElement.closest("tr");
    return line ? { key: line.dataset.key, at: focusable(line).indexOf(document.activeElement) } : null;
  }

  /** Restore the focus; the table gets it if the row is no longer visible. */
  focus({ key, at }) {
    const line = [...this.body.rows].find((one) => one.dataset.key === key);
    (line ? focusable(line)[at] : this.node)?.focus({ preventScroll: true });
  }

  pressed(event, row) {
    const to = { ArrowDown: "nextElementSibling", ArrowUp: "previousElementSibling" }[event.key];
    const end = { Home: 0, End: this.rows.length - 1 }[event.key];
    if (to) {
      event.currentTarget[to]?.focus();
      event.preventDefault();
    } else if (end !== undefined) {
      this.node.scrollTop = end * this.options.rowHeight;
      this.drawNow();
      this.focus({ key: this.options.key(this.rows[end]), at: 0 });
      event.preventDefault();
    } else if (event.key === "Enter" || event.key === " ") {
      this.options.onpick(row);
      event.preventDefault();
    }
  }

  gap(height) {
    const cell = h("td", { colspan: this.columns.length });
    cell.style.height = `${height}px`;
    const row = h("tr", { class: "gap", "aria-hidden": "true" }, cell);
    row.hidden = height === 0;
    return row;
  }
}

const focusable = (line) => [line, ...line.querySelectorAll("a, button, input")];

const NUMBERS = new Intl.Collator(undefined, { numeric: true });

function sorted(rows, value, down) {
  const keyed = rows.map((row) => [value(row), row]);
  keyed.sort(([a], [b]) => (typeof a === "number" && typeof b === "number" ? a - b : NUMBERS.compare(a ?? "", b ?? "")));
  if (down) keyed.reverse();
  return keyed.map(([, row]) => row);
}
