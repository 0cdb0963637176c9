// The experts that every layer chose for every token, how close the choices were, and how the load falls on experts.

import { matrix } from "./matrix.js";
import { canonical, clamp, number, place, plural, range, shown } from "./numbers.js";
import { barList, button, choice, codeColours, codeImage, h, paintOn, scale } from "./parts.js";
import { positionTable } from "./position_table.js";
import { routerBench } from "./router_bench.js";
import { view } from "./view.js";

const ROUTER_ACROSS = 4; // chips of a cell, side by side
const ROUTER_STRIDE = 64; // windows begin at multiples of it
const ROUTER_AROUND = 96; // positions on either side that one window has to hold: more than a screen shows
const ROUTER_USERS = 100;

export const routerView = view({
  name: "Experts",
  note:
    "The experts that each layer chose for each token. Experts are numbered within a layer: the same number in another " +
    "layer is another expert.",
  keys:
    "In the grid, [ and ] go through the experts of the token, Page Up and Page Down through the layers; in the load, " +
    "arrows go through all experts. Enter commits the changes.",
  build(v) {
    const { tokens, experts: E, slots: k, counts, other, live } = v.data;
    const [n, L] = [tokens.length, counts.shape[0]];
    const label = (pos) => `${pos} ${shown(tokens[pos])}`;

    // Choices at hand: of a window of positions, before the changes, after them, and of the other prompt.
    const windows = { before: null, after: null, other: null };
    const committed = () => (live ? v.state.committed : []);
    const side = () => (committed().length && v.state.side === "after" ? "after" : "before");
    const holds = (w, pos) => w !== null && pos >= w.first && pos < w.first + w.experts.shape[1];
    /** Where an expert is silenced by what was committed: "all" tokens, or these positions. */
    function silencedAt(layer, expert) {
      const those = committed().filter((one) => one.how === "silence" && one.layer === layer && one.expert === expert);
      const places = those.map(({ pos }) => pos ?? null);
      return places.includes(null) ? "all" : places;
    }
    /** One choice. A silenced expert keeps its slot, with a weight of 0 that nobody should read as a small one. */
    function slotOf(layer, pos, expert, weight, after) {
      const where = after && weight === 0 ? silencedAt(layer, expert) : [];
      return { expert, weight, silent: where === "all" || where.includes(pos) };
    }
    /** What is shown: the side that was chosen, where it has arrived. */
    const seen = (pos) => [windows[side()], windows.before].find((w) => holds(w, pos)) ?? null;
    const cellOf = (w, layer, pos) => layer * w.experts.shape[1] + pos - w.first;
    function slots(w, layer, pos) {
      if (!holds(w, pos)) return [];
      const at = cellOf(w, layer, pos) * k;
      return range(k).map((i) =>
        slotOf(layer, pos, w.experts.values[at + i], w.weights.values[at + i], w === windows.after),
      );
    }
    const weightOf = ({ weight, silent }) => (silent ? "silent" : number(weight));
    const differs = (which, layer, pos) =>
      holds(windows[which], pos) && windows[which].differs.values[cellOf(windows[which], layer, pos)] === 1;
    let [asked, changesAsked] = [null, "[]"];
    function ask(first) {
      const arrive = (which) => (answer) => {
        windows[which] = { first, ...answer };
        table.layout();
        v.refresh();
      };
      if (windows.before?.first !== first) v.show("window", { first }, arrive("before"));
      if (other?.differs && windows.other?.first !== first) v.show("window_other", { first }, arrive("other"));
      if (committed().length) v.show("window_after", { changes: committed(), first }, arrive("after"));
    }
    /** Sees to it that the choices around a position are at hand. */
    function need(pos) {
      const wanted = ["before", ...(other?.differs ? ["other"] : []), ...(committed().length ? ["after"] : [])];
      if (wanted.every((which) => holds(windows[which], pos))) return;
      const first =
        n <= v.data.window ? 0 : Math.max(0, Math.floor((pos - ROUTER_AROUND) / ROUTER_STRIDE) * ROUTER_STRIDE);
      const changes = canonical(committed());
      if (first === asked && changes === changesAsked) return;
      [asked, changesAsked] = [first, changes];
      queueMicrotask(() => ask(first)); // not while cells are being drawn
    }

    /** The selected place, and its expert: the heaviest where nobody chose one. */
    function now() {
      const pos = place(v.now.pos, n, n - 1);
      const layer = v.state.only ?? place(v.now.layer, L);
      const { expert } = v.now;
      const named = expert !== null && expert >= 0 && expert < E;
      return { pos, layer, expert: named ? expert : (slots(seen(pos), layer, pos)[0]?.expert ?? null) };
    }
    let at = now();

    // The grid.
    const grid = h("div", { className: "router-grid" });
    let table = null;
    let made = "";
    let rows = [];
    const value = { margin: (w, i) => w.margins.values[i], entropy: (w, i) => w.entropy.values[i] };
    const colour = {
      margin: (x) => v.theme.surprise(1 - Math.sqrt(x / (v.data.margin || 1))), // most margins are small
      entropy: (x) => v.theme.attention(x / Math.log(E)),
    };
    function fill(cell, row, pos) {
      need(pos);
      const [w, layer] = [seen(pos), rows[row]];
      if (!w) return cell.classList.add("waiting");
      const chosen = slots(w, layer, pos);
      cell.title = chosen.map((slot) => `expert ${slot.expert}: ${weightOf(slot)}`).join(", ");
      cell.classList.toggle("flip", differs("after", layer, pos));
      cell.classList.toggle("differs", differs("other", layer, pos));
      const { show } = v.state;
      cell.classList.toggle("chips", show === "experts");
      if (show === "experts") return cell.replaceChildren(...chosen.map(chipOf));
      const x = value[show](w, cellOf(w, layer, pos));
      cell.classList.toggle("missing", !Number.isFinite(x));
      cell.textContent = number(x);
      if (Number.isFinite(x)) paintOn(cell, colour[show](x));
    }
    function chipOf({ expert, weight, silent }) {
      const chip = h("span", { className: "chip" }, String(expert));
      chip.dataset.expert = expert;
      chip.classList.toggle("missing", !Number.isFinite(weight));
      chip.classList.toggle("silent", silent);
      chip.style.setProperty("--share", `${clamp(weight / (v.data.weight || 1), 0, 1) * 100 || 0}%`);
      if (E <= v.theme.expert.length) chip.style.setProperty("--colour", v.theme.expert[expert]);
      return chip;
    }
    function mark(cell, row, pos) {
      const here = rows[row] === at.layer;
      if (!here && !cell.classList.contains("lit")) return; // the other layers have nothing to mark
      cell.classList.toggle("lit", here);
      const is = (expert) => here && expert === at.expert;
      if (v.state.show === "experts")
        for (const chip of cell.children) chip.classList.toggle("chosen", is(Number(chip.dataset.expert)));
      else
        cell.classList.toggle(
          "uses",
          slots(seen(pos), rows[row], pos).some(({ expert }) => is(expert)),
        );
    }
    function move(pos, row, target) {
      const chip = target.closest(".chip");
      const layer = rows[row];
      const kept = layer === at.layer ? v.now.expert : null; // another layer has other experts
      v.select({ pos, layer, expert: chip ? Number(chip.dataset.expert) : kept });
    }
    function makeTable() {
      const { show, only } = v.state;
      const wanted = canonical([show, only]);
      if (wanted === made) return;
      made = wanted;
      rows = only === null ? range(L) : [only];
      const across = Math.min(k, ROUTER_ACROSS);
      const chips = show === "experts";
      table = positionTable(v, {
        name: "Experts of each token",
        tokens,
        rowNames: rows.map((layer) => `layer ${layer}`),
        rowHeight: chips ? 4 + 20 * Math.ceil(k / ROUTER_ACROSS) : 24,
        cellWidth: chips ? Math.max(58, 8 + across * (8 + 7 * String(E - 1).length)) : 58,
        fill,
        mark,
        move,
        peek: ({ pos, row }) => v.say(sentence(pos === undefined ? at : { ...at, pos, layer: rows[row] })),
      });
      grid.style.setProperty("--per-line", across);
      grid.replaceChildren(table.el);
    }
    v.body.addEventListener("keydown", (event) => {
      if (event.ctrlKey || event.metaKey || event.altKey || !event.target.matches(".table, .matrix")) return;
      const steps = { PageUp: -1, PageDown: 1 };
      const turns = { "[": -1, "]": 1 };
      if (event.key === "Enter") bench?.commit();
      else if (!event.target.matches(".table")) return;
      else if (event.key in steps)
        move(at.pos, clamp(rows.indexOf(at.layer) + steps[event.key], 0, rows.length - 1), grid);
      else if (event.key in turns) {
        const chosen = slots(seen(at.pos), at.layer, at.pos).map(({ expert }) => expert);
        const next = chosen[(chosen.indexOf(at.expert) + turns[event.key] + k) % k];
        if (next !== undefined) v.select({ pos: at.pos, layer: at.layer, expert: next });
      } else return;
      event.preventDefault();
    });

    // The load.
    const share = (count, of) => (count * E) / (of * k); // 1 is the uniform share
    const loadOf = (name, its, of) => ({
      name,
      of,
      counts: its,
      matrix: matrix(v, {
        name,
        pick: (layer, expert) => v.select({ layer, expert }),
        peek: (cell) => v.say(cell ? loadSentence(load, cell.row, cell.column) : sentence(at)),
      }),
    });
    const load = loadOf("Load of each expert", () => (side() === "after" && bench.effect()?.counts) || counts, n);
    const beside = other && loadOf("Load of each expert, other prompt", () => other.counts, other.tokens.length);
    const loads = beside ? [load, beside] : [load];
    const served = ({ counts: its }, layer, expert) => (expert === null ? 0 : its().values[layer * E + expert]);
    function loadSentence(one, layer, expert) {
      const count = served(one, layer, expert);
      return `${servesSentence(one, layer, expert)}, ${number(share(count, one.of), 2)} times the uniform share`;
    }
    function servesSentence(one, layer, expert) {
      const tokens = `${served(one, layer, expert)} of ${plural(one.of, "token")}`;
      const silent = one === load && side() === "after" && silencedAt(layer, expert) === "all";
      const named = `expert ${expert ?? "–"} of layer ${layer}`;
      return silent ? `${named} is silenced: its slot says nothing at ${tokens}` : `${named} serves ${tokens}`;
    }
    function showLoads() {
      const top = Math.max(2, ...loads.flatMap((one) => [...one.counts().values].map((count) => share(count, one.of))));
      const code = (x) => (x === 0 ? 255 : Math.round(254 * (x <= 1 ? x / 2 : 0.5 + (x - 1) / (top - 1) / 2)));
      const colours = codeColours(v.theme.diverging);
      for (const one of loads)
        one.matrix.show({
          image: codeImage(
            [...one.counts().values].map((count) => code(share(count, one.of))),
            E,
            L,
            colours,
          ),
          rows: range(L).map((layer) => `layer ${layer}`),
          columns: range(E).map(String),
          at: { row: at.layer, column: at.expert ?? 0 },
          sentence: loadSentence(one, at.layer, at.expert ?? 0),
          gutter: 68,
          head: 16 + 7 * String(E - 1).length,
          most: L > 12 ? 14 : 28,
        });
      loadLegend.replaceChildren(
        scale("diverging", "share of the layer's choices", {
          0: "0",
          0.5: `uniform ${number(100 / E, 1)} %`,
          1: `${number((100 * top) / E, 1)} %`,
        }),
        h("span", {}, h("i", { className: "missing" }), " unused"),
      );
    }

    // Words, lists and controls.
    const weighed = (chosen) => chosen.map((slot) => `expert ${slot.expert} ${weightOf(slot)}`).join(", ");
    const named = (chosen) => chosen.map(({ expert }) => `expert ${expert}`).join(", ");
    function sentence({ pos, layer }) {
      const w = seen(pos);
      if (!w) return `layer ${layer} at ${label(pos)}: …`;
      const i = cellOf(w, layer, pos);
      const said = [
        `layer ${layer} at ${label(pos)}: ${weighed(slots(w, layer, pos))}`,
        `margin ${number(value.margin(w, i))}, entropy ${number(value.entropy(w, i))} nats`,
      ];
      const turned = side() === "after" ? ["before", "before"] : ["after", "after"];
      if (differs("after", layer, pos))
        said.push(`${turned[0]} the changes ${named(slots(windows[turned[1]], layer, pos))}`);
      if (differs("other", layer, pos))
        said.push(`the other prompt, at ${shown(other.tokens[pos])}: ${named(slots(windows.other, layer, pos))}`);
      return said.join("; ");
    }
    const chosenTitle = h("h4");
    const chosenList = barList(v, "Experts of this token", ({ expert }) => v.select({ layer: at.layer, expert }));
    const closeness = h("p", { className: "note" });
    const otherTitle = h("h4");
    const otherList = barList(v, "Experts of the other prompt's token", ({ expert }) =>
      v.select({ layer: at.layer, expert }),
    );
    const usersTitle = h("h4");
    const usersNote = h("p", { className: "note" });
    const usersList = barList(v, "Tokens of this expert", ({ pos }) =>
      v.select({ pos, layer: at.layer, expert: at.expert }),
    );
    const bar = (slot) => ({ value: weightOf(slot), share: slot.weight / (v.data.weight || 1) });
    const barsOf = (chosen) =>
      chosen.map((slot) => ({ expert: slot.expert, name: `expert ${slot.expert}`, ...bar(slot) }));
    function showUsers() {
      const { layer, expert } = at;
      const count = served(load, layer, expert);
      usersTitle.textContent = servesSentence(load, layer, expert);
      const idle = range(E).filter((i) => served(load, layer, i) === 0).length;
      const unused = idle
        ? `${plural(idle, "expert")} of this layer unused by this prompt`
        : "Every expert of this layer is used";
      const cut = count > ROUTER_USERS ? `; the ${ROUTER_USERS} of most weight are listed` : "";
      usersNote.textContent = `${unused}${cut}.`;
      const [shownSide, changes] = [side(), committed()];
      const question = shownSide === "after" ? "layer_after" : "layer";
      v.show(question, shownSide === "after" ? { changes, layer } : { layer }, ({ experts, weights }) => {
        if (at.layer !== layer || at.expert !== expert || side() !== shownSide) return; // asked about another
        const users = [];
        experts.values.forEach((one, i) => {
          const pos = Math.floor(i / k);
          if (one === expert) users.push({ pos, ...slotOf(layer, pos, one, weights.values[i], shownSide === "after") });
        });
        users.sort((a, b) => b.weight - a.weight || a.pos - b.pos);
        const items = users
          .slice(0, ROUTER_USERS)
          .map((user) => ({ pos: user.pos, name: label(user.pos), ...bar(user) }));
        usersList.show(items, ({ pos }) => pos === at.pos);
      });
    }

    const controls = h("div", { className: "controls" });
    const legend = h("div", { className: "legend" });
    const loadLegend = h("div", { className: "legend wide" });
    const sides = h("span", { role: "group", ariaLabel: "routing shown" });
    function showControls() {
      const { show, only } = v.state;
      const none = v.data.missing;
      const toggle = (which) =>
        button(which, () => v.keep({ side: which }), {
          ariaPressed: String(side() === which),
          title: `The routing ${which} the changes`,
        });
      sides.replaceChildren(...(committed().length ? ["changes: ", toggle("before"), " ", toggle("after")] : []));
      controls.replaceChildren(
        choice("show", ["experts", "margin", "entropy"], show, (chosen) => v.keep({ show: chosen })),
        choice(
          "layers",
          [["all", "all"], ...range(L).map((layer) => [layer, String(layer)])],
          only ?? "all",
          (chosen) => v.keep({ only: chosen === "all" ? null : Number(chosen) }),
        ),
        sides,
        none ? h("span", {}, h("i", { className: "missing" }), ` ${plural(none, "weight")} without a number`) : "",
      );
      const corner = (className, text) => h("span", {}, h("i", { className: `corner ${className}` }), ` ${text}`);
      const entries = {
        experts: [`bar: weight, at most ${number(v.data.weight)}`, "framed: the selected expert"],
        margin: [
          scale("fragile", "margin: the last chosen probability minus the next", {
            0: "0 flips",
            0.5: number(v.data.margin / 4, 2),
            1: number(v.data.margin, 2),
          }),
          "underlined: uses the selected expert",
        ],
        entropy: [
          scale("attention", "entropy of the router", { 0: "0", 1: `${number(Math.log(E), 2)} nats` }),
          "underlined: uses the selected expert",
        ],
      }[show];
      legend.replaceChildren(
        ...entries.map((entry) => (typeof entry === "string" ? h("span", {}, entry) : entry)),
        committed().length ? corner("flip", "flipped by the changes") : "",
        show === "experts" && committed().some(({ how }) => how === "silence")
          ? h("span", {}, "struck out: silenced")
          : "",
        other?.differs ? corner("differs", `differs from the other prompt: ${otherSaid(other.differs)}`) : "",
      );
    }
    const otherSaid = ({ choices, tokens: there }) =>
      `${choices} of ${n * L} choices, at ${there} of ${plural(n, "token")}`;

    const bench = live ? routerBench(v, { label, layers: L, at: () => at }) : null;
    const without = h(
      "p",
      { className: "note" },
      "Made from a trace: gs.router_view(model, prompt) can also switch experts off.",
    );
    const loadBox = (text, one) => h("div", { className: "panel" }, beside ? h("small", {}, text) : "", one.matrix.el);
    const uneven = `The other prompt has ${plural(other?.tokens.length ?? 0, "token")} and this one ${n}: loads are compared, positions are not.`;
    v.body.append(
      controls,
      legend,
      h(
        "div",
        { className: "split router" },
        h(
          "div",
          {},
          grid,
          h("h4", {}, "Load: how the choices of a layer fall on its experts"),
          loadLegend,
          h(
            "div",
            { className: "loads" },
            loadBox("this prompt", load),
            beside ? loadBox("the other prompt", beside) : "",
          ),
          beside && !other.differs ? h("p", { className: "note" }, uneven) : "",
        ),
        h(
          "div",
          { className: "panel" },
          chosenTitle,
          chosenList.el,
          closeness,
          ...(other?.differs ? [otherTitle, otherList.el] : []),
          usersTitle,
          usersNote,
          usersList.el,
        ),
      ),
      bench ? bench.el : without,
    );

    return {
      paint() {
        if (canonical(committed()) !== changesAsked) windows.after = null;
        makeTable();
        showControls();
        table.layout();
        bench?.paint();
      },
      update() {
        at = now();
        need(at.pos);
        table.select(at.pos, Math.max(0, rows.indexOf(at.layer)));
        const w = seen(at.pos);
        const isPicked = ({ expert }) => expert === at.expert;
        chosenTitle.textContent = `layer ${at.layer} at ${label(at.pos)}`;
        chosenList.show(barsOf(slots(w, at.layer, at.pos)), isPicked);
        const i = w && cellOf(w, at.layer, at.pos);
        closeness.textContent = w
          ? `Margin ${number(value.margin(w, i))}, entropy ${number(value.entropy(w, i))} nats.`
          : "";
        if (other?.differs) {
          otherTitle.textContent = `the other prompt at ${at.pos} ${shown(other.tokens[at.pos])}`;
          otherList.show(barsOf(slots(windows.other, at.layer, at.pos)), isPicked);
        }
        showUsers();
        bench?.update();
        showLoads();
      },
      sentence: () => sentence(at),
      python: v.data.setup
        ? () => {
            const after = side() === "after" ? bench.python() : null;
            const place = `[0, ${at.pos}]`;
            return [
              ...(after ?? []),
              `_, cache = model.run_with_cache(prompt${after ? ", interventions=interventions" : ""})`,
              ...["indices", "weights"].map((what) => `cache["moe.router.hook_${what}", ${at.layer}]${place}`),
              `cache.routing.margins[${at.layer}, 0, ${at.pos}], cache.routing.entropy[${at.layer}, 0, ${at.pos}]`,
            ].join("\n");
          }
        : undefined,
      table() {
        const w = seen(at.pos);
        const places = w ? range(w.experts.shape[1]).map((i) => w.first + i) : [];
        const ordered = [at.layer, ...range(L).filter((layer) => layer !== at.layer)];
        return {
          columns: ["layer", "pos", "token", "rank", "expert", "weight", "margin", "entropy"],
          rows: ordered.flatMap((layer) =>
            places.flatMap((pos) => {
              const i = cellOf(w, layer, pos);
              return slots(w, layer, pos).map(({ expert, weight }, rank) => [
                layer,
                pos,
                shown(tokens[pos]),
                rank,
                expert,
                weight,
                value.margin(w, i),
                value.entropy(w, i),
              ]);
            }),
          ),
        };
      },
      picture: () => load.matrix.canvas,
    };
  },
});
