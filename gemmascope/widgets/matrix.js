// A matrix on a canvas: one colour a cell, names at the edges, a cursor by mouse and keyboard.

import { clamp, range } from "./numbers.js";
import { context, h, hatching, onKeys } from "./parts.js";

const NAME = 11; // height of a name, in pixels
const MATRIX_GUTTER = 0.35; // the largest share of the width that names of rows take
const MATRIX_HEAD = 150; // the most pixels that names of columns take

/** `name` is what a screen reader calls it. `pick(row, column)` hears of clicks and keys, `peek(place or null)` of the
 * mouse; `others` are further keys. Show it with `show({ image, rows, columns, at, ... })`:
 *     image    a canvas of one pixel a cell (codeImage), clear where there is nothing: hatched here
 *     rows, columns    names, as many as there are cells
 *     at       { row, column } of the cursor; `sentence` is what a screen reader hears there
 *     gutter   pixels for the names of rows, `head` for those of columns; by default what the longest needs, up to a
 *              share of the width. Names are measured once, while `rows` and `columns` are the same lists
 *     square   whether cells are squares; else they fill the width
 *     most     the largest size of a cell
 *     room     pixels that it may fill; its own width by default */
export function matrix(v, { name, pick, peek = () => {}, others = {} }) {
  const canvas = h("canvas", { ariaHidden: "true" });
  const cursor = h("div", { className: "spoken", role: "gridcell", id: v.id(name, "cursor") });
  const el = h(
    "div",
    { className: "matrix", role: "grid", tabIndex: 0, ariaLabel: name, "aria-activedescendant": cursor.id },
    h("div", { role: "row" }, cursor),
    canvas,
  );
  let shown = null;
  let hover = null;
  let geometry = null;
  const measured = { rows: {}, columns: {} };

  /** Pixels that the longest of some names needs, the bold one at the cursor too. */
  function longest(side) {
    const texts = shown[side];
    if (measured[side].texts !== texts) {
      const ctx = canvas.getContext("2d");
      ctx.font = `bold ${NAME}px ${v.theme.mono}`;
      const widest = texts.reduce((most, text) => Math.max(most, ctx.measureText(text.slice(0, 200)).width), 0);
      measured[side] = { texts, pixels: Math.ceil(widest) + 11 };
    }
    return measured[side].pixels;
  }

  const move = (row, column) =>
    shown && pick(clamp(row, 0, shown.rows.length - 1), clamp(column, 0, shown.columns.length - 1));
  onKeys(el, (columns, rows) => move(shown?.at.row + rows, shown?.at.column + columns), others);
  function under(event) {
    if (!shown) return null; // what it shows has not come, and may never
    const box = canvas.getBoundingClientRect();
    const column = Math.floor((event.clientX - box.left - geometry.gutter) / geometry.width);
    const row = Math.floor((event.clientY - box.top - geometry.head) / geometry.height);
    const inside = row >= 0 && column >= 0 && row < shown.rows.length && column < shown.columns.length;
    return inside ? { row, column } : null;
  }
  canvas.addEventListener("click", (event) => under(event) && pick(under(event).row, under(event).column));
  for (const type of ["mousemove", "mouseleave"])
    canvas.addEventListener(type, (event) => {
      hover = type === "mousemove" ? under(event) : null;
      peek(hover);
      draw();
    });

  function draw() {
    if (!shown) return;
    const { image, rows, columns, square = false, most = 32, room = el.clientWidth } = shown;
    const { gutter = Math.min(longest("rows"), Math.round(room * MATRIX_GUTTER)) } = shown;
    const { head = Math.min(longest("columns"), MATRIX_HEAD) } = shown;
    const width = clamp(Math.max(1, room - gutter - 4) / columns.length, 0.25, most);
    const fit = width >= 1 ? Math.floor(width) : width; // whole pixels keep cells alike
    const height = square ? fit : clamp(20, 1, most);
    geometry = { gutter, head, width: fit, height };
    const [w, t] = [fit * columns.length, height * rows.length];
    const ctx = context(canvas, gutter + w + 4, head + t + 4);
    ctx.fillStyle = hatching(ctx, v.theme);
    ctx.fillRect(gutter, head, w, t);
    ctx.imageSmoothingEnabled = fit < 1;
    ctx.drawImage(image, gutter, head, w, t);
    const at = hover ?? shown.at;
    const names = (texts, size, chosen, across) => {
      const step = Math.ceil((NAME + 2) / size);
      const every = range(Math.ceil(texts.length / step)).map((i) => i * step);
      for (const i of [...every.filter((i) => Math.abs(i - chosen) >= step), chosen]) {
        ctx.save();
        ctx.translate(gutter - 5, head - 5);
        if (across) ctx.rotate(-Math.PI / 2);
        ctx.font = `${i === chosen ? "bold " : ""}${NAME}px ${v.theme.mono}`;
        ctx.fillStyle = i === chosen ? v.theme.ink : v.theme.muted;
        [ctx.textAlign, ctx.textBaseline] = [across ? "left" : "right", "middle"];
        ctx.fillText(fitted(ctx, texts[i], (across ? head : gutter) - 10), 0, (i + 0.5) * size + 5);
        ctx.restore();
      }
    };
    names(rows, height, at.row, false);
    names(columns, fit, at.column, true);
    ctx.strokeStyle = v.theme.line;
    ctx.strokeRect(gutter - 0.5, head - 0.5, w + 1, t + 1);
    ctx.strokeStyle = v.theme.ink;
    ctx.strokeRect(gutter - 0.5, head + shown.at.row * height - 0.5, w + 1, height + 1);
    ctx.lineWidth = 2;
    ctx.strokeRect(gutter + at.column * fit - 1, head + at.row * height - 1, fit + 2, height + 2);
  }
  return {
    el,
    canvas,
    show(next) {
      shown = next;
      [el.ariaRowCount, el.ariaColCount] = [shown.rows.length, shown.columns.length];
      cursor.textContent = shown.sentence;
      draw();
    },
  };
}

/** A text cut to a width. */
function fitted(ctx, text, width) {
  let cut = text.slice(0, 200); // a token may have any length
  if (ctx.measureText(cut).width <= width && cut === text) return cut;
  while (cut.length > 1 && ctx.measureText(`${cut}…`).width > width) cut = cut.slice(0, -1);
  return `${cut}…`;
}
