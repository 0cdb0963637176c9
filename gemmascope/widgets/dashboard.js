// Several views under one heading. Each draws itself; what links them is the selection that all of them follow.

import { h } from "./parts.js";
import { followTheme } from "./view.js";

export async function dashboard({ model, el, host, signal = new AbortController().signal }) {
  const { title, facts } = model.get("data");
  const heading = h(
    "header",
    {},
    h("h2", { dir: "auto" }, title),
    h("p", { className: "note", dir: "auto" }, facts.join(" · ")),
  );
  const places = model.get("children").map(() => h("div"));
  const root = h("div", { className: "gsc dashboard" }, heading, h("div", { className: "views" }, ...places));
  followTheme(root, signal);
  el.append(root);
  if (!host) return root.append("This notebook's widgets are older than anywidget 0.11: show the views one by one.");
  for (const [i, ref] of model.get("children").entries()) {
    const child = await host.getWidget(ref);
    await child.render({ el: places[i] });
  }
}
