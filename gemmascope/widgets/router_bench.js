// Changes of the routing: what to do to the selected expert, the changes that are on, and what they did.

import { beforeAfter, changed, likeliestTokens } from "./before_after.js";
import { EXPERT_HOWS } from "./expert_hows.js";
import { canonical, largest, number, range, shown } from "./numbers.js";
import { barList, button, choice, h } from "./parts.js";

const ROUTER_MOST = 8; // positions listed by how much their prediction changed

/** `at()` is the selected { pos, layer, expert }. */
export function routerBench(v, { label, layers, at }) {
  const effects = new Map(); // changes -> what they did
  const history = []; // the lists of changes before this one
  let running = false;
  let everywhere = true;
  const same = (a, b) => canonical(a) === canonical(b);
  const effect = () => effects.get(canonical(v.state.committed)) ?? null;

  function set(changes, remember = true) {
    if (remember) history.push(v.state.changes);
    const known = !changes.length || effects.has(canonical(changes));
    v.keep({ changes, ...(known ? { committed: changes } : {}) });
  }
  function add(how) {
    const { pos, layer, expert } = at();
    const change = { layer, expert, how, pos: everywhere ? null : pos };
    const others = v.state.changes.filter(
      (one) => !same([one.layer, one.expert, one.pos], [layer, expert, change.pos]),
    );
    set([...others, change]);
  }
  async function commit() {
    const { changes, committed } = v.state;
    if (running || v.page || same(changes, committed)) return;
    running = true;
    paint();
    const answer = await v.run("effect", { changes });
    running = false;
    if (!answer) return paint();
    effects.set(canonical(changes), answer);
    v.keep({ committed: changes, side: "after" });
  }

  const target = h("h4");
  const makers = Object.entries(EXPERT_HOWS).map(([how, [verb, what]]) =>
    h(
      "div",
      { className: "maker" },
      button(verb, () => add(how)),
      h("small", {}, what),
    ),
  );
  const where = choice(
    "where",
    [
      ["all", "at every token"],
      ["one", "at the selected token"],
    ],
    "all",
    (chosen) => (everywhere = chosen === "all"),
  );
  const list = h("ul", { className: "changes", ariaLabel: "Changes that are on" });
  const commitButton = button("Commit", commit, { className: "commit", title: "Run the model with these changes" });
  function undo() {
    const { changes } = v.state;
    if (running || v.page || !(history.length || changes.length)) return;
    set(history.pop() ?? changes.slice(0, -1), false);
  }
  const undoButton = button("Undo", undo, { title: "Take the last edit of this list back" });
  const status = h("span", { className: "note", role: "status" });

  const nextTitle = h("h4");
  const next = beforeAfter(v, "Next tokens, before and after the changes", (id) => v.select({ token: id }));
  const difference = h("p", { className: "note" });
  const loss = h("p");
  const divergence = h("p");
  const flips = h("p");
  const mostTitle = h("h4", {}, "Where the prediction changed most");
  const most = barList(v, "Positions whose prediction changed most", ({ pos }) => v.select({ pos }));
  const before = h(
    "p",
    { className: "note" },
    "Choose what to do to the selected expert, and commit: what the model then says, beside what it said, stands here.",
  );
  const results = [
    h("div", { className: "panel" }, nextTitle, next.el, difference),
    h("div", { className: "panel" }, h("h4", {}, "Over the prompt"), loss, divergence, flips, mostTitle, most.el),
  ];
  const el = h(
    "section",
    { className: "router-bench", ariaLabel: "Change the routing" },
    h("h4", { className: "top" }, "Switch an expert off, silence it, or force it"),
    h(
      "p",
      { className: "note" },
      "A norm follows the experts' sum, so that silencing an expert with or without renormalising the other weights is " +
        "one and the same intervention. To let the next best expert step in is another. A forced expert has the weight " +
        "that its own probability gives it, which may be next to nothing.",
    ),
    h(
      "div",
      { className: "columns" },
      h(
        "div",
        { className: "panel" },
        target,
        where,
        ...makers,
        list,
        h("div", { className: "commits" }, commitButton, undoButton, status),
      ),
      before,
      ...results,
    ),
  );

  const told = ({ layer, expert, how, pos }) =>
    `expert ${expert} of layer ${layer} ${EXPERT_HOWS[how]?.[2] ?? how} ${pos === null || pos === undefined ? "at every token" : `at ${label(pos)}`}`;
  function paint() {
    const { changes, committed } = v.state;
    const fixed = running || v.page;
    list.replaceChildren(
      ...changes.map((change, i) => {
        const remove = () => (set(changes.filter((_, j) => j !== i)), commitButton.focus());
        const cross = button("✕", remove, { ariaLabel: `Remove: ${told(change)}`, title: "Remove", disabled: fixed });
        return h("li", {}, h("span", { dir: "auto" }, told(change)), cross);
      }),
    );
    const done = same(changes, committed);
    for (const maker of makers) maker.firstChild.disabled = fixed;
    commitButton.ariaDisabled = String(fixed || done); // not `disabled`, which would lose the focus
    undoButton.ariaDisabled = String(fixed || !(history.length || changes.length));
    status.textContent = running
      ? "Running …"
      : v.page
        ? "This page has no model: make the view again in a notebook to change the routing."
        : !changes.length && done
          ? "No changes are on."
          : done
            ? "On, and run."
            : `Not run yet${committed.length ? ": what is shown is the last run" : ""}.`;
  }

  function update() {
    const { committed } = v.state;
    const { pos, layer, expert } = at();
    target.textContent = expert === null ? "No expert is selected" : `expert ${expert} of layer ${layer}`;
    for (const maker of makers) maker.firstChild.disabled = running || v.page || expert === null;
    before.hidden = committed.length > 0;
    for (const part of results) part.hidden = !committed.length;
    if (!committed.length) return;
    if (!effect()) {
      const arrive = (answer) => {
        effects.set(canonical(committed), answer);
        queueMicrotask(v.refresh); // the frame may be in the midst of drawing
      };
      return v.show("effect", { changes: committed }, arrive);
    }
    showEffect(effect(), committed, pos);
    v.show("next", { changes: committed, pos }, (answer) => showNext(answer, pos));
  }
  function showEffect({ loss: [before, after], kl, flips: flipped }, committed, pos) {
    const n = kl.values.length;
    const rise = after - before;
    const change = before === null || after === null ? "" : ` (${rise < 0 ? "−" : "+"}${number(Math.abs(rise))})`;
    loss.textContent = `loss ${number(before)} → ${number(after)} nats a token${change}`;
    const mean = kl.values.reduce((a, b) => a + b, 0) / n;
    divergence.textContent = `KL(before ‖ after) of the next token: ${number(kl.values[pos])} nats here, ${number(mean)} on average`;
    const touched = new Set(committed.map((one) => one.layer));
    const named = range(layers)
      .filter((layer) => flipped.values[layer])
      .map((layer) => `${flipped.values[layer]} in layer ${layer}${touched.has(layer) ? ", the changed one" : ""}`);
    const total = flipped.values.reduce((a, b) => a + b, 0);
    flips.textContent = total
      ? `other experts at ${total} of ${n * layers} places (tokens: ${named.join("; ")})`
      : "the same experts everywhere";
    const top = largest(kl.values) || 1;
    const order = range(n)
      .sort((a, b) => kl.values[b] - kl.values[a])
      .slice(0, ROUTER_MOST);
    const items = order.map((i) => ({
      pos: i,
      name: label(i),
      value: number(kl.values[i]),
      share: kl.values[i] / top,
    }));
    most.show(items, (item) => item.pos === pos);
  }
  function showNext(answer, pos) {
    nextTitle.textContent = `next token after ${label(pos)}`;
    const tokens = likeliestTokens(answer, answer.texts, 0, 2 * answer.ids.shape[1]);
    next.show(tokens, v.now.token);
    const [first, second] = [...answer.ids.values].slice(0, 2).map((id) => tokens.find((one) => one.id === id));
    const gap =
      second &&
      changed(
        [0, 1].map((run) => first.logit[run] - second.logit[run]),
        3,
      );
    difference.textContent = second ? `logit of ${shown(first.text)} minus ${shown(second.text)}: ${gap}` : "";
  }

  return {
    el,
    paint,
    update,
    commit,
    effect,
    /** Lines that give the numbers of the run with what was committed. */
    python() {
      const { pos } = at();
      const ids = v.recall("next", { changes: v.state.committed, pos })?.ids.values.filter((id) => id >= 0);
      const probs = ids ? [`logits[0, ${pos}].float().softmax(-1)[[${ids.join(", ")}]]`] : [];
      return [...(effect()?.code ?? []), "logits = model(prompt, interventions=interventions)", ...probs];
    },
  };
}
