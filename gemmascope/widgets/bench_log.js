// What was committed at an ablation bench: a list to go back in, a table, and Python that gives the same figures.

import { changed, fixed } from "./before_after.js";
import { clamp, shown } from "./numbers.js";
import { h, onKeys, reveal } from "./parts.js";

/** The commits of `v.state.log`, the run as it is before them. `namesOf(on)` calls components by name; `goTo(entry)` hears
 * of clicks and keys, -1 for the run as it is. */
export function benchLog(v, namesOf, goTo) {
  const { tokens } = v.data;
  const el = h("div", { className: "log", role: "listbox", tabIndex: 0, ariaLabel: "Commits" });
  onKeys(el, (columns, lines) => goTo(clamp(v.state.at + columns + lines, -1, v.state.log.length - 1)));
  el.addEventListener("click", (event) => {
    const option = event.target.closest("[role=option]");
    if (option) goTo([...el.children].indexOf(option) - 1);
  });
  const told = ({ on, kind, pos, kl, loss, difference, first }) => [
    on.length ? `${kind}: ${namesOf(on)}` : "nothing",
    `at ${pos} ${shown(tokens[pos] ?? "")}`,
    `KL ${fixed(kl, 4)}`,
    `loss ${changed(loss, 4)}`,
    difference ? changed(difference, 3) : "",
    first.map(({ text, p }) => `${shown(text)} ${fixed(p, 4)}`).join(" → "),
  ];
  const option = (texts, i) =>
    h(
      "div",
      {
        role: "option",
        id: v.id("log", i),
        ariaSelected: String(i === v.state.at),
        title: texts.filter(Boolean).join("; "),
      },
      ...[i + 1, ...texts].map((text) => h("span", { dir: "auto" }, String(text))),
    );
  return {
    el,
    draw() {
      const { log, at } = v.state;
      el.replaceChildren(option(["as it is"], -1), ...log.map((entry, i) => option(told(entry), i)));
      const here = el.children[at + 1] ?? el.firstChild;
      el.setAttribute("aria-activedescendant", here.id);
      reveal(el, here);
    },
    table: () => ({
      columns: ["off", "kind", "pos", "KL (nats)"].concat(
        ["loss", "difference", "first", "p"].flatMap((what) => [`${what} before`, `${what} after`]),
      ),
      rows: v.state.log.map(({ on, kind, pos, kl, loss, difference, first }) => [
        namesOf(on),
        kind,
        pos,
        kl,
        ...loss,
        ...(difference ?? [null, null]),
        ...first.map(({ text }) => shown(text)),
        ...first.map(({ p }) => p),
      ]),
    }),
  };
}

/** Python that runs a commit (`made` makes its interventions and logits) and prints its figures, each beside what was
 * shown: `pair` are the answers or null, `top` the listed tokens. */
export function benchPython(made, { pos, kl, loss, difference }, pair, top) {
  const print = (what, ...parts) => `print(f"${what}")  # ${parts.join(" ")}`;
  const both = (figures, digits) => figures.map((x) => fixed(x, digits)).join(" -> ");
  const lines = [
    made,
    "before = model(prompt)",
    `pos = ${pos}`,
    "p, q = (run[0, pos].float().log_softmax(-1) for run in (before, logits))",
    print("{(p.exp() * (p - q)).sum().clamp(min=0):.4f}", "KL(before || after)", fixed(kl, 4), "nats"),
  ];
  if (loss.every(Number.isFinite))
    lines.push(
      'losses = [model(prompt, interventions=edits, return_type="loss") for edits in ([], interventions)]',
      print("{losses[0]:.4f} -> {losses[1]:.4f}", "loss", both(loss, 4), "nats"),
    );
  if (difference)
    lines.push(
      `right, wrong = ${pair.map(({ id }) => id).join(", ")}`,
      "differences = [(run[0, pos, right] - run[0, pos, wrong]).item() for run in (before, logits)]",
      print("{differences[0]:.3f} -> {differences[1]:.3f}", "logit difference", both(difference, 3)),
    );
  lines.push("was, now = (run[0, pos].float().softmax(-1) for run in (before, logits))");
  for (const { id, text, p } of top)
    lines.push(print(`{was[${id}]:.4f} -> {now[${id}]:.4f}`, shown(text).slice(0, 40), both(p, 4)));
  return lines.join("\n");
}
