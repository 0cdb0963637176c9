// A waterfall on a canvas: from nothing through what every part adds to the total.

import { clamp, largest, number, range } from "./numbers.js";
import { context, h, hatching, onKeys } from "./parts.js";
import { signColours, signedNumber } from "./attribution_parts.js";

const [WATERFALL_LEFT, WATERFALL_TOP, WATERFALL_HEIGHT] = [52, 4, 220];
const LABEL = 18; // height of a number at a step
const WORD_ROOM = 38; // pixels that the name of a kind takes
const LETTERS = { embed: "E", attn: "A", mlp: "F", ple: "P", rest: "…", total: "=" };
const WORDS = { embed: "embed", attn: "attn", mlp: "ffn", ple: "ple", rest: "else", total: "total" };

/** Steps of a kind { kind, layer, value }; the last is the total. `pick(i)`, `peek(i or null)`; `others` are further keys. */
export function waterfall(v, { pick, peek, others }) {
  const canvas = h("canvas", { ariaHidden: "true" });
  const cursor = h("div", {
    className: "spoken",
    role: "option",
    ariaSelected: "true",
    id: v.id("waterfall", "cursor"),
  });
  const props = { className: "waterfall", role: "listbox", tabIndex: 0, ariaLabel: "Waterfall of components" };
  const el = h("div", { ...props, "aria-activedescendant": cursor.id }, cursor, canvas);
  let [steps, at, hover, slot] = [[], 0, null, 1];
  const move = (by) => pick(clamp(at + by, 0, steps.length - 1));
  onKeys(el, (columns, rows) => move(columns + rows), others);
  const under = (event) => {
    const i = Math.floor((event.clientX - canvas.getBoundingClientRect().left - WATERFALL_LEFT) / slot);
    return i >= 0 && i < steps.length ? i : null;
  };
  canvas.addEventListener("click", (event) => under(event) !== null && pick(under(event)));
  for (const type of ["mousemove", "mouseleave"])
    canvas.addEventListener(type, (event) => {
      const next = type === "mousemove" ? under(event) : null;
      if (next === hover) return;
      hover = next;
      peek(hover);
      draw();
    });

  function draw() {
    const width = Math.max(el.clientWidth, 200);
    const bottom = WATERFALL_TOP + WATERFALL_HEIGHT;
    const ctx = context(canvas, width, bottom + 40);
    slot = (width - WATERFALL_LEFT - 6) / steps.length;
    const left = (i) => WATERFALL_LEFT + i * slot;
    let level = 0;
    const spans = steps.map(({ kind, value }) => {
      const from = kind === "total" ? 0 : level;
      level = kind === "total" ? value : level + (Number.isFinite(value) ? value : 0);
      return [from, level];
    });
    const ends = spans.flat().filter(Number.isFinite);
    const [low, high] = [-largest(ends.map((x) => -x)), largest(ends)];
    const reach = high - low || 1;
    const tick = waterfallTick(reach);
    const room = (reach * LABEL) / (WATERFALL_HEIGHT - 2 * LABEL); // for numbers above and below
    const [floor, ceiling] = [low - room, low + reach + room];
    const y = (value) => bottom - ((value - floor) / (ceiling - floor)) * WATERFALL_HEIGHT;
    const write = (text, x, y, align, colour, bold = "") => {
      ctx.font = `${bold}11px ${v.theme.mono}`;
      [ctx.textAlign, ctx.fillStyle] = [align, colour];
      ctx.fillText(text, x, y);
    };
    const lookOf = (i) => [i === (hover ?? at) ? v.theme.ink : v.theme.muted, i === at ? "bold " : ""];
    const banded = ({ layer }) => layer !== null && layer % 2 === 0;
    const line = (x1, y1, x2, y2, colour) => {
      ctx.strokeStyle = colour;
      ctx.beginPath();
      ctx.moveTo(x1, y1);
      ctx.lineTo(x2, y2);
      ctx.stroke();
    };

    // Bands of layers and their names.
    const groups = Map.groupBy(range(steps.length), (i) => steps[i].layer);
    const every = Math.ceil(22 / (slot * Math.max(1, groups.get(0)?.length ?? 1)));
    for (const [layer, members] of groups) {
      if (layer === null) continue;
      const [x, wide] = [left(members[0]), members.length * slot];
      if (banded({ layer })) {
        ctx.fillStyle = v.theme.raised;
        ctx.fillRect(x, WATERFALL_TOP, wide, WATERFALL_HEIGHT);
      }
      const here = steps[at].layer === layer;
      if (!here && layer % every) continue;
      write(
        wide > 60 ? `layer ${layer}` : String(layer),
        x + wide / 2,
        bottom + 33,
        "center",
        here ? v.theme.ink : v.theme.muted,
        here ? "bold " : "",
      );
    }
    // Levels.
    const digits = Math.max(0, -Math.floor(Math.log10(tick) + 1e-9));
    for (let value = Math.ceil(floor / tick) * tick; value <= ceiling; value += tick) {
      const flat = Math.round(y(value)) + 0.5;
      line(WATERFALL_LEFT, flat, width - 6, flat, Math.abs(value) < tick / 2 ? v.theme.muted : v.theme.line);
      write(
        value
          .toFixed(digits)
          .replace("-", "−")
          .replace(/^−(0(\.0*)?)$/, "$1"),
        WATERFALL_LEFT - 6,
        flat + 4,
        "right",
        v.theme.muted,
      );
    }
    // Steps: what each adds, and the sum that it leaves.
    const [up, down] = signColours(v.theme);
    const thick = Math.max(1, Math.min(slot * 0.64, 44));
    steps.forEach(({ kind, value }, i) => {
      const [from, to] = spans[i];
      const [x, middle] = [left(i) + (slot - thick) / 2, left(i) + slot / 2];
      if (i + 1 < steps.length)
        line(
          x,
          Math.round(y(to)) + 0.5,
          x + slot + (steps[i + 1].kind === "total" ? thick : 0),
          Math.round(y(to)) + 0.5,
          v.theme.muted,
        );
      if (Number.isFinite(value)) {
        ctx.fillStyle = kind === "total" ? v.theme.muted : value < 0 ? down : up;
        ctx.fillRect(x, Math.min(y(from), y(to)), thick, Math.max(1, Math.abs(y(to) - y(from))));
      } else {
        ctx.fillStyle = hatching(ctx, v.theme);
        ctx.fillRect(x, WATERFALL_TOP, thick, WATERFALL_HEIGHT);
      }
      const name = slot > WORD_ROOM ? WORDS[kind] : LETTERS[kind];
      if (slot > 10) write(name, middle, bottom + 16, "center", ...lookOf(i));
    });
    const told = (i) => {
      const [value, [from, to]] = [steps[i].value, spans[i]];
      const text = Number.isFinite(value) ? signedNumber(Number(value.toFixed(2)), 2) : "none";
      const middle = clamp(left(i) + slot / 2, WATERFALL_LEFT + 20, width - 24);
      const level = value < 0 ? Math.max(y(from), y(to)) + 13 : Math.min(y(from), y(to)) - 5;
      [ctx.font, ctx.textAlign, ctx.lineWidth] = [`${lookOf(i)[1]}11px ${v.theme.mono}`, "center", 4];
      ctx.strokeStyle = banded(steps[i]) ? v.theme.raised : `rgb(${v.theme.paper})`; // keeps lines off the number
      ctx.strokeText(text, middle, level);
      ctx.lineWidth = 1;
      write(text, middle, level, "center", ...lookOf(i));
    };
    if (slot > 46) range(steps.length).forEach(told);
    const marked = (i, thickness) => {
      [ctx.strokeStyle, ctx.lineWidth] = [v.theme.ink, thickness];
      ctx.strokeRect(left(i) + 1, WATERFALL_TOP - 1, Math.max(2, slot - 2), WATERFALL_HEIGHT + 23);
    };
    if (hover !== null && hover !== at) marked(hover, 1);
    marked(at, 2);
    told(at);
    if (hover !== null) told(hover);
  }
  return {
    el,
    canvas,
    /** Gives whether kinds stand as letters, for want of room. */
    show(newSteps, picked, sentence) {
      [steps, at] = [newSteps, picked];
      cursor.textContent = sentence;
      draw();
      return slot <= WORD_ROOM;
    },
  };
}

/** A round distance between levels, for four or five of them. */
function waterfallTick(reach) {
  const size = 10 ** Math.floor(Math.log10(reach / 4));
  return [1, 2, 5, 10].map((step) => step * size).find((step) => reach / step <= 5);
}
