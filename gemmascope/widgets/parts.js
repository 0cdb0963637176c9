// Parts that views share: elements, colours of the theme, keys, legends, a list of bars, a table of positions.
// Every string of the model or the user becomes text, never markup.

function h(tag, props = {}, ...children) {
  const el = document.createElement(tag);
  for (const [key, value] of Object.entries(props)) key in el ? (el[key] = value) : el.setAttribute(key, value);
  el.append(...children);
  return el;
}

function svg(tag, attributes = {}, ...children) {
  const el = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [key, value] of Object.entries(attributes)) el.setAttribute(key, value);
  el.append(...children);
  return el;
}

/** The colours the style sheet chose for light or dark; read again when that changes. */
function readTheme() {
  const css = getComputedStyle(document.documentElement);
  const value = (name) => css.getPropertyValue(name).trim();
  const stops = (name) => ramp(value(name).split(/\s*,\s*/));
  const attention = stops("--ramp-attention");
  return {
    ink: value("--ink"),
    muted: value("--muted"),
    line: value("--line"),
    hatch: value("--hatch"),
    mono: value("--mono"),
    probability: stops("--ramp-probability"),
    surprise: stops("--ramp-surprise"),
    attention: range(256).map((u) => packed(attention(Math.sqrt(u / 255)))),
    expert: range(8).map((i) => value(`--expert-${i}`)),
  };
}

function paintOn(el, rgb) {
  el.style.backgroundColor = `rgb(${rgb})`;
  el.style.color = inkOn(rgb);
}

/** Scroll a box, and never the page, until the element inside it is seen. */
function reveal(box, el, left = 0, top = 0) {
  const a = box.getBoundingClientRect();
  const b = el.getBoundingClientRect();
  if (b.left < a.left + left) box.scrollLeft += b.left - a.left - left;
  else if (b.right > a.right) box.scrollLeft += b.right - a.right;
  if (b.top < a.top + top) box.scrollTop += b.top - a.top - top;
  else if (b.bottom > a.bottom) box.scrollTop += b.bottom - a.bottom;
}

/** Arrow keys, Home and End (Shift: ten at a time) as (column, row) steps; other keys by name. */
function onKeys(el, step, others = {}) {
  el.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const by = event.shiftKey ? 10 : 1;
    const steps = {
      ArrowLeft: [-by, 0],
      ArrowRight: [by, 0],
      ArrowUp: [0, -by],
      ArrowDown: [0, by],
      Home: [-Infinity, 0],
      End: [Infinity, 0],
    };
    if (event.key in others) others[event.key]();
    else if (event.key in steps) step(...steps[event.key]);
    else return;
    event.preventDefault();
  });
}

/** A titled part of the page: what it shows in a sentence, its legend, then its views. */
function section(title, note, legend, ...children) {
  return h(
    "section",
    { ariaLabel: title },
    h("h2", {}, title),
    h("p", { className: "note" }, note),
    h("div", { className: "legend" }, ...legend),
    ...children,
  );
}

/** One entry of a legend: a colour scale with its name and ticks, { place in 0..1: text }. */
function scale(name, text, ticks) {
  const marks = Object.entries(ticks).map(([at, value]) =>
    h("span", { className: "tick", style: `left: ${at * 100}%` }, value),
  );
  return h("span", {}, text, h("span", { className: "scale" }, h("span", { className: `gradient ${name}` }), ...marks));
}

/** A list of named bars, one of them picked: top-k tokens, keys a query reads, experts of a token. */
function barList(label, pick) {
  let items = [];
  let picked = -1;
  const el = h("div", { className: "bars", role: "listbox", tabIndex: 0, ariaLabel: label });
  const choose = (i) => items.length && pick(items[clamp(i, 0, items.length - 1)]);
  onKeys(el, (columns, rows) => choose(picked + columns + rows));
  el.addEventListener("click", (event) => {
    const option = event.target.closest("[role=option]");
    if (option) choose([...el.children].indexOf(option));
  });
  const show = (newItems, isPicked) => {
    [items, picked] = [newItems, newItems.findIndex(isPicked)];
    el.replaceChildren(
      ...items.map((item, i) =>
        h(
          "div",
          {
            id: `${label}-${i}`.replace(/\W+/g, "-"),
            role: "option",
            ariaSelected: String(i === picked),
            title: item.title || item.name,
          },
          h("span", { className: "name", dir: "auto" }, item.name),
          h(
            "span",
            { className: "track" },
            h("span", { className: "bar", style: `width: ${clamp(item.share, 0, 1) * 100}%` }),
          ),
          h("span", { className: "value" }, item.value),
        ),
      ),
    );
    el.setAttribute("aria-activedescendant", picked < 0 ? "" : el.children[picked].id);
    if (picked >= 0) reveal(el, el.children[picked]);
  };
  return { el, show };
}

/** A table with a column for each position, drawn only where the scroller stands: layers down, tokens across. */
function positionTable(D, { name, rowNames, rowHeight, cellWidth, fill, mark, move, peek }) {
  const labelWidth = 68;
  const headHeight = 36;
  const row = (className, text) =>
    h("div", { className: `row ${className}`, role: "row" }, h("div", { className: "label", role: "rowheader" }, text));
  const head = row("head", "");
  const body = rowNames.map((text) => row("", text));
  const inner = h("div", { className: "inner", role: "presentation" }, head, ...body);
  const el = h(
    "div",
    {
      className: "table",
      role: "grid",
      tabIndex: 0,
      ariaLabel: name,
      ariaRowCount: body.length + 1,
      ariaColCount: D.n,
    },
    inner,
  );
  inner.style.setProperty("--row", `${rowHeight}px`);
  let [first, end] = [0, 0]; // the columns now drawn
  let width = cellWidth;
  let current = null;
  const place = (cell, pos) => {
    cell.style.left = `${labelWidth + pos * width}px`;
    cell.style.width = `${width}px`;
    cell.ariaColIndex = pos + 1;
    return cell;
  };
  function draw(force) {
    const a = Math.max(0, Math.floor(el.scrollLeft / width) - 4);
    const b = Math.min(D.n, Math.ceil((el.scrollLeft + el.clientWidth) / width) + 4);
    if (!force && a === first && b === end) return;
    [first, end] = [a, b];
    const positions = range(b - a).map((i) => a + i);
    const keep = (r, cells) => r.replaceChildren(r.firstChild, ...cells);
    keep(
      head,
      positions.map((pos) =>
        place(
          h(
            "div",
            { className: "cell", role: "columnheader", title: shown(D.tokens[pos]) },
            h("small", {}, String(pos)),
            h("span", { dir: "auto" }, shown(D.tokens[pos])),
          ),
          pos,
        ),
      ),
    );
    body.forEach((r, i) =>
      keep(
        r,
        positions.map((pos) => {
          const cell = place(
            h("div", { className: "cell", role: "gridcell", id: `${name}-${i}-${pos}`.replace(/\W+/g, "-") }),
            pos,
          );
          [cell.dataset.row, cell.dataset.pos] = [i, pos];
          fill(cell, i, pos);
          return cell;
        }),
      ),
    );
    if (current) update();
  }
  function update() {
    for (const cell of head.querySelectorAll(".cell"))
      cell.classList.toggle("here", Number(cell.ariaColIndex) === current.pos + 1);
    body.forEach((r, i) => r.classList.toggle("here", i === current.row));
    for (const cell of inner.querySelectorAll("[role=gridcell]")) {
      const here = Number(cell.dataset.pos) === current.pos && Number(cell.dataset.row) === current.row;
      cell.ariaSelected = String(here);
      mark(cell, Number(cell.dataset.row), Number(cell.dataset.pos));
      if (here) el.setAttribute("aria-activedescendant", cell.id);
    }
  }
  el.addEventListener("scroll", () => draw(false), { passive: true });
  el.addEventListener("click", (event) => {
    const cell = event.target.closest("[role=gridcell], [role=columnheader]");
    if (cell) move(cell.ariaColIndex - 1, "row" in cell.dataset ? Number(cell.dataset.row) : current.row, event.target);
  });
  el.addEventListener("mouseover", (event) => {
    const cell = event.target.closest("[role=gridcell]");
    peek(cell ? { pos: Number(cell.dataset.pos), row: Number(cell.dataset.row) } : {});
  });
  el.addEventListener("mouseleave", () => peek({}));
  onKeys(el, (columns, rows) =>
    move(clamp(current.pos + columns, 0, D.n - 1), clamp(current.row + rows, 0, body.length - 1), el),
  );
  return {
    el,
    select(pos, rowIndex) {
      current = { pos, row: rowIndex };
      const left = pos * width;
      const room = el.clientWidth - labelWidth;
      if (left < el.scrollLeft) el.scrollLeft = left;
      else if (left + width > el.scrollLeft + room) el.scrollLeft = left + width - room;
      const top = rowIndex * rowHeight;
      const height = el.clientHeight - headHeight;
      if (top < el.scrollTop) el.scrollTop = top;
      else if (top + rowHeight > el.scrollTop + height) el.scrollTop = top + rowHeight - height;
      draw(false);
      update();
    },
    layout() {
      const room = el.clientWidth - labelWidth;
      width = Math.min(room / Math.min(D.n, Math.floor(room / cellWidth)), Math.max(110, cellWidth * 2));
      inner.style.width = `${labelWidth + D.n * width}px`;
      draw(true);
    },
  };
}

/** Probabilities over named places: one line picked among faint ones that share its scale, a mark at one place. */
function lineChart({ label, names, lines, picked, at }) {
  const [width, height] = [300, 132];
  const [left, right, top, bottom] = [34, 292, 8, 112];
  const most = largest(picked);
  const ceiling = [0.001, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5].find((c) => c >= most) || 1;
  const x = (i) => left + (i / (names.length - 1)) * (right - left);
  const y = (value) => bottom - (Math.min(value, ceiling) / ceiling) * (bottom - top);
  const text = (value, x, y, anchor) => svg("text", { x, y, "text-anchor": anchor }, value);
  const line = (values, className) =>
    svg("polyline", { class: className, points: [...values].map((value, i) => `${x(i)},${y(value)}`).join(" ") });
  const every = Math.ceil(names.length / 8);
  const named = (i) => i === 0 || ((i - 1) % every === 0 && x(i) > left + 40); // the first name is the longest
  return svg(
    "svg",
    { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `${label}, at most ${number(most)}` },
    ...[0, ceiling / 2, ceiling].flatMap((value) => [
      svg("line", { class: "rule", x1: left, x2: right, y1: y(value), y2: y(value) }),
      text(String(value), left - 5, y(value) + 4, "end"),
    ]),
    svg("line", { class: "cursor", x1: x(at), x2: x(at), y1: top, y2: bottom }),
    ...lines.map((values) => line(values, "faint")),
    line(picked, "picked"),
    ...[...picked].map((value, i) => svg("circle", { cx: x(i), cy: y(value), r: i === at ? 4 : 2 })),
    ...names.map((name, i) => (named(i) ? text(name, x(i), height - 5, i ? "middle" : "start") : "")),
  );
}
