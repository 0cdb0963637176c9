// What each head reads: thumbnails of all heads, one large map, and the numbers of one query and one key.

import { ATTENTION_SCALES, attentionChange, attentionSeen, attentionSigned, attentionTop } from "./attention_codes.js";
import { attentionHeads, attentionKind } from "./attention_heads.js";
import { ATTENTION_TILE, attentionMap } from "./attention_map.js";
import { attentionSource, nothingToSee } from "./attention_source.js";
import { clamp, decoded, number, place, plural, range, shown } from "./numbers.js";
import { barList, button, choice, codeColours, h, scale } from "./parts.js";
import { view } from "./view.js";

const ATTENTION_LISTED = 8;

export const attentionView = view({
  name: "Attention",
  note:
    "How much each query (down) reads of each key (across). A sliding layer sees the last so many positions. " +
    "Heads over one bracket share keys and values.",
  keys:
    "Heads: arrows, [ and ] for the head, Page Up and Page Down for the layer, Enter pins the head. " +
    "Map: arrows move query and key, Enter goes to the key that is read most, + and - zoom, 0 shows all; " +
    "where the map has the focus, the wheel zooms, and dragging pans.",
  build(v) {
    const { data } = v;
    const { tokens, other, layers, heads: count, scores, start } = data;
    const n = tokens.length;
    const short = (text) => (text.length > 40 ? `${text.slice(0, 40)}…` : text);
    const at = (pos, of = 0) => `${pos} ${short(shown((of ? other : tokens)[pos]))}`;
    const here = () => {
      const { layer, head, pos } = v.now;
      return {
        layer: place(layer, layers.length, start[0]),
        head: place(head, count, start[1]),
        pos: place(pos, n, n - 1),
      };
    };
    /** What the map is compared with, if anything. */
    const reference = ({ layer, head }) => {
      if (v.state.minus === "prompt") return { of: 1, layer, head };
      return v.state.minus === "pinned" ? { of: 0, layer: v.state.pinned[0], head: v.state.pinned[1] } : null;
    };
    const sees = (layer, q, k) => attentionSeen(q, k, 1, n, layers[layer].window);
    const banded = (layer) => v.state.band && layers[layer].window !== null;

    const { weights, sourceOf } = attentionSource(v, {
      reference,
      banded,
      complete: (of, layer) => heads.complete(of, layer),
      came: () => map.draw(), // which asks for what is missing now
    });
    let source = nothingToSee; // of the map as it was drawn last
    function compared(question, now, i) {
      // One question after the other: of each kind, only the latest is answered.
      const base = weights(question, { of: 0, layer: now.layer, head: now.head }, i);
      const away = reference(now);
      if (!base || !away) return base && { base, away: null, values: base };
      const minus = weights(question, away, i);
      return minus && { base, away: minus, values: base.map((x, j) => x - minus[j]) };
    }

    // The parts on the page.
    const step = (byLayer, byHead) => {
      const { layer, head } = here();
      v.select({ layer: clamp(layer + byLayer, 0, layers.length - 1), head: clamp(head + byHead, 0, count - 1) });
    };
    const pin = () => {
      const { layer, head } = here();
      const same = v.state.pinned?.[0] === layer && v.state.pinned?.[1] === head;
      v.keep(
        same
          ? { pinned: null, minus: v.state.minus === "pinned" ? null : v.state.minus }
          : { pinned: [layer, head], minus: "pinned" },
      );
    };
    const turn = {
      PageUp: () => step(-1, 0),
      PageDown: () => step(1, 0),
      "[": () => step(0, -1),
      "]": () => step(0, 1),
    };
    const heads = attentionHeads(v, {
      pick: (layer, head) => v.select({ layer, head }),
      came: (layer) => (layer === here().layer || layer === v.state.pinned?.[0]) && v.refresh(),
      others: { ...turn, Enter: pin },
    });
    let kept = null; // what will keep the place to which the map was moved
    const map = attentionMap(v, {
      name: "Attention map: queries down, keys across",
      pick(row, column) {
        const key = banded(here().layer) ? Math.max(0, row - column) : column;
        v.select({ pos: row, key });
      },
      peek: (place) => v.say(place ? hovered(place) : parts.sentence()),
      moved(zoom) {
        clearTimeout(kept);
        kept = setTimeout(() => ((kept = null), v.keep({ zoom })), 300);
      },
      others: {
        ...turn,
        Enter() {
          const [most] = attentionTop(compared("row", here(), here().pos)?.values ?? [], 1);
          if (most !== undefined) v.select({ key: most });
        },
      },
    });
    const reads = barList(v, "Keys that the query reads", ({ i }) => v.select({ key: i }));
    const readBy = barList(v, "Queries that read the key", ({ i }) => v.select({ pos: i }));
    const readsTitle = h("h4");
    const readByTitle = h("h4");
    const mapTitle = h("h4");
    const mapNote = h("p", { className: "note" });
    const legend = h("div", { className: "legend" });

    const scales = choice("scale", Object.keys(ATTENTION_SCALES), v.state.scale, (chosen) => v.keep({ scale: chosen }));
    const sorts = choice("sort heads by", ["layer", ...scores.map(({ name }) => name)], "layer", (chosen) =>
      v.keep({ sort: chosen === "layer" ? null : chosen }),
    );
    const shows = choice(
      "show",
      [
        ["", "attention"],
        ["prompt", "minus the other prompt"],
        ["pinned", "minus the pinned head"],
      ],
      "",
      (chosen) => v.keep({ minus: chosen || null }),
    );
    const pinning = button("Pin this head", pin);
    const band = button("Band", () => v.keep({ band: !v.state.band, zoom: null }), {
      title: "Sliding layers by distance to the key",
    });
    const controls = h(
      "div",
      { className: "controls" },
      shows,
      pinning,
      scales,
      ...(scores.length ? [sorts] : []),
      band,
    );
    const zooms = h(
      "div",
      { className: "tools" },
      button("−", () => map.zoomHere(0.5), { ariaLabel: "Zoom out" }),
      button("+", () => map.zoomHere(2), { ariaLabel: "Zoom in" }),
      button("All", () => map.whole(), { ariaLabel: "Show the whole map" }),
    );
    const mapHead = h("div", { className: "maphead" }, mapTitle, zooms);
    const lists = h(
      "div",
      { className: "lists" },
      h("div", {}, readsTitle, reads.el),
      h("div", {}, readByTitle, readBy.el),
    );
    v.body.append(
      controls,
      legend,
      h(
        "div",
        { className: "attention-view" },
        heads.el,
        h("div", { className: "mapside" }, mapHead, map.el, mapNote),
        lists,
      ),
    );

    // Scores, asked for when somebody sorts by one: [layer][head] of each.
    const scored = [];
    let scoring = false;
    async function score() {
      if (scoring) return;
      scoring = true;
      while (scored.length < layers.length && !v.signal.aborted) {
        const answer = await v.run("scores", { of: 0, layer: scored.length });
        if (!answer) break;
        scored.push(answer.scores.values);
      }
      scoring = false;
      if (scored.length === layers.length) paintHeads();
    }
    function sortedBy() {
      const which = scores.findIndex(({ name }) => name === v.state.sort);
      if (which < 0) return null;
      if (scored.length < layers.length) return (score(), null);
      return scored.map((layer) => range(count).map((head) => layer[head * scores.length + which]));
    }
    let colours; // of the map: { plain, change }
    function paintHeads() {
      const { pinned, minus } = v.state;
      const other = minus === "prompt";
      heads.paint({ colours: other ? colours.change : colours.plain, scores: sortedBy(), reference: other, pinned });
      heads.select(here().layer, here().head);
    }

    // Words.
    /** The selected key; before anybody chose one, the key that is read most. */
    function keyOf(row) {
      if (v.now.key !== null) return place(v.now.key, n);
      return attentionTop(row?.values ?? [], 1)[0] ?? here().pos;
    }
    const hiddenBecause = (layer, q, k) => (sees(layer, q, k) ? "" : k > q ? "not yet written" : "outside the window");
    const value = (x, off = 0) => (Number.isFinite(x) ? number(x) + (off ? ` (±${off})` : "") : "no number");
    const off = v.page ? 0.002 : 0; // of a weight that a page reads from its map
    const named = ({ layer, head }) => `layer ${layer} head ${head}`;
    const head = (now, q, k) => `${named(now)}: ${at(q)} reads ${at(k)}: `;
    function sentence(now, k, row) {
      const hidden = hiddenBecause(now.layer, now.pos, k);
      const away = reference(now);
      if (hidden && !away) return head(now, now.pos, k) + hidden;
      if (!row) return head(now, now.pos, k) + (v.page ? coded(now.pos, k) : "…");
      if (!away) return head(now, now.pos, k) + value(row.base[k], off);
      const from = away.of ? `other prompt (${at(now.pos, 1)} reads ${at(k, 1)})` : named(away);
      const [base, minus, change] = [value(row.base[k], off), value(row.away[k], off), value(row.values[k], 2 * off)];
      return `${head(now, now.pos, k)}${base}; ${from}: ${minus}; difference ${change}`;
    }
    /** What the finest tile at hand says of a place. */
    function coded(q, k) {
      const [row, column] = banded(here().layer) ? [q, q - k] : [q, k];
      for (const [level, [r, c]] of source.blocks.entries()) {
        const [y, x] = [Math.floor(row / r), Math.floor(column / c)];
        const [down, right] = [Math.floor(y / ATTENTION_TILE), Math.floor(x / ATTENTION_TILE)];
        const tile = source.tile(level, right, down);
        if (!tile) continue;
        const code = tile.codes[(y - down * ATTENTION_TILE) * tile.columns + x - right * ATTENTION_TILE];
        const change = reference(here());
        const found = change ? value(attentionChange(code), 0.008) : value(decoded(code, 0, 1), 0.002);
        const words = change ? "difference " : "";
        return r * c === 1 ? words + found : `${words}at most ${found} in its block of ${r} × ${c}`;
      }
      return "…";
    }
    function hovered({ row, column }) {
      const now = here();
      const k = banded(now.layer) ? row - column : column;
      if (k < 0) return `${named(now)}: before the first token`;
      return head(now, row, k) + (hiddenBecause(now.layer, row, k) || coded(row, k));
    }

    function drawLegend() {
      const { words, curve, ticks } = ATTENTION_SCALES[v.state.scale];
      const none = source.map ? source.map.codes.reduce((sum, code) => sum + (code === 255), 0) : 0;
      const signed = attentionSigned(curve);
      const entries = Object.entries(ticks).map(([t, text]) => [Number(t), text]);
      const both = entries
        .filter(([t]) => t === 1 || (curve(t) > 0.3 && curve(t) < 0.6))
        .flatMap(([t, text]) => [
          [signed(t), text],
          [signed(-t), `−${text}`],
        ]);
      const bar = v.state.minus
        ? scale("diverging", `difference of weights, ${words}`, Object.fromEntries([[0.5, "0"], ...both]))
        : scale("attention", `weight, ${words}`, Object.fromEntries(entries.map(([t, text]) => [curve(t), text])));
      const marks = [h("span", {}, h("i", { className: "unseen" }), " out of sight")];
      if (none)
        marks.push(
          h(
            "span",
            {},
            h("i", { className: "missing" }),
            ` ${plural(none, "weight")} that ${none === 1 ? "is no number" : "are no numbers"}`,
          ),
        );
      legend.replaceChildren(bar, ...marks);
      legend.dataset.of = legendKey();
    }
    const legendKey = () => `${source.key} ${v.state.scale} ${v.state.minus} ${v.theme.ink}`;

    function drawMap(now, row, column, k) {
      source = sourceOf(now) ?? nothingToSee;
      const isBand = banded(now.layer);
      const window = Math.min(layers[now.layer].window ?? n, n);
      const away = reference(now);
      const { curve } = ATTENTION_SCALES[v.state.scale];
      const signed = (x) => Math.sign(x) * curve(Math.min(1, Math.abs(x)));
      const windows = [layers[now.layer].window, ...(away ? [layers[away.layer].window] : [])];
      const pixels = away ? colours.change : colours.plain;
      const turned = (values) => values && Float32Array.from(range(window), (back) => values[now.pos - back] ?? 0);
      const coarse = !isBand && (!away || away.of) ? heads.coarse(now.layer, now.head) : null;
      map.show({
        key: source.key,
        rows: n,
        columns: isBand ? window : n,
        square: !isBand,
        rowName: (i) => at(i),
        columnName: (i) => (isBand ? (i ? `${i} back` : "itself") : at(i)),
        at: { row: now.pos, column: isBand ? clamp(now.pos - k, 0, window - 1) : k },
        sentence: sentence(now, k, row),
        blocks: source.blocks,
        tile: source.tile,
        want: source.want,
        drawn: ([r, c]) => {
          const finer = source.blocks[0].every((size) => size === 1) ? "; zoom in for single ones" : "";
          const told = [r * c > 1 ? `Each cell is the largest weight of ${r} × ${c} positions${finer}.` : ""];
          if (isBand) told.push("Across: how many positions back the key stands.");
          mapNote.textContent = told.filter(Boolean).join(" ");
        },
        coarse,
        colours: pixels,
        hasMissing: true,
        seen: isBand
          ? (y, x, [r, c]) => x * c < Math.min((y + 1) * r, n)
          : (y, x, [r]) => windows.some((each) => attentionSeen(y, x, r, n, each)),
        across: row && (isBand ? turned(row.values) : row.values),
        down: isBand ? null : column && column.values,
        bar: signed,
        less: `rgb(${v.theme.diverging(0.17)})`,
        more: `rgb(${away ? v.theme.diverging(0.83) : v.theme.attention(0.6)})`,
      });
    }
    const bars = (found, chosen) => {
      const items = attentionTop(found?.values ?? [], ATTENTION_LISTED).map((i) => {
        const x = found.values[i];
        return { i, name: at(i), value: number(x), share: Math.abs(x) };
      });
      return [items, ({ i }) => i === chosen];
    };

    const parts = {
      paint() {
        const { scale: chosen, minus, pinned, sort } = v.state;
        const { curve } = ATTENTION_SCALES[chosen];
        const signed = attentionSigned(curve);
        const change = (t) => signed(2 * t - 1);
        colours = { plain: codeColours(v.theme.attention, curve), change: codeColours(v.theme.diverging, change) };
        scales.lastChild.value = chosen;
        sorts.lastChild.value = sort ?? "layer";
        shows.lastChild.value = minus ?? "";
        for (const option of shows.lastChild.options)
          option.disabled = (option.value === "prompt" && !other) || (option.value === "pinned" && !pinned);
        band.ariaPressed = String(v.state.band);
        band.hidden = !layers.some(({ window }) => window !== null);
        map.reset();
        if (!kept) map.look(v.state.zoom);
        paintHeads();
        legend.dataset.of = "";
      },
      update() {
        const now = here();
        const { pinned } = v.state;
        heads.select(now.layer, now.head);
        const row = compared("row", now, now.pos);
        const k = keyOf(row);
        // A column goes through every query, which a long prompt's layer must have been read for.
        const column = row && (!data.tile || heads.complete(0, now.layer)) ? compared("column", now, k) : null;
        drawMap(now, row, column, k);
        if (legend.dataset.of !== legendKey()) drawLegend();
        const away = reference(now);
        const minus = away ? ` minus ${away.of ? "the other prompt" : named(away)}` : "";
        mapTitle.textContent = `${named(now)} (${attentionKind(layers[now.layer])})${minus}`;
        const pinnedHere = pinned?.[0] === now.layer && pinned?.[1] === now.head;
        band.disabled = layers[now.layer].window === null;
        pinning.textContent = pinnedHere ? "Unpin this head" : "Pin this head";
        pinning.ariaPressed = String(pinnedHere);
        readsTitle.textContent = `${at(now.pos)} reads${minus && ", difference"}`;
        readByTitle.textContent = `${at(k)} is read by${minus && ", difference"}`;
        reads.show(...bars(row, k));
        readBy.show(...bars(column, now.pos));
      },
      sentence() {
        const now = here();
        const row = compared("row", now, now.pos);
        return sentence(now, keyOf(row), row);
      },
      python() {
        const now = here();
        const k = keyOf(compared("row", now, now.pos));
        const away = reference(now);
        const where = ({ head: i }) =>
          data.tile ? `heads=${i}, rows=[${now.pos}])[0, 0, ${k}]` : `heads=${i})[0, ${now.pos}, ${k}]`;
        const lines = ["_, cache = model.run_with_cache(prompt)"];
        if (away?.of) lines.push(data.other_setup, "_, other = model.run_with_cache(other_prompt)");
        const minus = away ? ` - ${away.of ? "other" : "cache"}.pattern(${away.layer}, ${where(away)}` : "";
        return [...lines, `cache.pattern(${now.layer}, ${where(now)}${minus}`].join("\n");
      },
      table() {
        const now = here();
        const row = compared("row", now, now.pos);
        const more = reference(now) ? ["minus", "difference"] : [];
        const rows = row ? attentionTop(row.values, n) : [];
        const cells = (i) => [i, shown(tokens[i]), row.base[i], ...(more.length ? [row.away[i], row.values[i]] : [])];
        return { columns: ["key", "token", `weight of query ${now.pos}`, ...more], rows: rows.map(cells) };
      },
      picture: () => map.canvas,
    };
    return parts;
  },
});
