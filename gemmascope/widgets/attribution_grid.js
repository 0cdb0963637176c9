// Layers by components, heads and experts, in one colour scale.

import { h } from "./parts.js";
import { largest, pixel, range } from "./numbers.js";
import { matrix } from "./matrix.js";
import { signedNumber } from "./attribution_parts.js";

/** The grid of a view. `pick(part)` hears of { layer, kind, head?, expert? }, expert null being the dense branch; `said(part)`
 * is what is said of one, which `peek(text or null)` hears. */
export function attributionGrid(v, { pick, peek, said, others }) {
  const { kinds, layers, n_heads: heads, n_experts: experts } = v.data;
  const apart = { name: "" };
  const branches = experts
    ? [
        { name: "dense", kind: "mlp", expert: null },
        { name: "experts", kind: "mlp", all: true },
      ]
    : [{ name: "feed-forward", kind: "mlp" }];
  const columns = [
    { name: "attention", kind: "attn" },
    ...branches,
    ...(kinds.includes("ple") ? [{ name: "per-layer", kind: "ple" }] : []),
    apart,
    ...range(heads).map((head) => ({ name: `head ${head}`, kind: "attn", head })),
    ...(experts ? [apart, ...range(experts).map((expert) => ({ name: `expert ${expert}`, kind: "mlp", expert }))] : []),
  ];
  let at = { row: 0, column: 0 };
  let own = null; // the column that was picked here, while the selection is still the one it led to
  const part = ({ row, column }) => {
    const { name, all, ...rest } = columns[column];
    return { layer: row, ...rest };
  };
  const grid = matrix(v, {
    name: "Attribution by layer and component",
    pick(row, column) {
      if (columns[column] === apart) column += column < at.column ? -1 : 1; // over the gap
      own = { column, of: null };
      pick(part({ row, column }));
    },
    peek: (place) => peek(place && columns[place.column] !== apart ? told(place) : null),
    others,
  });

  let found = null; // what is shown
  function told(place) {
    if (!columns[place.column].all) return said(part(place));
    return `The experts of layer ${place.row} together: ${signedNumber(value(place.row, columns[place.column]), 4)}`;
  }
  /** The number of a cell; NaN where there is none. */
  function value(row, { kind, head, expert, all }) {
    const of = (array, column) => (array ? array.values[row * array.shape[1] + column] : NaN);
    if (head !== undefined) return of(found.heads, head);
    if (all)
      return found.experts ? range(experts).reduce((sum, one) => sum + (of(found.experts, one + 1) || 0), 0) : NaN;
    if (expert !== undefined) return of(found.experts, expert === null ? 0 : expert + 1);
    return found.components.values.values[1 + row * kinds.length + kinds.indexOf(kind)];
  }
  return {
    el: grid.el,
    canvas: grid.canvas,
    /** What is said at the cursor. */
    told: () => told(at),
    /** Shows { components, heads, experts } (the latter two null until they are known) with a cursor; gives the scale's end. */
    show(answers, { layer, kind, head, expert }) {
      found = answers;
      const values = layers.map((_, row) => columns.map((column) => (column === apart ? NaN : value(row, column))));
      const reach = largest(values.flat().filter(Number.isFinite).map(Math.abs)) || 1;
      const image = new ImageData(columns.length, layers.length);
      const pixels = new Uint32Array(image.data.buffer);
      values.flat().forEach((x, i) => {
        if (columns[i % columns.length] === apart) pixels[i] = pixel(v.theme.paper);
        else if (Number.isFinite(x)) pixels[i] = pixel(v.theme.diverging(0.5 + x / reach / 2));
      });
      const canvas = h("canvas", { width: columns.length, height: layers.length });
      canvas.getContext("2d").putImageData(image, 0, 0);
      const same = (column) => column.kind === kind && !column.all && column.head === head && column.expert === expert;
      const of = `${kind} ${head} ${expert}`;
      if (own) own.of ??= of;
      at = { row: layer, column: own?.of === of ? own.column : columns.findIndex(same) };
      const names = { rows: layers.map((_, l) => `layer ${l}`), columns: columns.map(({ name }) => name) };
      grid.show({ image: canvas, ...names, at, sentence: told(at), gutter: 70, head: 94, most: 30 });
      return reach;
    },
  };
}
