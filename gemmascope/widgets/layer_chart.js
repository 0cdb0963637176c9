// Lines over layers, in a box that takes the keyboard: a layer is picked in it.

import { clamp, range } from "./numbers.js";
import { h, onKeys, svg } from "./parts.js";

const CHART_EDGE = { top: 8, right: 10, bottom: 20, left: 44 };
const CHART_FONT = 6; // pixels a character of a name takes, about

/** `name` is what a screen reader calls it; `pick(i)` hears of clicks and keys. Give it a width with `layout(pixels)`,
 * and show it with `show({ ... })`:
 *     names    of the places along the axis
 *     ticks    { value: text } along the other axis, whose range is that of `low` to `high`
 *     place    value -> 0 (bottom) to 1 (top); linear from low to high by default
 *     series   [{ values, colour, className, dots, band: { low, high } }], a gap where a value is NaN; dots are "all",
 *              "none", or "here" (by default)
 *     at       the place picked; `sentence` is what a screen reader hears there
 *     height   in pixels */
export function layerChart(v, { name, pick }) {
  const spoken = h("div", { className: "spoken", role: "option", id: v.id(name, "here"), ariaSelected: "true" });
  const picture = h("div", { ariaHidden: "true" });
  const el = h(
    "div",
    { className: "chart layers", role: "listbox", tabIndex: 0, ariaLabel: name, "aria-activedescendant": spoken.id },
    spoken,
    picture,
  );
  let now = null;
  let across = null;
  let width = 300;
  onKeys(el, (columns, rows) => now && pick(clamp(now.at + columns + rows, 0, now.names.length - 1)));
  picture.addEventListener("click", (event) => {
    if (!now) return;
    const x = event.clientX - picture.getBoundingClientRect().left;
    pick(range(now.names.length).reduce((a, b) => (Math.abs(across(b) - x) < Math.abs(across(a) - x) ? b : a)));
  });

  return {
    el,
    /** The width it has from now on: asked for once, since asking makes the browser lay out the page. */
    layout: (pixels) => (width = Math.max(160, pixels)),
    show(next) {
      now = next;
      const { names, low = 0, high = 1, ticks, series, at, height = 150 } = next;
      const [right, bottom] = [width - CHART_EDGE.right, height - CHART_EDGE.bottom];
      const place = next.place ?? ((value) => (value - low) / (high - low));
      across = (i) =>
        names.length === 1
          ? (CHART_EDGE.left + right) / 2
          : CHART_EDGE.left + (i / (names.length - 1)) * (right - CHART_EDGE.left);
      const y = (value) => bottom - clamp(place(value), 0, 1) * (bottom - CHART_EDGE.top);
      const point = (value, i) => `${across(i).toFixed(1)},${y(value).toFixed(1)}`;
      const coloured = (one, what, colour) => {
        if (colour) one.style[what] = colour;
        return one;
      };
      const drawn = ({ values, colour, className = "", dots = "here", band }) => {
        const numbers = [...values];
        const parts = chartRuns(numbers).map((run) =>
          coloured(
            svg("polyline", { class: className, points: run.map((i) => point(numbers[i], i)).join(" ") }),
            "stroke",
            colour,
          ),
        );
        if (band && names.length > 1) {
          const places = range(names.length);
          const edge = [
            ...places.map((i) => point(band.high[i], i)),
            ...places.reverse().map((i) => point(band.low[i], i)),
          ];
          parts.unshift(coloured(svg("polygon", { class: "band", points: edge.join(" ") }), "fill", colour));
        } else if (band) {
          const ends = { x1: across(0), x2: across(0), y1: y(band.low[0]), y2: y(band.high[0]) };
          parts.unshift(coloured(svg("line", { class: "whisker", ...ends }), "stroke", colour));
        }
        const marked = range(numbers.length).filter((i) => Number.isFinite(numbers[i]) && (dots === "all" || i === at));
        const dot = (i) => svg("circle", { cx: across(i), cy: y(numbers[i]), r: i === at ? 4 : 2.5 });
        return [...parts, ...(dots === "none" ? [] : marked.map((i) => coloured(dot(i), "fill", colour)))];
      };
      const room = Math.max(...names.map((each) => each.length)) * CHART_FONT + 8;
      const step = Math.ceil((room * names.length) / (right - CHART_EDGE.left));
      const named = (i) => i === at || (i % step === 0 && Math.abs(i - at) >= step);
      const anchor = (i) =>
        names.length === 1 || names[i].length < 3
          ? "middle"
          : i === 0
            ? "start"
            : i === names.length - 1
              ? "end"
              : "middle";
      const label = (i) =>
        svg("text", { class: i === at ? "here" : "", x: across(i), y: height - 5, "text-anchor": anchor(i) }, names[i]);
      const rules = Object.entries(ticks).flatMap(([value, text]) => [
        svg("line", { class: "rule", x1: CHART_EDGE.left, x2: right, y1: y(Number(value)), y2: y(Number(value)) }),
        svg("text", { x: CHART_EDGE.left - 5, y: y(Number(value)) + 3.5, "text-anchor": "end" }, text),
      ]);
      picture.replaceChildren(
        svg(
          "svg",
          { viewBox: `0 0 ${width} ${height}`, width, height },
          ...rules,
          svg("line", { class: "cursor", x1: across(at), x2: across(at), y1: CHART_EDGE.top, y2: bottom }),
          ...series.flatMap(drawn),
          ...range(names.length).filter(named).map(label),
        ),
      );
      spoken.textContent = next.sentence;
    },
  };
}

/** The stretches of numbers between those that are none. */
function chartRuns(values) {
  const found = [[]];
  values.forEach((value, i) => (Number.isFinite(value) ? found.at(-1).push(i) : found.push([])));
  return found.filter((run) => run.length);
}
