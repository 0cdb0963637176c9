// The page of an exported view: what a notebook's widget manager and kernel are, from numbers that the page carries.

import { LocalModel } from "./local_model.js";
import { canonical } from "./numbers.js";

async function inflate(text) {
  const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new DataView(await new Response(stream).arrayBuffer());
}

/** A value with the bytes of its arrays back. */
async function inflated(value) {
  if (Array.isArray(value)) return Promise.all(value.map(inflated));
  if (value === null || typeof value !== "object") return value;
  if ("dtype" in value && "shape" in value) return { ...value, data: await inflate(value.data) };
  const entries = Object.entries(value).map(async ([key, one]) => [key, await inflated(one)]);
  return Object.fromEntries(await Promise.all(entries));
}

/** Draws the page's view. `views` are the render functions by name. */
export async function showPage(views) {
  const page = JSON.parse(document.getElementById("gsc-page").textContent);
  const models = {};
  for (const [ref, model] of Object.entries(page.models)) models[ref] = new LocalModel(await inflated(model.traits));
  const signal = new AbortController().signal;
  const host = {
    getModel: async (ref) => models[ref],
    getWidget: async (ref) => ({ render: ({ el }) => mount(ref, el) }),
  };
  async function mount(ref, el) {
    const { render, answers } = page.models[ref];
    const invoke = async (name, { question, arguments: given }) => {
      const key = canonical([question, given]);
      if (!(key in answers)) throw new Error("This page does not hold that: make the view again in a notebook.");
      return [await inflated(answers[key]), []];
    };
    await views[render]({ model: models[ref], el, host, signal, experimental: { invoke, page: true } });
  }
  const main = document.createElement("main");
  document.body.append(main);
  await mount(page.shown, main).catch((error) => {
    main.append(`This page could not draw itself: ${error.message}`);
    throw error;
  });
}
