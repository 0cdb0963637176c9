// The prompt as tokens, coloured by a number each has: the shared cursor of all other views.

import { clamp, largest, missing, number, place, plural, shown } from "./numbers.js";
import { choice, h, onKeys, paintOn, reveal, scale } from "./parts.js";
import { view } from "./view.js";

export const tokenStrip = view({
  name: "Tokens",
  note: "The prompt, token by token. What is selected here is selected in every linked view.",
  keys: "Arrows move along tokens and lines, Home and End go to the ends.",
  build(v) {
    const { tokens, ids, metrics } = v.data;
    const n = tokens.length;
    const label = (pos) => `${pos} ${shown(tokens[pos])}`;
    const chips = tokens.map((text, pos) =>
      h(
        "span",
        { className: "token", role: "gridcell", id: v.id("token", pos), title: `${label(pos)}, id ${ids[pos]}` },
        h("span", { className: "text", dir: "auto" }, shown(text)),
      ),
    );
    const row = h("div", { role: "row" });
    chips.forEach((chip, pos) => row.append(chip, ...(tokens[pos].includes("\n") ? [h("br")] : [])));
    const strip = h("div", { className: "strip", role: "grid", tabIndex: 0, ariaLabel: "Tokens" }, row);
    const controls = h("div", { className: "controls" });
    v.body.append(controls, strip);

    const metric = () => metrics.find(({ name }) => name === v.state.metric) ?? metrics[0];
    const at = () => place(v.now.pos, n, n - 1);
    const move = (pos) => v.select({ pos: clamp(pos, 0, n - 1) });
    onKeys(strip, (columns, lines) => {
      if (columns) return move(at() + columns);
      const here = chips[at()];
      const beyond = chips.filter((chip) => (chip.offsetTop - here.offsetTop) * lines > 0);
      if (!beyond.length) return;
      const line = beyond.at(lines > 0 ? 0 : -1).offsetTop;
      const beside = (chip) => Math.abs(chip.offsetLeft - here.offsetLeft);
      const nearest = beyond
        .filter((chip) => chip.offsetTop === line)
        .reduce((a, b) => (beside(b) < beside(a) ? b : a));
      move(chips.indexOf(nearest));
    });
    strip.addEventListener("click", (event) => {
      const chip = event.target.closest(".token");
      if (chip) move(chips.indexOf(chip));
    });

    return {
      paint() {
        const { name, unit, values } = metric();
        const top = largest(values.values) || 1;
        const none = missing(values.values);
        controls.replaceChildren(
          choice(
            "colour",
            metrics.map(({ name }) => name),
            name,
            (chosen) => v.keep({ metric: chosen }),
          ),
          scale("surprise", name, { 0: "0", 1: `${number(top, 2)} ${unit}` }),
          none ? h("span", {}, h("i", { className: "missing" }), ` ${plural(none, "token")} without a number`) : "",
        );
        chips.forEach((chip, pos) => {
          const value = values.values[pos];
          chip.classList.toggle("missing", !Number.isFinite(value));
          if (Number.isFinite(value)) paintOn(chip, v.theme.surprise(value / top));
        });
      },
      update() {
        const pos = at();
        chips.forEach((chip, i) => (chip.ariaSelected = String(i === pos)));
        strip.setAttribute("aria-activedescendant", chips[pos].id);
        reveal(strip, chips[pos]);
      },
      sentence() {
        const { name, unit, values } = metric();
        const value = values.values[at()];
        return `${label(at())}, id ${ids[at()]}, ${name} ${Number.isFinite(value) ? `${number(value)} ${unit}` : "has no value"}`;
      },
      python: () => `tokens = model.to_tokens(prompt)\ntokens[0, ${at()}], model.to_str_tokens(tokens[0])[${at()}]`,
      table: () => ({
        columns: ["pos", "token", "id", ...metrics.map(({ name }) => name)],
        rows: tokens.map((text, pos) => [
          pos,
          shown(text),
          ids[pos],
          ...metrics.map(({ values }) => values.values[pos]),
        ]),
      }),
    };
  },
});
