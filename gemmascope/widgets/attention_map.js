// One large map on a canvas: as much of it as fits, zoomed and panned by mouse and keyboard, drawn from tiles of codes.

import { clamp, pixel } from "./numbers.js";
import { context, h, hatching, onKeys } from "./parts.js";

export const ATTENTION_TILE = 256; // cells along each side of a tile
const MAP_NAME = 11; // height of a name, in pixels
const MAP_GUTTER = 92; // room for names, left and above
const MAP_MARGIN = 38; // room for the numbers of one row, below, and of one column, to the right
const MAP_CELL = 32; // pixels of a cell, at most
const MAP_IMAGES = 256;

/** `pick(row, column)` hears of clicks and keys, `peek(place or null)` of the mouse, `moved(zoom)` of zooming and panning;
 * `others` are further keys. `show` takes
 *     key      what is shown, as a text: another one is another picture
 *     rows, columns    how many cells there are; square: whether they are squares
 *     rowName(i), columnName(i), at: { row, column }, sentence
 *     blocks   of each level, from fine to coarse: [rows, columns] of cells in one of its blocks
 *     tile(level, x, y)    { rows, columns, codes } where at hand, else null
 *     want(tiles)          hears which of [level, x, y] are looked at and not at hand
 *     coarse   { rows, columns, codes, block } to draw meanwhile, or null
 *     seen(row, column, [rows, columns])   whether a block has cells that are not out of sight
 *     colours  256 pixels; hasMissing: whether numbers are missing; drawn(block) hears in which blocks it is drawn
 *     across, down    numbers of the row and of the column `at`, or null; bar(x) is their length in -1..1; less, more:
 *              their colours */
export function attentionMap(v, { name, pick, peek, moved, others }) {
  const canvas = h("canvas", { ariaHidden: "true" });
  const cursor = h("div", { className: "spoken", role: "gridcell", id: v.id(name, "cursor") });
  const el = h(
    "div",
    { className: "map", role: "grid", tabIndex: 0, ariaLabel: name, "aria-activedescendant": cursor.id },
    h("div", { role: "row" }, cursor),
    canvas,
  );
  const images = new Map(); // the last to be used stands last
  let shown = null;
  let hover = null;
  let area = null; // { width, height, fit: how many cells are seen at first, along the axis that is zoomed }
  let zoom = null; // [row, column, cells] that are seen, or null: all

  function measure() {
    const room = Math.max(48, Math.min(el.clientWidth - MAP_GUTTER - MAP_MARGIN - 4, 760));
    const { rows, columns, square } = shown;
    // Whole pixels a block keep blocks alike, unless that leaves much of the room empty.
    const fitted = (count, space, most) => {
      const block = 2 ** Math.max(0, Math.ceil(Math.log2(count / space)));
      const alike = Math.round((count / block) * clamp(Math.floor(space / Math.ceil(count / block)), 1, most));
      return block > 1 && alike < 0.8 * space ? space : alike;
    };
    const width = fitted(columns, room, MAP_CELL);
    area = { width, height: square ? width : fitted(rows, 560, 20), fit: square ? columns : rows };
  }
  const least = () => clamp(Math.ceil((shown.square ? area.width : area.height) / MAP_CELL), 1, area.fit);
  function sight() {
    const [top, left, cells] = zoom ?? [0, 0, area.fit];
    const high = area.height / cells;
    return { top, left, cells, high, wide: shown.square ? high : area.width / shown.columns };
  }
  function look(top, left, cells) {
    const most = clamp(cells, least(), area.fit);
    const edge = (start) => clamp(start, 0, area.fit - most);
    zoom = most >= area.fit ? null : [edge(top), shown.square ? edge(left) : 0, most];
  }
  /** Zooms by a factor, with a place of the picture (in pixels from its corner) standing still. */
  function zoomAt(factor, x, y) {
    const { top, left, cells, high } = sight();
    const wanted = clamp(cells / factor, least(), area.fit);
    const still = 1 - wanted / cells;
    look(top + (y / high) * still, left + (x / high) * still, wanted);
    moved(zoom);
    draw();
  }
  function zoomHere(factor) {
    const { top, left, wide, high } = sight();
    const { row, column } = shown.at;
    const inside = (x, size) => clamp(x, 0, size);
    zoomAt(factor, inside((column + 0.5 - left) * wide, area.width), inside((row + 0.5 - top) * high, area.height));
  }
  function follow({ row, column }) {
    if (!zoom) return;
    const [top, left, cells] = zoom;
    const into = (start, i) => (i < start ? i : i + 1 > start + cells ? i + 1 - cells : start);
    look(into(top, row), into(left, column), cells);
  }

  // Keys and mouse.
  const zooming = { "+": () => zoomHere(2), "=": () => zoomHere(2), "-": () => zoomHere(0.5), 0: () => whole() };
  const whole = () => zoomHere(1 / shown.rows);
  const move = (row, column) => pick(clamp(row, 0, shown.rows - 1), clamp(column, 0, shown.columns - 1));
  onKeys(el, (columns, rows) => move(shown.at.row + rows, shown.at.column + columns), { ...zooming, ...others });
  const within = (event) => {
    const box = canvas.getBoundingClientRect();
    return [event.clientX - box.left - MAP_GUTTER, event.clientY - box.top - MAP_GUTTER];
  };
  function under(event) {
    const [x, y] = within(event);
    if (x < 0 || y < 0 || x >= area.width || y >= area.height) return null;
    const { top, left, wide, high } = sight();
    const [row, column] = [Math.floor(top + y / high), Math.floor(left + x / wide)];
    return row < shown.rows && column < shown.columns ? { row, column } : null;
  }
  let drag = null;
  canvas.addEventListener("pointerdown", (event) => {
    if (event.button || !under(event)) return;
    drag = { x: event.clientX, y: event.clientY, from: zoom, far: false };
    canvas.setPointerCapture(event.pointerId);
  });
  canvas.addEventListener("pointermove", (event) => {
    hover = under(event);
    if (drag) {
      const [x, y] = [event.clientX - drag.x, event.clientY - drag.y];
      drag.far ||= Math.hypot(x, y) > 3;
      if (drag.far && drag.from) {
        const { wide, high } = sight();
        look(drag.from[0] - y / high, drag.from[1] - x / wide, drag.from[2]);
      }
    }
    peek(hover);
    draw();
  });
  canvas.addEventListener("pointerup", (event) => {
    const ended = drag;
    drag = null;
    if (ended?.far) return ended.from && moved(zoom);
    const place = ended && under(event);
    if (place) pick(place.row, place.column);
  });
  canvas.addEventListener("pointercancel", () => (drag = null));
  canvas.addEventListener("pointerleave", () => {
    hover = null;
    peek(null);
    draw();
  });
  // The page scrolls as ever over a map that nobody works in.
  canvas.addEventListener(
    "wheel",
    (event) => {
      if (!el.contains(el.getRootNode().activeElement) && !event.ctrlKey) return;
      if (event.deltaY > 0 && !zoom) return;
      event.preventDefault();
      zoomAt(2 ** clamp(-event.deltaY / 150, -1, 1), ...within(event));
    },
    { passive: false },
  );

  // Drawing.
  function imageOf(level, x, y) {
    const id = `${shown.key} ${level} ${x} ${y}`;
    let image = images.get(id);
    if (!image) {
      const map = shown.tile(level, x, y);
      if (!map) return null;
      image = painted(map, shown.blocks[level], y * ATTENTION_TILE, x * ATTENTION_TILE);
    }
    images.delete(id);
    images.set(id, image);
    if (images.size > MAP_IMAGES) images.delete(images.keys().next().value);
    return image;
  }
  const painted = (map, block, top, left) =>
    attentionImage(map, shown.colours, v.theme.unseen, (r, c) => shown.seen(top + r, left + c, block));
  function drawTiles(ctx) {
    const { top, left, wide, high } = sight();
    const [bottom, right] = [
      Math.min(shown.rows, top + area.height / high),
      Math.min(shown.columns, left + area.width / wide),
    ];
    const put = (image, row, column, [r, c]) =>
      ctx.drawImage(
        image,
        MAP_GUTTER + (column - left) * wide,
        MAP_GUTTER + (row - top) * high,
        image.width * c * wide,
        image.height * r * high,
      );
    if (shown.coarse) {
      const id = `${shown.key} coarse ${shown.coarse.filled}`;
      if (!images.has(id)) images.set(id, painted(shown.coarse, [shown.coarse.block, shown.coarse.block], 0, 0));
      put(images.get(id), 0, 0, [shown.coarse.block, shown.coarse.block]);
    }
    const ratio = window.devicePixelRatio || 1;
    const fine = shown.blocks.findIndex(([r, c]) => r * high * ratio >= 0.999 && c * wide * ratio >= 0.999);
    const level = fine < 0 ? shown.blocks.length - 1 : fine;
    const missing = [];
    const cover = (at, each) => {
      const [r, c] = shown.blocks[at];
      const [tall, broad] = [ATTENTION_TILE * r, ATTENTION_TILE * c];
      for (let y = Math.floor(top / tall); y * tall < bottom; y++)
        for (let x = Math.floor(left / broad); x * broad < right; x++) {
          if (!shown.seen(y, x, [tall, broad])) each(null, y * tall, x * broad, [r, c], [at, x, y]);
          else each(imageOf(at, x, y), y * tall, x * broad, [r, c], [at, x, y]);
        }
    };
    // Coarser tiles below finer ones: whatever is at hand is seen until the rest comes.
    for (let at = shown.blocks.length - 1; at > level; at--)
      cover(at, (image, row, column, block) => image && put(image, row, column, block));
    cover(level, (image, row, column, block, tile) => {
      if (image) put(image, row, column, block);
      else if (shown.seen(tile[2], tile[1], [ATTENTION_TILE * block[0], ATTENTION_TILE * block[1]])) missing.push(tile);
    });
    shown.want(missing);
    shown.drawn(shown.blocks[level]);
  }
  function drawNames(ctx, first, size, count, extent, name, chosen, across) {
    const step = Math.max(1, Math.ceil((MAP_NAME + 2) / size));
    const end = Math.min(count, Math.ceil(first + extent / size));
    const put = (i) => {
      const along = (i + 0.5 - first) * size;
      if (along < 0 || along > extent) return;
      ctx.save();
      ctx.translate(MAP_GUTTER - 5, MAP_GUTTER - 5);
      if (across) ctx.rotate(-Math.PI / 2);
      ctx.font = `${i === chosen ? "bold " : ""}${MAP_NAME}px ${v.theme.mono}`;
      ctx.fillStyle = i === chosen ? v.theme.ink : v.theme.muted;
      [ctx.textAlign, ctx.textBaseline] = [across ? "left" : "right", "middle"];
      ctx.fillText(attentionFit(ctx, name(i), MAP_GUTTER - 12), 0, along + 5);
      ctx.restore();
    };
    // Every step-th name, and the chosen one at the cost of those it would run into.
    for (let i = Math.ceil(first / step) * step; i < end; i += step) if (Math.abs(i - chosen) >= step) put(i);
    if (chosen < count) put(chosen);
  }
  /** Numbers along one edge, a bar of the largest for each pixel. */
  function drawBars(ctx, numbers, first, size, extent, bar) {
    for (let x = 0; x < extent; x++) {
      const from = Math.floor(first + x / size);
      const to = Math.min(numbers.length, Math.max(from + 1, Math.floor(first + (x + 1) / size)));
      let most = 0;
      for (let i = from; i < to; i++) if (Math.abs(numbers[i]) > Math.abs(most)) most = numbers[i];
      if (most) bar(x, shown.bar(most));
    }
  }
  function draw() {
    if (!shown) return;
    const { width, height } = area;
    const ctx = context(canvas, MAP_GUTTER + width + MAP_MARGIN, MAP_GUTTER + height + MAP_MARGIN);
    const { top, left, wide, high } = sight();
    ctx.save();
    ctx.beginPath();
    ctx.rect(MAP_GUTTER, MAP_GUTTER, width, height);
    ctx.clip();
    ctx.fillStyle = v.theme.unseen;
    ctx.fillRect(MAP_GUTTER, MAP_GUTTER, width, height);
    if (shown.hasMissing) {
      ctx.fillStyle = hatching(ctx, v.theme);
      ctx.fillRect(MAP_GUTTER, MAP_GUTTER, width, height);
    }
    drawTiles(ctx);
    const at = hover ?? shown.at;
    [ctx.strokeStyle, ctx.fillStyle] = [v.theme.ink, v.theme.ink];
    const down = MAP_GUTTER + (shown.at.row - top) * high;
    ctx.globalAlpha = high < 4 ? 0.4 : 1;
    if (high < 4) ctx.fillRect(MAP_GUTTER, down, width, Math.max(1, high));
    else ctx.strokeRect(MAP_GUTTER - 0.5, down - 0.5, width + 1, high + 1);
    [ctx.globalAlpha, ctx.lineWidth] = [1, 2];
    const [x, y] = [MAP_GUTTER + (at.column - left) * wide, MAP_GUTTER + (at.row - top) * high];
    ctx.strokeRect(x - 1, y - 1, Math.max(wide, 4) + 2, Math.max(high, 4) + 2);
    ctx.restore();
    ctx.strokeStyle = v.theme.line;
    ctx.strokeRect(MAP_GUTTER - 0.5, MAP_GUTTER - 0.5, width + 1, height + 1);
    drawNames(ctx, top, high, shown.rows, height, shown.rowName, at.row, false);
    drawNames(ctx, left, wide, shown.columns, width, shown.columnName, at.column, true);
    const long = MAP_MARGIN - 8;
    const fill = (x) => (ctx.fillStyle = x < 0 ? shown.less : shown.more);
    if (shown.across)
      drawBars(ctx, shown.across, left, wide, width, (x, size) => {
        fill(size);
        ctx.fillRect(MAP_GUTTER + x, MAP_GUTTER + height + 4, 1, Math.max(1, Math.abs(size) * long));
      });
    if (shown.down)
      drawBars(ctx, shown.down, top, high, height, (y, size) => {
        fill(size);
        ctx.fillRect(MAP_GUTTER + width + 4, MAP_GUTTER + y, Math.max(1, Math.abs(size) * long), 1);
      });
  }
  return {
    el,
    canvas,
    draw,
    zoomHere,
    whole,
    /** Forgets what is drawn in other colours. */
    reset: () => images.clear(),
    look: (place) => (zoom = place),
    show(next) {
      const moved = shown && (shown.at.row !== next.at.row || shown.at.column !== next.at.column);
      shown = next;
      measure();
      if (zoom) look(...zoom);
      if (moved) follow(shown.at);
      [el.ariaRowCount, el.ariaColCount] = [String(shown.rows), String(shown.columns)];
      cursor.textContent = shown.sentence;
      draw();
    },
  };
}

/** Codes as a picture of one pixel a cell: `unseen` where `seen` says so, clear where a number is missing. */
export function attentionImage({ rows, columns, codes, filled = rows }, colours, unseen, seen) {
  const hidden = pixel(unseen.match(/[0-9a-f]{2}/gi).map((part) => parseInt(part, 16)));
  const image = new ImageData(columns, rows);
  const pixels = new Uint32Array(image.data.buffer);
  for (let r = 0, i = 0; r < filled; r++)
    for (let c = 0; c < columns; c++, i++) pixels[i] = seen(r, c) ? colours[codes[i]] : hidden;
  const canvas = h("canvas", { width: columns, height: rows });
  canvas.getContext("2d").putImageData(image, 0, 0);
  return canvas;
}

/** A text cut to a width. */
function attentionFit(ctx, text, width) {
  if (text.length < 60 && ctx.measureText(text).width <= width) return text;
  let cut = text.slice(0, 30); // a token may have any length
  while (cut.length > 1 && ctx.measureText(`${cut}…`).width > width) cut = cut.slice(0, -1);
  return `${cut}…`;
}
