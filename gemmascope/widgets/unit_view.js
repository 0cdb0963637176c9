// One unit: where it is active, what it writes to the logits, and the next token when it is turned up or down.

import { beforeAfter, changed, fixed, likeliestTokens } from "./before_after.js";
import { canonical, largest, number, plural, shown } from "./numbers.js";
import { barList, button, h, scale } from "./parts.js";
import { unitExamples, unitHistogram } from "./unit_examples.js";
import { view } from "./view.js";

const MODES = { scale: "its activation times", add: "added everywhere" };

export const unitView = view({
  name: "Unit",
  note: "What one part of the model responds to, what it writes, and what the model says when it is turned up or down.",
  keys: "Among the examples, left and right move along the text, up and down to another one's peak. Ctrl+Enter commits.",
  build(v) {
    const { name, meaning, texts, signed, modes, selects } = v.data;
    const fixedPage = v.page ? "This page has no model to run: open the view in a notebook." : "";
    let found = null;
    let own = null; // { tokens, values } of the text of the user's own
    let wrote = null;
    let steered = null;
    let reading = !v.page;
    let running = false;

    // What is looked at
    const rowOf = (one) => ({ ...one, values: [...one.values.values] });
    const ownRow = () => {
      const values = [...own.values.values];
      return { text: "own", first: 0, at: peakOf(values), tokens: own.tokens, values };
    };
    const peakOf = (values) =>
      values.reduce((best, x, i) => (Number.isFinite(x) && !(x <= values[best]) ? i : best), 0);
    function place() {
      const { text, pos } = v.state;
      if (text === "own" && own) return { text, pos: Math.min(pos, own.tokens.length - 1) };
      if (text !== null && text !== "own") return { text, pos };
      return found?.top.length ? { text: found.top[0].text, pos: found.top[0].at } : null;
    }
    const asked = ({ text, pos }) => ({ text: text === "own" ? v.state.own : text, pos });
    const mode = () => v.state.mode ?? modes[0];
    const extent = () => (found ? Math.max(Math.abs(found.low), Math.abs(found.high)) : 1) || 1;
    const strength = () => v.state.strength ?? (mode() === "scale" ? 0 : Number(extent().toPrecision(2)));

    // Reading
    const progress = h("progress", { max: texts, value: 0, ariaLabel: "Texts read" });
    const told = h("span", {});
    const halt = button("Stop", () => {
      reading = !reading;
      drawReading();
      if (reading) readOn();
    });
    function readOn() {
      v.show("read", { start: found?.texts ?? 0 }, (answer) => {
        found = answer;
        if (found.texts >= texts) reading = false;
        drawFound();
        v.refresh();
        if (reading && !v.signal.aborted) readOn();
      });
    }
    function drawReading() {
      const read = found?.texts ?? 0;
      progress.value = read;
      progress.hidden = read >= texts;
      halt.textContent = reading ? "Stop" : "Read on";
      halt.hidden = read >= texts || v.page;
      const none = found?.missing ? `; ${plural(found.missing, "token")} without a number` : "";
      told.textContent = `${read < texts ? `${read} of ` : ""}${plural(texts, "text")}, ${plural(found?.tokens ?? 0, "token")}${none}`;
    }

    // Activations
    const histogram = h("div", { className: "chart histogram" });
    const facts = h("p", { className: "note" });
    const legend = h("div", { className: "legend" });
    const colour = (value) =>
      signed ? v.theme.diverging(0.5 + value / (2 * extent())) : v.theme.attention(value / extent());
    const examples = unitExamples(v, (row, pos) => {
      v.keep({ text: row.text, pos });
      v.select(selects);
    });
    function drawFound() {
      drawReading();
      const most = number(extent(), 2);
      legend.replaceChildren(
        signed
          ? scale("diverging", "activation", { 0: `−${most}`, 0.5: "0", 1: most })
          : scale("attention", "activation", { 0: "0", 1: most }),
      );
      const active = found.active === null ? "–" : `${(found.active * 100).toFixed(1)} %`;
      facts.textContent = `Mean ${number(found.mean)}, from ${number(found.low)} to ${number(found.high)}; other than 0 at ${active} of tokens (<bos> left out).`;
      if (!found.top.length) facts.textContent += " It is active nowhere, so there are no examples.";
      examples.show(
        [
          ["Your text", own ? [ownRow()] : []],
          ["Most active", found.top.map(rowOf)],
          ["Least active", found.bottom.map(rowOf)],
        ],
        colour,
      );
    }
    function drawHistogram() {
      const mark = wrote?.value ?? NaN;
      const label = `Histogram of ${found.tokens} activations from ${number(found.low)} to ${number(found.high)}, log counts`;
      histogram.replaceChildren(unitHistogram({ ...found, counts: found.counts.values, mark, label }));
    }

    // A text of one's own
    const field = h("textarea", {
      rows: 2,
      maxLength: 10000,
      ariaLabel: "Your own text",
      placeholder: "Test a text of your own",
      value: v.state.own,
      disabled: v.page,
    });
    async function readOwn() {
      const text = field.value;
      if (!text) return v.say("Write some text first.");
      const answer = await v.run("own", { text });
      if (!answer) return;
      own = answer;
      if (found) drawFound();
      v.keep({ own: text, text: "own", pos: ownRow().at, steered: null });
    }
    field.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey) return;
      event.preventDefault();
      event.stopPropagation();
      readOwn();
    });

    // What it writes
    const here = h("h4", {});
    const mostList = barList(v, "Made likelier", (item) => v.select({ token: item.id }));
    const leastList = barList(v, "Made less likely", (item) => v.select({ token: item.id }));
    function drawWrote() {
      const { most, least } = wrote;
      const top =
        Math.max(
          largest(most.map(({ value }) => Math.abs(value))),
          largest(least.map(({ value }) => Math.abs(value))),
        ) || 1;
      const items = (of) =>
        of.map(({ id, text, value }) => ({
          id,
          name: shown(text),
          title: `${shown(text)}, id ${id}`,
          share: Math.abs(value) / top,
          value: `${value < 0 ? "−" : "+"}${number(Math.abs(value))}`,
        }));
      mostList.show(items(most), ({ id }) => id === v.now.token);
      leastList.show(items(least), ({ id }) => id === v.now.token);
    }

    // Turned up or down
    const modeName = v.id("mode");
    const radios = modes.map((each) => {
      const radio = h("input", { type: "radio", name: modeName, value: each, disabled: v.page });
      radio.addEventListener("change", () => v.keep({ mode: each, strength: null }));
      return h("label", {}, radio, " ", MODES[each]);
    });
    const slider = h("input", { type: "range", ariaLabel: "Strength", disabled: v.page });
    const sliderValue = h("output", {});
    slider.addEventListener("input", () => (sliderValue.textContent = number(slider.valueAsNumber, 2)));
    slider.addEventListener("change", () => v.keep({ strength: slider.valueAsNumber }));
    const commitButton = button("Commit", commit, { className: "commit" });
    const effectFacts = h("p", { className: "note" });
    const bars = beforeAfter(v, "Next token before and after", (token) => v.select({ token }));
    const steerQuestion = () => ({ ...asked(place()), mode: mode(), strength: strength() });
    async function commit() {
      if (running || v.page || !place()) return v.say(commitButton.title);
      running = true;
      drawSteering();
      const question = steerQuestion();
      const answer = await v.run("steer", question);
      running = false;
      if (!answer) return drawSteering();
      steered = { question: canonical(question), answer };
      v.keep({ steered: { text: question.text, mode: question.mode, strength: question.strength } });
    }
    function drawSteering() {
      radios.forEach((label) => (label.firstChild.checked = label.firstChild.value === mode()));
      const most = mode() === "scale" ? 4 : Number((4 * extent()).toPrecision(2));
      Object.assign(slider, { min: -most, max: most, step: mode() === "scale" ? 0.25 : most / 80 });
      slider.value = strength();
      sliderValue.textContent = number(strength(), 2);
      commitButton.textContent = running ? "Running …" : "Commit";
      commitButton.ariaDisabled = String(running || v.page || !place());
      commitButton.title =
        fixedPage || (running ? "The model runs: wait for it" : "Run the model on this text (Ctrl+Enter)");
    }
    function drawSteered(answer) {
      const { kl, loss } = answer;
      const { mode: how, strength: by } = v.state.steered;
      effectFacts.textContent = `${MODES[how]} ${number(by, 2)}: KL(before ‖ after) ${fixed(kl, 4)} nats here, loss on the text ${changed(loss, 4)} nats`;
      bars.el.hidden = false;
      bars.show(likeliestTokens(answer, answer.texts, 0), v.now.token);
    }
    v.body.onkeydown = (event) => {
      if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
      event.preventDefault();
      event.stopPropagation();
      commit();
    };

    const title = h("h4", { className: "unit-name" }, name);
    const left = h(
      "div",
      { className: "panel" },
      title,
      h("p", { className: "note" }, meaning),
      histogram,
      facts,
      h("div", { className: "controls" }, progress, halt, told),
      h(
        "div",
        { className: "own" },
        field,
        button("Read", readOwn, { ariaLabel: "Read your text", disabled: v.page, title: fixedPage }),
      ),
      legend,
      examples.el,
    );
    const right = h(
      "div",
      { className: "panel" },
      here,
      h(
        "p",
        { className: "note" },
        "What it adds there to the logits before the soft cap, with the norms held as they were.",
      ),
      h(
        "div",
        { className: "two" },
        h("div", {}, h("h4", {}, "Likelier"), mostList.el),
        h("div", {}, h("h4", {}, "Less likely"), leastList.el),
      ),
      h("h4", {}, "Turn it up or down in this text"),
      h(
        "div",
        { className: "controls" },
        h("span", { className: "radios", role: "radiogroup", ariaLabel: "How it is changed" }, ...radios),
      ),
      h("div", { className: "controls" }, slider, sliderValue, commitButton),
      effectFacts,
      bars.el,
    );
    v.body.append(h("div", { className: "unit" }, left, right));

    function drawPlace() {
      const at = place();
      examples.stand(at.text, at.pos);
      const row = examples.rows().find((one) => one.text === at.text && one.tokens[at.pos - one.first] !== undefined);
      const token = row ? ` ${shown(row.tokens[at.pos - row.first])}` : "";
      here.textContent = `At ${at.pos}${token} of ${at.text === "own" ? "your text" : `text ${at.text}`}`;
      v.show("wrote", asked(at), (answer) => {
        wrote = answer;
        drawWrote();
        drawHistogram();
        v.say(sentence());
      });
      const done = v.state.steered;
      if (!done || done.text !== asked(at).text) {
        bars.el.hidden = true;
        effectFacts.textContent = done ? "Steered in another text; commit to see it in this one." : "";
        return;
      }
      const question = { ...done, pos: at.pos };
      if (steered?.question === canonical(question)) return drawSteered(steered.answer);
      v.show("steer", question, (answer) => {
        steered = { question: canonical(question), answer };
        drawSteered(answer);
      });
    }
    function sentence() {
      const at = place();
      if (!at) return found ? `${name} is active nowhere in the texts read` : "";
      return `${name} at ${here.textContent.replace(/^At /, "")}: ${wrote ? number(wrote.value) : "…"}`;
    }
    if (v.state.own && !own)
      v.show("own", { text: v.state.own }, (answer) => {
        own = answer;
        if (found) drawFound();
        v.refresh();
      });
    if (v.page)
      v.show("found", {}, (answer) => {
        found = answer;
        queueMicrotask(() => (drawFound(), v.refresh()));
      });
    else queueMicrotask(readOn);

    return {
      paint() {
        drawReading();
        drawSteering();
        if (found) drawFound();
      },
      update() {
        if (!found) return;
        drawSteering();
        drawHistogram();
        right.hidden = !place();
        if (place()) drawPlace();
      },
      sentence,
      python() {
        if (!wrote) return "";
        const lines = [wrote.setup.trim(), wrote.python + `  # ${number(wrote.value, 4)}`];
        if (steered && !bars.el.hidden) {
          const { pos } = place();
          lines.push(steered.answer.python, `p, q = (run[0, ${pos}].float().softmax(-1) for run in (before, logits))`);
          for (const { id, text, p } of likeliestTokens(steered.answer, steered.answer.texts, 0))
            lines.push(
              `print(f"{p[${id}]:.4f} -> {q[${id}]:.4f}")  # ${shown(text).slice(0, 40)} ${p.map((x) => fixed(x, 4)).join(" -> ")}`,
            );
        }
        return lines.join("\n");
      },
      table: () => ({
        columns: ["text", "pos", "token", "activation"],
        rows: examples
          .rows()
          .flatMap(({ text, first, tokens, values }) =>
            tokens.map((token, i) => [text, first + i, shown(token), values[i]]),
          ),
      }),
    };
  },
});
