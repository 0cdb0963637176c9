// Components switched off: staged, committed, compared with the run that has them, and kept in a log.

import { beforeAfter, changed, fixed, likeliestTokens } from "./before_after.js";
import { benchLog, benchPython } from "./bench_log.js";
import { benchKey, benchMark, benchName, benchSwitch, benchSwitches } from "./bench_switches.js";
import { EXPERT_HOWS } from "./expert_hows.js";
import { canonical, clamp, largest, missing, number, place, plural, shown } from "./numbers.js";
import { button, choice, h, onKeys, paintOn, reveal, scale } from "./parts.js";
import { view } from "./view.js";

const MAX_LOG = 50;
const BENCH_SITES = { attn: "hook_attn_out", head: "attn.hook_z", mlp: "hook_mlp_out", dense: "hook_dense_out" };
Object.assign(BENCH_SITES, {
  moe: "hook_moe_out",
  expert: "moe.router.hook_logits",
  neuron: "mlp.hook_post",
  ple: "hook_ple_out",
});
const NO_ABLATION = { on: [], kind: "zero", experts: "reroute", donor: 0 };
const chosenOf = ({ on, kind, experts, donor }) => ({ on, kind, experts, donor });

export const ablationBench = view({
  name: "Ablation bench",
  note: "Switch components off (dashed until committed), commit, and see what becomes of the next token. Every commit is kept in the log.",
  keys:
    "Among the switches, Space or Enter switches, arrows move, PageUp and PageDown change the layer, [ and ] the component. " +
    "Ctrl+Enter commits, Ctrl+Z undoes, Ctrl+Shift+Z redoes. In the log, arrows go to another entry.",
  build(v) {
    const { tokens, layers, names, kinds, donors, pair, block } = v.data;
    const n = tokens.length;
    const fixedPage = v.page ? "This page has no model to run: open the view in a notebook to switch components." : "";
    let running = false;
    let shownFor = null; // the commit whose effect is drawn, as one text
    let effect = null;

    const nameOf = (component) => benchName(names, component);
    const namesOf = (on) => (on.length ? on.map(nameOf).join(", ") : "nothing");
    const committed = () => chosenOf(v.state.log[v.state.at] ?? NO_ABLATION);
    const staged = () => (v.page ? committed() : chosenOf(v.state)); // a page can commit nothing
    /** What of a choice matters to the model. */
    function essence({ on, kind, experts, donor }) {
      const routed = on.some(([what]) => what === "expert");
      const others = on.some(([what]) => what !== "expert");
      const how = [routed && experts, others && kind, others && kind === "resample" && donor];
      return canonical([on.map(benchKey).sort(), how]);
    }
    const same = (a, b) => essence(a) === essence(b);
    const at = () => place(v.now.pos, n, n - 1);
    const questionOf = (chosen) => ({ ...chosen, block: Math.floor(at() / block) });
    const keysOf = ({ on }) => new Set(on.map(benchKey));

    // Switches
    function flip(component) {
      const key = benchKey(component);
      const on = v.state.on.filter((one) => benchKey(one) !== key);
      stage({ on: on.length === v.state.on.length ? [...on, component] : on });
    }
    function stage(changes) {
      v.keep(changes);
      if (v.state.live) commit();
    }
    function select([what, layer, index]) {
      const site = BENCH_SITES[what] ? `blocks.${layer}.${BENCH_SITES[what]}` : v.now.site;
      v.select({ layer, site, ...(["head", "expert", "neuron"].includes(what) ? { [what]: index } : {}) });
    }
    function fold(layer) {
      const { toggled } = v.state;
      v.keep({ toggled: toggled.includes(layer) ? toggled.filter((one) => one !== layer) : [...toggled, layer] });
    }
    const grid = benchSwitches(v, { flip, move: select, fold });

    // Commits
    async function commit() {
      if (running || v.page) return v.say(commitButton.title);
      const chosen = staged();
      if (same(chosen, committed())) return v.say("Nothing was switched since the last commit.");
      running = true;
      drawControls();
      const pos = at();
      const question = questionOf(chosen);
      const answer = await v.run("effect", question);
      running = false;
      if (!answer) return drawControls();
      take(answer, question);
      const kept = [...v.state.log, { ...chosen, ...figures(pos) }].slice(-MAX_LOG);
      v.keep({ log: kept, at: kept.length - 1 });
      if (v.state.live && !same(staged(), committed())) commit(); // switched while it ran
    }
    function take(answer, question) {
      effect = answer;
      shownFor = canonical(question);
      paintStrip();
    }
    /** Goes to an entry of the log, -1 for the run as it is. */
    function goTo(entry) {
      if (running || v.page) return;
      const to = clamp(entry, -1, v.state.log.length - 1);
      v.keep({ at: to, ...chosenOf(v.state.log[to] ?? { ...v.state, on: [] }) });
    }
    const undo = () => goTo(v.state.at - 1);
    const redo = () => goTo(v.state.at + 1);
    v.body.onkeydown = (event) => {
      if (!(event.ctrlKey || event.metaKey) || running) return;
      const text = event.target.tagName === "INPUT" && event.target.type === "text";
      const key = event.key.toLowerCase();
      if (key === "enter") commit();
      else if (key === "z" && !text) event.shiftKey ? redo() : undo();
      else return;
      event.preventDefault();
      event.stopPropagation();
    };

    // Figures at the position
    const first = (run, pos) =>
      likeliestTokens(effect, effect.texts, pos % block, Infinity).reduce((a, b) => (b.p[run] > a.p[run] ? b : a));
    const ends = (of, pos) => (of ? [0, 1].map((run) => of.values[run * n + pos]) : null);
    const clean = (x) => (Number.isFinite(x) ? x : null);
    function figures(pos) {
      return {
        pos,
        kl: clean(effect.kl.values[pos]),
        loss: effect.loss,
        difference: ends(effect.difference, pos)?.map(clean) ?? null,
        first: [0, 1].map((run) => ({ text: first(run, pos).text.slice(0, 40), p: clean(first(run, pos).p[run]) })),
      };
    }
    const pairName = pair ? `logit ${pair.map(({ text }) => shown(text)).join(" − ")}` : "";
    const facts = h("dl", { className: "facts" });
    function drawFacts() {
      const { kl, loss, difference } = figures(at());
      const by = ([before, after]) =>
        before === null || after === null
          ? ""
          : ` (${after < before ? "−" : "+"}${fixed(Math.abs(after - before), 4)})`;
      const told = [
        ["KL(before ‖ after)", `${fixed(kl, 4)} nats`],
        ["loss on the prompt", `${changed(loss, 4)} nats${by(loss)}`],
        ...(difference ? [[pairName, `${changed(difference, 3)}`]] : []),
      ];
      facts.replaceChildren(
        ...told.map(([name, value]) => h("div", {}, h("dt", { dir: "auto" }, name), h("dd", {}, value))),
      );
    }

    // The prompt, coloured by what the ablation does at each position
    const chips = tokens.map((text, pos) =>
      h(
        "span",
        { className: "token", role: "gridcell", id: v.id("bench", pos) },
        h("span", { className: "text", dir: "auto" }, shown(text)),
      ),
    );
    const strip = h(
      "div",
      { className: "strip", role: "grid", tabIndex: 0, ariaLabel: "Prompt, by KL" },
      h("div", { role: "row" }, ...chips),
    );
    const legend = h("div", { className: "legend" });
    let lit = 0;
    const goPos = (pos) => v.select({ pos: clamp(pos, 0, n - 1) });
    onKeys(strip, (columns, lines) => goPos(at() + columns + (Math.abs(lines) === Infinity ? lines : lines * 10)));
    strip.addEventListener("click", (event) => {
      const chip = event.target.closest(".token");
      if (chip) goPos(chips.indexOf(chip));
    });
    function paintStrip() {
      const { values } = effect.kl;
      const top = largest(values.filter(Number.isFinite)) || 1;
      const none = missing(values);
      legend.replaceChildren(
        scale("surprise", "KL(before ‖ after) of what each token says next", { 0: "0", 1: `${number(top, 2)} nats` }),
        none ? h("span", {}, h("i", { className: "missing" }), ` ${plural(none, "position")} without a number`) : "",
      );
      chips.forEach((chip, pos) => {
        chip.classList.toggle("missing", !Number.isFinite(values[pos]));
        chip.title = `${pos} ${shown(tokens[pos])}, KL ${number(values[pos], 4)} nats`;
        if (Number.isFinite(values[pos])) paintOn(chip, v.theme.surprise(Math.max(0, values[pos]) / top));
      });
    }

    const bars = beforeAfter(v, "Next token before and after", (token) => v.select({ token }));

    // Neurons of the selected layer
    const neuronList = h("span", { className: "units", role: "group", ariaLabel: "Neurons" });
    const neuronTitle = h("h4", {});
    const neuronField = h("input", { type: "number", min: 0, ariaLabel: "Neuron to switch", placeholder: "neuron" });
    const flipField = () => {
      const index = neuronField.valueAsNumber;
      const layer = place(v.now.layer, layers.length);
      if (!(Number.isInteger(index) && index >= 0 && index < layers[layer].neurons))
        return v.say(`Layer ${layer} has neurons 0 to ${layers[layer].neurons - 1}.`);
      flipNeuron(["neuron", layer, index]);
    };
    function flipNeuron(component) {
      flip(component);
      select(component);
    }
    neuronField.addEventListener("keydown", (event) => event.key === "Enter" && !event.ctrlKey && flipField());
    const neurons = h(
      "div",
      { className: "neurons" },
      neuronTitle,
      h(
        "div",
        { className: "controls" },
        ...(v.page ? [] : [neuronField, button("Switch", flipField, { ariaLabel: "Switch this neuron" })]),
        neuronList,
      ),
    );
    function drawNeurons() {
      const layer = place(v.now.layer, layers.length);
      const pos = at();
      const off = staged()
        .on.filter(([what, l]) => what === "neuron" && l === layer)
        .map(([, , index]) => index);
      const draw = (ids, values) => {
        neuronTitle.textContent = `${v.data.experts ? "Neurons of the dense branch" : "Neurons"} of layer ${layer}${ids.length ? `, largest at ${pos} ${shown(tokens[pos])}` : ""}`;
        const all = [...new Set([...off, ...ids])];
        neurons.hidden = v.page && !all.length;
        const focused = neuronList.contains(document.activeElement) && document.activeElement.dataset.key;
        neuronList.replaceChildren(
          ...all.map((index) => {
            const el = benchSwitch(names, ["neuron", layer, index], String(index), flipNeuron);
            benchMark(el, keysOf(staged()), keysOf(committed()), fixedPage);
            const value = values[ids.indexOf(index)];
            if (value !== undefined) el.title += `, activation ${number(value)}`;
            el.classList.toggle("here", index === v.now.neuron);
            return el;
          }),
        );
        if (focused) [...neuronList.children].find((el) => el.dataset.key === focused)?.focus();
      };
      if (v.page) return draw([], []);
      v.show("neurons", { layer, pos }, ({ ids, values }) => draw([...ids.values], [...values.values]));
    }

    // Controls
    const kindName = v.id("kind");
    const kindOf = (kind) => {
      const why = fixedPage || kinds[kind];
      const radio = h("input", { type: "radio", name: kindName, value: kind, disabled: Boolean(why) });
      radio.addEventListener("change", () => stage({ kind }));
      return h("label", { title: why || `${kind} ablation` }, radio, " ", kind);
    };
    const radios = Object.keys(kinds).map(kindOf);
    const donorChoice = choice(
      "from",
      donors.map((text, i) => [String(i), `${i} ${shown(text)}`]),
      "0",
      (i) => stage({ donor: Number(i) }),
    );
    const expertChoice = choice(
      "experts",
      ["reroute", "silence"].map((how) => [how, EXPERT_HOWS[how].slice(0, 2).join(": ")]),
      "reroute",
      (experts) => stage({ experts }),
    );
    const live = h("input", { type: "checkbox", disabled: v.page });
    live.addEventListener("change", () => {
      v.keep({ live: live.checked });
      if (live.checked) commit();
    });
    const commitButton = button("Commit", commit, { className: "commit" });
    const undoButton = button("Undo", undo);
    const redoButton = button("Redo", redo);
    const clearButton = button("All on", () => !v.page && stage({ on: [] }), { title: "Switch every component on" });
    const pending = h("span", { className: "pending" });
    const settings = h(
      "div",
      { className: "controls" },
      h("span", { className: "radios", role: "radiogroup", ariaLabel: "Kind of ablation" }, ...radios),
      donorChoice,
      v.data.experts ? expertChoice : "",
    );
    const actions = h(
      "div",
      { className: "controls" },
      h("span", { className: "buttons" }, commitButton, undoButton, redoButton, clearButton),
      h("label", {}, live, " as I switch"),
      pending,
    );
    function drawControls() {
      const { state } = v;
      radios.forEach((label) => (label.firstChild.checked = label.firstChild.value === staged().kind));
      donorChoice.hidden = state.kind !== "resample";
      donorChoice.querySelector("select").value = String(state.donor);
      Object.assign(expertChoice.querySelector("select"), { value: state.experts, disabled: v.page });
      live.checked = state.live;
      const ready = !same(staged(), committed());
      commitButton.textContent = running ? "Running …" : "Commit";
      // Not `disabled`: a button that is would lose the focus, and with it the keys.
      commitButton.ariaDisabled = String(running || v.page || !ready);
      commitButton.title =
        fixedPage ||
        (running
          ? "The model runs: wait for it"
          : ready
            ? "Run the model (Ctrl+Enter)"
            : "Nothing was switched since the last commit");
      undoButton.ariaDisabled = String(running || v.page || state.at < 0);
      redoButton.ariaDisabled = String(running || v.page || state.at >= state.log.length - 1);
      clearButton.ariaDisabled = String(v.page || !state.on.length);
      const off = `${plural(state.on.length, "component")} off`;
      pending.title = namesOf(state.on);
      pending.textContent = fixedPage || (running ? `${off}, running …` : ready ? `${off}, not committed` : off);
    }

    // Sets
    const setName = h("input", { type: "text", maxLength: 60, ariaLabel: "Name of the set", placeholder: "name" });
    const saveSet = () => {
      const name = setName.value.trim();
      if (!name || !v.state.on.length)
        return v.say(name ? "Nothing is off: switch something off to save it." : "Give the set a name.");
      setName.value = "";
      v.keep({ sets: { ...v.state.sets, [name]: v.state.on } });
    };
    setName.addEventListener("keydown", (event) => event.key === "Enter" && !event.ctrlKey && saveSet());
    const setList = h("span", { className: "buttons" });
    const saving = v.page ? [] : [setName, button("Save", saveSet, { ariaLabel: "Save the set" })];
    const sets = h("div", { className: "controls" }, "sets", ...saving, setList);
    function drawSets() {
      const without = (name) => Object.fromEntries(Object.entries(v.state.sets).filter(([other]) => other !== name));
      sets.hidden = v.page && !Object.keys(v.state.sets).length;
      setList.replaceChildren(
        ...Object.entries(v.state.sets).flatMap(([name, on]) => [
          button(name, () => stage({ on }), { title: `Switch off ${namesOf(on)}`, dir: "auto", disabled: v.page }),
          button("×", () => v.keep({ sets: without(name) }), { ariaLabel: `Forget ${name}`, disabled: v.page }),
        ]),
      );
    }

    const log = benchLog(v, namesOf, goTo);
    const left = h("div", { className: "panel" }, grid.el, neurons, sets);
    const right = h("div", { className: "panel" }, facts, bars.el);
    v.body.append(
      settings,
      actions,
      h("div", { className: "bench" }, left, right),
      legend,
      strip,
      h("h4", {}, "Log"),
      log.el,
    );

    function drawEffect() {
      const question = questionOf(committed());
      const draw = () => {
        drawFacts();
        bars.show(likeliestTokens(effect, effect.texts, at() % block), v.now.token);
      };
      if (shownFor === canonical(question)) return draw();
      if (running) return; // what comes takes its place
      v.show("effect", question, (answer) => {
        if (shownFor === canonical(question)) return;
        take(answer, question);
        draw();
        v.say(sentence());
      });
    }
    function sentence() {
      if (!effect) return "";
      const { kl } = figures(at());
      const { on, kind } = committed();
      const [was, is] = [first(0, at()), first(1, at())];
      const off = on.length ? `${namesOf(on)} off (${kind})` : "nothing is switched off";
      return `${off}; after ${at()} ${shown(tokens[at()])}: KL ${fixed(kl, 4)} nats, ${shown(was.text)} ${fixed(was.p[0], 4)} → ${shown(is.text)} ${fixed(is.p[1], 4)}`;
    }
    return {
      paint() {
        if (effect) paintStrip();
        drawControls();
        drawSets();
        log.draw();
      },
      update() {
        const pos = at();
        const here = { ...v.now, layer: v.now.layer === null ? null : place(v.now.layer, layers.length) };
        grid.show({ off: keysOf(staged()), committed: keysOf(committed()), why: fixedPage, here });
        drawNeurons();
        for (const chip of [chips[lit], chips[pos]]) chip.ariaSelected = String(chip === chips[pos]);
        lit = pos;
        strip.setAttribute("aria-activedescendant", chips[pos].id);
        reveal(strip, chips[pos]);
        drawEffect();
      },
      sentence,
      python() {
        if (!effect) return "";
        const top = likeliestTokens(effect, effect.texts, at() % block);
        return benchPython(effect.python, figures(at()), pair, top);
      },
      table: log.table,
    };
  },
});
