// The frame around every view: its data, state and selection, questions to the kernel, theme, keyboard help, notices, and
// what can be taken along (Python, CSV, a picture, a table).
//
// A view is `export const nounView = view({ name, note, keys, build })`, where name and note are texts, or functions of
// the view's data that give one. `build(v)` fills `v.body` once, and returns
//     paint()     draws everything: called at first, when the theme or the width changes, when the state changes
//     update()    draws what depends on the selection
//     sentence()  what is selected, for the readout and for screen readers
//     python()    lines that give the selected number (optional)
//     table()     { columns, rows } behind the picture, the most telling first (optional)
//     picture()   a canvas (optional)
// and hears nothing of the model: `v` is all it knows.

import { LocalModel } from "./local_model.js";
import { canonical, csv, unpacked } from "./numbers.js";
import { button, h, readTheme } from "./parts.js";

const SELECTED = ["pos", "key", "layer", "head", "expert", "neuron", "token", "site"];
const MAX_ANSWERS = 256;
const TABLE_ROWS = 50;

export function view({ name: named, note: noted, keys = "", build }) {
  return async ({ model, el, host, signal = new AbortController().signal, experimental }) => {
    const [name, note] = [named, noted].map((text) => (typeof text === "function" ? text(model.get("data")) : text));
    const uid = `gsc-${Math.random().toString(36).slice(2)}`;
    const words = (text) => String(text).replace(/[^\w-]+/g, "-");
    const body = h("div", { className: "body" });
    const readout = h("p", { className: "readout", role: "status", ariaLive: "polite" });
    const notice = h("p", { className: "notice", role: "alert", hidden: true });
    const aside = h("div", { className: "aside", hidden: true });
    const tools = h("div", { className: "tools", role: "toolbar", ariaLabel: `${name}: take along` });
    const title = h("h3", { id: `${uid}-title` }, name);
    const head = h("div", { className: "heading" }, title, tools);
    const root = h(
      "section",
      { className: "gsc", "aria-labelledby": title.id },
      head,
      h("p", { className: "note" }, note),
    );
    root.append(notice, body, readout, aside);
    el.append(root);

    // Answers of the kernel, or of the page.
    const known = new Map(); // the last to be used stands last
    const asked = new Map(); // question -> what stops its latest asking
    function remember(key, answer) {
      known.delete(key);
      known.set(key, answer);
      if (known.size > MAX_ANSWERS) known.delete(known.keys().next().value);
      return answer;
    }
    async function invoke(question, args, stop) {
      const either = AbortSignal.any([signal, stop]); // with a signal of ours, there is no time limit
      const [response, buffers] = await experimental.invoke("ask", { question, arguments: args }, { signal: either });
      if (response.error !== undefined) throw new Error(response.error);
      if (failed) v.notice("");
      failed = false;
      return unpacked(response, (data) => (typeof data === "number" ? buffers[data] : data));
    }
    let failed = false; // until an answer comes again
    function fail(error) {
      if (signal.aborted || error.name === "AbortError") return;
      const gone = /cannot send|comm|disposed|no kernel/i.test(error.message);
      failed = true;
      v.notice(gone ? "The kernel is gone or was restarted: run this cell again." : error.message);
    }

    const v = {
      body,
      signal,
      theme: null,
      data: null,
      /** Without a kernel: only what the page carries can be shown. */
      page: Boolean(experimental?.page),
      get state() {
        return model.get("state");
      },
      /** Changes of the state, which Python sees. */
      keep(changes) {
        model.set("state", { ...model.get("state"), ...changes });
        model.save_changes();
      },
      /** What is selected: numbers, null where nothing is. */
      get now() {
        return Object.fromEntries(SELECTED.map((each) => [each, shared.get(each) ?? null]));
      },
      /** Selects, here and in every linked view. */
      select(changes) {
        for (const [each, value] of Object.entries(changes)) shared.set(each, value);
        shared.save_changes();
      },
      /** An id that no other view has. */
      id: (...parts) => `${uid}-${parts.map(words).join("-")}`,
      notice(text) {
        notice.textContent = text;
        notice.hidden = !text;
      },
      say: (text) => (readout.textContent = text),
      /** The answer to a question if it is at hand, else null. */
      recall(question, args = {}) {
        const key = canonical([question, args]);
        return known.has(key) ? remember(key, known.get(key)) : null;
      },
      /** Asks, and calls `then` with the answer: now where it is at hand. A later call with the same question takes the
       * place of this one. */
      show(question, args, then) {
        asked.get(question)?.abort();
        const at_hand = v.recall(question, args);
        if (at_hand) return then(at_hand);
        const stop = new AbortController();
        asked.set(question, stop);
        root.ariaBusy = "true";
        invoke(question, args, stop.signal)
          .then((answer) => {
            remember(canonical([question, args]), answer);
            if (!stop.signal.aborted) then(answer);
          }, fail)
          .finally(() => {
            if (asked.get(question) === stop) asked.delete(question);
            root.ariaBusy = String(asked.size > 0);
          });
      },
      /** Asks for something to be done, which no answer at hand stands for. Says what went wrong, and gives null then. */
      async run(question, args, stop = new AbortController().signal) {
        v.notice("");
        return invoke(question, args, stop).catch((error) => (fail(error), null));
      },
      /** Draws again what the selection or an answer changed. */
      refresh() {
        parts.update();
        v.say(parts.sentence());
        root.dataset.drawn = Number(root.dataset.drawn ?? 0) + 1;
      },
    };

    // What can be taken along.
    function open(label, ...contents) {
      const again = !aside.hidden && aside.dataset.label === label;
      aside.hidden = again;
      aside.dataset.label = label;
      aside.replaceChildren(...(again ? [] : contents));
    }
    const save = (blob, ending) => {
      const link = h("a", { href: URL.createObjectURL(blob), download: `${words(name)}.${ending}` });
      link.click();
      setTimeout(() => URL.revokeObjectURL(link.href), 1000);
    };
    async function copyPython() {
      const text = [v.data.setup, parts.python()].filter(Boolean).join("\n");
      open("Python", h("pre", { tabIndex: 0, ariaLabel: "Python for what is selected" }, text));
      await navigator.clipboard?.writeText(text).then(
        () => v.say("Copied."),
        () => v.say("Select the text to copy it."),
      );
    }
    function showTable() {
      const { columns, rows } = parts.table();
      const cells = (tag, row) => row.map((value) => h(tag, { dir: "auto" }, String(Number.isNaN(value ?? NaN) ? "–" : value)));
      const lines = rows.slice(0, TABLE_ROWS).map((row) => h("tr", {}, ...cells("td", row)));
      const table = h("table", {}, h("thead", {}, h("tr", {}, ...cells("th", columns))), h("tbody", {}, ...lines));
      const more = rows.length > TABLE_ROWS ? `The first ${TABLE_ROWS} of ${rows.length} rows; CSV has all.` : "";
      open(
        "Table",
        h("div", { className: "rows", tabIndex: 0, role: "region", ariaLabel: `${name} as a table` }, table),
        more,
      );
    }
    const saveCsv = () => {
      const { columns, rows } = parts.table();
      save(new Blob([csv(columns, rows)], { type: "text/csv" }), "csv");
    };
    const help = () =>
      open(
        "Keys",
        h("p", { className: "note" }, `Tab moves between parts, arrows inside one (Shift: ten at a time). ${keys}`),
      );
    function offer() {
      const offers = [
        parts.python && button("Python", copyPython, { title: "Copy the Python for what is selected" }),
        parts.table && button("Table", showTable, { title: "The numbers behind the picture" }),
        parts.table && button("CSV", saveCsv, { title: "Save the numbers behind the picture" }),
        parts.picture &&
          button("PNG", () => parts.picture().toBlob((blob) => save(blob, "png")), { title: "Save the picture" }),
        button("?", help, { ariaLabel: "Keys" }),
      ];
      tools.replaceChildren(...offers.filter(Boolean));
    }
    root.addEventListener(
      "keydown",
      (event) => event.key === "?" && !/INPUT|TEXTAREA|SELECT/.test(event.target.tagName) && help(),
    );

    // The selection that is followed.
    let shared = new LocalModel({});
    let waiting = false;
    const onSelect = () => {
      if (waiting) return; // several entries of one selection are one change
      waiting = true;
      queueMicrotask(() => {
        waiting = false;
        if (parts) v.refresh();
      });
    };
    async function follow() {
      shared.off("change", onSelect);
      const ref = model.get("selection");
      if (ref && host) shared = await host.getModel(ref);
      else v.notice("This notebook's widgets are older than anywidget 0.11, so that views are not linked.");
      shared.on("change", onSelect);
    }

    let parts = null;
    function paint() {
      v.theme = readTheme(root);
      if (!parts || !root.clientWidth) return; // not in the document yet
      parts.paint();
      v.refresh();
    }
    function rebuild() {
      v.data = unpacked(model.get("data"));
      known.clear();
      v.notice("");
      body.replaceChildren();
      parts = build(v);
      offer();
      paint();
    }
    let frame;
    const later = () => {
      cancelAnimationFrame(frame);
      frame = requestAnimationFrame(paint);
    };
    followTheme(root, signal, later);
    await follow();
    model.on("change:selection", async () => (await follow(), v.refresh()));
    model.on("change:state", paint);
    model.on("change:data", rebuild);
    rebuild();

    let width = 0;
    const sizes = new ResizeObserver(() => {
      if (root.clientWidth === width) return; // its own drawing makes it higher
      width = root.clientWidth;
      later();
    });
    sizes.observe(root);
    signal.addEventListener("abort", () => {
      shared.off("change", onSelect);
      sizes.disconnect();
    });
  };
}

/** Keeps data-theme of an element "light" or "dark", and calls `changed` when it becomes the other. */
export function followTheme(root, signal, changed = () => {}) {
  root.dataset.theme = themeOf();
  const look = () => {
    const now = themeOf();
    if (now === root.dataset.theme) return;
    root.dataset.theme = now;
    changed();
  };
  const observer = new MutationObserver(look);
  const watched = {
    attributes: true,
    attributeFilter: ["data-jp-theme-light", "data-vscode-theme-kind", "theme", "class"],
  };
  for (const one of [document.documentElement, document.body]) observer.observe(one, watched);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", look, { signal });
  signal.addEventListener("abort", () => observer.disconnect());
}

/** "light" or "dark", as Jupyter, VS Code, Colab, marimo or else the system says. */
function themeOf() {
  const { body, documentElement: page } = document;
  const jupyter = body.dataset.jpThemeLight;
  if (jupyter) return jupyter === "true" ? "light" : "dark";
  const named = body.dataset.vscodeThemeKind ?? page.getAttribute("theme") ?? body.dataset.theme ?? "";
  if (/dark|black/.test(named) || page.classList.contains("dark") || body.classList.contains("dark")) return "dark";
  if (/light/.test(named) || page.classList.contains("light") || body.classList.contains("light")) return "light";
  return matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
}
