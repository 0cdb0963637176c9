// A clean and a corrupted prompt above each other, token by token, what differs marked.

import { clamp, shown } from "./numbers.js";
import { h, onKeys, reveal } from "./parts.js";

/** `columns` are pairs of positions, -1 where a token has no partner; `pick(column)` hears of clicks and keys. */
export function patchPrompts(v, { clean, corrupted, columns }, pick) {
  let at = 0;
  const differ = columns.map(([a, b]) => a < 0 || b < 0 || clean[a] !== corrupted[b]);
  const token = (tokens, pos) => h("span", { className: "piece", dir: "auto" }, pos < 0 ? "–" : shown(tokens[pos]));
  const spoken = (tokens, pos) => (pos < 0 ? "nothing" : shown(tokens[pos]));
  const options = columns.map(([a, b], i) => {
    const said = differ[i] ? `clean ${spoken(clean, a)}, corrupted ${spoken(corrupted, b)}` : shown(clean[a]);
    const name = `${a < 0 ? b : a}: ${said}`;
    const [above, below] = [token(clean, a), token(corrupted, b)];
    const option = { className: "column", role: "option", id: v.id("column", i), title: name, ariaLabel: name };
    const el = h("div", option, h("small", {}, String(a < 0 ? b : a)), above, below);
    el.classList.toggle("differs", differ[i]);
    return el;
  });
  const list = h(
    "div",
    { className: "columns", role: "listbox", tabIndex: 0, ariaLabel: "Clean and corrupted prompt" },
    ...options,
  );
  list.ariaOrientation = "horizontal";
  onKeys(list, (steps) => steps && pick(clamp(at + steps, 0, columns.length - 1)));
  list.addEventListener("click", (event) => {
    const option = event.target.closest("[role=option]");
    if (option) pick(options.indexOf(option));
  });
  const names = h(
    "div",
    { className: "names", ariaHidden: "true" },
    h("small", {}, "pos"),
    h("span", {}, "clean"),
    h("span", {}, "corrupted"),
  );
  return {
    el: h("div", { className: "patch-prompts" }, names, list),
    differing: differ.filter(Boolean).length,
    select(column) {
      options[at].ariaSelected = "false";
      at = column;
      options[at].ariaSelected = "true";
      list.setAttribute("aria-activedescendant", options[at].id);
      reveal(list, options[at]);
    },
  };
}
