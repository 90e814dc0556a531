// The atlas: a table of reports that sorts, filters and opens, with a head map in each row.

const UNDEFINED = 255; // a head whose sink attention is not defined
const maps = page.rows.map(({ map }) => map && unpack(map));
const chosenValues = new Map(); // of the grid's columns, by index
let sortedBy = null;
let direction = -1;
const openRows = new Set();

// The 255 colours of a theme's scale, as red, green and blue.
function colours() {
  const scale = page.themes[theme.name].sequential.map(([at, colour]) => [at, parts(colour)]);
  return Array.from({ length: UNDEFINED }, (_, step) => {
    const at = step / (UNDEFINED - 1);
    const above = Math.max(1, scale.findIndex(([stop]) => stop >= at));
    const [[low, one], [high, other]] = [scale[above - 1], scale[above]];
    return one.map((x, channel) => x + ((other[channel] - x) * (at - low)) / (high - low));
  });
}

let palette = colours();

// A head map, one pixel a head: layers are rows. `size` is the side of a head on the screen.
function drawMap({ values, shape }, size) {
  const [layers, heads] = shape;
  const canvas = document.createElement("canvas");
  canvas.width = heads;
  canvas.height = layers;
  canvas.style.width = `${heads * size}px`;
  canvas.style.height = `${layers * size}px`;
  const image = new ImageData(heads, layers);
  values.forEach((step, index) => {
    if (step !== UNDEFINED) image.data.set([...palette[step], 255], 4 * index);
  });
  canvas.getContext("2d").putImageData(image, 0, 0);
  return canvas;
}

// As large as a row has room for, and as a large map is readable.
const small = ([layers, heads]) => Math.max(1, Math.min(5, Math.floor(44 / layers), Math.floor(120 / heads)));
const large = ([layers, heads]) => Math.max(3, Math.min(16, Math.floor(360 / layers), Math.floor(420 / heads)));

function details(index) {
  const { said, link, epsilon } = page.rows[index];
  const box = document.createElement("div");
  const words = document.createElement("div");
  box.className = "open";
  const text = document.createElement("p");
  text.textContent = said;
  words.append(text);
  if (link) {
    const anchor = document.createElement("a");
    anchor.href = link;
    anchor.textContent = "The full report";
    words.append(anchor);
  }
  box.append(words);
  if (maps[index]) {
    const figure = document.createElement("div");
    const under = document.createElement("p");
    under.className = "about";
    under.textContent = `Rows are layers, columns heads; ε = ${epsilon}.`;
    const canvas = drawMap(maps[index], large(maps[index].shape));
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", "sink attention of every head");
    canvas.addEventListener("pointermove", ({ offsetX, offsetY }) => {
      const [layers, heads] = maps[index].shape;
      const head = Math.min(heads - 1, Math.floor((offsetX / canvas.clientWidth) * heads));
      const layer = Math.min(layers - 1, Math.floor((offsetY / canvas.clientHeight) * layers));
      const step = maps[index].values[layer * heads + head];
      const value = step === UNDEFINED ? "–" : (step / (UNDEFINED - 1)).toFixed(2);
      under.textContent = `layer ${layer}, head ${head}: sink attention ${value}`;
    });
    figure.append(canvas, under);
    box.append(figure);
  }
  return box;
}

function shownRows() {
  const words = byId("filter").value.toLowerCase().split(/\s+/).filter(Boolean);
  const kept = page.rows.map((_, index) => index).filter((index) => {
    const { values } = page.rows[index];
    for (const [column, value] of chosenValues) if (String(values[column]) !== value) return false;
    const text = values.join(" ").toLowerCase();
    return words.every((word) => text.includes(word));
  });
  if (sortedBy !== null) {
    const order = compare(sortedBy, direction);
    kept.sort((one, other) => order(page.rows[one].values, page.rows[other].values));
  }
  return kept;
}

const written = (value, kind) => cell(kind === "number" ? value : value ?? "–", kind);

function drawRow(index) {
  const { values } = page.rows[index];
  const row = document.createElement("tr");
  row.className = "link";
  const map = document.createElement("td");
  map.className = "map";
  const button = document.createElement("button");
  button.setAttribute("aria-expanded", String(openRows.has(index)));
  button.setAttribute("aria-label", `details of ${values[0]}`);
  button.append(maps[index] ? drawMap(maps[index], small(maps[index].shape)) : "details");
  map.append(button);
  row.append(map, ...values.map((value, column) => written(value, page.columns[column].kind)));
  const toggle = () => {
    if (!openRows.delete(index)) openRows.add(index);
    draw();
    byId("atlas").querySelector(`[data-row="${index}"] button`)?.focus({ preventScroll: true });
  };
  row.dataset.row = index;
  row.addEventListener("click", toggle); // a key on the button clicks it, and so the row
  if (!openRows.has(index)) return [row];
  const below = document.createElement("tr");
  const place = document.createElement("td");
  place.colSpan = page.columns.length + 1;
  place.className = "opened";
  place.append(details(index));
  below.append(place);
  return [row, below];
}

function draw() {
  const kept = shownRows();
  byId("atlas").tBodies[0].replaceChildren(...kept.flatMap(drawRow));
  byId("count").textContent = `${kept.length} of ${page.rows.length} reports`;
  [...byId("atlas").tHead.rows[0].cells].forEach((th, column) => {
    th.removeAttribute("aria-sort");
    if (column - 1 === sortedBy) th.setAttribute("aria-sort", direction < 0 ? "descending" : "ascending");
  });
}

function startHead() {
  const titles = byId("atlas").createTHead().insertRow();
  const first = document.createElement("th");
  first.scope = "col";
  first.className = "text";
  first.textContent = "heads";
  titles.append(first);
  byId("atlas").createTBody();
  page.columns.forEach(({ title, kind, about }, column) => {
    const th = document.createElement("th");
    const button = document.createElement("button");
    th.scope = "col";
    th.className = kind;
    button.type = "button";
    button.textContent = title;
    button.title = about;
    button.addEventListener("click", () => {
      const first = kind === "text" ? 1 : -1;
      direction = sortedBy === column ? -direction : first;
      sortedBy = column;
      draw();
    });
    th.append(button);
    titles.append(th);
  });
}

function startFilters() {
  for (const { column, values } of page.filters) {
    const label = document.createElement("label");
    const select = document.createElement("select");
    label.append(page.columns[column].title, select);
    select.append(new Option("all", ""), ...values.map((value) => new Option(value ?? "–", String(value))));
    select.addEventListener("change", () => {
      if (select.value === "") chosenValues.delete(column);
      else chosenValues.set(column, select.value);
      draw();
    });
    byId("controls").insertBefore(label, byId("controls").querySelector(".scale"));
  }
  byId("filter").addEventListener("input", draw);
  const titles = page.columns.map(({ title }) => title);
  byId("exports").append(...exports(() => [titles, ...shownRows().map((index) => page.rows[index].values)]));
}

function drawScale() {
  const stops = [0, 64, 127, 190, 254].map((step) => `rgb(${palette[step].map(Math.round).join(",")})`);
  byId("scale-bar").style.background = `linear-gradient(90deg, ${stops.join(",")})`;
}

startHead();
startFilters();
theme.watchers.push(() => {
  palette = colours();
  drawScale();
  draw();
});
startTheme();
document.documentElement.dataset.ready = String(Math.round(performance.now()));
