// The colours of a grid of cells, and how to read them.

import { clamp, plural } from "./numbers.js";
import { codeColours, codeImage, h, scale } from "./parts.js";

export const PATCH_SAID = { pos: "position" };
export const PATCH_DIGITS = 5; // decimals of a figure; smaller figures are said with an exponent

/** Decimals that show three digits of the largest of some figures. */
export const patchDigits = (largest) => clamp(2 - Math.floor(Math.log10(largest)), 0, 12);

/** A facet of the answer "grid" as a picture. `shares` are what is coloured, a number a cell, of all facets: their
 * colours are one scale, whose middle is a cell that did nothing, or which rises from 0. */
export function patchColours(v, grid, shares, facet) {
  const there = shares.filter(Number.isFinite);
  const reach = there.reduce((most, x) => Math.max(most, Math.abs(x - grid.nothing)), 0) || 1;
  const rising = !grid.based && there.every((x) => x >= 0); // attention, say
  const [low, high] = [rising ? 0 : grid.nothing - reach, grid.nothing + reach];
  const [, rows, columns] = grid.cell.shape;
  const codes = new Uint8Array(rows * columns).fill(255);
  for (let i = 0; i < codes.length; i++) {
    const cell = grid.cell.values[facet * rows * columns + i];
    const x = cell < 0 ? NaN : shares[cell];
    if (Number.isFinite(x)) codes[i] = Math.round(((x - low) / (high - low)) * 254);
  }
  const ramp = rising ? "probability" : "diverging";
  return { image: codeImage(codes, columns, rows, codeColours(v.theme[ramp])), facet, low, high, reach, ramp };
}

/** Its scale, what is missing, and what stands along its edges. */
export function patchLegend(grid, { low, high, reach, ramp }, none, down, across) {
  const digits = patchDigits(reach);
  const small = digits > PATCH_DIGITS && Math.max(Math.abs(low), Math.abs(high)) < 1e-2;
  const tick = (x) => {
    const text = small ? x.toExponential(2) : x.toFixed(digits);
    return Number(text) === 0 ? "0" : text;
  };
  const along = (where, axis) => {
    const tokens = axis.of === null ? "" : `, with the tokens of ${axis.of}`;
    return h("span", {}, `${where}: ${PATCH_SAID[axis.name] ?? axis.name}${tokens}`);
  };
  const said = down && (down.of !== null || down.entries.some((one) => typeof one !== "number"));
  return [
    scale(
      ramp,
      grid.shares ? "share recovered (corrupted 0, clean 1)" : grid.unit,
      Object.fromEntries([0, 0.5, 1].map((at) => [at, tick(low + at * (high - low))])),
    ),
    grid.based ? h("span", {}, "middle: the cell did nothing") : "",
    none ? h("span", {}, h("i", { className: "missing" }), ` ${plural(none, "cell")} not run`) : "",
    said ? along("down", down) : "",
    along("across", across),
  ];
}
