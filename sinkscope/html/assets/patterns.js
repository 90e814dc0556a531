// The attention patterns that the page holds: the chosen head's, and small ones of the strongest.

const STRONGEST = 12;

// The prompt whose patterns are shown: the chosen one, or the first where the page has none of it.
const patternPrompt = () => Math.max(page.patterns.prompts.indexOf(state.prompt), 0);

// One head's cells, a row a query [0, 255].
function cellsOf(layer, head) {
  const { values, shape } = array("patterns.cells");
  const [, layers, heads, side] = shape;
  const start = ((patternPrompt() * layers + layer) * heads + head) * side * side;
  return Array.from({ length: side }, (_, row) =>
    values.subarray(start + row * side, start + (row + 1) * side));
}

function fillPattern(data, layout) {
  const { first, length } = page.patterns;
  const edges = [...first, length].map((position) => position - 0.5);
  const name = (cell) => {
    const last = (first[cell + 1] ?? length) - 1;
    return first[cell] === last ? `${last}` : `${first[cell]} to ${last}`;
  };
  data[0].x = edges;
  data[0].y = edges;
  data[0].z = cellsOf(state.layer, state.head).map((row, query) =>
    Array.from(row, (x, key) => (page.causal && key > query ? null : x / 255)));
  data[0].text = first.map((_, query) => first.map((_, key) => `query ${name(query)}, key ${name(key)}`));
  layout.yaxis.autorange = "reversed";
  byId("pattern-prompt").textContent = `, prompt ${page.patterns.prompts[patternPrompt()]}`;
}

// Colours between the stops of the scale, mixed in RGB as Plotly does.
function mixed(share) {
  const stops = page.themes[theme.name].sequential;
  const next = Math.max(1, stops.findIndex(([at]) => at >= share));
  const [[from, a], [to, b]] = [stops[next - 1], stops[next]];
  const part = (share - from) / (to - from);
  return parts(a).map((x, i) => Math.round(x + part * (parts(b)[i] - x)));
}

function paint(canvas, layer, head, colours) {
  const cells = cellsOf(layer, head);
  const side = cells.length;
  canvas.width = canvas.height = side;
  const context = canvas.getContext("2d");
  const image = context.createImageData(side, side);
  cells.forEach((row, query) => row.forEach((x, key) => {
    if (!(page.causal && key > query)) image.data.set([...colours[x], 255], 4 * (query * side + key));
  }));
  context.putImageData(image, 0, 0);
}

function startPatterns() {
  if (!page.patterns || !byId("strongest")) return;
  const { values, shape } = array("sink_attention.mean");
  const order = Array.from(values.keys()).filter((at) => values[at] === values[at])
    .sort((a, b) => values[b] - values[a]).slice(0, STRONGEST);
  const buttons = order.map((at) => {
    const [layer, head] = [Math.floor(at / shape[1]), at % shape[1]];
    const button = document.createElement("button");
    const canvas = document.createElement("canvas");
    button.type = "button";
    button.append(canvas, `layer ${layer}, head ${head}: ${number(values[at])}`);
    button.addEventListener("click", () => {
      choose({ layer, head });
      byId("heads-title").scrollIntoView({ block: "start" });
    });
    return { button, canvas, layer, head };
  });
  const colours = Array.from({ length: 256 }, (_, x) => mixed(x / 255));
  const draw = () => {
    for (const { canvas, layer, head } of buttons) {
      paint(canvas, layer, head, colours);
    }
    mark();
  };
  const mark = () => {
    for (const { button, layer, head } of buttons) {
      button.setAttribute("aria-pressed", String(layer === state.layer && head === state.head));
    }
  };
  byId("strongest").append(...buttons.map(({ button }) => button));
  watch(["prompt"], draw);
  watch(["layer", "head"], mark);
  draw();
}
