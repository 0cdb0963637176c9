// Pure: numbers and strings in, numbers and strings out; nothing here knows the document.

const clamp = (x, low, high) => Math.min(Math.max(x, low), high);
const range = (n) => Array.from({ length: n }, (_, i) => i);

/** A token with everything invisible made visible. */
function shown(text) {
  const marks = { " ": "·", "▁": "·", "\n": "⏎", "\t": "⇥", "\r": "␍" };
  return text
    .replace(/[ ▁\n\t\r]/g, (c) => marks[c])
    .replace(/[\p{Cc}\p{Cf}\p{Cs}\p{Zs}\p{Zl}\p{Zp}]/gu, (c) => `\\u{${c.codePointAt(0).toString(16)}}`);
}

const number = (p) => (p === 0 || p >= 0.001 ? p.toFixed(3) : p.toExponential(1));
const plural = (count, noun) => `${count} ${noun}${count === 1 ? "" : "s"}`;

/** "#rrggbb" -> [r, g, b]. */
const hex = (colour) => [1, 3, 5].map((i) => parseInt(colour.slice(i, i + 2), 16));

/** Colour stops "#rrggbb" -> a function from [0, 1] to [r, g, b]. */
function ramp(stops) {
  const rgb = stops.map(hex);
  return (t) => {
    const x = clamp(t, 0, 1) * (rgb.length - 1);
    const i = Math.min(Math.floor(x), rgb.length - 2);
    return rgb[i].map((c, j) => Math.round(c + (rgb[i + 1][j] - c) * (x - i)));
  };
}

/** [r, g, b] as the 32 bits of one opaque ImageData pixel. */
const packed = ([r, g, b]) => ((255 << 24) | (b << 16) | (g << 8) | r) >>> 0;

/** Black or white, whichever is easier to read on the colour (WCAG relative luminance). */
function inkOn(rgb) {
  const [r, g, b] = rgb.map((c) => (c <= 10 ? c / 3294 : ((c / 255 + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b > 0.179 ? "#000" : "#fff";
}

/** Largest code of each factor x factor block of a [side, side] map. */
function poolMax(map, side, factor) {
  const out = Math.ceil(side / factor);
  const pooled = new Uint8Array(out * out);
  for (let q = 0; q < side; q++) {
    for (let k = 0; k < side; k++) {
      const at = Math.floor(q / factor) * out + Math.floor(k / factor);
      if (map[q * side + k] > pooled[at]) pooled[at] = map[q * side + k];
    }
  }
  return pooled;
}

/** May any position of block q see any position of block k? A window of W reaches W keys, the query itself among them. */
function visible(q, k, block, n, window) {
  const last = (i) => Math.min((i + 1) * block, n) - 1;
  return last(q) >= k * block && (window === null || q * block - last(k) < window);
}

/** Largest number, not-a-numbers passed over, at least 0. */
const largest = (xs) => xs.reduce((a, b) => (b > a ? b : a), 0);

/** The numbers of the page behind questions, so that no view knows how they are stored. */
function reader(data, arrays) {
  const { surprise, lensIds, lensProbs, patterns, expertIndices, expertWeights } = arrays;
  const [n, rows, ranks] = lensIds.shape;
  const [, heads, side] = patterns.shape;
  const token = (id) => shown(data.lensTokens[id]);
  const cellId = (pos, row, rank) => lensIds.values[(pos * rows + row) * ranks + rank];
  const path = (pos, row, rank) => {
    const at = ((pos * rows + row) * ranks + rank) * rows;
    return lensProbs.values.subarray(at, at + rows);
  };
  const slots = expertIndices ? expertIndices.shape[2] : 0;
  const experts = (layer, pos) =>
    range(slots)
      .map((slot) => (layer * n + pos) * slots + slot)
      .map((at) => ({ expert: expertIndices.values[at], weight: expertWeights.values[at] }))
      .sort((a, b) => b.weight - a.weight);
  const last = (cell) => Math.min((cell + 1) * data.block, n) - 1;
  return {
    ...data,
    n,
    rows,
    heads,
    side,
    token,
    experts,
    last,
    maxWeight: expertWeights ? largest(expertWeights.values) : null,
    at: (pos) => `${pos} ${shown(data.tokens[pos])}`,
    surprise: (pos) => surprise.values[pos],
    maxSurprise: largest(surprise.values),
    lens: (pos, row) => range(ranks).map((rank) => ({ id: cellId(pos, row, rank), p: path(pos, row, rank)[row] })),
    /** Probability of a token at every row, or null where no row of the position lists it. */
    path: (pos, id) => {
      for (let row = 0; row < rows; row++)
        for (let i = 0; i < ranks; i++) if (cellId(pos, row, i) === id) return path(pos, row, i);
      return null;
    },
    map: (layer, head) =>
      patterns.values.subarray((layer * heads + head) * side * side, (layer * heads + head + 1) * side * side),
    sees: (layer, q, k) => visible(q, k, data.block, n, data.layers[layer].window),
    cell: (pos) => Math.floor(pos / data.block),
    cellName: (i) =>
      data.block === 1
        ? `${i} ${shown(data.tokens[i])}`
        : i * data.block === last(i)
          ? String(last(i))
          : `${i * data.block} to ${last(i)}`,
    served: (layer, expert) =>
      range(n)
        .map((pos) => ({ pos, ...experts(layer, pos).find((e) => e.expert === expert) }))
        .filter((e) => "weight" in e),
    load: (layer) => {
      const counts = new Array(data.nExperts).fill(0);
      for (let i = 0; i < n * slots; i++) counts[expertIndices.values[layer * n * slots + i]]++;
      return counts;
    },
  };
}
