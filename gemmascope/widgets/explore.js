// The explore page: one prompt, four linked views, one selection. Stands last in the page's one script,
// after numbers.js, parts.js and attention.js.

function tokenView(D, go) {
  const tokens = range(D.n).map((pos) =>
    h(
      "span",
      { className: "token", role: "gridcell", id: `token-${pos}`, title: `${D.at(pos)}, id ${D.ids[pos]}` },
      h("i", { className: "dot" }),
      h("span", { className: "text", dir: "auto" }, shown(D.tokens[pos])),
      h("i", { className: "reads" }),
    ),
  );
  const row = h("div", { role: "row" });
  tokens.forEach((el, pos) => row.append(el, ...(D.tokens[pos].includes("\n") ? [h("br")] : [])));
  const strip = h("div", { className: "strip", role: "grid", tabIndex: 0, ariaLabel: "Tokens" }, row);
  const readout = h("p", { className: "readout" });
  const top = Math.max(8, Math.ceil(D.maxSurprise));
  const keyReads = h("span");
  const keyServed = h("span");
  const legend = h(
    "div",
    { className: "legend" },
    scale("surprise", "surprise", { 0: "0", 1: `${top} nats` }),
    keyReads,
    keyServed,
  );
  const el = h(
    "section",
    { className: "tokens", ariaLabel: "Tokens" },
    strip,
    h("div", { className: "under" }, readout, legend),
  );
  const self = { el };
  const move = (pos) => go({ pos: clamp(pos, 0, D.n - 1) }, self);
  let now;
  onKeys(strip, (columns, lines) => {
    if (columns) return move(now.pos + columns);
    const here = tokens[now.pos];
    const beyond = tokens.filter((t) => (t.offsetTop - here.offsetTop) * lines > 0);
    if (!beyond.length) return;
    const line = beyond.at(lines > 0 ? 0 : -1).offsetTop;
    const aside = (t) => Math.abs(t.offsetLeft - here.offsetLeft);
    const nearest = beyond.filter((t) => t.offsetTop === line).reduce((a, b) => (aside(b) < aside(a) ? b : a));
    move(tokens.indexOf(nearest));
  });
  strip.addEventListener("click", (event) => {
    const token = event.target.closest(".token");
    if (token) move(tokens.indexOf(token));
  });
  self.sentence = ({ pos }) => {
    const s = D.surprise(pos);
    const surprise = `surprise ${s.toFixed(2)} nats (p ${number(Math.exp(-s))})`;
    return `${D.at(pos)}, id ${D.ids[pos]}, ${Number.isNaN(s) ? "nothing before it to predict it from" : surprise}`;
  };
  self.paint = (theme) =>
    tokens.forEach((t, pos) => {
      if (Number.isNaN(D.surprise(pos))) t.classList.add("missing");
      else paintOn(t, theme.surprise(D.surprise(pos) / top));
    });
  self.update = (next) => {
    now = next;
    const map = D.map(now.layer, now.head);
    const users = new Set(now.expert === null ? [] : D.served(now.layer, now.expert).map((u) => u.pos));
    tokens.forEach((t, pos) => {
      t.ariaSelected = String(pos === now.pos);
      t.classList.toggle("served", users.has(pos));
      t.lastChild.style.height = `${(map[now.q * D.side + D.cell(pos)] / 255) * 8}px`;
    });
    strip.setAttribute("aria-activedescendant", `token-${now.pos}`);
    reveal(strip, tokens[now.pos]);
    readout.textContent = self.sentence(now);
    keyReads.textContent = `▁ read from here by layer ${now.layer} head ${now.head}`;
    keyServed.textContent = now.expert === null ? "" : `● served by expert ${now.expert} of layer ${now.layer}`;
  };
  return self;
}

function lensView(D, go) {
  const after = (row) => (row === 0 ? "embed" : row === D.rows - 1 ? "output" : `layer ${row - 1}`);
  const place = ({ pos, row }) => `${after(row)} at ${D.at(pos)}`;
  const readout = h("p", { className: "readout" });
  const title = h("h3");
  const chartTitle = h("h3");
  const chart = h("div", { className: "chart" });
  const self = {};
  const picking = {};
  let theme, now;
  const table = positionTable(D, {
    name: "Logit lens",
    rowNames: range(D.rows).map(after),
    rowHeight: clamp(Math.floor(280 / D.rows), 24, 36),
    cellWidth: 58,
    fill(cell, row, pos) {
      const [best] = D.lens(pos, row);
      cell.textContent = D.token(best.id);
      cell.dir = "auto";
      cell.title = `${D.token(best.id)} ${number(best.p)}`;
      cell.classList.toggle("hit", best.id === D.ids[pos + 1]);
      paintOn(cell, theme.probability(best.p));
    },
    mark() {},
    move: (pos, row) => go({ pos, layer: row - 1 }, self),
    peek: (at) => (readout.textContent = self.sentence({ ...now, ...at })),
  });
  const list = barList("Most probable tokens", (item) => go({ token: item.id }, picking));
  const note =
    "What the model would say next if it stopped there: ln_final and unembed on the residual stream after each layer. " +
    `The output is the stream after layer ${D.rows - 2}.`;
  const legend = [
    scale("probability", "probability of the top token", { 0: "0", 1: "1" }),
    h("span", {}, h("u", {}, "underlined"), " the token that does follow"),
  ];
  self.el = section(
    "Logit lens",
    note,
    legend,
    readout,
    h("div", { className: "split" }, table.el, h("div", { className: "panel" }, title, list.el, chartTitle, chart)),
  );
  self.sentence = ({ pos, row }) => {
    const [best] = D.lens(pos, row);
    return `${place({ pos, row })}: ${D.token(best.id)} ${number(best.p)}`;
  };
  picking.sentence = (at) => `${place(at)}: ${D.token(at.token)} ${number(D.path(at.pos, at.token)[at.row])}`;

  self.paint = (newTheme) => {
    theme = newTheme;
    table.layout();
  };
  self.update = (next) => {
    now = next;
    table.select(now.pos, now.row);
    readout.textContent = self.sentence(now);
    title.textContent = place(now);
    list.show(
      D.lens(now.pos, now.row).map(({ id, p }) => ({
        id,
        name: D.token(id),
        value: number(p),
        share: p,
        title: `${D.token(id)}, id ${id}`,
      })),
      (item) => item.id === now.token,
    );
    chartTitle.textContent = `${D.token(now.token)} over layers`;
    chart.replaceChildren(
      lineChart({
        label: `Probability of ${D.token(now.token)} over layers`,
        names: range(D.rows).map((row) => (row === 0 ? "embed" : String(row - 1))),
        lines: D.lens(now.pos, now.row).map(({ id }) => D.path(now.pos, id)),
        picked: D.path(now.pos, now.token),
        at: now.row,
      }),
    );
  };
  return self;
}

function expertView(D, go) {
  const self = {};
  const perLine = 4;
  const slots = D.experts(0, 0).length;
  const digits = String(D.nExperts - 1).length;
  const readout = h("p", { className: "readout" });
  const chosenTitle = h("h3");
  const servedTitle = h("h3");
  const load = h("p", { className: "note" });
  let theme, now;
  const table = positionTable(D, {
    name: "Experts",
    rowNames: range(D.layers.length).map((l) => `layer ${l}`),
    rowHeight: 4 + 20 * Math.ceil(slots / perLine),
    cellWidth: Math.max(58, 8 + Math.min(slots, perLine) * (6 + 7 * digits)),
    fill(cell, layer, pos) {
      const chosen = D.experts(layer, pos);
      cell.style.setProperty("--per-line", Math.min(slots, perLine));
      cell.title = chosen.map(({ expert, weight }) => `expert ${expert}: ${number(weight)}`).join(", ");
      cell.replaceChildren(
        ...chosen.map(({ expert, weight }) => {
          const bar = h("i", { style: `width: ${clamp(weight / D.maxWeight, 0, 1) * 100}%` });
          if (D.nExperts <= theme.expert.length) bar.style.background = theme.expert[expert];
          const chip = h("span", { className: "chip" }, String(expert), bar);
          chip.dataset.expert = expert;
          return chip;
        }),
      );
    },
    mark(cell, layer) {
      for (const chip of cell.children)
        chip.classList.toggle("chosen", layer === now.layer && Number(chip.dataset.expert) === now.expert);
    },
    move(pos, layer, target) {
      const chip = target.closest(".chip");
      go({ pos, layer, expert: chip ? Number(chip.dataset.expert) : null }, self);
    },
    peek: ({ pos = now.pos, row = now.layer }) => (readout.textContent = self.sentence({ pos, layer: row })),
  });
  const chosen = barList("Experts of this token", (item) => go({ expert: item.expert }, self));
  const served = barList("Tokens of this expert", (item) => go({ pos: item.pos, expert: now.expert }, self));
  const note =
    `The ${slots} of ${D.nExperts} experts that each layer chose for each token. ` +
    "Experts are numbered within a layer: the same number in another layer is another expert.";
  const legend = [
    h("span", {}, `bar: weight, longest ${number(D.maxWeight)}`),
    h("span", {}, "framed: the selected expert"),
  ];
  self.el = section(
    "Experts",
    note,
    legend,
    readout,
    h(
      "div",
      { className: "split" },
      table.el,
      h("div", { className: "panel" }, chosenTitle, chosen.el, servedTitle, load, served.el),
    ),
  );
  self.sentence = ({ pos, layer }) =>
    `layer ${layer} at ${D.at(pos)}: ` +
    D.experts(layer, pos)
      .map(({ expert, weight }) => `expert ${expert} ${number(weight)}`)
      .join(", ");
  self.paint = (newTheme) => {
    theme = newTheme;
    table.layout();
  };
  self.update = (next) => {
    now = next;
    table.select(now.pos, now.layer);
    readout.textContent = self.sentence(now);
    const bar = (weight) => ({ value: number(weight), share: weight / D.maxWeight });
    chosenTitle.textContent = `layer ${now.layer} at ${D.at(now.pos)}`;
    chosen.show(
      D.experts(now.layer, now.pos).map(({ expert, weight }) => ({ expert, name: `expert ${expert}`, ...bar(weight) })),
      (item) => item.expert === now.expert,
    );
    const users = D.served(now.layer, now.expert);
    const idle = D.load(now.layer).filter((count) => count === 0).length;
    servedTitle.textContent = `expert ${now.expert} serves ${users.length} of ${plural(D.n, "token")}`;
    load.textContent = idle
      ? `${plural(idle, "expert")} of this layer unused by this prompt.`
      : "Every expert of this layer is used by this prompt.";
    served.show(
      users.map(({ pos, weight }) => ({ pos, name: D.at(pos), ...bar(weight) })),
      (item) => item.pos === now.pos,
    );
  };
  return self;
}

async function inflate({ dtype, shape, data }) {
  const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0));
  const buffer = await new Response(
    new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate")),
  ).arrayBuffer();
  return { shape, values: new { float32: Float32Array, int32: Int32Array, uint8: Uint8Array }[dtype](buffer) };
}

async function main() {
  const data = JSON.parse(document.getElementById("data").textContent);
  const arrays = {};
  for (const [name, array] of Object.entries(data.arrays)) arrays[name] = await inflate(array);
  const D = reader(data, arrays);
  let state = { key: null, token: null, expert: null, ...data.start };

  /** What the state leaves open: the strongest key, the likeliest token, the heaviest expert of the selected place. */
  function resolve({ pos, layer, head, key, token, expert }) {
    const l = Math.max(layer, 0);
    const q = D.cell(pos);
    const row = layer + 1;
    const keys = D.map(l, head).subarray(q * D.side, (q + 1) * D.side);
    return {
      pos,
      row,
      layer: l,
      head,
      q,
      key: key ?? keys.indexOf(Math.max(...keys)),
      token: token ?? D.lens(pos, row)[0].id,
      expert: D.nExperts ? (expert ?? D.experts(l, pos)[0].expert) : null,
    };
  }
  const live = h("p", { className: "spoken", role: "status", ariaLive: "polite" });
  function go(patch, view) {
    const next = { ...state, ...patch };
    const moved = (...names) => names.some((name) => next[name] !== state[name]);
    if (moved("pos", "layer", "head") && !("key" in patch)) next.key = null;
    if (moved("layer") && !("expert" in patch)) next.expert = null;
    if (moved("pos") && next.token !== null && !D.path(next.pos, next.token)) next.token = null;
    state = next;
    const now = resolve(state);
    for (const v of views) v.update(now);
    live.textContent = view.sentence(now);
  }
  const views = [tokenView(D, go), lensView(D, go), attentionView(D, go), ...(D.nExperts ? [expertView(D, go)] : [])];
  const facts = [
    plural(D.layers.length, "layer"),
    plural(D.heads, "head"),
    plural(D.n, "token"),
    ...(D.nExperts ? [`${D.nExperts} experts, ${D.experts(0, 0).length} a token`] : []),
  ];
  const keys =
    "Keys: Tab moves between views, arrows inside one (Shift: ten at a time), Home and End to the ends; " +
    "in the attention views Page Up and Page Down change the layer, [ and ] the head.";
  document.title = `${D.model}: ${shown(D.prompt)}`;
  document.body.append(
    h(
      "main",
      {},
      h(
        "header",
        {},
        h("h1", { dir: "auto" }, D.model),
        h("p", { className: "facts" }, facts.join(" · ")),
        h("p", { className: "prompt", dir: "auto" }, D.prompt),
      ),
      ...views.map((view) => view.el),
      h("footer", {}, h("p", { className: "note" }, keys)),
      live,
    ),
  );
  function paint() {
    const theme = readTheme();
    for (const view of views) view.paint(theme);
    for (const view of views) view.update(resolve(state));
  }
  paint();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", paint);
  let frame;
  window.addEventListener("resize", () => {
    cancelAnimationFrame(frame);
    frame = requestAnimationFrame(paint);
  });
}

main().catch((error) => {
  document.body.append(h("p", {}, `This page could not draw itself: ${error.message}`));
  throw error;
});
