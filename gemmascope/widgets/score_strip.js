// A text as tokens, coloured by a score each has; its cursor is its own, since the text is no linked view's prompt.

import { clamp, shown } from "./numbers.js";
import { h, onKeys, paintOn, reveal } from "./parts.js";

/** `name` is what a screen reader calls it, and `told(pos)` what is said of a token. Show it with `show({ ... })`:
 *     texts    of the tokens
 *     colour   pos -> [r, g, b], null where there is no number: hatched here
 *     marked   the token that was probed, if one was
 *     at       where the cursor is at first */
export function scoreStrip(v, { name, told }) {
  const el = h("div", { className: "strip", role: "listbox", tabIndex: 0, ariaLabel: name });
  let chips = [];
  let at = 0;
  const move = (pos) => {
    if (!chips.length) return;
    at = clamp(pos, 0, chips.length - 1);
    chips.forEach((chip, i) => (chip.ariaSelected = String(i === at)));
    el.setAttribute("aria-activedescendant", chips[at].id);
    reveal(el, chips[at]);
  };
  const pick = (pos) => {
    move(pos);
    if (chips.length) v.say(told(at));
  };
  onKeys(el, (columns, rows) => pick(at + columns + rows * 10));
  el.addEventListener("click", (event) => {
    const chip = event.target.closest(".token");
    if (chip) pick(chips.indexOf(chip));
  });
  return {
    el,
    show({ texts, colour, marked = null, at: first }) {
      chips = texts.map((text, pos) => {
        const chip = h(
          "span",
          { className: "token", role: "option", id: v.id(name, pos), title: told(pos), dir: "auto" },
          shown(text),
        );
        const rgb = colour(pos);
        if (rgb) paintOn(chip, rgb);
        else chip.classList.add("missing");
        if (pos === marked) chip.classList.add("probed");
        return chip;
      });
      el.replaceChildren(...chips.flatMap((chip, pos) => (texts[pos].includes("\n") ? [chip, h("br")] : [chip])));
      move(first);
    },
  };
}
