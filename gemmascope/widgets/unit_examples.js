// Texts around the places where a unit is most, or least, active, coloured by its activation; and how often it is how active.

import { number, range, shown } from "./numbers.js";
import { h, onKeys, paintOn, reveal, svg } from "./parts.js";

/** Rows of texts in one grid. `pick(row, pos)` hears of clicks and keys. */
export function unitExamples(v, pick) {
  const el = h("div", { className: "examples", role: "grid", tabIndex: 0, ariaLabel: "Examples" });
  let rows = []; // { key, text, first, at, tokens, values, cells }
  let chosen = { row: 0, pos: 0 };

  const end = (row) => row.first + row.tokens.length - 1;
  onKeys(el, (columns, lines) => {
    if (!rows.length) return;
    const last = rows.length - 1;
    if (lines) {
      const to = Math.min(Math.max(chosen.row + lines, 0), last);
      return pick(rows[to], rows[to].at);
    }
    const row = rows[chosen.row];
    pick(row, Math.min(Math.max(chosen.pos + columns, row.first), end(row)));
  });
  el.addEventListener("click", (event) => {
    const row = rows.find(({ line }) => line.contains(event.target));
    if (!row) return;
    const i = row.cells.indexOf(event.target.closest(".token"));
    pick(row, i < 0 ? row.at : row.first + i);
  });

  function lineOf(row, group, i) {
    const cells = row.tokens.map((text, j) =>
      h(
        "span",
        {
          className: "token",
          role: "gridcell",
          id: v.id("unit", group, i, j),
          title: `${shown(text)}, ${number(row.values[j])}`,
        },
        h("span", { className: "text", dir: "auto" }, shown(text)),
      ),
    );
    const peak = number(row.values[row.at - row.first]);
    const label = h(
      "span",
      { className: "peak", role: "rowheader", title: row.text === "own" ? "your text" : `text ${row.text}` },
      peak,
    );
    return {
      ...row,
      cells,
      line: h(
        "div",
        { className: "example", role: "row" },
        label,
        h("span", { className: "words", role: "presentation" }, ...cells),
      ),
    };
  }
  return {
    el,
    /** groups: [[title, rows]]; colour(value) is [r, g, b]. */
    show(groups, colour) {
      rows = groups.flatMap(([title, of]) => of.map((row, i) => lineOf(row, title, i)));
      let next = 0;
      const drawn = groups.flatMap(([title, of]) => {
        const lines = rows.slice(next, (next += of.length)).map(({ line }) => line);
        const name = h("h4", {}, title);
        return lines.length
          ? [
              h(
                "div",
                { role: "rowgroup" },
                h("div", { role: "row" }, h("span", { role: "columnheader" }, name)),
                ...lines,
              ),
            ]
          : [];
      });
      el.replaceChildren(...drawn);
      for (const { cells, values } of rows)
        cells.forEach((cell, j) => {
          const there = Number.isFinite(values[j]);
          cell.classList.toggle("missing", !there);
          if (there) paintOn(cell, colour(values[j]));
        });
    },
    /** Puts the cursor on a place, if it is shown. */
    stand(text, pos) {
      const row = rows.findIndex((one) => one.text === text && one.first <= pos && pos <= end(one));
      for (const cell of el.querySelectorAll("[aria-selected=true]")) cell.ariaSelected = "false";
      el.setAttribute("aria-activedescendant", "");
      if (row < 0) return;
      chosen = { row, pos };
      const cell = rows[row].cells[pos - rows[row].first];
      cell.ariaSelected = "true";
      el.setAttribute("aria-activedescendant", cell.id);
      reveal(el, cell);
    },
    rows: () => rows,
  };
}

/** How many tokens have which activation: bars of log counts from low to high, a mark at a value. */
export function unitHistogram({ counts, low, high, mark, label }) {
  const [width, height] = [420, 120];
  const [left, right, top, bottom] = [34, 414, 8, 100];
  const most = Math.max(1, ...counts);
  const end = high > low ? high : low + 1;
  const x = (value) => left + ((value - low) / (end - low)) * (right - left);
  const y = (count) => bottom - (Math.log10(1 + count) / Math.log10(1 + most)) * (bottom - top);
  const step = (right - left) / counts.length;
  const text = (value, x, y, anchor) => svg("text", { x, y, "text-anchor": anchor }, value);
  const decades = range(Math.floor(Math.log10(most)) + 1).map((power) => 10 ** power);
  const zero = low < 0 && high > 0 && x(0) > left + 40 && x(0) < right - 40;
  return svg(
    "svg",
    { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label },
    ...decades
      .slice(-3)
      .flatMap((count) => [
        svg("line", { class: "rule", x1: left, x2: right, y1: y(count), y2: y(count) }),
        text(count >= 10000 ? `1e${Math.log10(count)}` : String(count), left - 5, y(count) + 4, "end"),
      ]),
    ...[...counts].map((count, i) =>
      svg("rect", {
        class: "count",
        x: left + i * step,
        y: y(count),
        width: Math.max(step - 1, 0.5),
        height: bottom - y(count),
      }),
    ),
    svg("line", { class: "rule", x1: left, x2: right, y1: bottom, y2: bottom }),
    ...(Number.isFinite(mark) ? [svg("line", { class: "mark", x1: x(mark), x2: x(mark), y1: top, y2: bottom })] : []),
    text(number(low, 2), left, height - 4, "start"),
    ...(zero ? [text("0", x(0), height - 4, "middle")] : []),
    text(number(end, 2), right, height - 4, "end"),
  );
}
