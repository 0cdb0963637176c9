// The architecture as a tree: layers, the steps of each, their modules and hook points.

import { clamp, number, plural, shown } from "./numbers.js";
import { h, onKeys, reveal } from "./parts.js";
import { view } from "./view.js";

const MAP_OPENED = 200; // matches of a filter up to which layers open by themselves

export const modelMap = view({
  name: "Model map",
  note:
    "Every layer, what differs between them, and what each place inside is called: its hook point, by which it is " +
    "read and changed.",
  keys:
    "Right and left open and close a layer, Enter copies a name and selects it, PageUp and PageDown go from layer to " +
    "layer.",
  build(v) {
    const { facts, steps, sites, groups, layers, dtype, norms } = v.data;
    const last = layers.length - 1; // the head; place 0 is the embedding
    const answers = new Map(); // layer -> norms of its sites
    const most = Math.max(...layers.slice(1, last).map((layer) => layer.parameters));
    const ple = layers.some((layer) => layer.ple);
    let rows = [];
    let elements = [];
    let chosen = null; // the element at the cursor
    let cursor = "l0"; // a row's id
    let seen = {}; // what was selected when this was last drawn
    let tested = null;

    // What there is
    const filled = (site, layer) => sites[site].name.replace("{l}", layer);
    const groupOf = (layer) => groups[layers[layer + 1].group];
    const isBlock = (layer) => layer >= 0 && layer < last - 1;
    const homes = new Map(); // name of a hook point -> its layer
    layers.forEach((_, i) => groupOf(i - 1).sites.forEach((site) => homes.set(filled(site, i - 1), i - 1)));

    // Parts
    const box = h("input", {
      type: "search",
      value: v.state.filter,
      placeholder: "hook_z, expert, ^blocks\\.[0-3]\\.",
      ariaLabel: "Filter hook points by name or meaning",
    });
    box.addEventListener("input", () => v.keep({ filter: box.value }));
    const found = h("span", { role: "status" });
    const about = norms ? "numbers at hook points: the norm of what a position holds, mean over the prompt" : "";
    const tree = h("div", {
      className: "tree",
      role: "tree",
      tabIndex: 0,
      ariaLabel: "Layers, modules and hook points",
    });
    const names = [
      "",
      "attention",
      "heads",
      "keys, values",
      "feed-forward",
      ...(ple ? ["per-layer"] : []),
      "parameters",
      "memory",
    ];
    const head = h(
      "div",
      { className: "line layer head", ariaHidden: "true" },
      ...names.map((name) => h("span", {}, name)),
    );
    const inner = h("div", { className: `model-map${ple ? " ple" : ""}` }, head, tree);
    const order = h("p", { className: "order" }, "A block, in order: ");
    steps.forEach(([name, does], i) =>
      order.append(h("b", {}, `${i + 1}\u00a0${name}`), `: ${does}${i < steps.length - 1 ? "; " : "."}`),
    );
    v.body.append(
      h("p", { className: "facts" }, h("b", { dir: "auto" }, facts[0]), ` · ${facts.slice(1).join(" · ")}`),
      order,
      h("div", { className: "controls" }, h("label", { className: "choice" }, "find ", box), found, about),
      inner,
    );

    // Rows
    const count = (n) =>
      n >= 1e9 ? `${(n / 1e9).toFixed(2)} B` : n >= 1e6 ? `${(n / 1e6).toFixed(2)} M` : n.toLocaleString("en");
    const bytes = (n) =>
      n >= 1e9 ? `${(n / 1e9).toFixed(2)} GB` : n >= 1e6 ? `${(n / 1e6).toFixed(1)} MB` : `${(n / 1e3).toFixed(1)} kB`;
    /** What a filter says of names: a regular expression where it is one, a plain text else. */
    function test() {
      const text = v.state.filter;
      if (!text) return null;
      try {
        const pattern = new RegExp(text, "i");
        return (name) => pattern.test(name);
      } catch (error) {
        v.notice(`${text} is no regular expression (${error.message}), so it is looked for as a text.`);
        return (name) => name.toLowerCase().includes(text.toLowerCase());
      }
    }
    function collect() {
      v.notice("");
      const matches = test();
      const kept = (layer) => {
        const own = groupOf(layer).sites;
        return matches ? own.filter((site) => matches(filled(site, layer)) || matches(sites[site].meaning)) : own;
      };
      const all = layers.map((_, i) => kept(i - 1));
      const total = all.reduce((sum, own) => sum + own.length, 0);
      tested = matches && { total, opened: total <= MAP_OPENED };
      found.textContent = matches ? plural(total, "hook point") : "";
      rows = all.flatMap((own, i) => (own.length || !matches ? rowsOf(i - 1, own) : []));
    }
    const isOpen = (layer) => (tested?.opened ? !v.state.open.includes(layer) : v.state.open.includes(layer));
    function rowsOf(layer, own) {
      const top = { id: `l${layer + 1}`, layer, level: 1, sort: "layer", hits: own.length };
      if (!isOpen(layer)) return [top];
      const made = [top];
      const without = Object.keys(groupOf(layer).modules).filter(
        (name) => !own.some((site) => sites[site].module === name),
      );
      if (!isBlock(layer) && !tested) for (const module of without) made.push(moduleRow(layer, module, 2));
      let [step, module] = [null, ""];
      for (const site of own) {
        const one = sites[site];
        if (one.step !== step) {
          [step, module] = [one.step, ""];
          made.push({ id: `l${layer + 1}s${step}`, layer, level: 2, sort: "step", step });
        }
        const deep = step === null ? 2 : 3;
        if (one.module && one.module !== module) made.push(moduleRow(layer, one.module, deep, site));
        module = one.module;
        made.push({ id: `l${layer + 1}h${site}`, layer, level: deep + (module ? 1 : 0), sort: "site", site });
      }
      return made;
    }
    const moduleRow = (layer, module, level, before = "") => ({
      id: `l${layer + 1}m${module}${before}`,
      layer,
      level,
      sort: "module",
      module,
    });
    const path = ({ layer, module }) => (isBlock(layer) ? `model.blocks[${layer}].${module}` : `model.${module}`);
    function weightsOf({ layer, module }) {
      const weights = groupOf(layer).modules[module] ?? [];
      const n = weights.reduce((sum, [, shape]) => sum + shape.reduce((a, b) => a * b, 1), 0);
      const each = weights.map(
        ([name, shape]) => `${name} ${shape.map((size) => size.toLocaleString("en")).join(" × ")}`,
      );
      return `${count(n)} parameters${each.length ? `: ${each.join(", ")}` : ""}`;
    }
    const normOf = ({ layer, site }) => answers.get(layer)?.values[groupOf(layer).sites.indexOf(site)];
    const axesOf = ({ layer, site }) =>
      sites[site].axes.map((axis) =>
        layers[layer + 1].sizes[axis] ? `${axis} ${layers[layer + 1].sizes[axis].toLocaleString("en")}` : axis,
      );
    const cell = (text, className = "") => h("span", { className }, text);

    function layerCells(row) {
      const one = layers[row.layer + 1];
      const amount = h(
        "span",
        { className: "amount" },
        count(one.parameters),
        h("span", { className: "bar", style: `width: ${isBlock(row.layer) ? (one.parameters / most) * 100 : 0}%` }),
      );
      const name = cell(`${isOpen(row.layer) ? "▾" : "▸"} ${one.name}`, "name");
      const hits = tested ? cell(plural(row.hits, "match").replace("matchs", "matches"), "muted") : "";
      if (!isBlock(row.layer))
        return [
          name,
          cell(row.layer < 0 ? "token → stream" : "stream → logits", "muted"),
          cell(""),
          cell(""),
          hits || cell(""),
          ...(ple ? [cell("")] : []),
          amount,
          cell(bytes(one.bytes)),
        ];
      const experts = one.experts ? ` + ${one.experts[0]} experts of ${one.experts[2]}, ${one.experts[1]} a token` : "";
      return [
        name,
        h(
          "span",
          {},
          h("i", { className: `kind ${one.kind}` }),
          one.window ? ` sliding, sees ${one.window.toLocaleString("en")}` : " global, sees all",
        ),
        cell(`${one.heads} q, ${one.kv_heads} kv`),
        cell(keysOf(one)),
        h("span", {}, `${one.mlp.toLocaleString("en")} wide${experts}`, hits ? " · " : "", hits),
        ...(ple ? [cell(one.ple ? `${one.ple} wide` : "–")] : []),
        amount,
        cell(bytes(one.bytes)),
      ];
    }
    const keysOf = (one) => (one.kv_source !== null ? `of layer ${one.kv_source}` : one.k_is_v ? "own, K = V" : "own");
    function cells(row) {
      if (row.sort === "layer") return layerCells(row);
      if (row.sort === "step")
        return [cell(`${row.step + 1} ${steps[row.step][0]}`, "name"), cell(steps[row.step][1], "muted meaning")];
      if (row.sort === "module") {
        return [cell(row.module, "name"), cell(weightsOf(row), "muted meaning")];
      }
      const one = sites[row.site];
      const norm = normOf(row);
      const told = one.expansion ? "on demand" : norm === undefined || Number.isNaN(norm) ? "" : number(norm);
      return [
        cell(one.name.split(".").at(-1), "name"),
        cell(axesOf(row).join(" × "), "axes"),
        cell(one.meaning, "meaning"),
        cell(told, "norm"),
      ];
    }
    function draw() {
      collect();
      elements = rows.map((row) => {
        const item = { className: `line ${row.sort}`, role: "treeitem", id: v.id(row.id) };
        const el = h("div", item, ...cells(row));
        el.ariaLevel = String(row.level);
        el.style.setProperty("--level", row.level - 1);
        if (row.sort === "layer") el.ariaExpanded = String(isOpen(row.layer));
        el.dataset.id = row.id;
        return el;
      });
      tree.replaceChildren(
        ...(elements.length
          ? elements
          : [h("div", { className: "line", role: "treeitem" }, "No hook point has that in its name or meaning.")]),
      );
      ask();
    }
    /** Norms of the layers that are open, one after another. */
    function ask() {
      if (!norms) return;
      const next = rows.find((row) => row.sort === "site" && !answers.has(row.layer));
      if (!next) return;
      v.show("norms", { layer: next.layer }, (answer) => {
        answers.set(next.layer, answer.norms);
        draw();
        v.refresh();
      });
    }

    // Moving and choosing
    const at = () =>
      Math.max(
        0,
        rows.findIndex(({ id }) => id === cursor),
      );
    function moveTo(i) {
      const row = rows[clamp(i, 0, rows.length - 1)];
      if (!row) return;
      cursor = row.id;
      if (isBlock(row.layer) && v.now.layer !== row.layer) v.select({ layer: row.layer });
      v.refresh();
    }
    function toggle(layer, to) {
      if (isOpen(layer) === to) return;
      const { open } = v.state;
      v.keep({ open: open.includes(layer) ? open.filter((one) => one !== layer) : [...open, layer] });
    }
    function act(row) {
      cursor = row.id;
      if (row.sort === "layer") toggle(row.layer, !isOpen(row.layer));
      const changes = isBlock(row.layer) ? { layer: row.layer } : {};
      v.select(row.sort === "site" ? { ...changes, site: filled(row.site, row.layer) } : changes);
      v.refresh();
      const text = row.sort === "site" ? filled(row.site, row.layer) : row.sort === "module" ? path(row) : "";
      if (text)
        navigator.clipboard?.writeText(text).then(
          () => v.say(`Copied. ${sentence()}`),
          () => {},
        );
    }
    function sideways(right) {
      const row = rows[at()];
      if (row.sort === "layer") toggle(row.layer, right);
      else if (!right) moveTo(rows.findLastIndex((other, i) => i < at() && other.level < row.level));
    }
    const jump = (by) => {
      const tops = rows.map((row, i) => [row, i]).filter(([row]) => row.sort === "layer");
      const here = tops.findLastIndex(([, i]) => i <= at());
      moveTo(tops[clamp(here + by, 0, tops.length - 1)][1]);
    };
    const others = {
      Enter: () => act(rows[at()]),
      " ": () => act(rows[at()]),
      PageUp: () => jump(-1),
      PageDown: () => jump(1),
    };
    onKeys(
      tree,
      (columns, lines) => {
        if (!rows.length) return;
        if (Number.isFinite(columns) && columns) sideways(columns > 0);
        else moveTo(at() + (lines || columns));
      },
      Object.fromEntries(Object.entries(others).map(([key, act]) => [key, () => rows.length && act()])),
    );
    tree.addEventListener("click", (event) => {
      const el = event.target.closest("[data-id]");
      if (el) act(rows.find(({ id }) => id === el.dataset.id));
    });

    /** The cursor goes where another view went. */
    function follow() {
      const { site, layer } = v.now;
      const before = seen;
      seen = { site, layer };
      if (site !== before.site && homes.has(site)) {
        const home = homes.get(site);
        const index = groupOf(home).sites.find((one) => filled(one, home) === site);
        cursor = `l${home + 1}h${index}`;
        if (!isOpen(home)) cursor = `l${home + 1}`;
      } else if (layer !== before.layer && layer !== null && rows[at()]?.layer !== layer)
        cursor = `l${(layer < 0 ? layer + last - 1 : layer) + 1}`;
    }
    function sentence() {
      const row = rows[at()];
      if (!row) return "Nothing is found.";
      const one = layers[row.layer + 1];
      const amount = `${one.parameters.toLocaleString("en")} parameters, ${bytes(one.bytes)} in ${dtype}`;
      if (row.sort === "layer") {
        if (!isBlock(row.layer)) return `${one.name}: ${amount}`;
        const sees = one.window
          ? `sliding, a query sees ${plural(one.window, "position")}`
          : "global, a query sees every position";
        const experts = one.experts ? ` and ${one.experts[0]} experts, ${one.experts[1]} a token` : "";
        const keys = { "own, K = V": "its own keys, which are its values too", own: "its own keys and values" }[
          keysOf(one)
        ];
        const counted = `${plural(one.heads, "query head")}, ${plural(one.kv_heads, "kv head")}`;
        const heads = `${counted}, ${keys ?? `keys and values ${keysOf(one)}`}`;
        return `${one.name}: ${sees}; ${heads}; feed-forward ${one.mlp} wide${experts}; ${amount}`;
      }
      if (row.sort === "step") return `${one.name}, step ${row.step + 1}: ${steps[row.step].join(", ")}`;
      if (row.sort === "module") {
        return `${path(row)}: ${weightsOf(row)}`;
      }
      const norm = normOf(row);
      const size = norm === undefined || Number.isNaN(norm) ? "" : `; norm ${number(norm)}, mean over positions`;
      const demand = sites[row.site].expansion ? "; computed on demand" : "";
      return `${filled(row.site, row.layer)} [${axesOf(row).join(", ")}]: ${sites[row.site].meaning}${demand}${size}`;
    }

    return {
      paint() {
        if (box.value !== v.state.filter) box.value = v.state.filter;
        draw();
      },
      update() {
        follow();
        const here = at();
        if (chosen) chosen.ariaSelected = "false";
        chosen = elements[here] ?? null;
        if (!chosen) return tree.removeAttribute("aria-activedescendant");
        chosen.ariaSelected = "true";
        tree.setAttribute("aria-activedescendant", chosen.id);
        reveal(tree, chosen);
      },
      sentence,
      python() {
        const row = rows[at()];
        if (!row || (row.sort === "layer" && !isBlock(row.layer))) return "model.cfg";
        if (row.sort === "module") return path(row);
        if (row.sort !== "site") return `model.layer(${row.layer})`;
        const name = filled(row.site, row.layer);
        const norm = normOf(row);
        if (!norms) return `model.sites["${name}"]`;
        const size = norm === undefined || Number.isNaN(norm) ? "" : "[0].float().flatten(1).norm(dim=-1).mean()";
        return `logits, cache = model.run_with_cache(prompt)\ncache["${name}"]${size}`;
      },
      table: () => ({
        columns: ["hook point", "layer", "axes", "meaning", ...(norms ? ["norm"] : [])],
        rows: layers.flatMap((_, i) =>
          groupOf(i - 1).sites.map((site) => {
            const norm = normOf({ layer: i - 1, site });
            const row = [
              filled(site, i - 1),
              isBlock(i - 1) ? i - 1 : "",
              sites[site].axes.join(" "),
              shown(sites[site].meaning),
            ];
            return [...row, ...(norms ? [norm ?? ""] : [])];
          }),
        ),
      }),
    };
  },
});
