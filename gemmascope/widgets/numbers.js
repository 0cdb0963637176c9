// Pure: numbers and strings in, numbers and strings out; nothing here knows the document.

export const clamp = (x, low, high) => Math.min(Math.max(x, low), high);
export const range = (n) => Array.from({ length: n }, (_, i) => i);

/** A place among n that somebody selected: counted from the end where negative, `otherwise` where nobody did. */
export const place = (i, n, otherwise = 0) =>
  i === null || i === undefined ? otherwise : clamp(i < 0 ? i + n : i, 0, n - 1);

/** A token with everything invisible made visible. */
export function shown(text) {
  const marks = { " ": "·", "▁": "·", "\n": "⏎", "\t": "⇥", "\r": "␍" };
  return text
    .replace(/[ ▁\n\t\r]/g, (c) => marks[c])
    .replace(/[\p{Cc}\p{Cf}\p{Cs}\p{Zs}\p{Zl}\p{Zp}]/gu, (c) => `\\u{${c.codePointAt(0).toString(16)}}`);
}

/** A number in a table or a sentence; a dash for what is none. */
export const number = (x, digits = 3) =>
  x === null || !Number.isFinite(x)
    ? "–"
    : x === 0 || Math.abs(x) >= 10 ** -digits
      ? x.toFixed(digits)
      : x.toExponential(1);
export const plural = (count, noun) => `${count} ${noun}${count === 1 ? "" : "s"}`;

/** "#rrggbb" -> [r, g, b]. */
export const hex = (colour) => [1, 3, 5].map((i) => parseInt(colour.slice(i, i + 2), 16));

/** Colour stops "#rrggbb" -> a function from [0, 1] to [r, g, b]. */
export function ramp(stops) {
  const rgb = stops.map(hex);
  return (t) => {
    const x = clamp(t, 0, 1) * (rgb.length - 1);
    const i = Math.min(Math.floor(x), rgb.length - 2);
    return rgb[i].map((c, j) => Math.round(c + (rgb[i + 1][j] - c) * (x - i)));
  };
}

/** [r, g, b] as the 32 bits of one opaque ImageData pixel. */
export const pixel = ([r, g, b]) => ((255 << 24) | (b << 16) | (g << 8) | r) >>> 0;

/** Black or white, whichever is easier to read on the colour (WCAG relative luminance). */
export function inkOn(rgb) {
  const [r, g, b] = rgb.map((c) => (c <= 10 ? c / 3294 : ((c / 255 + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b > 0.179 ? "#000" : "#fff";
}

/** Largest number, not-a-numbers passed over, at least 0. */
export const largest = (xs) => xs.reduce((a, b) => (b > a ? b : a), 0);

/** How many entries are no numbers, infinities among them. */
export const missing = (xs) => xs.reduce((count, x) => count + (x === null || !Number.isFinite(x)), 0);

/** Codes of arrays.py: 0 to LEVELS are evenly spaced numbers, MISSING is none. */
export const LEVELS = 254;
export const MISSING = 255;
export const decoded = (code, low, high) => (code === MISSING ? NaN : low + (code / LEVELS) * (high - low));

/** Rows of text as a CSV file. */
export function csv(columns, rows) {
  const cell = (value) => {
    const text = value === null || value === undefined ? "" : String(value);
    return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  };
  return [columns, ...rows].map((row) => row.map(cell).join(",")).join("\r\n") + "\r\n";
}

/** A question as one text: keys in order, so that the same question is the same text. */
export function canonical(value) {
  if (Array.isArray(value)) return `[${value.map(canonical).join(",")}]`;
  if (value === null || typeof value !== "object") return JSON.stringify(value);
  return `{${Object.keys(value)
    .sort()
    .map((key) => `${JSON.stringify(key)}:${canonical(value[key])}`)
    .join(",")}}`;
}

const ARRAYS = { float32: Float32Array, int32: Int32Array, uint8: Uint8Array };

/** A packed value (arrays.py) with its arrays as { shape, values }; `bytes` finds the ArrayBuffer view of an array's data. */
export function unpacked(value, bytes = (data) => data) {
  if (Array.isArray(value)) return value.map((one) => unpacked(one, bytes));
  if (value === null || typeof value !== "object") return value;
  if ("dtype" in value && "shape" in value) {
    const view = bytes(value.data);
    const copy = view.buffer.slice(view.byteOffset, view.byteOffset + view.byteLength); // wherever it began
    return { shape: value.shape, values: new ARRAYS[value.dtype](copy) };
  }
  return Object.fromEntries(Object.entries(value).map(([key, one]) => [key, unpacked(one, bytes)]));
}
