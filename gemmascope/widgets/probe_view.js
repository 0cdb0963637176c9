// How well a probe reads a property, by layer, against what any labels would give; where it errs; what it says of text.

import { layerChart } from "./layer_chart.js";
import { clamp, number, place, plural, range, shown } from "./numbers.js";
import { button, choice, h, onKeys, paintOn, reveal, scale, svg } from "./parts.js";
import { scoreStrip } from "./score_strip.js";
import { view } from "./view.js";

const PROBE_CONTROL = "#d55e00"; // as in the style sheet
const PROBE_CERTAIN = 6; // a logit whose colour is full: p = 0.998
const PROBE_KEYS =
  "In the chart, arrows change the layer. In the table of what was said, arrows choose whose examples are listed, " +
  "Escape lists all. In the list of examples, up and down. In a text, left and right go from token to token. Enter " +
  "reads the text that was typed.";

export const probeView = view({
  name: "Probe",
  note: "What a linear probe reads from activations, on examples it has not seen, and what any labels would give.",
  keys: PROBE_KEYS,
  build(v) {
    const { axis, places, unit, folds, kind, classes, versus, answered, sites } = v.data;
    const [mean, low, high] = probeRows(v.data.score);
    const control = v.data.control ? probeRows(v.data.control) : null;
    const chance = v.data.chance.values;
    const n = places.length;
    const can = (question) => answered.includes(question);
    const best = range(n).reduce((a, b) => (gain(b) > gain(a) ? b : a));
    function gain(i) {
      return control ? mean[i] - control[0][i] : mean[i];
    }
    const nameOf = (i) =>
      axis === "probe" ? "the probe" : axis === "k" ? plural(places[i], "neuron") : `layer ${places[i]}`;

    // What is looked at.
    function at() {
      if (axis !== "layer") return place(v.state.place, n, best);
      const { layer } = v.now;
      if (layer === null || places.includes(layer)) return layer === null ? best : places.indexOf(layer);
      return range(n).reduce((a, b) => (Math.abs(places[b] - layer) < Math.abs(places[a] - layer) ? b : a));
    }
    function pick(i) {
      if (axis !== "layer") return v.keep({ place: i });
      v.select(sites.length ? { layer: places[i], site: sites[i] } : { layer: places[i] });
    }
    const target = () => (classes.length > 2 ? place(v.state.target, classes.length) : 0);

    // The parts.
    const chart = layerChart(v, { name: `${unit} by ${axis}`, pick });
    const legend = h("div", { className: "legend" });
    const title = h("h4");
    const verdict = h("p", { className: "verdict" });
    const neurons = h("div", { className: "probed-neurons" });
    const said = h("div", { className: "said" });
    const panel = h("div", { className: "panel" }, title, verdict, neurons, said);
    const left = h("div", {}, legend, chart.el);
    v.body.append(h("div", { className: "split" }, left, panel));

    const confusion = probeConfusion(v, { classes, pick: (cell) => v.keep({ cell, example: null }) });
    const dots = h("div", { className: "chart dots" });
    const errors = h("p", { className: "note" });
    if (can("held_out")) said.append(h("h4", {}, "held-out examples"), classes.length ? confusion.el : dots, errors);

    const listTitle = h("h4");
    const list = probeExamples(v, (example) => v.keep({ example }));
    const all = button("All examples", () => v.keep({ cell: null, example: null }));
    const strip = scoreStrip(v, { name: "Example", told: (pos) => tellToken(shownExample, pos) });
    const stripTitle = h("p", { className: "note" });
    const colours = h("div", { className: "controls probed-colours" });
    let shownExample = null;
    let drawn = false; // the texts, since the last update began
    if (can("examples")) v.body.append(h("div", { className: "heading" }, listTitle, all), list.el);

    const typed = h("input", {
      type: "text",
      ariaLabel: "Text to read",
      placeholder: "Text to read",
      value: v.state.text,
      dir: "auto",
    });
    const read = button("Read it", commit, { className: "commit" });
    const projection = scoreStrip(v, { name: "Text read", told: (pos) => tellToken(shownText, pos) });
    const readNote = h("p", { className: "note" });
    let shownText = null; // { text, answer }
    let reading = false;
    typed.addEventListener("keydown", (event) => event.key === "Enter" && commit());
    if (can("project")) {
      const box = h("div", { className: "reader" }, typed, read);
      v.body.append(colours, stripTitle, strip.el, h("h4", {}, "your own text"), box, readNote, projection.el);
    }

    async function commit() {
      if (reading || v.page) return;
      if (!typed.value.trim()) return v.notice("There is no text to read: type some.");
      [reading, read.disabled, readNote.textContent] = [true, true, "Reading …"];
      const text = typed.value;
      const answer = await v.run("project", { text });
      [reading, read.disabled, readNote.textContent] = [false, false, ""];
      if (!answer) return;
      shownText = { text, answer };
      v.keep({ text });
      if (v.state.text === text) drawTexts();
    }

    // Words.
    const interval = (i) => `${number(low[i])} to ${number(high[i])}`;
    function judged(i) {
      const named = unit[0].toUpperCase() + unit.slice(1);
      const over = `95 % interval over ${plural(folds, "fold")}: ${interval(i)}`;
      const score = `${named} ${number(mean[i])} on held-out examples (${over}); chance ${number(chance[i])}.`;
      if (!control) return [score, "There was no control task, so that nothing says what other labels would give."];
      const gives = versus.endsWith("s") ? "give" : "gives";
      const beside = `The ${versus} ${gives} ${number(control[0][i])}, selectivity ${number(gain(i))}`;
      const nothing = "within the interval: no evidence that this is readable here.";
      if (low[i] <= control[0][i]) return [score, `${beside}, which is ${nothing}`];
      if (low[i] <= chance[i]) return [score, `${beside}, but chance is ${nothing}`];
      return [score, `${beside}, which is more than the interval.`];
    }
    const evident = (i) => control !== null && low[i] > Math.max(control[0][i], chance[i]);
    /** What the probe says at a token: the score that colours it, and the class it means. */
    function scoresAt({ answer }, i, pos) {
      const [, length, width] = answer.scores.shape;
      const first = (i * length + pos) * width;
      return [...answer.scores.values.subarray(first, first + width)];
    }
    function tellToken(what, pos) {
      if (!what) return "";
      const scores = scoresAt(what, at(), pos);
      const where = `${pos} ${shown(what.answer.texts[pos])}`;
      const own = scores[target()];
      if (!classes.length) return `${where}: ${number(own)}`;
      const two = classes.length === 2;
      const which = two ? (own > 0 ? 1 : 0) : scores.indexOf(Math.max(...scores));
      const share =
        kind !== "logistic"
          ? ""
          : `, p = ${number(two ? 1 / (1 + Math.exp(-Math.abs(own))) : probeShares(scores)[which])}`;
      const score = two ? number(own) : `${number(own)} of ${shown(classes[target()])}`;
      return `${where}: score ${score}, read as ${shown(classes[which])}${share}`;
    }

    // Drawing.
    function drawChart(i) {
      const values = [...mean, ...low, ...high, ...chance, ...(control ? control.flatMap((row) => [...row]) : [])];
      const axisValues = probeTicks(
        Math.min(...values.filter(Number.isFinite)),
        unit === "accuracy" ? 1 : Math.max(...values.filter(Number.isFinite)),
      );
      const series = [{ values: chance, className: "chance", colour: v.theme.muted, dots: n > 1 ? "none" : "all" }];
      const lined = (className, [values, low, high], colour) => ({
        values,
        className,
        colour,
        dots: "all",
        band: { low, high },
      });
      if (control) series.push(lined("control", control, PROBE_CONTROL));
      series.push(lined("probe", [mean, low, high]));
      chart.show({
        ...axisValues,
        names: places.map(String),
        series,
        at: i,
        height: n > 1 ? 240 : 160,
        sentence: sentence(),
      });
    }
    function drawLegend() {
      const line = (className, text) => h("span", {}, h("i", { className: `probe-line ${className}` }), ` ${text}`);
      legend.replaceChildren(
        h("span", {}, `${unit} by ${axis}; bands: 95 % over folds`),
        line("probe", "probe"),
        control ? line("control", versus) : h("span", {}, "no control task was run"),
        line("chance", "chance"),
      );
    }
    /** Asks, and shows a part again when it can be drawn: what stands there until then is of something else. */
    function ask(question, args, parts, draw) {
      for (const part of parts) part.style.visibility = "hidden";
      v.show(question, args, (answer) => {
        draw(answer);
        for (const part of parts) part.style.visibility = "";
      });
    }
    function drawHeldOut(i) {
      ask("held_out", { place: i }, [said], (answer) => {
        if (!classes.length) return dots.replaceChildren(probeScatter(answer, v.data.span));
        const counts = answer.counts.values;
        confusion.show(counts, v.state.cell);
        const wrong = range(counts.length).reduce((sum, k) => sum + (k % (classes.length + 1) ? counts[k] : 0), 0);
        const total = counts.reduce((a, b) => a + b, 0);
        errors.textContent = `${wrong} of ${plural(total, "example")} read wrongly, by probes that had not seen them.`;
      });
    }
    function drawExamples(i) {
      const { cell } = v.state;
      all.hidden = cell === null;
      ask("examples", { place: i, cell }, [list.el, listTitle], (answer) => {
        const which = cell
          ? `${shown(classes[cell[0]])} read as ${shown(classes[cell[1]])}`
          : classes.length
            ? "wrong ones first"
            : "the farthest off first";
        listTitle.textContent = `examples, ${which}: ${answer.numbers.length} of ${answer.count}`;
        list.show(answer, v.state.example);
        const example = v.state.example ?? answer.numbers[0];
        if (!can("tokens") || example === undefined) return;
        ask("tokens", { example }, [strip.el, stripTitle], (tokens) => {
          shownExample = { answer: tokens, example };
          drawTexts();
          drawn = true;
        });
      });
    }
    function drawTexts() {
      if (!v.theme || !can("project")) return;
      const i = at();
      const both = [shownExample, shownText].filter(Boolean);
      const own = (what, pos) => scoresAt(what, i, pos)[target()];
      const found = both
        .flatMap((what) => range(what.answer.texts.length).map((pos) => Math.abs(own(what, pos))))
        .filter(Number.isFinite);
      const largest = found.reduce((a, b) => Math.max(a, b), 1e-6);
      const most = kind === "logistic" ? Math.min(largest, PROBE_CERTAIN) : largest;
      const [from, to] = v.data.span;
      const colourOf = (x) =>
        classes.length ? v.theme.diverging(0.5 + x / (2 * most)) : v.theme.probability((x - from) / (to - from || 1));
      const colour = (what) => (pos) => (Number.isFinite(own(what, pos)) ? colourOf(own(what, pos)) : null);
      for (const [part, what] of [
        [strip, shownExample],
        [projection, shownText],
      ]) {
        part.el.hidden = !what;
        const { texts, pos = null } = what?.answer ?? {};
        if (what) part.show({ texts, colour: colour(what), marked: pos, at: pos ?? texts.length - 1 });
      }
      stripTitle.hidden = !shownExample;
      if (shownExample) stripTitle.textContent = `example ${shownExample.example}; framed: the token that was probed`;
      const ticks = classes.length
        ? {
            0: `${most < largest ? "≤" : ""}${number(-most, 1)}`,
            0.5: "0",
            1: `${most < largest ? "≥" : ""}${number(most, 1)}`,
          }
        : { 0: number(from, 1), 1: number(to, 1) };
      const meaning =
        classes.length === 2
          ? `score: below 0 ${shown(classes[0])}, above 0 ${shown(classes[1])}`
          : classes.length
            ? "score"
            : "number read";
      colours.hidden = !both.length;
      colours.replaceChildren(
        classes.length > 2
          ? choice(
              "score of",
              classes.map((name, k) => [String(k), shown(name)]),
              String(target()),
              (k) => v.keep({ target: Number(k) }),
            )
          : "",
        scale(classes.length ? "diverging" : "probability", meaning, ticks),
      );
    }
    function drawNeurons(i) {
      const names = v.data.neurons[i] ?? [];
      neurons.replaceChildren(
        ...names.map(({ name, layer, neuron, expert }) => button(name, () => v.select({ layer, neuron, expert }))),
      );
      neurons.hidden = !names.length;
    }
    function sentence() {
      const i = at();
      const beside = control ? `, ${versus} ${number(control[0][i])}, selectivity ${number(gain(i))}` : ", no control";
      const found = `${nameOf(i)}: ${unit} ${number(mean[i])} (${interval(i)}), chance ${number(chance[i])}${beside}`;
      return evident(i) ? found : `${found}: no evidence`;
    }

    return {
      paint() {
        chart.layout(left.clientWidth);
        drawLegend();
        if (!can("project")) return;
        if (!reading) typed.value = v.state.text;
        [typed.disabled, read.disabled] = [v.page, v.page || reading];
        if (v.page) readNote.textContent = "Text is read by the model: in the notebook.";
        const { text } = v.state;
        if (!text) shownText = null;
        else if (shownText?.text !== text)
          v.show("project", { text }, (answer) => {
            shownText = { text, answer };
            drawTexts();
          });
      },
      update() {
        const i = at();
        drawChart(i);
        title.textContent = nameOf(i);
        verdict.replaceChildren(...judged(i).map((line) => h("span", {}, line)));
        verdict.classList.toggle("nothing", !evident(i));
        drawNeurons(i);
        if (can("held_out")) drawHeldOut(i);
        drawn = false;
        if (can("examples")) drawExamples(i);
        if (!drawn) drawTexts();
      },
      sentence,
      python: can("project") ? () => probePython(axis, places[at()], sites[at()], v.state.text) : undefined,
      table: () => ({
        columns: [axis, unit, "low", "high", "chance", ...(control ? [versus, "selectivity"] : [])],
        rows: range(n).map((i) => [
          places[i],
          mean[i],
          low[i],
          high[i],
          chance[i],
          ...(control ? [control[0][i], gain(i)] : []),
        ]),
      }),
    };
  },
});

const probeRows = ({ shape, values }) =>
  range(shape[0]).map((row) => values.subarray(row * shape[1], (row + 1) * shape[1]));
const probeShares = (xs) => {
  const most = Math.max(...xs);
  const powers = xs.map((x) => Math.exp(x - most));
  const sum = powers.reduce((a, b) => a + b, 0);
  return powers.map((p) => p / sum);
};

/** Round numbers from below `least` to above `most`: { low, high, ticks }. */
function probeTicks(least, most) {
  const step =
    [0.02, 0.05, 0.1, 0.2, 0.25, 0.5, 1, 2, 5, 10].find((one) => (most - least) / one <= 6) ?? (most - least) / 4;
  const [first, last] = [Math.floor(least / step + 1e-9), Math.ceil(most / step - 1e-9)];
  const marks = range(last - first + 1).map((k) => Number(((first + k) * step).toFixed(6)));
  return {
    low: first * step,
    high: Math.max(last, first + 1) * step,
    ticks: Object.fromEntries(marks.map((mark) => [mark, String(mark)])),
  };
}

/** What was said of each label's examples. `pick([label, said] or null)` hears of clicks and keys. */
function probeConfusion(v, { classes, pick }) {
  const n = classes.length;
  const row = (...cells) => h("div", { role: "row" }, ...cells);
  const head = (text, role) => h("div", { role, className: "name", title: shown(text), dir: "auto" }, shown(text));
  const cells = range(n * n).map((k) => h("div", { role: "gridcell", className: "count", id: v.id("cell", k) }));
  const el = h(
    "div",
    { className: "confusion", role: "grid", tabIndex: 0, ariaLabel: "What was said of each label's examples" },
    row(
      h("div", { role: "columnheader", className: "axes" }, "label ↓ said →"),
      ...classes.map((text) => head(text, "columnheader")),
    ),
    ...classes.map((text, i) => row(head(text, "rowheader"), ...cells.slice(i * n, (i + 1) * n))),
  );
  el.style.setProperty("--classes", n);
  let picked = null;
  const choose = (k) => pick(k === null || k === picked ? null : [Math.floor(k / n), k % n]);
  onKeys(
    el,
    (columns, rows) => {
      const k = picked ?? 0;
      const next = clamp(Math.floor(k / n) + rows, 0, n - 1) * n + clamp((k % n) + columns, 0, n - 1);
      if (picked === null || next !== picked) choose(picked === null ? 0 : next);
    },
    { Escape: () => choose(null) },
  );
  el.addEventListener("click", (event) => {
    const cell = event.target.closest("[role=gridcell]");
    if (cell) choose(cells.indexOf(cell));
  });
  return {
    el,
    show(counts, cell) {
      picked = cell ? cell[0] * n + cell[1] : null;
      cells.forEach((one, k) => {
        const label = Math.floor(k / n);
        const total = counts.subarray(label * n, (label + 1) * n).reduce((a, b) => a + b, 0);
        one.textContent = String(counts[k]);
        one.title = `${counts[k]} of ${total} ${shown(classes[label])} were read as ${shown(classes[k % n])}`;
        one.ariaSelected = String(k === picked);
        paintOn(one, v.theme.probability(total ? counts[k] / total : 0));
      });
      el.setAttribute("aria-activedescendant", picked === null ? "" : cells[picked].id);
    },
  };
}

/** Examples with their labels and what was said of them; `pick(number)` hears of clicks and keys. */
function probeExamples(v, pick) {
  const el = h("div", { className: "probed-examples", role: "listbox", tabIndex: 0, ariaLabel: "Examples" });
  let numbers = [];
  let at = 0;
  onKeys(el, (columns, rows) => numbers.length && pick(numbers[clamp(at + columns + rows, 0, numbers.length - 1)]));
  el.addEventListener("click", (event) => {
    const option = event.target.closest("[role=option]");
    if (option) pick(numbers[[...el.children].indexOf(option)]);
  });
  return {
    el,
    show({ numbers: given, labels, said, texts }, example) {
      numbers = given;
      at = Math.max(0, numbers.indexOf(example));
      const option = (i) =>
        h(
          "div",
          { role: "option", id: v.id("example", i), ariaSelected: String(i === at), title: shown(texts[i]) },
          h("span", { className: "mark" }, labels[i] === said[i] ? "✓" : "✗"),
          h(
            "span",
            { dir: "auto" },
            labels[i] === said[i] ? shown(labels[i]) : `${shown(labels[i])}, read as ${shown(said[i])}`,
          ),
          h("span", { className: "text" }, h("bdi", {}, shown(texts[i]))),
        );
      el.replaceChildren(...range(numbers.length).map(option));
      el.setAttribute("aria-activedescendant", numbers.length ? el.children[at].id : "");
      if (numbers.length) reveal(el, el.children[at]);
    },
  };
}

/** What was said of held-out examples against their labels, and the line where both are the same. */
function probeScatter({ labels, said }, [from, to]) {
  const [size, edge] = [220, 34];
  const all = [from, to, ...said.values];
  const { low, high, ticks } = probeTicks(Math.min(...all), Math.max(...all));
  const x = (value) => edge + ((value - low) / (high - low)) * (size - edge - 8);
  const y = (value) => size - edge - ((value - low) / (high - low)) * (size - edge - 8);
  const text = (value, x, y, anchor) => svg("text", { x, y, "text-anchor": anchor }, value);
  return svg(
    "svg",
    {
      viewBox: `0 0 ${size} ${size}`,
      role: "img",
      "aria-label": "What was said of held-out examples, against their labels",
    },
    ...Object.entries(ticks).flatMap(([value, name]) => [
      svg("line", { class: "rule", x1: edge, x2: size - 8, y1: y(Number(value)), y2: y(Number(value)) }),
      text(name, edge - 4, y(Number(value)) + 3.5, "end"),
      text(name, x(Number(value)), size - edge + 14, "middle"),
    ]),
    svg("line", { class: "cursor", x1: x(low), y1: y(low), x2: x(high), y2: y(high) }),
    ...[...labels.values].map((label, i) => svg("circle", { cx: x(label), cy: y(said.values[i]), r: 2 })),
    text("label →, said ↑", size - 8, size - 4, "end"),
  );
}

/** Python for the scores of the text that was read, or for the score of the place while none was. */
function probePython(axis, layer, site, text) {
  const probe = axis === "layer" ? `probes.probes[${layer}]` : "probe";
  if (!text.trim()) return `${probe}.scores.mean()`;
  return [
    `text = ${JSON.stringify(text)}`,
    `found = gs.collect(model, text, "${site}", positions=None)["${site}"]`,
    `${probe}.score(found)`,
  ].join("\n");
}
