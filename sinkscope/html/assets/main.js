// Puts the page together: what this report lacks goes, the rest is drawn and listened to.

// Parts of the page whose figures the report does not have.
function removeMissing() {
  const has = (name) =>
    name in page.views ||
    (name === "tokens" && page.tokens !== null) ||
    (name === "strongest" && page.patterns !== undefined && "sink_attention.mean" in page.arrays) ||
    (name === "tables" && document.querySelector("[data-table]") !== null);
  for (const card of document.querySelectorAll("[data-view-card]")) {
    if (!has(card.dataset.viewCard)) card.remove();
  }
  for (const section of document.querySelectorAll("[data-needs]")) {
    if (!section.dataset.needs.split(" ").some(has)) section.remove();
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
  watch(["metric"], () => { byId("metric").value = state.metric; });
  watch(["metric"], startMetric);
  watch(["metric", "epsilon"], describeCount);
  byId("metric").value = state.metric;
  startMetric();
}

// Beside what its arrays depend on, every figure moves with the marks that are drawn on it.
const MARKED_BY = {
  map: ["metric", "epsilon", "layer", "head"],
  received: ["position"], values: ["position"], residual: ["position"],
  pattern: ["prompt"], layers: ["layer"], drains: ["layer"], chance: ["layer"], "drain-chance": ["layer"], positions: ["layer"], rate: ["epsilon"],
};

// To a screen reader a figure is called as its heading is.
function nameAsPicture(element, heading) {
  heading.id = `heading-${element.dataset.view}`;
  element.setAttribute("role", "figure"); // not "img": it has buttons
  element.setAttribute("aria-labelledby", heading.id);
}

async function startFigures() {
  for (const element of figures.filter((one) => one.isConnected)) {
    const name = element.dataset.view;
    const view = page.views[name];
    const heading = element.closest(".card").querySelector("h3");
    if (heading && heading.textContent === "") heading.textContent = view.title;
    if (heading) nameAsPicture(element, heading);
    if (view.note) element.insertAdjacentText("afterend", view.note);
    const depends = view.depends.map((dim) => (dim === "kv_head" ? "head" : dim));
    theme.watchers.push(() => draw(element));
    watch(["log", ...depends, ...(MARKED_BY[name] ?? [])], () => draw(element));
    await draw(element);
    listen(element);
  }
}

async function start() {
  followAddress();
  startTheme();
  startTables();
  removeMissing();
  if (byId("layer")) startChoice();
  if (page.metrics.length > 0) startMap();
  startTokens();
  startPatterns();
  await startFigures();
  addEventListener("hashchange", followAddress);
  document.documentElement.dataset.ready = String(Math.round(performance.now()));
}

start();
