// The figures: drawn by Plotly from what the package made, moved by what is chosen.

// On a touch screen a drag scrolls the page, and no button hides a legend.
const narrow = matchMedia("(max-width: 600px)");
const figures = [...document.querySelectorAll("[data-view]")];

function draw(element) {
  const name = element.dataset.view;
  const view = coloured(page.views[name], theme.name);
  const data = resolve(view.data);
  const layout = sized(element, resolve(view.layout));
  layout.template = page.themes[theme.name].template;
  layout.shapes = [...(layout.shapes ?? []), ...marks(name)];
  if (name === "map") fillMap(data, layout);
  if (name === "pattern") fillPattern(data, layout);
  if (name === "positions") data[0].text = Array(page.sizes.layer).fill(data[0].text);
  if (name in state.log) setScale(layout.yaxis, state.log[name], data);
  if (name === "rate") layout.annotations = layout.shapes.map(nameThreshold);
  keepZoom(element, layout);
  if (touch.matches) layout.dragmode = false;
  if (narrow.matches) Object.assign(layout.margin, { l: 44, r: 6 });
  if (narrow.matches && layout.xaxis2) stack(layout);
  if (element.clientWidth < SMALL) tighten(layout);
  return Plotly.react(element, data, layout, config());
}

// Where a figure is small, as on a phone and two abreast on paper, its words are small, and what an
// axis says after its name has a line of its own.
const SMALL = 400;
function tighten(layout) {
  layout.legend = { ...layout.legend, font: { size: 10 } };
  for (const name of ["xaxis", "yaxis"]) {
    const { title } = layout[name];
    layout[name] = { ...layout[name], title: { ...title, font: { size: 11 } } };
  }
  if (!layout.xaxis.title?.text?.includes("; ")) return;
  layout.xaxis.title.text = layout.xaxis.title.text.replace("; ", ";<br>");
  layout.margin = { ...layout.margin, b: (layout.margin.b ?? 80) + 12 };
}

// Two panels side by side become one above the other; their titles are notes on the paper.
function stack(layout) {
  const titles = layout.annotations.filter(({ xref }) => xref === "paper");
  [["xaxis", "yaxis", [0.58, 1]], ["xaxis2", "yaxis2", [0, 0.4]]].forEach(([x, y, domain], panel) => {
    layout[x].domain = [0, 1];
    layout[y].domain = domain;
    Object.assign(titles[panel], { x: 0.5, y: domain[1] });
  });
  layout.height *= 1.5;
}

// Zoom stays when another head is drawn into the same axes.
function keepZoom(element, layout) {
  const name = element.dataset.view;
  layout.uirevision = name === "map" ? state.metric : String(state.log[name]);
}

// On a logarithmic axis the smallest bar is a decade high: at its very foot it would be nothing.
function setScale(axis, logarithmic, data) {
  axis.type = logarithmic ? "log" : "linear";
  axis.dtick = logarithmic ? "D2" : null;
  axis.tickformat = ",~g";
  const known = data.flatMap(({ y }) => Array.from(y)).filter((x) => x > 0);
  const [least, most] = [known.reduce((a, b) => Math.min(a, b), Infinity), known.reduce((a, b) => Math.max(a, b), 0)];
  const fits = logarithmic && known.length > 0;
  axis.range = fits ? [Math.log10(least) - 1, Math.log10(most) + 0.05] : undefined;
  axis.autorange = !fits;
}

function nameThreshold({ x0 }) {
  return {
    x: x0, y: 1, yref: "paper", xanchor: "left", yanchor: "top", xshift: 3, showarrow: false,
    text: `ε = ${number(x0)}`,
  };
}

// A frame about the chosen layer, dark within light or light within dark: seen on every colour.
function framed(columns) {
  const { ink, paper } = page.themes[theme.name];
  return [[paper, 5], [ink, 2]].map(([color, width]) => ({
    type: "rect", ...columns, y0: state.layer - 0.5, y1: state.layer + 0.5, line: { color, width },
  }));
}

// Lines and frames that show what is chosen elsewhere.
function marks(name) {
  const colours = page.themes[theme.name];
  const line = { color: colours.ink, width: 2 };
  const vertical = (x, dash) => ({
    type: "line", x0: x, x1: x, y0: 0, y1: 1, yref: "paper", line: { ...line, width: 1, dash },
  });
  if (name === "map") {
    const column = chosen(metric().dim);
    return framed({ x0: column - 0.5, x1: column + 0.5 });
  }
  if (name === "positions") {
    return framed({ xref: "paper", x0: 0, x1: 1 });
  }
  if (["layers", "drains", "chance", "drain-chance"].includes(name)) return [vertical(state.layer, "dot")];
  if (name === "rate" && metric()?.threshold !== null && metric()) return [vertical(state.epsilon)];
  if (name === "pattern") return [];
  if (["received", "values", "residual"].includes(name) && state.position !== null) {
    return [vertical(state.position, "dot")];
  }
  return [];
}

// The head map: the chosen metric's cells, those at or below the threshold empty.
function fillMap(data, layout) {
  const { name, label, dim, hover, range, scale, interval, log, ticks } = metric();
  const cells = rows(`${name}.mean`);
  const [above, below] = data;
  const kept = (x) => Math.min(Math.max(Math.log10(x), range[0]), range[1]);
  above.z = log ? cells.map((row) => row.map(kept)) : cells;
  [above.zmin, above.zmax] = range;
  above.colorscale = page.themes[theme.name][scale];
  above.colorbar = { ...above.colorbar, title: { text: label, side: "right" }, ...ticks };
  above.hovertemplate = hover;
  const ends = interval ? rows(`${name}.ends`) : null;
  above.customdata = cells.map((row, layer) => Array.from(row, (x, head) =>
    (ends ? [x, ends[layer][2 * head], ends[layer][2 * head + 1]] : [x])));
  below.z = cells.map((row) => Array.from(row, (x) => (x <= state.epsilon ? 1 : null)));
  layout.xaxis.title.text = DIM_WORDS[dim];
  layout.xaxis.dtick = tick(cells[0].length);
}

const tick = (size) => [1, 2, 5, 10, 20, 50, 100].find((step) => size <= 20 * step) ?? 1000;

function describeHead() {
  byId("layer").value = state.layer;
  byId("head").value = state.head;
  byId("chosen").textContent = metric() ? aboutHead() : "";
  for (const span of document.querySelectorAll("[data-where]")) {
    span.textContent = where(span.dataset.where.split(" "));
  }
}

function aboutHead() {
  const { name, dim, label, interval } = metric();
  const cells = rows(`${name}.mean`);
  const [layer, column] = [state.layer, chosen(dim)];
  let text = `${where(["layer", dim])}: ${label} ${number(cells[layer][column])}`;
  if (interval) {
    const ends = rows(`${name}.ends`)[layer].subarray(2 * column, 2 * column + 2);
    if (Number.isFinite(ends[0])) text += `, 95 % interval ${number(ends[0])} to ${number(ends[1])}`;
  }
  return `${text[0].toUpperCase()}${text.slice(1)}.`;
}

function describeCount() {
  const { name, dim } = metric();
  const values = array(`${name}.mean`).values;
  const known = values.filter((x) => !Number.isNaN(x));
  const above = known.filter((x) => x > state.epsilon).length;
  const share = known.length ? Math.round((100 * above) / known.length) : 0;
  const heads = `${known.length.toLocaleString("en-US")} ${DIM_WORDS[dim]}${known.length === 1 ? "" : "s"}`;
  const none = state.epsilon < metric().slider[0];
  byId("epsilon-shown").textContent = none ? "none" : number(state.epsilon);
  byId("count").textContent = none ? `${heads}, no threshold`
    : `${above} of ${heads} (${share} %) above ${number(state.epsilon)}`;
}

// A metric's threshold starts at ε for probabilities, and below everything for other figures.
function startMetric() {
  const { slider, threshold, about, dim } = metric();
  const [low, high] = slider;
  const range = byId("epsilon");
  range.min = low - (threshold === null ? (high - low) / 100 || 1 : 0);
  range.max = high;
  range.value = threshold ?? range.min;
  byId("metric-about").textContent = `${about[0].toUpperCase()}${about.slice(1)}.` +
    (dim === "kv_head" ? " Heads that share keys and values share a column." : "");
  choose({ epsilon: threshold ?? Number(range.min) });
}

// Which columns of the map stand for a query head's neighbour.
function headAt(column) {
  return metric().dim === "kv_head" ? column * (page.sizes.head / page.sizes.kv_head) : column;
}

// The position of a bar or of a cell; where it stands for several, the one whose value it shows.
function positionAt(name, { x, curveNumber, pointNumber }) {
  const view = page.views[name];
  if (!view.peak) return x;
  if (name === "positions") return rows(view.peak)[pointNumber[0]][pointNumber[1]];
  const bin = array(["sinks", "others"][curveNumber]).values[pointNumber];
  return slice(view.peak, view.depends)[bin];
}

function listen(element) {
  const name = element.dataset.view;
  element.on("plotly_click", ({ points: [point] }) => {
    if (name === "map") choose({ layer: point.y, head: headAt(point.x) });
    if (["layers", "drains", "chance", "drain-chance"].includes(name)) choose({ layer: Math.round(point.x) });
    if (name === "positions") choose({ layer: point.y, position: positionAt(name, point) });
    if (["received", "values", "residual"].includes(name)) {
      choose({ position: positionAt(name, point) });
    }
  });
}

function moveOnMap(event) {
  const steps = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
  const step = steps[event.key];
  if (!step) return;
  event.preventDefault();
  const width = metric().dim === "kv_head" ? page.sizes.head / page.sizes.kv_head : 1;
  choose({
    layer: within(state.layer + step[0], page.sizes.layer),
    head: within(state.head + step[1] * width, page.sizes.head),
  });
}
