// Parts that views share: elements, colours of the theme, keys, legends, a list of bars, a table of positions.
// Every string of the model or the user becomes text, never markup.

import { clamp, inkOn, pixel, ramp, range } from "./numbers.js";

/** An element. One that takes the keyboard keeps its keys: without the attribute, the notebook takes them as its own. */
export function h(tag, props = {}, ...children) {
  const el = document.createElement(tag);
  for (const [key, value] of Object.entries(props)) key in el ? (el[key] = value) : el.setAttribute(key, value);
  if (el.tabIndex >= 0) el.setAttribute("data-lm-suppress-shortcuts", "true");
  el.append(...children);
  return el;
}

export function svg(tag, attributes = {}, ...children) {
  const el = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [key, value] of Object.entries(attributes)) el.setAttribute(key, value);
  el.append(...children);
  return el;
}

/** The colours that the style sheet chose for light or dark; read again when that changes. */
export function readTheme(root) {
  const css = getComputedStyle(root);
  const value = (name) => css.getPropertyValue(name).trim();
  const stops = (name) => ramp(value(name).split(/\s*,\s*/));
  return {
    ink: value("--ink"),
    muted: value("--muted"),
    line: value("--line"),
    hatch: value("--hatch"),
    unseen: value("--unseen"),
    mono: value("--mono"),
    probability: stops("--ramp-probability"),
    surprise: stops("--ramp-surprise"),
    attention: stops("--ramp-attention"),
    diverging: stops("--ramp-diverging"),
    expert: range(8).map((i) => value(`--expert-${i}`)),
  };
}

export function paintOn(el, rgb) {
  el.style.backgroundColor = `rgb(${rgb})`;
  el.style.color = inkOn(rgb);
}

/** Scroll a box, and never the page, until the element inside it is seen. */
export function reveal(box, el, left = 0, top = 0) {
  const a = box.getBoundingClientRect();
  const b = el.getBoundingClientRect();
  if (b.left < a.left + left) box.scrollLeft += b.left - a.left - left;
  else if (b.right > a.right) box.scrollLeft += b.right - a.right;
  if (b.top < a.top + top) box.scrollTop += b.top - a.top - top;
  else if (b.bottom > a.bottom) box.scrollTop += b.bottom - a.bottom;
}

/** Arrow keys, Home and End (Shift: ten at a time) as (column, row) steps; other keys by name. */
export function onKeys(el, step, others = {}) {
  el.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const by = event.shiftKey ? 10 : 1;
    const steps = {
      ArrowLeft: [-by, 0],
      ArrowRight: [by, 0],
      ArrowUp: [0, -by],
      ArrowDown: [0, by],
      Home: [-Infinity, 0],
      End: [Infinity, 0],
    };
    if (event.key in others) others[event.key]();
    else if (event.key in steps) step(...steps[event.key]);
    else return;
    event.preventDefault();
  });
}

/** A drawing context in CSS pixels, sharp on this screen. */
export function context(canvas, width, height) {
  const scale = window.devicePixelRatio || 1;
  [canvas.width, canvas.height] = [Math.round(width * scale), Math.round(height * scale)];
  [canvas.style.width, canvas.style.height] = [`${width}px`, `${height}px`];
  const ctx = canvas.getContext("2d");
  ctx.scale(scale, scale);
  ctx.imageSmoothingEnabled = false;
  return ctx;
}

/** The stripes of what is missing or out of sight, to fill with. */
export function hatching(ctx, theme) {
  const stripes = h("canvas", { width: 6, height: 6 });
  const pen = stripes.getContext("2d");
  pen.strokeStyle = theme.hatch;
  for (const x of [-6, 0, 6]) pen.stroke(new Path2D(`M${x} 6L${x + 6} 0`));
  return ctx.createPattern(stripes, "repeat");
}

/** Codes as a picture of one pixel a cell; `colours` are 256 packed pixels, 0 where a code is left clear. */
export function codeImage(codes, columns, rows, colours) {
  const image = new ImageData(columns, rows);
  const pixels = new Uint32Array(image.data.buffer);
  for (let i = 0; i < pixels.length; i++) pixels[i] = colours[codes[i]];
  const canvas = h("canvas", { width: columns, height: rows });
  canvas.getContext("2d").putImageData(image, 0, 0);
  return canvas;
}

/** 256 pixels for codes: a colour ramp, bent by `curve`; what is missing is clear. */
export const codeColours = (ramp, curve = (t) => t) =>
  range(256).map((code) => (code === 255 ? 0 : pixel(ramp(curve(code / 254)))));

/** A choice among a few, with a name. */
export function choice(label, options, chosen, pick) {
  const named = options.map((option) => (Array.isArray(option) ? option : [option, option]));
  const select = h("select", { ariaLabel: label }, ...named.map(([value, text]) => h("option", { value }, text)));
  select.value = chosen;
  select.addEventListener("change", () => pick(select.value));
  return h("label", { className: "choice" }, label, " ", select);
}

/** A button that says what it does. */
export function button(text, press, props = {}) {
  const el = h("button", { type: "button", ...props }, text);
  el.addEventListener("click", press);
  return el;
}

/** One entry of a legend: a colour scale with its name and ticks, { place in 0..1: text }. */
export function scale(name, text, ticks) {
  const marks = Object.entries(ticks).map(([at, value]) =>
    h("span", { className: "tick", style: `left: ${at * 100}%` }, value),
  );
  return h("span", {}, text, h("span", { className: "scale" }, h("span", { className: `gradient ${name}` }), ...marks));
}

/** A list of named bars, one of them picked: top-k tokens, keys a query reads, experts of a token. */
export function barList(v, label, pick) {
  let items = [];
  let picked = -1;
  const el = h("div", { className: "bars", role: "listbox", tabIndex: 0, ariaLabel: label });
  const choose = (i) => items.length && pick(items[clamp(i, 0, items.length - 1)]);
  onKeys(el, (columns, rows) => choose(picked + columns + rows));
  el.addEventListener("click", (event) => {
    const option = event.target.closest("[role=option]");
    if (option) choose([...el.children].indexOf(option));
  });
  const show = (newItems, isPicked) => {
    [items, picked] = [newItems, newItems.findIndex(isPicked)];
    el.replaceChildren(
      ...items.map((item, i) =>
        h(
          "div",
          {
            id: v.id(label, i),
            role: "option",
            ariaSelected: String(i === picked),
            title: item.title || item.name,
          },
          h("span", { className: "name", dir: "auto" }, item.name),
          h(
            "span",
            { className: "track" },
            h("span", { className: "bar", style: `width: ${clamp(item.share, 0, 1) * 100}%` }),
          ),
          h("span", { className: "value" }, item.value),
        ),
      ),
    );
    el.setAttribute("aria-activedescendant", picked < 0 ? "" : el.children[picked].id);
    if (picked >= 0) reveal(el, el.children[picked]);
  };
  return { el, show };
}
