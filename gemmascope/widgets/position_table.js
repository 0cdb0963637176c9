// A table with a column for each position, drawn only where the scroller stands.

import { clamp, range, shown } from "./numbers.js";
import { h, onKeys } from "./parts.js";

/** Rows down (layers, mostly), tokens across.
 * fill(cell, row, pos) draws a cell; mark(cell, row, pos) what depends on the selection; move(pos, row, target) selects;
 * peek({ pos, row } or {}) hears of the mouse. */
export function positionTable(v, { name, tokens, rowNames, rowHeight, cellWidth, fill, mark, move, peek }) {
  const n = tokens.length;
  const labelWidth = 68;
  const headHeight = 36;
  const row = (className, text) =>
    h("div", { className: `row ${className}`, role: "row" }, h("div", { className: "label", role: "rowheader" }, text));
  const head = row("head", "");
  const body = rowNames.map((text) => row("", text));
  const inner = h("div", { className: "inner", role: "presentation" }, head, ...body);
  const el = h(
    "div",
    {
      className: "table",
      role: "grid",
      tabIndex: 0,
      ariaLabel: name,
      ariaRowCount: body.length + 1,
      ariaColCount: n,
    },
    inner,
  );
  inner.style.setProperty("--row", `${rowHeight}px`);
  let [first, end] = [0, 0]; // the columns now drawn
  let width = cellWidth;
  let current = null;
  const place = (cell, pos) => {
    cell.style.left = `${labelWidth + pos * width}px`;
    cell.style.width = `${width}px`;
    cell.ariaColIndex = pos + 1;
    return cell;
  };
  const beyond = (from, to) => range(Math.max(0, to - from)).map((i) => from + i);
  function draw(force) {
    const a = Math.max(0, Math.floor(el.scrollLeft / width) - 4);
    const b = Math.min(n, Math.ceil((el.scrollLeft + el.clientWidth) / width) + 4);
    if (!force && a === first && b === end) return;
    const apart = force || b <= first || a >= end; // else what is drawn in both places stays
    const [before, after] = apart ? [beyond(a, b), []] : [beyond(a, first), beyond(end, b)];
    [first, end] = [a, b];
    const drawRow = (r, make) => {
      const cells = [...r.children].slice(1);
      for (const cell of cells) if (apart || cell.ariaColIndex <= a || cell.ariaColIndex > b) cell.remove();
      r.firstChild.after(...before.map(make));
      r.append(...after.map(make));
    };
    drawRow(head, (pos) =>
      place(
        h(
          "div",
          { className: "cell", role: "columnheader", title: shown(tokens[pos]) },
          h("small", {}, String(pos)),
          h("span", { dir: "auto" }, shown(tokens[pos])),
        ),
        pos,
      ),
    );
    body.forEach((r, i) =>
      drawRow(r, (pos) => {
        const cell = place(h("div", { className: "cell", role: "gridcell", id: v.id(name, i, pos) }), pos);
        [cell.dataset.row, cell.dataset.pos] = [i, pos];
        fill(cell, i, pos);
        return cell;
      }),
    );
    if (current) update();
  }
  function update() {
    for (const cell of head.querySelectorAll(".cell"))
      cell.classList.toggle("here", Number(cell.ariaColIndex) === current.pos + 1);
    body.forEach((r, i) => r.classList.toggle("here", i === current.row));
    for (const cell of inner.querySelectorAll("[role=gridcell]")) {
      const here = Number(cell.dataset.pos) === current.pos && Number(cell.dataset.row) === current.row;
      cell.ariaSelected = String(here);
      mark(cell, Number(cell.dataset.row), Number(cell.dataset.pos));
      if (here) el.setAttribute("aria-activedescendant", cell.id);
    }
  }
  el.addEventListener("scroll", () => draw(false), { passive: true });
  el.addEventListener("click", (event) => {
    const cell = event.target.closest("[role=gridcell], [role=columnheader]");
    if (cell) move(cell.ariaColIndex - 1, "row" in cell.dataset ? Number(cell.dataset.row) : current.row, event.target);
  });
  el.addEventListener("mouseover", (event) => {
    const cell = event.target.closest("[role=gridcell]");
    peek(cell ? { pos: Number(cell.dataset.pos), row: Number(cell.dataset.row) } : {});
  });
  el.addEventListener("mouseleave", () => peek({}));
  onKeys(el, (columns, rows) =>
    move(clamp(current.pos + columns, 0, n - 1), clamp(current.row + rows, 0, body.length - 1), el),
  );
  return {
    el,
    select(pos, rowIndex) {
      current = { pos, row: rowIndex };
      const left = pos * width;
      const room = el.clientWidth - labelWidth;
      if (left < el.scrollLeft) el.scrollLeft = left;
      else if (left + width > el.scrollLeft + room) el.scrollLeft = left + width - room;
      const top = rowIndex * rowHeight;
      const height = el.clientHeight - headHeight;
      if (top < el.scrollTop) el.scrollTop = top;
      else if (top + rowHeight > el.scrollTop + height) el.scrollTop = top + rowHeight - height;
      draw(false);
      update();
    },
    layout() {
      const room = el.clientWidth - labelWidth;
      const fit = clamp(Math.floor(room / cellWidth), 1, n);
      width = clamp(room / fit, cellWidth, Math.max(110, cellWidth * 2));
      inner.style.width = `${labelWidth + n * width}px`;
      draw(true);
    },
  };
}
