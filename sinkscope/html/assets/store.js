// What is chosen on the page, and what has to be drawn again when that changes.

const arrays = {};
function array(name) {
  arrays[name] ??= unpack(page.arrays[name]);
  return arrays[name];
}

const state = {
  ...page.start,
  prompt: 0,
  quantity: 0,
  position: null, // chosen in a figure or among the tokens
  epsilon: null,
  log: { // which y axes are logarithmic
    received: false, values: false, residual: page.views.residual?.layout.yaxis.type === "log",
  },
};
const ADDRESSED = ["layer", "head", "metric", "prompt"]; // choices that the address holds

const watchers = [];

// Call `draw` when one of these things is chosen anew.
function watch(keys, draw) {
  watchers.push({ keys, draw });
}

// Choose what the address says, as far as this page has it.
function followAddress() {
  const { layer, head, prompt, metric: name } = address.read();
  const changes = {};
  if (layer) changes.layer = within(Number(layer), page.sizes.layer);
  if (head) changes.head = within(Number(head), page.sizes.head);
  if (prompt && page.tokens) changes.prompt = within(Number(prompt), page.tokens.prompts.length);
  if (page.metrics.some((one) => one.name === name)) changes.metric = name;
  choose(changes);
}

const within = (index, size) => Math.min(Math.max(Math.round(index) || 0, 0), size - 1);

function choose(changes) {
  const keys = Object.keys(changes).filter((key) => changes[key] !== state[key]);
  if (keys.length === 0) return;
  Object.assign(state, changes);
  const addressed = keys.filter((key) => ADDRESSED.includes(key));
  if (addressed.length) address.write(Object.fromEntries(addressed.map((key) => [key, state[key]])));
  for (const watcher of watchers) {
    if (watcher.keys.some((key) => keys.includes(key))) watcher.draw();
  }
}

// Several query heads may share a key and value head.
function chosen(dim) {
  if (dim !== "kv_head") return state[dim];
  return Math.floor(state.head / (page.sizes.head / page.sizes.kv_head));
}

// What is left of an array at the chosen indices along its first dimensions.
function slice(name, at) {
  const { values, shape } = array(name);
  let start = 0;
  let size = values.length;
  at.forEach((dim, axis) => {
    size /= shape[axis];
    start += chosen(dim) * size;
  });
  return values.subarray(start, start + size);
}

// A 2-D array as its rows, as heatmaps want it.
function rows(name) {
  const { values, shape } = array(name);
  const width = values.length / shape[0];
  return Array.from({ length: shape[0] }, (_, row) => values.subarray(row * width, (row + 1) * width));
}

// A figure with its references replaced by what is chosen now.
function resolve(node) {
  if (Array.isArray(node)) return node.map(resolve);
  if (node === null || typeof node !== "object") return node;
  if ("$list" in node) return page.lists[node.$list];
  if ("$array" in node) {
    const values = slice(node.$array, node.at);
    if (node.take === null) return values;
    return Float32Array.from(array(node.take).values, (index) => values[index]);
  }
  return Object.fromEntries(Object.entries(node).map(([key, value]) => [key, resolve(value)]));
}

const metric = () => page.metrics.find((one) => one.name === state.metric);

const DIM_WORDS = { head: "head", kv_head: "KV head", layer: "layer" };
const where = (dims) => dims.map((dim) => `${DIM_WORDS[dim]} ${chosen(dim)}`).join(", ");
