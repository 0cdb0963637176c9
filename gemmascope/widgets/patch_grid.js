// A patching sweep as a grid that fills in while it runs: the page asks for one pass after another, so that to stop is
// to ask no more.

import { matrix } from "./matrix.js";
import { canonical, clamp, number, place, plural, range, shown } from "./numbers.js";
import { button, choice, h } from "./parts.js";
import { patchTokens } from "./patch_cell.js";
import { PATCH_DIGITS, PATCH_SAID, patchColours, patchDigits, patchLegend } from "./patch_colours.js";
import { patchPrompts } from "./patch_prompts.js";
import { view } from "./view.js";

/** Axes that have a place in the selection. */
const PATCH_AXES = {
  layer: "layer",
  pos: "pos",
  query: "pos",
  key: "key",
  head: "head",
  expert: "expert",
  neuron: "neuron",
};
const PATCH_PLACES = ["facet", "row", "column"];
const PATCH_PANEL = 324; // pixels of the panel beside the grid, and between
const PATCH_NARROW = 860; // a view of fewer pixels has the panel below

export const patchGrid = view({
  name: ({ offers, title }) => (offers ? "Patching" : title),
  note: ({ offers, note }) =>
    offers
      ? "Each cell puts one activation of one run into the other, and its colour says how much of the difference " +
        "between the two runs comes with it: which place carries the information, by cause and not by correlation."
      : note,
  keys:
    "Enter runs the cell at the cursor again; PageUp and PageDown go from layer to layer, [ and ] from head to head, " +
    "or through the pictures of another axis.",
  build(v) {
    const { title, prompts, offers } = v.data;
    const live = Boolean(offers) && !v.page;
    let grid = null; // the answer on show: its values are filled in as cells come
    let of = null; // the settings it is of, as text
    let names = []; // of the entries of each axis: facet, row, column
    let image = null;
    let best = null; // the cell at the cursor, with what was chosen of it
    let running = null; // what stops the sweep that runs
    let busy = false; // one cell is being run again
    let told = null; // the cell that was run again last
    const own = {}; // the cursor on axes that no other view knows

    const settings = () => {
      const { site, by, direction, metric } = v.state;
      return offers ? { site, by, direction, metric } : {};
    };

    // Parts
    const facts = h("p", { className: "baselines" });
    const controls = h("div", { className: "controls" });
    const start = button("Run", () => (running ? stop() : go()), { className: "commit", hidden: !live });
    const bar = h("progress", { max: 1, value: 0, ariaLabel: "Cells that have run" });
    const left = h("span", { className: "left" });
    const taken = button("", () => take(), { hidden: true });
    const facets = h("span", {});
    const map = matrix(v, {
      name: "Cells of the sweep",
      pick: (row, column) => choose({ row, column }),
      peek: (place) => v.say(sentence(place ?? {})),
      others: {
        Enter: () => again(),
        PageUp: () => along("layer", -1),
        PageDown: () => along("layer", 1),
        "[": () => along("head", -1),
        "]": () => along("head", 1),
      },
    });
    map.canvas.addEventListener("click", () => again());
    map.el.hidden = true;
    const legend = h("p", { className: "legend" });
    const heading = h("h4");
    const lines = h("p", { className: "figures" });
    const rerun = button("Run this cell", () => again(), { className: "commit", hidden: !live });
    const why = h("small", { hidden: true });
    const tokens = patchTokens(v, (token) => v.select({ token }));
    const panel = h("div", { className: "panel" }, heading, lines, rerun, why, tokens.el);
    const pair = prompts && patchPrompts(v, prompts, (column) => pickColumn(column));
    const progress = h("div", { className: "controls sweeping" }, start, bar, left, facets, taken);
    if (pair) v.body.append(pair.el);
    const picture = h("div", { className: "picture" }, map.el, legend);
    v.body.append(facts, controls, progress, h("div", { className: "patch-split" }, picture, panel));

    // Cells
    const sizes = () => grid.cell.shape;
    const numberAt = ({ facet, row, column }) => grid.cell.values[(facet * sizes()[1] + row) * sizes()[2] + column];
    function share(value) {
      const { clean, corrupted } = grid.baselines;
      return grid.shares ? (value - corrupted) / (clean - corrupted) : value;
    }
    /** A figure, with three digits of the largest change. */
    const amount = (x) => number(x, grid.shares ? 3 : clamp(patchDigits(image.reach), 3, PATCH_DIGITS));
    const waiting = () => grid.values.values.reduce((count, value) => count + Number.isNaN(value), 0);
    /** The axes as facet, row, column; null where there are fewer. */
    const axes = () => [...Array(3 - grid.axes.length).fill(null), ...grid.axes];
    const named = (axis) => PATCH_SAID[axis.name] ?? axis.name;
    const label = (axis, i) => {
      const entry = axis.entries[i];
      if (axis.tokens[i] !== null) return `${entry} ${shown(axis.tokens[i])}`;
      return typeof entry === "number" ? `${named(axis)} ${entry}` : shown(String(entry ?? "–")).replaceAll("·", " ");
    };
    /** Where the selection or the reader put the cursor on an axis; null where nobody did. */
    function chosenOn(axis, i) {
      if (!axis) return 0;
      const now = axis.name in PATCH_AXES ? v.now[PATCH_AXES[axis.name]] : null;
      const found = now === null ? -1 : axis.entries.indexOf(now < 0 ? now + axis.entries.length : now);
      if (found >= 0) return found;
      const kept = i === 0 && v.state.facet !== null ? axis.entries.indexOf(v.state.facet) : -1;
      if (kept >= 0) return kept;
      return axis.name in own ? clamp(own[axis.name], 0, axis.entries.length - 1) : null;
    }
    /** How far a figure is from that of a cell that did nothing; -1 for none. */
    const far = (value) => (Number.isFinite(value) ? Math.abs(share(value) - grid.nothing) : -1);
    /** The cursor: on axes where nobody put it, that of the strongest cell; before any has run, of the last position. */
    function at() {
      const chosen = axes().map(chosenOn);
      const key = canonical(chosen);
      if (best?.key !== key) best = { key, place: chosen.includes(null) ? strongest(chosen) : chosen };
      const [facet, row, column] = best.place;
      return { facet, row, column };
    }
    function strongest(chosen) {
      const there = chosen.map((index, i) => (index === null ? range(sizes()[i]) : [index]));
      let [most, found] = [-1, there.map((all, i) => (axes()[i]?.name === "pos" ? all.at(-1) : all[0]))];
      for (const facet of there[0])
        for (const row of there[1])
          for (const column of there[2]) {
            const cell = numberAt({ facet, row, column });
            const reach = cell < 0 ? -1 : far(grid.values.values[cell]);
            if (reach > most) [most, found] = [reach, [facet, row, column]];
          }
      return found;
    }
    function choose(place) {
      if (!grid) return;
      const changes = {};
      const before = at();
      const to = { ...before, ...place };
      axes().forEach((axis, i) => {
        if (!axis) return;
        const index = to[PATCH_PLACES[i]];
        own[axis.name] = index;
        if (axis.name in PATCH_AXES) changes[PATCH_AXES[axis.name]] = axis.entries[index];
      });
      v.select(changes);
      if (to.facet !== before.facet) v.keep({ facet: axes()[0].entries[to.facet] });
      v.refresh();
    }
    const patch = (site, by) => v.keep({ site, by, facet: null });
    function pickSite(to) {
      const found = offers.sites.find((one) => one.site === to);
      patch(to, found ? found.by[0] : v.state.by);
    }
    /** The site that another view selected, where it can be patched and is not yet. */
    function elsewhere() {
      const hook = (v.now.site ?? "").replace(/^blocks\.\d+\./, "");
      return live && offers.sites.find((one) => one.hook === hook && one.site !== v.state.site);
    }
    const take = () => pickSite(elsewhere().site);
    /** Steps along an axis; where there is none of that name, through the pictures. */
    function along(name, by) {
      if (!grid) return;
      const i = Math.max(
        0,
        axes().findIndex((axis) => axis?.name === name),
      );
      choose({ [PATCH_PLACES[i]]: clamp(at()[PATCH_PLACES[i]] + by, 0, sizes()[i] - 1) });
    }
    /** Which of a column's positions the cells are of: that of the run which they change. */
    const side = () => (v.state.direction === "noising" ? 0 : 1);
    function pickColumn(column) {
      const pos = prompts.columns[column][side()];
      if (pos >= 0) v.select({ pos });
    }

    // Running
    function stop() {
      running?.abort();
      running = null;
      status();
    }
    async function go() {
      if (!grid || busy) return;
      const mine = (running = new AbortController());
      const [on, asked] = [grid, settings()];
      const [begun, before] = [performance.now(), waiting()];
      status();
      while (running === mine && !v.signal.aborted && waiting()) {
        const came = await v.run("cells", { ...asked, first: on.heard }, mine.signal);
        if (came === null || running !== mine) break;
        came.numbers.values.forEach((cell, i) => (on.values.values[cell] = came.values.values[i]));
        on.heard += came.numbers.values.length;
        draw();
        const done = before - waiting();
        status(((performance.now() - begun) / done) * waiting());
      }
      if (running === mine) running = null;
      best = null;
      status();
      v.refresh();
    }
    async function again() {
      if (!live || !grid || busy || running || numberAt(at()) < 0) return;
      const [key, cell] = [of, numberAt(at())];
      busy = true;
      status();
      const answer = await v.run("cell", { ...settings(), number: cell });
      busy = false;
      if (answer) told = { key, cell, ...answer };
      status();
      v.refresh();
    }
    function status(milliseconds = null) {
      if (!grid) return;
      const [n, wait] = [grid.values.values.length, waiting()];
      const time = milliseconds === null ? "" : `, about ${Math.max(1, Math.round(milliseconds / 1000))} s left`;
      start.textContent = running ? "Stop" : wait === n ? "Run" : wait ? "Go on" : "Done";
      start.disabled = busy || (!running && wait === 0);
      [bar.value, bar.hidden] = [(n - wait) / n, !live];
      left.textContent = wait || offers ? `${n - wait} of ${plural(n, "cell")}${wait ? time : ""}` : plural(n, "cell");
      rerun.disabled = busy || Boolean(running);
      rerun.textContent = busy ? "Running …" : "Run this cell";
      [why.textContent, why.hidden] = ["Stop the sweep to run one cell.", !running];
    }

    // Drawing
    function draw() {
      image = null;
      update();
      const [, down, across] = axes();
      legend.replaceChildren(...patchLegend(grid, image, waiting(), down, across));
    }
    /** The position at the cursor, in the run that cells change. */
    function posAt() {
      const i = grid ? axes().findIndex((axis) => axis?.name === "pos") : -1;
      if (i >= 0) return axes()[i].entries[at()[PATCH_PLACES[i]]];
      const last = prompts.columns.findLast(([a, b]) => a >= 0 && b >= 0)[side()];
      return place(v.now.pos, prompts[["clean", "corrupted"][side()]].length, last);
    }
    function update() {
      if (pair) {
        const pos = posAt();
        const column = prompts.columns.findIndex((one) => one[side()] === pos);
        pair.select(Math.max(column, 0));
      }
      const other = elsewhere();
      taken.hidden = !other;
      if (other) taken.textContent = `Patch ${other.hook}, selected elsewhere`;
      if (!grid) return;
      const to = at();
      if (!image || image.facet !== to.facet) image = patchColours(v, grid, grid.values.values.map(share), to.facet);
      const wide = v.body.clientWidth;
      map.show({
        image: image.image,
        rows: names[1],
        columns: names[2],
        at: to,
        sentence: sentence(),
        most: 56,
        room: wide < PATCH_NARROW ? wide : wide - PATCH_PANEL,
      });
      if (axes()[0]) facets.querySelector("select").value = String(to.facet);
      tell(to);
    }
    function offerFacets() {
      const [facet] = axes();
      if (!facet) return facets.replaceChildren();
      const name = (entry, i) => (typeof entry === "number" ? String(entry) : label(facet, i));
      const options = facet.entries.map((entry, i) => [String(i), name(entry, i)]);
      facets.replaceChildren(choice(named(facet), options, "0", (i) => choose({ facet: Number(i) })));
    }
    function tell(place) {
      const cell = numberAt(place);
      const mine = told && told.key === of && told.cell === cell ? told : null;
      heading.textContent = where(place);
      const value =
        cell < 0 ? NaN : Number.isNaN(grid.values.values[cell]) ? (mine?.value ?? NaN) : grid.values.values[cell];
      const line = (name, text) => h("span", {}, h("span", { className: "what" }, name), " ", h("b", {}, text));
      const spread = grid.interval && cell >= 0 ? [0, 1].map((i) => amount(grid.interval.values[cell * 2 + i])) : null;
      lines.replaceChildren(
        ...(Number.isNaN(value)
          ? [h("span", {}, cell < 0 ? "This place does not exist." : "This cell has not run.")]
          : [line(grid.unit, amount(value)), grid.shares ? line("share recovered", number(share(value))) : ""]),
        spread ? line("95 % of means", `${spread[0]} to ${spread[1]}`) : "",
      );
      tokens.el.hidden = !mine;
      if (mine) tokens.show(mine, v.now.token);
    }
    const where = (place) =>
      axes()
        .map((axis, i) => axis && `${named(axis)} ${label(axis, place[PATCH_PLACES[i]])}`)
        .filter(Boolean)
        .map((text) => text.replace(/^(\w+) \1 /, "$1 "))
        .join(", ");
    /** Of the cell at the cursor, or at a place that the mouse is over. */
    function sentence(over = {}) {
      if (!grid) return "";
      const place = { ...at(), ...over };
      const cell = numberAt(place);
      if (cell < 0) return `${where(place)}: no such cell`;
      const value = grid.values.values[cell];
      if (Number.isNaN(value)) return `${where(place)}: not run`;
      const recovered = grid.shares ? `, ${number(share(value))} of the difference recovered` : "";
      return `${where(place)}: ${grid.unit} ${amount(value)}${recovered}`;
    }
    function head() {
      const metric = offers?.metrics.find(({ name }) => name === v.state.metric);
      const about = metric?.tokens.length ? ` of ${metric.tokens.map(shown).join(" over ")}` : "";
      const each = Object.entries(grid.baselines).map(([name, value]) => `${name} run ${number(value)}`);
      facts.replaceChildren(
        h("b", { dir: "auto" }, `${grid.unit}${about}`),
        each.length ? `: ${each.join(", ")}` : "",
        pair
          ? h(
              "small",
              { dir: "auto" },
              `${title}; ${plural(pair.differing, "token")} differ${pair.differing === 1 ? "s" : ""}`,
            )
          : "",
      );
    }
    function offer() {
      if (!offers) return;
      const { site, by, direction, metric } = v.state;
      const known = offers.sites.find((one) => one.site === site);
      const bys = known?.by ?? [by];
      const joined = (list) => list.map((name) => PATCH_SAID[name] ?? name).join(" × ");
      if (!live) {
        controls.replaceChildren(`${site} by ${joined(by)}, ${direction}`);
        return;
      }
      const sites = offers.sites.map((one) => [one.site, `${one.site}: ${one.meaning}`]);
      const all = bys.some((one) => canonical(one) === canonical(by)) ? bys : [...bys, by];
      const focused = controls.getRootNode().activeElement?.ariaLabel;
      controls.replaceChildren(
        choice("patch", known ? sites : [...sites, [site, site]], site, pickSite),
        choice(
          "by",
          all.map((one) => [canonical(one), joined(one)]),
          canonical(by),
          (to) => patch(site, JSON.parse(to)),
        ),
        choice(
          "direction",
          [
            ["denoising", "denoising: clean into corrupted"],
            ["noising", "noising: corrupted into clean"],
          ],
          direction,
          (to) => v.keep({ direction: to }),
        ),
        choice(
          "measure",
          offers.metrics.map(({ name }) => name),
          metric,
          (to) => v.keep({ metric: to }),
        ),
      );
      [...controls.querySelectorAll("select")].find((one) => one.ariaLabel === focused)?.focus();
    }

    return {
      paint() {
        const key = canonical(settings());
        if (key !== of) {
          stop();
          v.notice("");
          [grid, of] = [null, key];
        }
        offer();
        v.show("grid", settings(), (answer) => {
          if (grid !== answer) {
            [grid, best, map.el.hidden] = [answer, null, false];
            names = axes().map((axis) => (axis ? range(axis.entries.length).map((i) => label(axis, i)) : [""]));
            head();
            offerFacets();
          }
          draw();
          status();
          v.refresh();
        });
      },
      update,
      sentence,
      python() {
        const cell = grid ? numberAt(at()) : 0;
        const row = `result.table.iloc[${Math.max(cell, 0)}]`;
        if (!offers) return row;
        const { site, by, direction, metric } = v.state;
        const made = offers.metrics.find(({ name }) => name === metric).python;
        const what = `${JSON.stringify(site)}, (${by.map((name) => `"${name}"`).join(", ")})`;
        const way = direction === "noising" ? ', direction="noising"' : "";
        return [
          made === null ? "# metric: the function that gs.patch_grid was given" : `metric = ${made}`,
          `result = gs.activation_patching(model, clean, corrupted, metric, ${what}${way}${offers.call})`,
          row,
        ].join("\n");
      },
      table() {
        if (!grid) return { columns: [], rows: [] };
        const cells = [];
        for (let facet = 0; facet < sizes()[0]; facet++)
          for (let row = 0; row < sizes()[1]; row++)
            for (let column = 0; column < sizes()[2]; column++) {
              const cell = numberAt({ facet, row, column });
              if (cell >= 0) cells.push({ places: [facet, row, column], value: grid.values.values[cell] });
            }
        cells.sort((a, b) => far(b.value) - far(a.value));
        const none = (x) => (Number.isNaN(x) ? null : x);
        const known = axes()
          .map((axis, i) => [axis, i])
          .filter(([axis]) => axis);
        return {
          columns: [...known.map(([axis]) => axis.name), grid.unit, ...(grid.shares ? ["recovered"] : [])],
          rows: cells.map(({ places, value }) => [
            ...known.map(([axis, i]) => axis.entries[places[i]]),
            none(value),
            ...(grid.shares ? [none(share(value))] : []),
          ]),
        };
      },
      picture: () => map.canvas,
    };
  },
});
