// The next token in three runs: clean, corrupted, and corrupted (or clean) with one cell patched.

import { clamp, number, shown } from "./numbers.js";
import { h, onKeys, reveal } from "./parts.js";

const PATCH_RUNS = ["clean", "corrupted", "patched"];

/** A list of tokens with a bar for each run; `pick(id)` hears of clicks and keys. */
export function patchTokens(v, pick) {
  let shownIds = [];
  let at = -1;
  const list = h("div", { className: "list", role: "listbox", tabIndex: 0, ariaLabel: "Next token before and after" });
  const head = h(
    "div",
    { className: "line head", ariaHidden: "true" },
    h("span", {}, "next token"),
    ...PATCH_RUNS.map((run) => h("span", {}, run)),
  );
  const el = h("div", { className: "patch-tokens" }, head, list);
  const move = (i) => shownIds.length && pick(shownIds[clamp(i, 0, shownIds.length - 1)]);
  onKeys(list, (columns, rows) => move(at + columns + rows));
  list.addEventListener("click", (event) => {
    const option = event.target.closest("[role=option]");
    if (option) move([...list.children].indexOf(option));
  });
  const amount = (run, p) =>
    h(
      "span",
      { className: "amount" },
      number(p),
      h("span", { className: `bar ${run}`, style: `width: ${clamp(p, 0, 1) * 100}%` }),
    );
  return {
    el,
    show({ ids, tokens, probs }, token) {
      shownIds = ids;
      at = ids.indexOf(token);
      const p = (run, i) => probs.values[run * ids.length + i];
      list.replaceChildren(
        ...tokens.map((text, i) => {
          const said = PATCH_RUNS.map((run, r) => `${run} ${number(p(r, i))}`).join(", ");
          const option = { className: "line", role: "option", id: v.id("patched", i), ariaSelected: String(i === at) };
          const name = h("span", { className: "name", dir: "auto" }, shown(text));
          return h(
            "div",
            { ...option, ariaLabel: `${shown(text)}: ${said}`, title: `${shown(text)}, id ${ids[i]}` },
            name,
            ...PATCH_RUNS.map((run, r) => amount(run, p(r, i))),
          );
        }),
      );
      list.setAttribute("aria-activedescendant", at < 0 ? "" : v.id("patched", at));
      if (at >= 0) reveal(list, list.children[at]);
    },
  };
}
