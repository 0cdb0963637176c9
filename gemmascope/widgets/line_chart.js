// Lines over a few named places, as SVG.

import { largest, number } from "./numbers.js";
import { svg } from "./parts.js";

/** Probabilities over named places: one line picked among faint ones that share its scale, a mark at one place. */
export function lineChart({ label, names, lines, picked, at }) {
  const [width, height] = [300, 132];
  const [left, right, top, bottom] = [34, 292, 8, 112];
  const most = largest(picked);
  const ceiling = [0.001, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5].find((c) => c >= most) || 1;
  const x = (i) => left + (i / (names.length - 1)) * (right - left);
  const y = (value) => bottom - (Math.min(value, ceiling) / ceiling) * (bottom - top);
  const text = (value, x, y, anchor) => svg("text", { x, y, "text-anchor": anchor }, value);
  const line = (values, className) =>
    svg("polyline", { class: className, points: [...values].map((value, i) => `${x(i)},${y(value)}`).join(" ") });
  const every = Math.ceil(names.length / 8);
  const named = (i) => i === 0 || ((i - 1) % every === 0 && x(i) > left + 40); // the first name is the longest
  return svg(
    "svg",
    { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `${label}, at most ${number(most)}` },
    ...[0, ceiling / 2, ceiling].flatMap((value) => [
      svg("line", { class: "rule", x1: left, x2: right, y1: y(value), y2: y(value) }),
      text(String(value), left - 5, y(value) + 4, "end"),
    ]),
    svg("line", { class: "cursor", x1: x(at), x2: x(at), y1: top, y2: bottom }),
    ...lines.map((values) => line(values, "faint")),
    line(picked, "picked"),
    ...[...picked].map((value, i) => svg("circle", { cx: x(i), cy: y(value), r: i === at ? 4 : 2 })),
    ...names.map((name, i) => (named(i) ? text(name, x(i), height - 5, i ? "middle" : "start") : "")),
  );
}
