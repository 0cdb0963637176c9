// The page of a view under test: traits and questions go to Python, where the test runs, through `toPython`.

class LiveModel extends LocalModel {
  constructor(ref, values) {
    super(values);
    this.ref = ref;
    this.changed = {};
  }
  set(name, value) {
    if (this.get(name) !== value) this.changed[name] = value;
    super.set(name, value);
  }
  receive(name, value, buffers) {
    if (canonical(this.get(name)) !== canonical(value)) super.set(name, bytesIn(value, buffers));
  }
  save_changes() {
    const changed = this.changed;
    this.changed = {};
    window.sent = Promise.all([window.sent, window.toPython({ ref: this.ref, changed })]);
  }
}

function bytesIn(value, buffers) {
  if (Array.isArray(value)) return value.map((one) => bytesIn(one, buffers));
  if (value === null || typeof value !== "object") return value;
  if ("dtype" in value && "shape" in value) {
    const bytes = Uint8Array.from(atob(buffers[value.data]), (c) => c.charCodeAt(0));
    return { ...value, data: new DataView(bytes.buffer) };
  }
  return Object.fromEntries(Object.entries(value).map(([key, one]) => [key, bytesIn(one, buffers)]));
}

async function showLive(views, { models, shown }) {
  const live = {};
  for (const [ref, { traits, buffers }] of Object.entries(models))
    live[ref] = new LiveModel(ref, bytesIn(traits, buffers));
  window.models = live;
  const signal = new AbortController().signal;
  const host = {
    getModel: async (ref) => live[ref],
    getWidget: async (ref) => ({ render: ({ el }) => mount(ref, el) }),
  };
  async function mount(ref, el) {
    const invoke = async (name, message, { signal }) => {
      const answer = window.toPython({ ref, question: message });
      const stopped = new Promise((_, fail) =>
        signal.addEventListener("abort", () => fail(new DOMException("", "AbortError"))),
      );
      const { response, buffers, gone } = await Promise.race([answer, stopped]);
      if (gone) throw new Error("Cannot send");
      return [bytesIn(response, buffers), []];
    };
    await views[models[ref].render]({ model: live[ref], el, host, signal, experimental: { invoke } });
  }
  const main = document.createElement("main");
  document.body.append(main);
  await mount(shown, main);
}
