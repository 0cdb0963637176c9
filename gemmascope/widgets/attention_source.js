// Where the numbers of the attention view come from: whole maps of a short prompt, tiles of a long one, exact rows and
// columns; what is compared is taken away here.

import { attentionBand, attentionCut, attentionDifference, attentionPool } from "./attention_codes.js";
import { ATTENTION_TILE } from "./attention_map.js";
import { decoded, range } from "./numbers.js";

const ATTENTION_KEPT = 512; // tiles

/** The source of a map that is not there yet. `map` is all of it, where there is such a thing; else see attentionMap. */
export const nothingToSee = { key: "nothing", blocks: [[1, 1]], tile: () => null, want: () => {}, map: null };

/** `reference(now)` is the { of, layer, head } that is taken away, or null; `banded(layer)` whether a layer is shown by
 * distance; `complete(of, layer)` whether its thumbnails are there; `came()` hears of tiles. */
export function attentionSource(v, { reference, banded, complete, came }) {
  const { tokens, layers, tile: tiled } = v.data;
  const n = tokens.length;
  const coming = {}; // of each question, with what it was asked last
  function need(question, args) {
    const answer = v.recall(question, args);
    const key = JSON.stringify(args);
    if (!answer && coming[question] !== key) {
      coming[question] = key;
      v.show(question, args, () => v.refresh());
    }
    return answer;
  }
  const asMap = ({ shape: [rows, columns], values }) => ({ rows, columns, codes: values });
  const mapOf = (which) => {
    const answer = need("map", which);
    return answer && asMap(answer.codes);
  };
  /** The "row" of a query or the "column" of a key, exact, or as good as a page's map has them; null until then. */
  function weights(question, which, i) {
    if (!v.page) return need(question, { ...which, [question === "row" ? "pos" : "key"]: i })?.weights.values ?? null;
    const map = tiled ? null : mapOf(which);
    return (
      map && Float32Array.from(range(n), (j) => decoded(map.codes[question === "row" ? i * n + j : j * n + i], 0, 1))
    );
  }

  // Tiles, one asked for at a time; of those that wait, only what is still looked at.
  const tiles = new Map(); // the last to be used stands last; false is one that did not come
  let [queue, loading] = [[], null];
  const named = ({ of, layer, head }, place) => JSON.stringify([of, layer, head, ...place]);
  function tileOf(which, place) {
    const key = named(which, place);
    const found = tiles.get(key);
    if (found) {
      tiles.delete(key);
      tiles.set(key, found);
    }
    return found || null;
  }
  async function load() {
    if (loading) {
      if (!queue.some((each) => named(...each) === loading.key)) loading.stop.abort();
      return;
    }
    if (!queue.length) return;
    const [which, [z, x, y]] = queue[0];
    loading = { key: named(...queue[0]), stop: new AbortController() };
    const { key, stop } = loading;
    const answer = await v.run("tile", { ...which, z, x, y }, stop.signal);
    loading = null;
    if (answer || !stop.signal.aborted) tiles.set(key, answer ? asMap(answer.codes) : false);
    if (tiles.size > ATTENTION_KEPT) tiles.delete(tiles.keys().next().value);
    if (!v.signal.aborted) came();
  }
  const coarsest = Math.max(0, Math.ceil(Math.log2(n / ATTENTION_TILE)));
  // A page holds one level, of at most 4 tiles along a side.
  const levels = v.page ? [Math.max(0, coarsest - 2)] : range(coarsest + 1);
  // What a layer was read into holds the coarser tiles; finer ones need only their own rows.
  const ready = ({ of, layer }, z) => v.page || complete(of, layer) || (ATTENTION_TILE << z) * 16 <= n;
  function tiledSource(key, base, away) {
    const both = away ? [base, away] : [base];
    const tile = (level, x, y) => compared(base, away, (which) => tileOf(which, [levels[level], x, y]));
    function want(missing) {
      const asked = missing.flatMap(([level, x, y]) => both.map((which) => [which, [levels[level], x, y]]));
      queue = asked.filter((each) => ready(each[0], each[1][0]) && !tiles.has(named(...each)));
      load();
    }
    return { key, blocks: levels.map((z) => [2 ** z, 2 ** z]), tile, want, map: null };
  }

  /** A map that is here, and its coarser levels. */
  function wholeSource(key, map, block, byColumn) {
    const sizes = range(1 + Math.ceil(Math.log2(Math.max(map.rows, 2)))).map((z) => [2 ** z, byColumn ? 2 ** z : 1]);
    const pooled = [];
    const level = (z) => (pooled[z] ??= attentionPool(map, ...sizes[z]));
    const side = ATTENTION_TILE;
    const tile = (z, x, y) => attentionCut(level(z), y * side, x * side, side, side);
    return { key, blocks: sizes.map(([r, c]) => [r * block[0], c * block[1]]), tile, want: () => {}, map };
  }
  function compared(base, away, make) {
    const one = make(base);
    const two = one && away ? make(away) : null;
    if (!one || (away && !two)) return null;
    return away ? { ...one, ...attentionDifference(one, two) } : one;
  }

  let latest = null;
  /** The source of the large map, null until it is there. */
  function sourceOf(now) {
    const base = { of: 0, layer: now.layer, head: now.head };
    const away = reference(now);
    const band = banded(now.layer);
    const key = JSON.stringify([base, away, band]);
    if (latest?.key === key) return latest;
    if (tiled && !band) return (latest = tiledSource(key, base, away));
    const window = Math.min(layers[now.layer].window ?? n, n);
    let block = [1, 1];
    const map = compared(base, away, (which) => {
      if (!tiled) {
        const whole = mapOf(which);
        return whole && band ? attentionBand(whole, window) : whole;
      }
      const answer = need("band", { ...which, window });
      if (answer) block = [answer.rows, answer.columns];
      return answer && asMap(answer.codes);
    });
    latest = map && wholeSource(key, map, block, !band);
    return latest;
  }
  return { weights, sourceOf };
}
