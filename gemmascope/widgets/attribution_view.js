// What each part of the model added to the logit of token A, or to that of A minus that of B: as a waterfall or a grid,
// opened from a layer to its heads and the tokens they took it from, or to its experts and neurons.

import { attributionGrid } from "./attribution_grid.js";
import {
  MAX_TOKENS,
  addsUp,
  signColours,
  signedBars,
  signedNumber,
  sourceTokens,
  tokenChoice,
} from "./attribution_parts.js";
import { waterfall } from "./attribution_waterfall.js";
import { clamp, hex, missing, number, place, plural, range, shown } from "./numbers.js";
import { button, choice, h, scale } from "./parts.js";
import { view } from "./view.js";

const WRITES = { embed: "the embedding", attn: "attention", mlp: "the feed-forward", ple: "the per-layer input" };
const SOURCES = 24; // in the list

export const attributionView = view({
  name: "Attribution",
  note:
    "What each part of the model added to a logit, or to the difference of two: the scales of all norms frozen from this " +
    "run, before the soft cap, later layer scalars counted in. The parts add up.",
  keys:
    "In the picture arrows go to the next part, PageUp and PageDown to the next layer, [ and ] to the next head, Enter into " +
    "the parts of a part; Escape goes back.",
  build(v) {
    const { tokens, layers, kinds, n_heads: nHeads, n_experts: nExperts, softcap } = v.data;
    const n = tokens.length;
    const label = (pos) => `${pos} ${shown(tokens[pos])}`;
    const site = (layer, kind) => (kind === "embed" ? "hook_embed" : `blocks.${layer}.hook_${kind}_out`);
    const indexOf = ({ layer, kind }) => (kind === "embed" ? 0 : 1 + layer * kinds.length + kinds.indexOf(kind));
    const parts = [
      { layer: null, kind: "embed" },
      ...layers.flatMap((_, layer) => kinds.map((kind) => ({ layer, kind }))),
    ];
    const nameOf = ({ layer, kind }) => (kind === "embed" ? "the embedding" : `${WRITES[kind]} of layer ${layer}`);

    // What is looked at: the part whose site was selected last, or the one that a head or an expert belongs to.
    let kind = null;
    let before = null;
    function follow(now) {
      const written = /^(?:blocks\.(\d+)\.)?hook_(embed|attn|mlp|ple)(?:_out)?$/.exec(now.site ?? "");
      const fits = written && (written[2] === "embed" || Number(written[1]) === now.layer);
      if (fits && now.site !== before?.site) kind = written[2];
      else if (now.head !== null && now.head !== before?.head) kind = "attn";
      else if (now.expert !== null && now.expert !== before?.expert) kind = "mlp";
      else if (kind === "embed" && now.layer !== before?.layer) kind = "attn";
      before = now;
    }
    const strongest = (values) =>
      values.reduce((best, x, i) => (Math.abs(x) > (Math.abs(values[best]) || 0) ? i : best), 0);
    function looked(components) {
      const now = v.now;
      if (kind === "embed") return parts[0];
      if (now.layer === null) return parts[1 + strongest(components.values.values.slice(1))];
      return { layer: place(now.layer, layers.length), kind: kinds.includes(kind) ? kind : "attn" };
    }
    const at = () => place(v.now.pos, n, v.data.pos);
    const choose = ({ layer, kind: chosen, head, expert }, more = {}) =>
      v.select({
        ...(layer === null ? {} : { layer }),
        site: site(layer, chosen),
        ...(head === undefined ? {} : { head }),
        ...(expert === undefined ? {} : { expert }),
        ...more,
      });

    // Controls.
    const pair = () => [now.components.correct.id, now.components.wrong?.id ?? null];
    function compare(correct, wrong) {
      const [first, second] = now.components.likeliest.map(({ id }) => id);
      const usual = correct === first && wrong === second; // which goes with the position
      v.keep(usual ? { correct: null, wrong: null } : { correct, wrong });
    }
    const chooseA = tokenChoice(v, "logit of", null, (id) => compare(id, pair()[1] === id ? pair()[0] : pair()[1]));
    const chooseB = tokenChoice(v, "minus", "nothing", (id) =>
      compare(pair()[0] === id ? (pair()[1] ?? pair()[0]) : pair()[0], id),
    );
    const usual = button("the two likeliest", () => v.keep({ correct: null, wrong: null }), {
      title: "Compare the two likeliest tokens, wherever the position goes",
    });
    const step = (by) => v.select({ pos: clamp(at() + by, 0, n - 1) });
    const back = button("‹", () => step(-1), { ariaLabel: "Position before" });
    const next = button("›", () => step(1), { ariaLabel: "Position after" });
    const where = h("b", { dir: "auto" });
    const form = choice("as", ["waterfall", "grid"], v.state.form, (chosen) => v.keep({ form: chosen }));
    const controls = h("div", { className: "controls" }, chooseA.el, chooseB.el, usual);
    controls.append(h("span", { className: "choice" }, back, " after ", where, " ", next), form);

    // The picture, and what opens below it.
    const headBy = (by) =>
      now.part?.kind === "attn" && choose({ ...now.part, head: clamp(now.head + by, 0, nHeads - 1) });
    const layerBy = (by) =>
      now.part &&
      choose({
        layer: clamp((now.part.layer ?? (by > 0 ? -1 : 0)) + by, 0, layers.length - 1),
        kind: now.part.kind === "embed" ? "attn" : now.part.kind,
      });
    const walk = { "[": () => headBy(-1), "]": () => headBy(1), PageUp: () => layerBy(-1), PageDown: () => layerBy(1) };
    const into = (el) => () => !el.hidden && el.focus();
    const list = signedBars(v, "Parts", {
      pick: (item) => choose(...item.chosen),
      peek: (item) => v.say(item ? item.said : sentence()),
      others: {
        ...walk,
        Enter: () => into(inner.el.hidden ? list.el : now.part.kind === "attn" ? strip.el : inner.el)(),
        Escape: () => picture().el.focus(),
      },
    });
    const inner = signedBars(v, "Parts of a part", {
      pick: (item) => choose(...item.chosen),
      peek: (item) => v.say(item ? item.said : sentence()),
      others: { ...walk, Escape: into(list.el) },
    });
    const strip = sourceTokens(v, {
      pick: (key) => choose({ ...now.part, head: now.head }, { key }),
      peek: (key) => v.say(key === null || !now.sources ? sentence() : saidOfSource(key)),
      others: { ...walk, Escape: into(list.el) },
    });
    const deeper = { ...walk, Enter: into(list.el) };
    const fall = waterfall(v, {
      pick: (i) => i < parts.length && choose(parts[i]),
      peek: (i) => v.say(i === null ? sentence() : said(steps()[i])),
      others: deeper,
    });
    const grid = attributionGrid(v, {
      pick(part) {
        choose(part);
        v.refresh(); // its cursor also goes where nothing else is selected
      },
      peek: (text) => v.say(text ?? sentence()),
      said,
      others: deeper,
    });
    const picture = () => (v.state.form === "grid" ? grid : fall);
    const heading = () => h("h4");
    const [total, listTitle, stripTitle, innerTitle] = [heading(), heading(), heading(), heading()];
    const line = () => h("p", { className: "sum" });
    const [sum, listSum, stripSum, innerSum] = [line(), line(), line(), line()];
    const legend = h("div", { className: "legend" });
    const stripLegend = h("div", { className: "legend" });
    const sourcePanel = h("div", { className: "panel" }, stripTitle, strip.el, stripLegend, stripSum);
    const innerPanel = h("div", { className: "panel" }, innerTitle, inner.el, innerSum);
    const opened = h(
      "div",
      { className: "opened" },
      h("div", { className: "panel" }, listTitle, list.el, listSum),
      sourcePanel,
      innerPanel,
    );
    v.body.append(h("div", { className: "attribution" }, controls, total, legend, fall.el, grid.el, sum, opened));

    // Numbers.
    let now = {}; // what is drawn: the answers, and the place in them
    let lacking = false;
    function need(question, args) {
      const found = v.recall(question, args);
      if (found) return found;
      lacking = true;
      v.show(question, args, v.refresh);
      return null;
    }
    const steps = () => [
      ...parts.map((part, i) => ({ ...part, value: now.components.values.values[i] })),
      { layer: null, kind: "rest", value: now.components.rest },
      { layer: null, kind: "total", value: now.components.total },
    ];
    const what = ({ correct, wrong }) =>
      `logit of ${shown(correct.text)}${wrong ? ` minus logit of ${shown(wrong.text)}` : ""}`;
    const row = (array, i) => [...array.values.subarray(i * array.shape[1], (i + 1) * array.shape[1])];
    function said({ layer, kind, head, expert, value }) {
      const { components, heads, experts } = now;
      const one = (name, x) => `${name}: ${Number.isFinite(x) ? signedNumber(x, 4) : "no number"}`;
      if (kind === "rest") return one("Everything else, which no component wrote", value);
      if (kind === "total") return one(`The ${what(components)} before the soft cap`, value);
      if (head !== undefined) return one(`Head ${head} of layer ${layer}`, heads ? row(heads, layer)[head] : NaN);
      if (expert !== undefined && experts) {
        const x = row(experts, layer)[expert === null ? 0 : expert + 1];
        const name = expert === null ? `The dense branch of layer ${layer}` : `Expert ${expert} of layer ${layer}`;
        return Number.isNaN(x) && expert !== null ? `${name}: the token did not choose it` : one(name, x);
      }
      const name = nameOf({ layer, kind });
      return one(name[0].toUpperCase() + name.slice(1), components.values.values[indexOf({ layer, kind })]);
    }
    function saidOfSource(key) {
      const { values, attention } = now.sources;
      return `Head ${now.head} of layer ${now.part.layer} from ${label(key)}: ${signedNumber(values.values[key], 4)}, attention ${number(attention.values[key])}`;
    }
    function sentence() {
      if (now.pos !== at()) return `After ${label(at())}: ${v.page ? "not in this page" : "not read yet"}`;
      const { part, head, key } = now;
      const whole = `After ${label(now.pos)}, ${what(now.components)} ${signedNumber(now.components.total)}`;
      if (v.state.form === "grid" && part.kind !== "embed") return `${whole} · ${grid.told()}`;
      const opened =
        part.kind === "attn" && now.heads
          ? [said({ ...part, head })]
          : part.kind === "mlp" && nExperts && now.experts
            ? [said({ ...part, expert: now.expert })]
            : [];
      const source = part.kind === "attn" && now.sources && v.now.key !== null ? [saidOfSource(key)] : [];
      return [whole, said(part), ...opened, ...source].join(" · ");
    }

    // Drawing.
    function drawPicture() {
      const { components, part } = now;
      const { correct, wrong, likeliest, probs } = components;
      total.textContent = `${what(components)}, after ${label(now.pos)}: ${signedNumber(components.total)}`;
      const colours = signColours(v.theme).map((colour, i) => {
        const patch = h("i", { className: "patch" });
        patch.style.background = colour;
        return h("span", {}, patch, i ? " lowers it" : " raises it");
      });
      const none = missing([...components.values.values]);
      const missed = none
        ? [h("span", {}, h("i", { className: "missing" }), ` ${plural(none, "component")} without a number`)]
        : [];
      const capped = softcap
        ? [h("span", {}, `after the soft cap of ${softcap}: ${signedNumber(components.capped)}`)]
        : [];
      if (v.state.form === "grid") {
        const cursor = part.kind === "embed" ? { layer: 0, kind: "attn" } : { ...part };
        if (part.kind === "mlp" && nExperts) cursor.expert = now.expert;
        if (part.kind === "attn" && v.now.head !== null) cursor.head = now.head;
        const reach = grid.show(now, cursor);
        const ends = { 0: signedNumber(-reach, 2), 0.5: "0", 1: signedNumber(reach, 2) };
        const hatched = h("span", {}, h("i", { className: "missing" }), nExperts ? " not chosen" : " no number");
        const embedding = h("span", {}, `the embedding, not in the grid: ${signedNumber(components.values.values[0])}`);
        legend.replaceChildren(
          scale("diverging", "adds", ends),
          nExperts ? hatched : "",
          embedding,
          ...capped,
          ...missed,
        );
      } else {
        const letters = ["A attention", "F feed-forward", ...(kinds.includes("ple") ? ["P per-layer input"] : [])];
        const short = fall.show(steps(), indexOf(part), said(part));
        legend.replaceChildren(...colours, short ? h("span", {}, letters.join(" · ")) : "", ...capped, ...missed);
      }
      const gap = addsUp(
        [...components.values.values],
        components.total,
        `The ${parts.length} components`,
        "the logits",
      );
      sum.textContent = `${gap} Everything else: ${signedNumber(components.rest, 6)}.`;
      chooseA.show(likeliest, probs.values, correct);
      chooseB.show(likeliest, probs.values, wrong);
    }
    function drawHeads(args) {
      const { part, heads } = now;
      const { layer } = part;
      const whole = now.components.values.values[indexOf(part)];
      const values = row(heads, layer);
      const { kind: sort, window, kv_source: source } = layers[layer];
      const about = `${sort === "global" ? "Global" : "Sliding"}${window ? `, window ${window}` : ""}${source === null ? "" : `, keys and values of layer ${source}`}`;
      listTitle.textContent = `Layer ${layer} attention, by head: ${signedNumber(whole)}`;
      const items = values.map((value, head) => ({
        name: `head ${head}`,
        value,
        chosen: [{ ...part, head }],
        said: said({ ...part, head }),
      }));
      list.show(items, (item) => item.chosen[0].head === now.head);
      listSum.textContent = `${addsUp(values, whole, "The heads", "the attention")} ${about}.`;
      now.sources = need("sources", { ...args, layer, head: now.head });
      [sourcePanel.hidden, innerPanel.hidden] = [!now.sources, !now.sources];
      if (!now.sources) return;
      const from = now.sources.values.values;
      const attention = now.sources.attention.values;
      now.key = place(v.now.key, n, strongest(from));
      stripTitle.textContent = `Where head ${now.head} took it from: ${signedNumber(values[now.head])}`;
      const reach = strip.show(from, attention, now.key);
      stripLegend.replaceChildren(
        scale("diverging", "adds", { 0: signedNumber(-reach, 2), 0.5: "0", 1: signedNumber(reach, 2) }),
        n > MAX_TOKENS ? `the ${MAX_TOKENS} strongest of ${n} tokens` : "",
      );
      stripSum.textContent = addsUp([...from], values[now.head], "The tokens", `head ${now.head}`);
      innerTitle.textContent = "Sources, strongest first, with attention";
      const first = range(n)
        .sort((a, b) => Math.abs(from[b]) - Math.abs(from[a]))
        .slice(0, SOURCES)
        .filter((key) => attention[key] !== 0);
      const rows = first.map((key) => ({
        name: label(key),
        value: from[key],
        note: attention[key].toFixed(2),
        chosen: [{ ...part, head: now.head }, { key }],
        said: saidOfSource(key),
        key,
      }));
      inner.show(rows, ({ key }) => key === now.key);
      const others = from.reduce((sum, x, key) => (first.includes(key) ? sum : sum + x), 0);
      innerSum.textContent = first.length < n ? `The others add ${signedNumber(others)}.` : "";
    }
    function drawBranches(args) {
      const { part } = now;
      const { layer } = part;
      const whole = now.components.values.values[indexOf(part)];
      sourcePanel.hidden = true;
      innerPanel.hidden = !nExperts;
      if (!nExperts)
        return drawNeurons(args, list, listTitle, listSum, `Layer ${layer} feed-forward, by neuron`, whole);
      listTitle.textContent = `Layer ${layer} feed-forward: ${signedNumber(whole)}`;
      const values = row(now.experts, layer);
      const ran = range(values.length).filter((branch) => branch === 0 || !Number.isNaN(values[branch]));
      const items = ran.map((branch) => {
        const expert = branch ? branch - 1 : null;
        return {
          name: branch ? `expert ${expert}` : "dense",
          value: values[branch],
          chosen: [{ ...part, expert }],
          said: said({ ...part, expert }),
        };
      });
      list.show(items, (item) => item.chosen[0].expert === now.expert);
      listSum.textContent = addsUp(
        items.map(({ value }) => value),
        whole,
        "The branches",
        "the feed-forward",
      );
      const mine = items.find((item) => item.chosen[0].expert === now.expert);
      if (mine)
        return drawNeurons(
          { ...args, expert: now.expert },
          inner,
          innerTitle,
          innerSum,
          now.expert === null ? "Neurons of the dense branch" : `Neurons of expert ${now.expert}`,
          mine.value,
        );
      innerTitle.textContent = `Expert ${now.expert}: ${label(now.pos)} did not choose it in layer ${layer}`;
      inner.show([], () => false);
      innerSum.textContent = "";
    }
    function drawNeurons(args, into, title, under, name, whole) {
      const { part } = now;
      const found = need("neurons", { expert: null, ...args, layer: part.layer });
      title.textContent = `${name}: ${signedNumber(whole)}`;
      if (!found) return;
      const values = [...found.values.values];
      const expert = args.expert === undefined ? {} : { expert: args.expert };
      const items = [...found.neurons.values].map((neuron, i) => ({
        name: `neuron ${neuron}`,
        value: values[i],
        chosen: [{ ...part, ...expert }, { neuron }],
        said: `${name}, ${neuron}: ${signedNumber(values[i], 4)}`,
        neuron,
      }));
      into.show(items, ({ neuron }) => neuron === v.now.neuron);
      const others = found.n - values.length;
      under.textContent = `${addsUp([...values, found.rest], whole, others ? `These and ${others} more` : "The neurons", "the whole")}${others ? ` The others add ${signedNumber(found.rest)}.` : ""}`;
    }

    return {
      paint() {
        const look = getComputedStyle(v.body.parentElement);
        v.theme.raised = look.getPropertyValue("--raised").trim();
        v.theme.paper = look.backgroundColor.match(/\d+/g).slice(0, 3).map(Number);
        form.querySelector("select").value = v.state.form;
        [fall.el.hidden, grid.el.hidden] = [v.state.form === "grid", v.state.form !== "grid"];
      },
      update() {
        const args = { pos: at(), correct: v.state.correct, wrong: v.state.wrong };
        const lacked = lacking;
        lacking = false;
        follow(v.now);
        where.textContent = label(args.pos);
        [back.disabled, next.disabled] = [args.pos === 0, args.pos === n - 1];
        usual.disabled = args.correct === null && args.wrong === null;
        const components = need("components", args);
        v.body.firstChild.classList.toggle("old", !components);
        if (!components) return;
        const part = looked(components);
        const wide = v.state.form === "grid";
        const heads = part.kind === "attn" || wide ? (need("heads", args)?.values ?? null) : null;
        const experts = nExperts && (part.kind === "mlp" || wide) ? (need("experts", args)?.values ?? null) : null;
        const strongestHead = heads && part.layer !== null ? strongest(row(heads, part.layer)) : 0;
        now = {
          pos: args.pos,
          components,
          part,
          heads,
          experts,
          head: place(v.now.head, nHeads, strongestHead),
          expert: place(v.now.expert, nExperts, null),
          sources: null,
        };
        drawPicture();
        const single = part.kind === "embed" || part.kind === "ple";
        opened.classList.toggle("attn", part.kind === "attn");
        if (part.kind === "attn" && heads) drawHeads(args);
        else if (part.kind === "mlp" && (experts || !nExperts)) drawBranches(args);
        else {
          [sourcePanel.hidden, innerPanel.hidden] = [true, true];
          listTitle.textContent = single ? said(part) : "";
          list.show([], () => false);
          listSum.textContent = single ? "It is written as a whole and has no parts." : "";
        }
        if (lacked && !lacking) v.notice("");
      },
      sentence,
      python() {
        if (!now.components) return "";
        const { part, head, expert, key, components } = now;
        const [correct, wrong] = pair();
        const call = (by) =>
          `gs.direct_logit_attribution(model, prompt, ${correct}, ${wrong === null ? "None" : wrong}${by}, pos=${now.pos})`;
        const shownAs = (name, cell, x) => `print(${name}.only(${cell}).mean.item())  # ${number(x, 6)}`;
        const one = part.kind === "embed" ? 'component="embed"' : `layer=${part.layer}, component="${part.kind}"`;
        const lines = [`parts = ${call("")}`, shownAs("parts", one, components.values.values[indexOf(part)])];
        if (part.kind === "attn" && now.heads)
          lines.push(
            `heads = ${call(', by="head"')}`,
            shownAs("heads", `layer=${part.layer}, head=${head}`, row(now.heads, part.layer)[head]),
          );
        if (part.kind === "attn" && now.sources)
          lines.push(
            `sources = ${call(', by="source"')}`,
            shownAs("sources", `layer=${part.layer}, head=${head}, key=${key}`, now.sources.values.values[key]),
          );
        if (part.kind === "mlp" && now.experts) {
          const x = row(now.experts, part.layer)[expert === null ? 0 : expert + 1];
          lines.push(
            `experts = ${call(', by="expert"')}`,
            shownAs(
              "experts",
              `layer=${part.layer}, expert=${expert === null ? '"dense"' : expert}`,
              Number.isNaN(x) ? 0 : x,
            ),
          );
        }
        return lines.join("\n");
      },
      table() {
        const columns = ["what", "layer", "part", "adds"];
        if (!now.components) return { columns, rows: [] };
        const rows = steps().map(({ layer, kind, value }) => ["component", layer, kind, value]);
        now.heads?.values.forEach((x, i) => rows.push(["head", Math.floor(i / nHeads), i % nHeads, x]));
        now.experts?.values.forEach((x, i) =>
          rows.push([
            "branch",
            Math.floor(i / (nExperts + 1)),
            i % (nExperts + 1) ? (i % (nExperts + 1)) - 1 : "dense",
            Number.isNaN(x) ? 0 : x,
          ]),
        );
        now.sources?.values.values.forEach((x, key) =>
          rows.push([`source of head ${now.head}`, now.part.layer, label(key), x]),
        );
        return { columns, rows };
      },
      picture: () => picture().canvas,
    };
  },
});
