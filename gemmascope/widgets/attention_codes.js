// Pure: attention as codes (arrays.py), pooled, compared and turned. A map is { rows, columns, codes }.

import { LEVELS, MISSING, range } from "./numbers.js";

const ATTENTION_FAINTEST = 0.002; // half of what one code stands for

/** How a weight from 0 to 1 becomes a place on the colour scale, in words and with ticks { weight: text }. */
export const ATTENTION_SCALES = {
  linear: { words: "on a linear scale", curve: (t) => t, ticks: { 0: "0", 0.5: ".5", 1: "1" } },
  sqrt: { words: "on a square-root scale", curve: Math.sqrt, ticks: { 0: "0", 0.05: ".05", 0.25: ".25", 1: "1" } },
  log: {
    words: "on a logarithmic scale",
    curve: (t) => (t <= ATTENTION_FAINTEST ? 0 : 1 - Math.log(t) / Math.log(ATTENTION_FAINTEST)),
    ticks: { [ATTENTION_FAINTEST]: "≤.002", 0.02: ".02", 0.2: ".2", 1: "1" },
  },
};

/** A place on a scale from -1 to 1, 0 in the middle, as one from 0 to 1. */
export const attentionSigned = (curve) => (t) => 0.5 + 0.5 * Math.sign(t) * curve(Math.abs(t));

/** Whether a query of block row `q` sees a key of block column `k`; blocks are `block` positions wide. */
export const attentionSeen = (q, k, block, n, window) =>
  k * block < Math.min((q + 1) * block, n) && (window === null || q * block - (k + 1) * block + 1 < window);

/** The largest code of each block; missing where one is. */
export function attentionPool(map, byRow, byColumn) {
  if (byRow === 1 && byColumn === 1) return map;
  const [rows, columns] = [Math.ceil(map.rows / byRow), Math.ceil(map.columns / byColumn)];
  const codes = new Uint8Array(rows * columns);
  for (let r = 0; r < map.rows; r++) {
    const to = Math.floor(r / byRow) * columns;
    for (let c = 0, i = r * map.columns; c < map.columns; c++, i++) {
      const at = to + Math.floor(c / byColumn);
      if (map.codes[i] > codes[at]) codes[at] = map.codes[i];
    }
  }
  return { rows, columns, codes };
}

/** a - b as codes: the middle one is no difference. */
export function attentionDifference(a, b) {
  const codes = a.codes.map((code, i) =>
    code === MISSING || b.codes[i] === MISSING ? MISSING : (LEVELS + 1 + code - b.codes[i]) >> 1,
  );
  return { ...a, codes };
}
export const attentionChange = (code) => (code === MISSING ? NaN : (2 * code) / LEVELS - 1);

/** A map [query, key] as [query, query - key], up to `window`. */
export function attentionBand({ rows, columns, codes }, window) {
  const band = new Uint8Array(rows * window);
  for (let q = 0; q < rows; q++)
    for (let back = 0; back < window && back <= q; back++) band[q * window + back] = codes[q * columns + q - back];
  return { rows, columns: window, codes: band };
}

/** A rectangle of a map, cut at its ends. */
export function attentionCut(map, top, left, rows, columns) {
  const [height, width] = [Math.min(rows, map.rows - top), Math.min(columns, map.columns - left)];
  const codes = new Uint8Array(height * width);
  for (let r = 0; r < height; r++) {
    const from = (top + r) * map.columns + left;
    codes.set(map.codes.subarray(from, from + width), r * width);
  }
  return { rows: height, columns: width, codes };
}

/** The places of the most of some numbers, the largest first; those that are 0 or no numbers are left out. */
export function attentionTop(xs, count) {
  const size = (i) => Math.abs(xs[i]);
  const found = range(xs.length).filter((i) => size(i) > 0);
  if (found.length <= count || count > 32) return found.sort((a, b) => size(b) - size(a)).slice(0, count);
  const top = []; // of many, few are wanted: one pass is enough
  for (const i of found) {
    if (top.length === count && size(i) <= size(top[count - 1])) continue;
    const at = top.findIndex((each) => size(i) > size(each));
    top.splice(at < 0 ? top.length : at, 0, i);
    top.length = Math.min(top.length, count);
  }
  return top;
}
