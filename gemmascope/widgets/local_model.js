// A model as widgets know it, in the browser alone: for a page without a kernel, and for a view without a selection.

export class LocalModel {
  #values;
  #listeners = new Map();

  constructor(values) {
    this.#values = values;
  }
  get(name) {
    return this.#values[name];
  }
  set(name, value) {
    if (this.#values[name] === value) return;
    this.#values[name] = value;
    this.#fire(`change:${name}`);
    this.#fire("change");
  }
  save_changes() {}
  on(event, listener) {
    if (!this.#listeners.has(event)) this.#listeners.set(event, new Set());
    this.#listeners.get(event).add(listener);
  }
  off(event, listener) {
    this.#listeners.get(event)?.delete(listener);
  }
  #fire(event) {
    for (const listener of [...(this.#listeners.get(event) ?? [])]) listener();
  }
}
