// Parts of the attribution view: signed bars, the tokens that a head took from, the tokens that are compared.

import { clamp, largest, missing, number, plural, range, shown } from "./numbers.js";
import { button, h, onKeys, paintOn, reveal } from "./parts.js";

const ROUNDING = 1e-5; // of a sum of float32 numbers, beside the largest of them
export const MAX_TOKENS = 300; // drawn of a long prompt: those that matter most

/** A number with its sign. */
export const signedNumber = (x, digits = 3) => `${x > 0 ? "+" : ""}${number(x, digits)}`.replace(/^-/, "−");
/** The two colours of the view: for what speaks for token A, and for what speaks against it. */
export const signColours = (theme) => [0.84, 0.16].map((t) => `rgb(${theme.diverging(t)})`);

/** Whether parts add up to their whole, in words and to the last digit. */
export function addsUp(values, whole, names, wholeName) {
  const gap = whole - values.reduce((sum, x) => sum + (x || 0), 0);
  const most = largest([1, Math.abs(whole), ...values.map((x) => Math.abs(x) || 0)]);
  const none = missing(values);
  if (none || !Number.isFinite(gap)) return `${names} do not add up: ${plural(none, "number")} missing, NaN or infinite.`;
  const [together, left] = [signedNumber(whole - gap, 6), number(Math.abs(gap), 6)];
  if (Math.abs(gap) <= ROUNDING * most)
    return `${names} add up to ${together}; ${wholeName}: ${signedNumber(whole, 6)}, off by ${left}.`;
  return `${names} add up to ${together}, but ${wholeName}: ${signedNumber(whole, 6)}. A hook changed what lies between, or numbers were rounded to 16 bits.`;
}

/** Cursor in a list of options, by keys and clicks. `pick(i)` hears of it, `others` are further keys. */
function attributionList(el, length, at, pick, others) {
  const choose = (i) => length() && pick(clamp(i, 0, length() - 1));
  onKeys(el, (columns, rows) => choose(at() + columns + rows), others);
  el.addEventListener("click", (event) => {
    const option = event.target.closest("[role=option]");
    if (option) choose([...el.children].indexOf(option));
  });
}

/** A list of named bars to both sides of nothing. Items are { name, title, value, note }; `pick(item)`, `peek(item or null)`. */
export function signedBars(v, label, { pick, peek, others }) {
  let items = [];
  let picked = -1;
  let theme = null; // that they are drawn in
  const el = h("div", { className: "bars signed", role: "listbox", tabIndex: 0, ariaLabel: label });
  attributionList(
    el,
    () => items.length,
    () => picked,
    (i) => pick(items[i]),
    others,
  );
  el.addEventListener("mouseover", (event) => {
    const option = event.target.closest("[role=option]");
    peek(option ? items[[...el.children].indexOf(option)] : null);
  });
  el.addEventListener("mouseleave", () => peek(null));
  const row = (item, i, reach, colours) => {
    const half = (clamp(Math.abs(item.value) / reach, 0, 1) || 0) * 50;
    const bar = h("span", { className: "bar" });
    bar.style.cssText = `left: ${item.value < 0 ? 50 - half : 50}%; width: ${half}%; background: ${colours[item.value < 0 ? 1 : 0]}`;
    const cells = [h("span", { className: "track" }, bar), h("span", { className: "value" }, signedNumber(item.value))];
    const name = h("span", { className: "name", dir: "auto" }, item.name);
    const note = h("span", { className: "also" }, item.note ?? "");
    const props = {
      id: v.id(label, i),
      role: "option",
      ariaSelected: String(i === picked),
      title: item.title ?? item.name,
    };
    return h("div", props, name, note, ...cells);
  };
  return {
    el,
    show(newItems, isPicked) {
      const same = ({ name, value, note }, i) =>
        name === items[i].name && value === items[i].value && note === items[i].note;
      const drawn = theme === v.theme && newItems.length === items.length && newItems.every(same);
      [items, picked, theme] = [newItems, newItems.findIndex(isPicked), v.theme];
      if (drawn) [...el.children].forEach((option, i) => (option.ariaSelected = String(i === picked)));
      else draw();
      if (picked < 0) return el.removeAttribute("aria-activedescendant");
      el.setAttribute("aria-activedescendant", el.children[picked].id);
      reveal(el, el.children[picked]);
    },
  };
  function draw() {
    el.hidden = !items.length;
    const reach = largest(items.map(({ value }) => Math.abs(value)).filter(Number.isFinite)) || 1;
    const colours = signColours(v.theme);
    el.classList.toggle(
      "noted",
      items.some(({ note }) => note),
    );
    el.replaceChildren(...items.map((item, i) => row(item, i, reach, colours)));
  }
}

/** The prompt, coloured by what a head took from each token. `pick(pos)`, `peek(pos or null)`. */
export function sourceTokens(v, { pick, peek, others }) {
  const { tokens } = v.data;
  let [drawn, at] = [[], 0];
  let [shares, reach, theme] = [null, 1, null]; // as they are drawn
  const el = h("div", { className: "strip sources", role: "listbox", tabIndex: 0, ariaLabel: "Source tokens" });
  attributionList(
    el,
    () => drawn.length,
    () => drawn.indexOf(at),
    (i) => pick(drawn[i]),
    others,
  );
  el.addEventListener("mouseover", (event) => {
    const option = event.target.closest("[role=option]");
    peek(option ? drawn[[...el.children].indexOf(option)] : null);
  });
  el.addEventListener("mouseleave", () => peek(null));
  return {
    el,
    /** Numbers for each token: what came from it, and the attention it got. */
    show(values, attention, picked) {
      at = picked;
      if (shares !== values || theme !== v.theme || !drawn.includes(at)) draw(values, attention);
      [...el.children].forEach((chip, i) => (chip.ariaSelected = String(drawn[i] === at)));
      const here = el.children[drawn.indexOf(at)];
      el.setAttribute("aria-activedescendant", here.id);
      reveal(el, here);
      return reach;
    },
  };
  function draw(values, attention) {
    [shares, theme] = [values, v.theme];
    const strong = range(tokens.length).sort((a, b) => Math.abs(values[b]) - Math.abs(values[a]));
    const kept = new Set([...strong.slice(0, MAX_TOKENS), at]);
    drawn = range(tokens.length).filter((pos) => kept.has(pos));
    reach = largest(drawn.map((pos) => Math.abs(values[pos])).filter(Number.isFinite)) || 1;
    const chips = drawn.map((pos, i) => {
      const chip = h("span", { className: "token", role: "option", id: v.id("source", pos) }, shown(tokens[pos]));
      [chip.dir, chip.title] = ["auto", `${pos} ${shown(tokens[pos])}`];
      chip.classList.toggle("gap", pos > (i ? drawn[i - 1] + 1 : 0));
      chip.classList.toggle("unseen", attention[pos] === 0);
      chip.classList.toggle("missing", !Number.isFinite(values[pos]));
      if (attention[pos] !== 0 && Number.isFinite(values[pos]))
        paintOn(chip, v.theme.diverging(0.5 + values[pos] / reach / 2));
      return chip;
    });
    el.replaceChildren(...chips);
  }
}

/** A choice of a token among the likeliest, by a text that is typed, or of none. `pick(id or null)`. */
export function tokenChoice(v, label, none, pick) {
  const select = h("select", { ariaLabel: label });
  const input = h("input", {
    type: "text",
    hidden: true,
    size: 12,
    ariaLabel: `${label}: its text`,
    placeholder: "·text, Enter",
  });
  input.setAttribute("data-lm-suppress-shortcuts", "true");
  const cancel = button("cancel", () => typing(false), { hidden: true });
  const typing = (on) => {
    [select.hidden, input.hidden, cancel.hidden] = [on, !on, !on];
    (on ? input : select).focus();
  };
  let [current, options] = ["", ""];
  select.addEventListener("change", () => {
    const chosen = select.value;
    select.value = current; // until the state says so
    if (chosen === "typed") typing(true);
    else pick(chosen === "none" ? null : Number(chosen));
  });
  input.addEventListener("keydown", async (event) => {
    if (event.key === "Escape") typing(false);
    if (event.key !== "Enter") return;
    const found = await v.run("token", { text: input.value.replaceAll("·", " ") });
    if (!found) return; // the frame says why
    typing(false);
    input.value = "";
    pick(found.id);
  });
  return {
    el: h("span", { className: "choice" }, `${label} `, select, input, cancel),
    show(likeliest, probs, chosen) {
      const known = likeliest.some(({ id }) => id === chosen?.id);
      const choices = likeliest.map(({ id, text }, i) => [id, `${shown(text).slice(0, 40)}  ${number(probs[i])}`]);
      if (chosen && !known) choices.push([chosen.id, shown(chosen.text).slice(0, 40)]);
      if (none) choices.push(["none", none]);
      choices.push(["typed", "another token…"]);
      if (options !== String(choices))
        select.replaceChildren(...choices.map(([value, text]) => h("option", { value }, text)));
      options = String(choices);
      current = String(chosen?.id ?? "none");
      select.value = current;
    },
  };
}
