// What each layer would say next: a table of positions by layers, and how probable tokens are from layer to layer.

import { layerChart } from "./layer_chart.js";
import { clamp, number, place, range, shown } from "./numbers.js";
import { barList, button, choice, h, paintOn, scale } from "./parts.js";
import { positionTable } from "./position_table.js";
import { view } from "./view.js";

const LENS_PINS = 6;
const LENS_INK = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"]; // Okabe and Ito's, one a pin
const LENS_READ = { resid_post: "after the layer", resid_mid: "after attention", resid_mlp: "after feed-forward" };
const LENS_FLOOR = 1e-6; // the lowest probability of a logarithmic axis

export const lensView = view({
  name: "Lens",
  note: "What the model would say next if it stopped there: each place of its stream, read as it reads the last one.",
  keys:
    "In the table, left and right go along positions, up and down along layers; Enter pins the likeliest token. " +
    "In the list, Enter pins the token, or takes its pin away.",
  build(v) {
    const { tokens, ids, layers, size, carried } = v.data;
    const [n, rows] = [tokens.length, layers + 1];
    const pinsAtFirst = v.state.pins; // those that an exported page has answers for
    const texts = new Map(ids.map((id, pos) => [id, tokens[pos]]));
    const token = (id) => shown(texts.get(id) ?? `id ${id}`);
    const label = (pos) => `${pos} ${shown(tokens[pos])}`;
    const reading = () => ({ lens: v.state.lens, site: v.state.site });
    const after = (row) =>
      row === 0 ? "embed" : row === layers && v.state.site === "resid_post" ? "output" : `layer ${row - 1}`;
    const where = ({ pos, row }) => {
      const part = row > 0 && v.state.site !== "resid_post" ? ` ${LENS_READ[v.state.site]}` : "";
      return `${after(row)}${part} at ${label(pos)}`;
    };

    // What is selected. The embedding is no layer: its site says it.
    const siteOf = (row) => (row === 0 ? "hook_embed" : `blocks.${row - 1}.hook_${v.state.site}`);
    function at() {
      const { pos, layer, site } = v.now;
      const embedded = site === "hook_embed" && !layer;
      return { pos: place(pos, n, n - 1), row: embedded ? 0 : place(layer, layers, layers - 1) + 1 };
    }
    const move = (pos, row) => v.select({ pos, layer: Math.max(row - 1, 0), site: siteOf(row) });

    // Blocks of the table.
    const held = new Map();
    let asking = false;
    let bad = 0; // places without a number
    const inPage = (what, pos) => !v.page || pos >= carried[what];
    function block(pos) {
      const which = Math.floor(pos / size);
      if (held.has(which)) return held.get(which);
      const keep = (answer) => {
        asking = false;
        held.set(which, answer);
        const [values, top] = [answer.probs.values, answer.probs.shape[2]];
        for (let i = 0; i < values.length; i += top) bad += !Number.isFinite(values[i]);
        for (const [id, text] of Object.entries(answer.texts)) texts.set(Number(id), text);
      };
      const question = { ...reading(), block: which };
      const known = v.recall("table", question);
      if (known) return (keep(known), known);
      if (asking || !inPage("table", pos)) return null;
      asking = true;
      v.show("table", question, (answer) => {
        keep(answer);
        table.layout(); // which asks for the next block that is seen
        v.refresh();
      });
      return null;
    }
    /** The figures of a place, null while they are not there. */
    function cellOf({ pos, row }) {
      const answer = block(pos);
      if (!answer) return null;
      const cell = (pos % size) * rows + row;
      const top = answer.ids.shape[2];
      const [first, end] = [cell * top, (cell + 1) * top];
      return {
        ids: [...answer.ids.values.subarray(first, end)],
        probs: [...answer.probs.values.subarray(first, end)],
        entropy: answer.entropy.values[cell],
        KL: answer.kl.values[cell],
      };
    }
    /** Courses of tokens at the selected position: id -> { probs, ranks } by row. */
    let courses = new Map();
    let coursesOf = "";
    function askCourses({ pos }) {
      const place = `${v.state.lens} ${v.state.site} ${pos}`;
      if (place !== coursesOf) [courses, coursesOf] = [new Map(), place];
      const answer = block(pos);
      if (!answer || !inPage("course", pos)) return;
      const stride = rows * answer.ids.shape[2];
      const listed = new Set(answer.ids.values.subarray((pos % size) * stride, ((pos % size) + 1) * stride));
      const { token } = v.now;
      const wanted = token !== null && token === clamp(token, 0, v.data.vocabulary - 1) ? [token] : [];
      const further = v.page ? pinsAtFirst : [...v.state.pins, ...wanted];
      const asked = [...new Set(further)].filter((id) => !listed.has(id)).sort((a, b) => a - b);
      let late = false;
      v.show("course", { ...reading(), pos, ids: asked }, (answer) => {
        const { ids, probs, ranks } = answer;
        for (const [id, text] of Object.entries(answer.texts)) texts.set(Number(id), text);
        const part = (array, i) => array.values.subarray(i * rows, (i + 1) * rows);
        courses = new Map([...ids.values].map((id, i) => [id, { probs: part(probs, i), ranks: part(ranks, i) }]));
        if (late) v.refresh();
      });
      late = true;
    }
    function pickedToken(cell) {
      const { token } = v.now;
      return token !== null && courses.has(token) ? token : cell.ids[0];
    }

    // Pins.
    const isPinned = (id) => v.state.pins.includes(id);
    const full = () => v.state.pins.length >= LENS_PINS;
    function pin(id) {
      if (isPinned(id)) return v.keep({ pins: v.state.pins.filter((one) => one !== id) });
      v.notice(
        full() ? `${LENS_PINS} tokens are pinned, which is as many as can be told apart: take one away first.` : "",
      );
      if (!full()) v.keep({ pins: [...v.state.pins, id] });
    }
    const ink = (id) => LENS_INK[v.state.pins.indexOf(id)];

    // The parts.
    const controls = h("div", { className: "controls" });
    const unseen = h("span");
    const table = positionTable(v, {
      name: "Lens",
      tokens,
      rowNames: range(rows).map((row) => (row ? `layer ${row - 1}` : "embed")),
      rowHeight: clamp(Math.floor(280 / rows), 24, 36),
      cellWidth: 58,
      fill(element, row, pos) {
        const cell = cellOf({ pos, row });
        const bad = cell && !Number.isFinite(cell.probs[0]);
        element.textContent = cell && !bad ? token(cell.ids[0]) : "";
        element.dir = "auto";
        element.classList.toggle("missing", !cell || bad);
        element.classList.toggle("hit", Boolean(cell) && !bad && cell.ids[0] === ids[pos + 1]);
        element.style.backgroundColor = element.style.color = "";
        if (!cell || bad) element.ariaLabel = bad ? "no number" : "not there";
        else paintOn(element, colourOf(cell));
      },
      mark() {},
      move,
      peek: (there) => v.say(sentence({ ...at(), ...there })),
    });
    table.el.addEventListener("keydown", (event) => {
      const cell = event.key === "Enter" && cellOf(at());
      if (!cell) return;
      event.preventDefault();
      pin(cell.ids[0]);
    });
    const title = h("h4");
    const list = barList(v, "Likeliest tokens", (item) => v.select({ token: item.id }));
    list.el.addEventListener("keydown", (event) => {
      const cell = event.key === "Enter" && cellOf(at());
      if (!cell) return;
      event.preventDefault();
      pin(pickedToken(cell));
    });
    const figures = h("p", { className: "lens-figures" });
    const pinning = h("div", { className: "controls pinning" });
    const courseTitle = h("div", { className: "heading courses" });
    const chart = layerChart(v, { name: "Layers", pick: (row) => move(at().pos, row) });
    const pinned = h("ul", { className: "pins", ariaLabel: "Pinned tokens" });
    const panel = h("div", { className: "panel" }, title, list.el, figures, pinning, courseTitle, chart.el, pinned);
    v.body.append(controls, h("div", { className: "split" }, table.el, panel));

    const most = Math.log(v.data.vocabulary);
    function colourOf(cell) {
      if (v.state.colour === "probability") return v.theme.probability(cell.probs[0]);
      return v.theme.surprise(cell[v.state.colour] / most);
    }
    function sentence(there) {
      const cell = cellOf(there);
      if (!cell)
        return `${where(there)}: not ${inPage("table", there.pos) ? "there yet" : "in this page, but in the notebook"}`;
      const right = cell.ids[0] === ids[there.pos + 1] ? ", which does follow" : "";
      const told = `${where(there)}: ${token(cell.ids[0])} ${number(cell.probs[0])}${right}`;
      return `${told}, entropy ${number(cell.entropy, 2)} nats, KL to the output ${number(cell.KL, 2)} nats`;
    }

    function drawControls() {
      const { lens, site, colour } = v.state;
      const only = (options, chosen) => (v.page ? options.filter(([value]) => value === chosen) : options);
      const sites = Object.entries(LENS_READ).filter(([value]) => lens === "logit" || value === "resid_post");
      const lenses = [
        ["logit", "logit"],
        ["tuned", "tuned"],
      ];
      const pickLens = (chosen) => v.keep({ lens: chosen, site: chosen === "tuned" ? "resid_post" : site });
      const named = {
        probability: "probability of the likeliest token",
        entropy: "entropy, nats",
        KL: "KL to the output, nats",
      };
      const top = colour === "probability" ? "1" : number(most, 1);
      controls.replaceChildren(
        v.data.tuned ? choice("lens", only(lenses, lens), lens, pickLens) : "",
        choice("stream", only(sites, site), site, (chosen) => v.keep({ site: chosen })),
        choice("colour", Object.keys(named), colour, (chosen) => v.keep({ colour: chosen })),
        scale(colour === "probability" ? "probability" : "surprise", named[colour], { 0: "0", 1: top }),
        h("span", {}, h("u", {}, "underlined"), " the token that does follow"),
        unseen,
      );
    }
    function sayMissing() {
      const away = v.page && carried.table > 0 ? `positions before ${carried.table} are not in this page` : "";
      const told = [bad ? `${bad} without a number` : "", away].filter(Boolean).join(", ");
      unseen.replaceChildren(...(told ? [h("i", { className: "missing" }), ` ${told}`] : []));
    }

    function drawPinning(cell, picked, pos) {
      const offers = [[picked, isPinned(picked) ? "Unpin" : "Pin"]];
      if (pos + 1 < n && ids[pos + 1] !== picked && !isPinned(ids[pos + 1]))
        offers.push([ids[pos + 1], "Pin what follows:"]);
      pinning.replaceChildren(
        ...offers.map(([id, does]) => button(`${does} ${token(id).slice(0, 24)}`, () => pin(id), { dir: "auto" })),
      );
    }
    function drawPins(row) {
      const items = v.state.pins.map((id) => {
        const course = courses.get(id);
        const swatch = h("i", { className: "swatch" });
        swatch.style.backgroundColor = ink(id);
        const told = course
          ? `${number(course.probs[row])}, rank ${number(course.ranks[row], 0)}`
          : v.page
            ? "not in this page"
            : "…";
        const off = button("×", () => pin(id), { ariaLabel: `Unpin ${token(id)}`, title: "Unpin" });
        return h(
          "li",
          {},
          swatch,
          h("span", { className: "name", dir: "auto", title: `id ${id}` }, token(id)),
          h("span", { className: "value" }, told),
          off,
        );
      });
      pinned.replaceChildren(...items);
      pinned.hidden = !items.length;
    }
    function drawChart(cell, picked, there) {
      const { measure } = v.state;
      const faint = cell.ids.filter((id) => id !== picked && !isPinned(id) && courses.has(id));
      const strong = [...v.state.pins, ...(isPinned(picked) ? [] : [picked])].filter((id) => courses.has(id));
      const axis = lensAxis(
        measure,
        strong.map((id) => courses.get(id)),
        v.data.vocabulary,
      );
      const valuesOf = (id) => axis.values(courses.get(id));
      const series = [
        ...faint.map((id) => ({ values: valuesOf(id), className: "faint", dots: "none" })),
        ...strong.map((id) => ({
          values: valuesOf(id),
          colour: ink(id),
          className: id === picked ? "picked" : "pinned",
        })),
      ];
      const course = courses.get(picked);
      const told = course ? `${token(picked)} ${number(course.probs[there.row])}, rank ${number(course.ranks[there.row], 0)}` : "";
      chart.show({
        ...axis,
        names: range(rows).map((row) => (row ? String(row - 1) : "emb")),
        series,
        at: there.row,
        sentence: `${after(there.row)}: ${told}`,
      });
    }

    return {
      paint() {
        held.clear();
        [asking, bad] = [false, 0];
        drawControls();
        const names = table.el.querySelectorAll(".row:not(.head) > .label");
        names.forEach((name, row) => (name.textContent = after(row)));
        courseTitle.replaceChildren(
          h("h4", {}, "over layers"),
          choice("show", ["probability", "log probability", "rank"], v.state.measure, (measure) => v.keep({ measure })),
        );
        chart.layout(panel.clientWidth);
        table.layout();
      },
      update() {
        const there = at();
        table.select(there.pos, there.row);
        sayMissing();
        title.textContent = where(there);
        const cell = cellOf(there);
        for (const part of [list.el, figures, pinning, courseTitle, chart.el]) part.hidden = !cell;
        askCourses(there);
        if (!cell) return drawPins(there.row);
        const picked = pickedToken(cell);
        list.show(
          cell.ids.map((id, i) => ({
            id,
            name: token(id),
            value: number(cell.probs[i]),
            share: Number.isFinite(cell.probs[i]) ? cell.probs[i] : 0,
            title: `${token(id)}, id ${id}`,
          })),
          (item) => item.id === picked,
        );
        const away = inPage("course", there.pos) ? "" : "; what is over layers here is in the notebook";
        figures.textContent = `entropy ${number(cell.entropy)} · KL to output ${number(cell.KL)} nats${away}`;
        drawPinning(cell, picked, there.pos);
        chart.el.style.visibility = courseTitle.style.visibility = courses.size ? "" : "hidden"; // nothing jumps
        drawPins(there.row);
        if (courses.size) drawChart(cell, picked, there);
      },
      sentence() {
        const there = at();
        const course = courses.get(v.now.token);
        return (
          sentence(there) +
          (course ? `; ${token(v.now.token)} ${number(course.probs[there.row])}, rank ${number(course.ranks[there.row], 0)}` : "")
        );
      },
      python() {
        const there = at();
        const cell = cellOf(there);
        return cell ? lensPython(v.state, there, pickedToken(cell)) : "";
      },
      table() {
        const columns = [
          "pos",
          "token",
          "place",
          "rank",
          "says next",
          "id",
          "probability",
          "entropy",
          "KL to the output",
        ];
        const lines = [];
        for (const pos of [...held.keys()]
          .sort((a, b) => b - a)
          .flatMap((which) =>
            range(size)
              .map((i) => which * size + i)
              .filter((pos) => pos < n)
              .reverse(),
          ))
          for (const row of range(rows).reverse()) {
            const cell = cellOf({ pos, row });
            cell.ids.forEach((id, i) =>
              lines.push([pos, shown(tokens[pos]), after(row), i, token(id), id, cell.probs[i], cell.entropy, cell.KL]),
            );
          }
        return { columns, rows: lines };
      },
    };
  },
});

/** Scale and ticks of the chart: { low, high, ticks, place, values(course) }. */
function lensAxis(measure, courses, vocabulary) {
  if (measure === "rank") {
    const high = Math.log10(vocabulary);
    const ticks = Object.fromEntries(
      [1, 10, 100, 1000, 10000, 100000].filter((rank) => rank < vocabulary).map((rank) => [rank - 1, String(rank - 1)]),
    );
    return { ticks, place: (rank) => 1 - Math.log10(rank + 1) / high, values: ({ ranks }) => ranks };
  }
  if (measure === "log probability") {
    const ticks = { 1: "1", 0.01: "1e-2", 0.0001: "1e-4", 0.000001: "≤1e-6" };
    return {
      ticks,
      place: (p) => 1 - Math.log(Math.max(p, LENS_FLOOR)) / Math.log(LENS_FLOOR),
      values: ({ probs }) => probs,
    };
  }
  const most = Math.max(0, ...courses.flatMap(({ probs }) => [...probs].filter(Number.isFinite)));
  const high = [0.001, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5].find((one) => one >= most) ?? 1;
  return { high, ticks: { 0: "0", [high / 2]: String(high / 2), [high]: String(high) }, values: ({ probs }) => probs };
}

/** Python for the probability and the rank of a token at a place. */
function lensPython({ lens, site }, { pos, row }, id) {
  const tuned = "# tuned: the TunedLens that was given to the view\n";
  if (site === "resid_post") {
    const read = lens === "tuned" ? `${tuned}lens = tuned.read(` : "lens = gs.logit_lens(model, ";
    const only = `only(layer=${row - 1}).mean`;
    return `${read}prompt, ${id}, positions=${pos})\nlens.log_prob.${only}.exp(), lens.rank.${only}, lens.kl.${only}`;
  }
  const name = row === 0 ? "hook_embed" : `blocks.${row - 1}.hook_${site}`;
  return [
    `_, cache = model.run_with_cache(prompt, names_filter="${name}")`,
    `logits = model.softcap(model.unembed(model.ln_final(cache["${name}"])))`,
    `log_probs = logits[0, ${pos}].float().log_softmax(-1)`,
    `log_probs[${id}].exp(), (log_probs > log_probs[${id}]).sum()`,
  ].join("\n");
}
