// The attention view: a thumbnail of every head, one large map, and what the selected query reads.

/** An attention map as a picture of one pixel a cell; what may not be seen is left clear. */
function mapImage(codes, side, colours, seen) {
  const image = new ImageData(side, side);
  const pixels = new Uint32Array(image.data.buffer);
  for (let q = 0; q < side; q++)
    for (let k = 0; k < side; k++) if (seen(q, k)) pixels[q * side + k] = colours[codes[q * side + k]];
  const canvas = h("canvas", { width: side, height: side });
  canvas.getContext("2d").putImageData(image, 0, 0);
  return canvas;
}

/** A drawing context in CSS pixels, sharp on this screen. */
function context(canvas, width, height) {
  const scale = window.devicePixelRatio || 1;
  [canvas.width, canvas.height] = [Math.round(width * scale), Math.round(height * scale)];
  [canvas.style.width, canvas.style.height] = [`${width}px`, `${height}px`];
  const ctx = canvas.getContext("2d");
  ctx.scale(scale, scale);
  ctx.imageSmoothingEnabled = false;
  return ctx;
}

function attentionView(D, go) {
  const self = {};
  let theme, now, image, geometry;
  let hover = null;
  const kindOf = (layer) => (layer.kind === "sliding" ? `sliding ${layer.window}` : layer.kind);
  const head = (l, i) =>
    h(
      "div",
      {
        className: "thumb",
        role: "gridcell",
        id: `head-${l}-${i}`,
        title: `layer ${l} head ${i}`,
        ariaLabel: `layer ${l} head ${i}`,
      },
      h("canvas", { ariaHidden: "true" }),
    );
  const rows = D.layers.map((layer, l) => {
    const size = D.heads / layer.kvHeads;
    const groups = range(layer.kvHeads).map((g) =>
      h("div", { className: "group", role: "presentation" }, ...range(size).map((i) => head(l, g * size + i))),
    );
    const source = layer.kvSource === null ? [] : [h("small", {}, `K, V: layer ${layer.kvSource}`)];
    return h(
      "div",
      { className: "row", role: "row" },
      h("div", { className: "label", role: "rowheader" }, `layer ${l}`, h("small", {}, kindOf(layer)), ...source),
      ...groups,
    );
  });
  const names = h(
    "div",
    { className: "row names", role: "presentation" },
    h("div", { className: "label" }, "head"),
    ...range(D.heads).map((i) => h("span", {}, String(i))),
  );
  const thumbs = h("div", { className: "thumbs", role: "grid", tabIndex: 0, ariaLabel: "Heads" }, names, ...rows);
  const canvas = h("canvas", { ariaHidden: "true" });
  const cursor = h("div", { className: "spoken", role: "gridcell", id: "map-cursor" });
  const map = h(
    "div",
    {
      className: "map",
      role: "grid",
      tabIndex: 0,
      ariaLabel: "Attention map: queries down, keys across",
      ariaRowCount: D.side,
      ariaColCount: D.side,
      "aria-activedescendant": "map-cursor",
    },
    h("div", { role: "row" }, cursor),
    canvas,
  );
  const readout = h("p", { className: "readout" });
  const title = h("h3");
  const listTitle = h("h3");
  const list = barList("Keys read", (item) => go({ key: item.key }, self));
  const note =
    "How much each query (down) reads of each key (across), to ±0.002. A sliding layer sees the last so many positions. " +
    "Heads over one bracket share keys and values." +
    (D.block > 1
      ? ` The prompt is long: each cell is the largest weight of a block of ${D.block} x ${D.block} positions.`
      : "");
  const legend = [
    scale("attention", "weight, on a square-root scale", { 0: "0", [Math.sqrt(0.05)]: ".05", 0.5: ".25", 1: "1" }),
    h("span", {}, h("i", { className: "missing" }), " out of sight"),
  ];
  self.el = section(
    "Attention",
    note,
    legend,
    h("div", { className: "heads" }, thumbs, h("div", {}, title, readout, map), h("div", {}, listTitle, list.el)),
  );

  const step = (layers, heads) =>
    go(
      { layer: clamp(now.layer + layers, 0, D.layers.length - 1), head: clamp(now.head + heads, 0, D.heads - 1) },
      self,
    );
  const turn = { PageUp: () => step(-1, 0), PageDown: () => step(1, 0), "[": () => step(0, -1), "]": () => step(0, 1) };
  const toCell = (q, k) => go({ pos: q === now.q ? now.pos : D.last(q), key: k }, self);
  onKeys(thumbs, (columns, by) => step(by, columns), turn);
  onKeys(map, (columns, by) => toCell(clamp(now.q + by, 0, D.side - 1), clamp(now.key + columns, 0, D.side - 1)), turn);
  thumbs.addEventListener("click", (event) => {
    const thumb = event.target.closest(".thumb");
    if (thumb) go({ layer: Number(thumb.id.split("-")[1]), head: Number(thumb.id.split("-")[2]) }, self);
  });
  const under = (event) => {
    const box = canvas.getBoundingClientRect();
    const [k, q] = [event.clientX - box.left, event.clientY - box.top].map((at) =>
      Math.floor((at - geometry.gutter) / geometry.cell),
    );
    return q >= 0 && k >= 0 && q < D.side && k < D.side ? { q, key: k } : null;
  };
  canvas.addEventListener("click", (event) => under(event) && toCell(under(event).q, under(event).key));
  for (const type of ["mousemove", "mouseleave"])
    canvas.addEventListener(type, (event) => {
      hover = type === "mousemove" ? under(event) : null;
      readout.textContent = self.sentence({ ...now, ...hover });
      drawMap();
    });
  self.sentence = ({ layer, head: i, q, key }) => {
    const value = D.sees(layer, q, key)
      ? number(D.map(layer, i)[q * D.side + key] / 255)
      : key > q
        ? "not yet written"
        : "outside the window";
    return `layer ${layer} head ${i}: ${D.cellName(q)} reads ${D.cellName(key)}: ${value}`;
  };

  function drawMap() {
    const gutter = 92;
    const room = map.clientWidth - gutter - 4;
    const cell = clamp(Math.floor(room / D.side), 1, 32);
    const size = cell * D.side;
    const step = Math.ceil(13 / cell);
    geometry = { gutter, cell };
    const ctx = context(canvas, gutter + size + 4, gutter + size + 4);
    const clip = (text) => {
      while (text.length > 1 && ctx.measureText(text).width > gutter - 10) text = `${text.slice(0, -2)}…`;
      return text;
    };
    const stripes = h("canvas", { width: 6, height: 6 });
    const pen = stripes.getContext("2d");
    pen.strokeStyle = theme.hatch;
    for (const x of [-6, 0, 6]) pen.stroke(new Path2D(`M${x} 6L${x + 6} 0`));
    ctx.fillStyle = ctx.createPattern(stripes, "repeat");
    ctx.fillRect(gutter, gutter, size, size);
    ctx.drawImage(image, gutter, gutter, size, size);
    const at = hover || now;
    const label = (i, chosen, across) => {
      ctx.save();
      ctx.translate(gutter - 5, gutter - 5);
      if (across) ctx.rotate(-Math.PI / 2);
      ctx.font = `${chosen ? "bold " : ""}11px ${theme.mono}`;
      ctx.fillStyle = chosen ? theme.ink : theme.muted;
      [ctx.textAlign, ctx.textBaseline] = [across ? "left" : "right", "middle"];
      ctx.fillText(clip(D.cellName(i)), 0, (i + 0.5) * cell + 5);
      ctx.restore();
    };
    const labels = (chosen, across) => {
      // Every step-th label, and the chosen one at the cost of those it would run into.
      for (let i = 0; i < D.side; i += step) if (Math.abs(i - chosen) >= step) label(i, false, across);
      label(chosen, true, across);
    };
    labels(at.q, false);
    labels(at.key, true);
    ctx.strokeStyle = theme.line;
    ctx.strokeRect(gutter - 0.5, gutter - 0.5, size + 1, size + 1);
    ctx.strokeStyle = theme.ink;
    ctx.strokeRect(gutter - 0.5, gutter + now.q * cell - 0.5, size + 1, cell + 1);
    ctx.lineWidth = 2;
    ctx.strokeRect(gutter + at.key * cell - 1, gutter + at.q * cell - 1, cell + 2, cell + 2);
  }
  function drawThumbs() {
    const size = clamp(Math.floor((thumbs.clientWidth - 100) / D.heads) - 4, 26, 80);
    const factor = Math.ceil(D.side / 64);
    thumbs.style.setProperty("--thumb", `${size}px`);
    for (const l of range(D.layers.length))
      for (const i of range(D.heads)) {
        const codes = poolMax(D.map(l, i), D.side, factor);
        const side = Math.ceil(D.side / factor);
        const image = mapImage(codes, side, theme.attention, (q, k) =>
          visible(q, k, D.block * factor, D.n, D.layers[l].window),
        );
        context(rows[l].querySelectorAll("canvas")[i], size, size).drawImage(image, 0, 0, size, size);
      }
  }
  self.paint = (newTheme) => {
    theme = newTheme;
    drawThumbs();
  };
  self.update = (next) => {
    now = next;
    const chosen = `head-${now.layer}-${now.head}`;
    for (const thumb of thumbs.querySelectorAll(".thumb")) thumb.ariaSelected = String(thumb.id === chosen);
    thumbs.setAttribute("aria-activedescendant", chosen);
    reveal(thumbs, document.getElementById(chosen), 100);
    readout.textContent = cursor.textContent = self.sentence(now);
    title.textContent = `layer ${now.layer} head ${now.head}, ${kindOf(D.layers[now.layer])}`;
    listTitle.textContent = `${D.cellName(now.q)} reads`;
    const row = D.map(now.layer, now.head).subarray(now.q * D.side, (now.q + 1) * D.side);
    const keys = range(D.side)
      .filter((k) => row[k] > 0)
      .sort((a, b) => row[b] - row[a])
      .slice(0, 8);
    list.show(
      keys.map((key) => ({ key, name: D.cellName(key), value: number(row[key] / 255), share: row[key] / 255 })),
      (item) => item.key === now.key,
    );
    image = mapImage(D.map(now.layer, now.head), D.side, theme.attention, (q, k) => D.sees(now.layer, q, k));
    drawMap();
  };
  return self;
}
