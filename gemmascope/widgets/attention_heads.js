// Thumbnails of every head: by layer, with the heads that share keys under one bracket, or sorted by a score.

import { attentionDifference, attentionSeen } from "./attention_codes.js";
import { attentionImage } from "./attention_map.js";
import { clamp, range } from "./numbers.js";
import { context, h, onKeys, reveal } from "./parts.js";

const HEADS_NAME = 96; // pixels of a layer's name

/** What a layer is, in two words. */
export const attentionKind = ({ kind, window }) => (window === null ? kind : `${kind} ${window}`);

/** `pick(layer, head)` hears of clicks and arrows, `came(layer)` of a layer that is complete; `others` are further keys. */
export function attentionHeads(v, { pick, came, others }) {
  const { layers, heads: count, tokens, thumb_block: block } = v.data;
  const side = Math.ceil(tokens.length / block);
  const thumbs = layers.map((_, layer) => range(count).map((head) => makeThumb(layer, head)));
  const el = h("div", { className: "thumbs", role: "grid", tabIndex: 0, ariaLabel: "Heads" });
  let places = []; // rows of [layer, head], as they stand
  let [chosen, pinned] = [null, null];
  let look = null; // { size, colours, reference(layer, head) }

  function makeThumb(layer, head) {
    const name = `layer ${layer} head ${head}`;
    const canvas = h("canvas", { ariaHidden: "true" });
    const words = h("small", { hidden: true });
    const cell = h("div", {
      className: "thumb",
      role: "gridcell",
      id: v.id("head", layer, head),
      title: name,
      ariaLabel: name,
    });
    cell.append(canvas, words);
    [cell.dataset.layer, cell.dataset.head] = [layer, head];
    return { cell, canvas, words };
  }
  onKeys(
    el,
    (columns, rows) => {
      const row = places.findIndex((each) => each.some(([l, i]) => l === chosen[0] && i === chosen[1]));
      const column = places[row].findIndex(([l, i]) => l === chosen[0] && i === chosen[1]);
      const to = places[clamp(row + rows, 0, places.length - 1)];
      pick(...to[clamp(column + columns, 0, to.length - 1)]);
    },
    others,
  );
  el.addEventListener("click", (event) => {
    const cell = event.target.closest(".thumb");
    if (cell) pick(Number(cell.dataset.layer), Number(cell.dataset.head));
  });

  // What is asked for: the layers in sight, one part at a time, the selected layer first.
  const small = [0, 1].map(() => layers.map(() => ({ parts: 0, failed: false, maps: null })));
  const insight = new Set();
  let asking = false;
  const wanted = () => {
    const prompts = look?.prompts ?? [0];
    const first = [chosen, pinned].filter(Boolean).map(([layer]) => layer);
    for (const layer of [...first, ...[...insight].sort((a, b) => a - b)])
      for (const of of prompts) {
        const { parts, failed } = small[of][layer];
        if (!failed && parts < layers[layer].parts) return [of, layer];
      }
    return null;
  };
  async function ask() {
    if (asking) return;
    asking = true;
    for (let next = wanted(); next && !v.signal.aborted; next = wanted()) {
      const [of, layer] = next;
      const one = small[of][layer];
      const answer = await v.run("thumbs", { of, layer, part: one.parts });
      if (answer) take(one, answer.codes);
      else one.failed = true;
      drawLayer(layer);
      if (!answer || one.parts === layers[layer].parts) came(layer);
    }
    asking = false;
  }
  function take(one, { shape: [, rows, columns], values }) {
    one.maps ??= range(count).map(() => ({ rows: side, columns: side, codes: new Uint8Array(side * side), filled: 0 }));
    one.maps.forEach((map, head) => {
      map.codes.set(values.subarray(head * rows * columns, (head + 1) * rows * columns), map.filled * columns);
      map.filled += rows;
    });
    one.parts += 1;
  }
  const watch = new IntersectionObserver((entries) => {
    for (const { target, isIntersecting } of entries) if (isIntersecting) insight.add(Number(target.dataset.layer));
    ask();
  });
  v.signal.addEventListener("abort", () => watch.disconnect());
  for (const { cell } of thumbs.flat()) watch.observe(cell);

  function codesOf(layer, head) {
    const map = small[0][layer].maps?.[head];
    const other = look.reference ? small[1][layer].maps?.[head] : null;
    if (!map || (look.reference && !other)) return null;
    return other ? { ...attentionDifference(map, other), filled: Math.min(map.filled, other.filled) } : map;
  }
  function drawLayer(layer) {
    if (!look) return;
    const { window } = layers[layer];
    for (const head of range(count)) {
      const map = codesOf(layer, head);
      const ctx = context(thumbs[layer][head].canvas, look.size, look.size);
      if (!map) continue;
      const seen = (q, k) => attentionSeen(q, k, block, tokens.length, window);
      ctx.imageSmoothingEnabled = side > look.size;
      ctx.drawImage(attentionImage(map, look.colours, v.theme.unseen, seen), 0, 0, look.size, look.size);
    }
  }

  function byLayer() {
    const row = (layer, l) => {
      const size = count / layer.kv_heads;
      const groups = range(layer.kv_heads).map((g) =>
        h("div", { className: "group", role: "presentation" }, ...range(size).map((i) => thumbs[l][g * size + i].cell)),
      );
      const source = layer.kv_source === null ? [] : [h("small", {}, `K, V: layer ${layer.kv_source}`)];
      const label = h(
        "div",
        { className: "label", role: "rowheader" },
        `layer ${l}`,
        h("small", {}, attentionKind(layer)),
        ...source,
      );
      return h("div", { className: "row", role: "row" }, label, ...groups);
    };
    const names = range(count).map((i) => h("span", {}, String(i)));
    const head = h(
      "div",
      { className: "row names", ariaHidden: "true" },
      h("div", { className: "label" }, "head"),
      ...names,
    );
    places = layers.map((_, l) => range(count).map((i) => [l, i]));
    el.replaceChildren(head, ...layers.map(row));
  }
  function sorted(scores, room) {
    const score = ([l, i]) => scores[l][i];
    const order = layers.flatMap((_, l) => range(count).map((i) => [l, i]));
    order.sort(
      (a, b) =>
        (Number.isFinite(score(b)) ? score(b) : -Infinity) - (Number.isFinite(score(a)) ? score(a) : -Infinity) || 0,
    );
    const columns = Math.max(1, Math.floor(room / (look.size + 4)));
    places = range(Math.ceil(order.length / columns)).map((r) => order.slice(r * columns, (r + 1) * columns));
    const rows = places.map((row) =>
      h("div", { className: "row", role: "row" }, ...row.map(([l, i]) => thumbs[l][i].cell)),
    );
    el.replaceChildren(...rows);
  }

  return {
    el,
    /** A head's thumbnail as a map, with what one cell stands for; null while there is none. */
    coarse: (layer, head) => {
      const map = look && codesOf(layer, head);
      return map && { ...map, block };
    },
    complete: (of, layer) => small[of][layer].parts === layers[layer].parts,
    /** Draws every thumbnail. `scores` [layer][head] sorts them, null is by layer; `prompts` are those it takes. */
    paint({ colours, scores, reference, pinned: pin }) {
      const room = el.clientWidth - 8;
      const size = scores ? 60 : clamp(Math.floor((room - HEADS_NAME) / count) - 4, 26, 72);
      look = { size, colours, reference, prompts: reference ? [0, 1] : [0] };
      el.style.setProperty("--thumb", `${size}px`);
      if (scores) sorted(scores, room);
      else byLayer();
      pinned = pin;
      for (const [l, row] of thumbs.entries())
        for (const [i, { cell, words }] of row.entries()) {
          words.hidden = !scores;
          words.textContent = scores
            ? `L${l} H${i}\n${Number.isFinite(scores[l][i]) ? scores[l][i].toFixed(2) : "–"}`
            : "";
          cell.classList.toggle("pinned", pinned?.[0] === l && pinned?.[1] === i);
        }
      for (const l of range(layers.length)) drawLayer(l);
    },
    select(layer, head) {
      if (chosen) thumbs[chosen[0]][chosen[1]].cell.ariaSelected = "false";
      chosen = [layer, head];
      const { cell } = thumbs[layer][head];
      cell.ariaSelected = "true";
      el.setAttribute("aria-activedescendant", cell.id);
      reveal(el, cell, HEADS_NAME, 20);
      ask();
    },
  };
}
