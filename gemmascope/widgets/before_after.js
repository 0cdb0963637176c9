// The next token before and after an edit: two bars for each of the likeliest, one of them picked.

import { clamp, number, shown } from "./numbers.js";
import { h, onKeys, reveal } from "./parts.js";

/** The likeliest tokens of one row of a table that compare.py made, the likeliest of either run first:
 * [{ id, text, p: [before, after], logit: [before, after] }]. */
export function likeliestTokens({ ids, p, logit }, texts, row, most = 10) {
  const [runs, rows, width] = p.shape;
  const pair = (of, i) => [0, runs - 1].map((run) => of.values[(run * rows + row) * width + i]);
  const found = [];
  for (let i = 0; i < width; i++) {
    const id = ids.values[row * width + i];
    if (id >= 0) found.push({ id, text: texts[id] ?? String(id), p: pair(p, i), logit: pair(logit, i) });
  }
  const most_likely = ({ p }) => Math.max(...p.map((x) => (Number.isFinite(x) ? x : 0)));
  return found.sort((a, b) => most_likely(b) - most_likely(a)).slice(0, most);
}

/** "0.9123 → 0.0345", dashes for what is no number. */
export const changed = ([before, after], digits) => `${fixed(before, digits)} → ${fixed(after, digits)}`;

/** As Python's f"{x:.4f}" writes it, so that a copied line prints what was shown. */
export const fixed = (x, digits) => (x === null || !Number.isFinite(x) ? "–" : x.toFixed(digits));

/** A list of such tokens. pick(id) hears of clicks and keys. */
export function beforeAfter(v, label, pick) {
  let tokens = [];
  let at = -1;
  const list = h("div", { className: "pairs", role: "listbox", tabIndex: 0, ariaLabel: label });
  const choose = (i) => tokens.length && pick(tokens[clamp(i, 0, tokens.length - 1)].id);
  onKeys(list, (columns, rows) => choose(Math.max(at, rows > 0 || columns > 0 ? -1 : 0) + columns + rows));
  list.addEventListener("click", (event) => {
    const option = event.target.closest("[role=option]");
    if (option) choose([...list.children].indexOf(option));
  });
  const bar = (share, run) =>
    h("span", { className: `bar ${run}`, style: `width: ${(Number.isFinite(share) ? clamp(share, 0, 1) : 0) * 100}%` });
  const option = ({ id, text, p, logit }, i) =>
    h(
      "div",
      {
        id: v.id(label, i),
        role: "option",
        ariaSelected: String(i === at),
        title: `${shown(text)}, id ${id}: probability ${p.map((x) => number(x, 6)).join(" → ")}, logit ${changed(logit, 3)}`,
      },
      h("span", { className: "name", dir: "auto" }, shown(text)),
      h("span", { className: "track" }, bar(p[0], "before"), bar(p[1], "after")),
      h("span", { className: "value" }, changed(p, 4)),
      h("span", { className: "value logit" }, changed(logit, 3)),
    );
  const head = h(
    "div",
    { className: "pairs-head" },
    h("span", {}, "next token"),
    h(
      "span",
      { className: "keys" },
      h("i", { className: "key before" }),
      " before ",
      h("i", { className: "key after" }),
      " after",
    ),
    h("span", { className: "value" }, "probability"),
    h("span", { className: "value logit" }, "logit"),
  );
  return {
    el: h("div", { className: "before-after" }, head, list),
    show(newTokens, picked) {
      [tokens, at] = [newTokens, newTokens.findIndex(({ id }) => id === picked)];
      list.replaceChildren(...tokens.map(option));
      list.setAttribute("aria-activedescendant", at < 0 ? "" : list.children[at].id);
      if (at >= 0) reveal(list, list.children[at]);
    },
  };
}
