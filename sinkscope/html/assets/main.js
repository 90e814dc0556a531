// Puts the page together: what this report lacks goes, the rest is drawn and listened to.

// Parts of the page whose figures the report does not have.
function removeMissing() {
  const has = (name) =>
    name in page.views.light ||
    (name === "tokens" && page.tokens !== null) ||
    (name === "tables" && document.querySelector("[data-table]") !== null);
  for (const card of document.querySelectorAll("[data-view-card]")) {
    if (!has(card.dataset.viewCard)) card.remove();
  }
  for (const section of document.querySelectorAll("[data-needs]")) {
    if (!section.dataset.needs.split(" ").some(has)) section.remove();
  }
}

function startTheme() {
  const button = byId("theme");
  const system = matchMedia("(prefers-color-scheme: dark)");
  let byHand = false;
  const show = () => {
    document.documentElement.dataset.theme = state.theme;
    button.textContent = state.theme === "dark" ? "Light" : "Dark";
  };
  watch(["theme"], show);
  state.theme = system.matches ? "dark" : "light";
  show();
  button.addEventListener("click", () => {
    byHand = true;
    choose({ theme: state.theme === "dark" ? "light" : "dark" });
  });
  system.addEventListener("change", () => {
    if (!byHand) choose({ theme: system.matches ? "dark" : "light" });
  });
  // Paper is white.
  let before = state.theme;
  addEventListener("beforeprint", () => {
    before = state.theme;
    choose({ theme: "light" });
    fitPaper(true);
  });
  addEventListener("afterprint", () => {
    fitPaper(false);
    choose({ theme: before });
  });
}

// Figures as wide as the sheet: at once, since printing does not wait.
function fitPaper(printing) {
  document.documentElement.toggleAttribute("data-print", printing);
  for (const figure of document.querySelectorAll(".js-plotly-plot")) {
    const width = printing ? figure.parentElement.clientWidth : null;
    Plotly.relayout(figure, { width, autosize: !printing });
  }
}

function startChoice() {
  for (const dim of ["layer", "head"]) {
    byId(dim).max = page.sizes[dim] - 1;
    byId(dim).addEventListener("change", ({ target }) =>
      choose({ [dim]: within(Number(target.value), page.sizes[dim]) }));
  }
  for (const box of document.querySelectorAll("[data-log]")) {
    const name = box.dataset.log;
    box.checked = state.log[name];
    box.addEventListener("change", () => choose({ log: { ...state.log, [name]: box.checked } }));
  }
  watch(["metric", "layer", "head"], describeHead);
  describeHead();
}

function startMap() {
  for (const one of page.metrics) byId("metric").add(new Option(one.heading, one.name));
  byId("metric").addEventListener("change", ({ target }) => choose({ metric: target.value }));
  byId("epsilon").addEventListener("input", ({ target }) => choose({ epsilon: Number(target.value) }));
  document.querySelector('[data-view="map"]').addEventListener("keydown", moveOnMap);
  watch(["metric"], startMetric);
  watch(["metric", "epsilon"], describeCount);
  startMetric();
}

// Beside what its arrays depend on, every figure moves with the marks that are drawn on it.
const MARKED_BY = {
  map: ["metric", "epsilon", "layer", "head"],
  received: ["position"], values: ["position"], residual: ["position"],
  layers: ["layer"], drains: ["layer"], positions: ["layer"], rate: ["epsilon"],
};

// To a screen reader a figure is a picture called as its heading is.
function nameAsPicture(element, heading) {
  heading.id = `heading-${element.dataset.view}`;
  element.setAttribute("role", "img");
  element.setAttribute("aria-labelledby", heading.id);
}

async function startFigures() {
  for (const element of figures.filter((one) => one.isConnected)) {
    const name = element.dataset.view;
    const view = page.views.light[name];
    const heading = element.closest(".card").querySelector("h3");
    if (heading && heading.textContent === "") heading.textContent = view.title;
    if (heading) nameAsPicture(element, heading);
    if (view.note) element.insertAdjacentText("afterend", view.note);
    const depends = view.depends.map((dim) => (dim === "kv_head" ? "head" : dim));
    watch(["theme", "log", ...depends, ...(MARKED_BY[name] ?? [])], () => draw(element));
    await draw(element);
    listen(element);
  }
}

async function start() {
  startTheme();
  startTables();
  removeMissing();
  if (byId("layer")) startChoice();
  if (page.metrics.length > 0) startMap();
  startTokens();
  await startFigures();
  document.documentElement.dataset.ready = String(Math.round(performance.now()));
}

start();
