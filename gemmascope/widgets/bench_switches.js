// The components of a model as switches: a row for each layer, whole parts first, then its heads and its experts.

import { range } from "./numbers.js";
import { button, h, onKeys, reveal } from "./parts.js";

const BENCH_CELLS = 600; // switches that are drawn at once; in a larger model layers are unfolded one by one
const BENCH_COLUMNS = 16; // and there, a layer's are laid out in lines of so many
const BENCH_SHORT = { attn: "attn", mlp: "mlp", dense: "dense", moe: "moe", ple: "ple" };

/** "layer 2 head 1", which is also what a screen reader and a test call the switch. */
export function benchName(names, [what, layer, index]) {
  return `layer ${layer} ${names[what]}${index === null ? "" : ` ${index}`}`;
}

export const benchKey = (component) => JSON.stringify(component);

/** A switch of one component; checked while the component runs. */
export function benchSwitch(names, component, text, press) {
  const el = button(text, () => press(component), { className: `switch ${component[0]}`, role: "switch" });
  el.ariaLabel = benchName(names, component);
  el.dataset.key = benchKey(component);
  return el;
}

/** Shows a switch as it is: `off` and `committed` are sets of keys. */
export function benchMark(el, off, committed, why) {
  const isOff = off.has(el.dataset.key);
  el.ariaChecked = String(!isOff);
  el.classList.toggle("staged", isOff !== committed.has(el.dataset.key));
  el.disabled = Boolean(why);
  el.title = why || `${el.ariaLabel} ${isOff ? "is off" : "is on"}`;
}

/** `flip(component)` hears of a switch, `move(component)` of the cursor, `fold(layer)` of a layer's own button. */
export function benchSwitches(v, { flip, move, fold }) {
  const { layers, parts, heads, experts, names } = v.data;
  const small = layers.length * (parts.length + heads + experts) <= BENCH_CELLS;
  const groups = [
    ["head", heads],
    ["expert", experts],
  ].filter(([, count]) => count);
  const el = h("div", { className: "switches", role: "grid", ariaLabel: "Components, by layer" });
  el.style.setProperty("--cell", `${experts > 99 || heads > 99 ? 26 : 24}px`);
  let rows = [];
  let buttons = []; // of every row that is drawn, in the order of the page
  let drawn = "";
  let cursor = null;
  let last = null; // where the selection was

  const isOpen = (layer, here) => small !== v.state.toggled.includes(layer) || (!small && layer === here);
  const cell = (className, ...children) => h("span", { className, role: "gridcell" }, ...children);
  const one = (component, text) => benchSwitch(names, component, text, (which) => (go(which), flip(which)));

  function row(layer, open) {
    const label = button(`${open ? "▾" : "▸"} ${layer} ${layers[layer].kind}`, () => fold(layer), {
      className: "fold",
      ariaLabel: `layer ${layer}, ${layers[layer].kind}`,
      ariaExpanded: String(open),
      title: `${open ? "Fold" : "Unfold"} layer ${layer}`,
    });
    label.dataset.key = benchKey(["layer", layer, null]);
    const whole = parts.map((what) => cell("", one([what, layer, null], BENCH_SHORT[what])));
    const drawn = ([what, count]) =>
      h(
        "span",
        { className: "units", role: "presentation" },
        ...range(count).map((i) => cell("", one([what, layer, i], i))),
      );
    const folded = cell("units folded");
    const units = !open
      ? [folded]
      : small
        ? groups.map(drawn)
        : [h("span", { className: "stack", role: "presentation" }, ...groups.map(drawn))];
    return h("div", { className: "line", role: "row" }, h("span", { role: "rowheader" }, label), ...whole, ...units);
  }
  function build(here) {
    const open = range(layers.length).map((layer) => isOpen(layer, here));
    const wanted = open.join();
    if (wanted === drawn) return;
    drawn = wanted;
    const focused = el.contains(document.activeElement);
    rows = open.map((is, layer) => row(layer, is));
    const heading = (className, text) => h("span", { className, role: "columnheader" }, text);
    const titles = groups.map(([what, count]) => [`${names[what]}s`, count]);
    const head = h(
      "div",
      { className: "line top", role: "row" },
      heading("", "layer"),
      ...parts.map((what, i) => heading("", i ? h("span", { className: "spoken" }, names[what]) : "whole part")),
      ...(small ? titles : [[titles.map(([title]) => title).join(", "), BENCH_COLUMNS]]).map(([title, count]) => {
        const it = heading("units", title);
        it.style.setProperty("--count", count);
        return it;
      }),
    );
    el.replaceChildren(head, ...rows);
    for (const units of el.querySelectorAll(".line:not(.top) .units"))
      units.style.setProperty("--count", small ? units.childElementCount : BENCH_COLUMNS);
    buttons = [...el.querySelectorAll("button")];
    stand(buttons.find((each) => each.dataset.key === cursor) ?? buttons[1], focused);
  }
  /** The one button that the Tab key reaches. */
  function stand(on, focus) {
    for (const each of buttons) if (each.tabIndex !== -1) each.tabIndex = -1;
    on.tabIndex = 0;
    cursor = on.dataset.key;
    if (!focus) return;
    on.focus({ preventScroll: true });
    reveal(el, on, 92);
  }
  function go(component) {
    const key = benchKey(component);
    const on = buttons.find((each) => each.dataset.key === key);
    if (on) stand(on, true);
    move(component);
  }
  function step(columns, lines) {
    const at = buttons.findIndex((each) => each.dataset.key === cursor);
    const box = buttons[at].getBoundingClientRect();
    const line = (each) => each.getBoundingClientRect().top;
    let to = null;
    if (columns) {
      const same = buttons.filter((each) => Math.abs(line(each) - box.top) < 2);
      const i = same.indexOf(buttons[at]) + columns;
      to = same[Math.min(Math.max(i, 0), same.length - 1)];
    } else {
      const beyond = buttons.filter((each) => (line(each) - box.top) * lines > 2);
      const tops = [...new Set(beyond.map(line))].sort((a, b) => (a - b) * Math.sign(lines));
      const top = tops[Math.min(Math.abs(lines), tops.length) - 1];
      const middle = (each) => Math.abs(each.getBoundingClientRect().left - box.left);
      const there = beyond.filter((each) => line(each) === top);
      to = there.length ? there.reduce((a, b) => (middle(b) < middle(a) ? b : a)) : null;
    }
    if (!to) return;
    stand(to, true);
    const component = JSON.parse(to.dataset.key);
    move(component[0] === "layer" ? ["layer", component[1], null] : component);
  }
  el.addEventListener("focusin", (event) => event.target.dataset.key && stand(event.target, false));
  onKeys(el, step, {
    PageUp: () => step(0, -1),
    PageDown: () => step(0, 1),
    "[": () => step(-1, 0),
    "]": () => step(1, 0),
  });
  return {
    el,
    show({ off, committed, why, here }) {
      build(here.layer);
      const followed = here.head === null ? null : benchKey(["head", here.layer, here.head]);
      const there = followed !== last && buttons.find((each) => each.dataset.key === followed);
      if (there && !el.contains(document.activeElement)) stand(there, false); // Tab goes to what others selected
      last = followed;
      const layersOff = [...off].map((key) => JSON.parse(key)).filter(([, , index]) => index !== null);
      rows.forEach((each, layer) => {
        each.classList.toggle("here", layer === here.layer);
        const folded = each.querySelector(".folded");
        if (!folded) return;
        const count = layersOff.filter(([, one]) => one === layer).length;
        const has = groups.map(([what, many]) => `${many} ${names[what]}s`).join(", ");
        folded.textContent = count ? `${has}; ${count} off` : has;
      });
      const picked = [
        ["head", here.layer, here.head],
        ["expert", here.layer, here.expert],
      ].map(benchKey);
      for (const each of buttons) {
        if (each.className === "fold") continue;
        benchMark(each, off, committed, why);
        each.classList.toggle("here", picked.includes(each.dataset.key));
        const [what, layer] = JSON.parse(each.dataset.key);
        const over = { head: "attn", dense: "mlp", moe: "mlp", expert: "mlp" }[what];
        const gone = (part) => off.has(benchKey([part, layer, null]));
        each.classList.toggle("moot", (over && gone(over)) || (what === "expert" && gone("moe")));
      }
    },
  };
}
