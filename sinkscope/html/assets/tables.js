// Tables that sort by a click on a column's title.

const ROWS_SHOWN = 20;

// A table of all heads, from the arrays that the map draws.
function headsTable() {
  const columns = page.columns.map((name) => page.metrics.find((one) => one.name === name));
  const made = [];
  for (let layer = 0; layer < page.sizes.layer; layer += 1) {
    for (let head = 0; head < page.sizes.head; head += 1) {
      made.push([layer, head, ...columns.map(({ name, dim }) => {
        const { values, shape } = array(`${name}.mean`);
        const column = dim === "kv_head" ? Math.floor(head / (page.sizes.head / shape[1])) : head;
        return values[layer * shape[1] + column];
      })]);
    }
  }
  return {
    columns: ["layer", "head", ...columns.map(({ label }) => label)],
    kinds: ["id", "id", ...columns.map(() => "number")],
    rows: made,
    of: made.length,
  };
}

function cell(value, kind) {
  const td = document.createElement("td");
  td.className = kind;
  td.textContent = kind === "number" ? number(value) : value;
  return td;
}

// Missing figures come last whichever way a column is sorted.
function compare(column, direction) {
  return (one, other) => {
    const [a, b] = [one[column], other[column]];
    if (typeof a === "string") return direction * a.localeCompare(b);
    const [knownA, knownB] = [Number.isFinite(a), Number.isFinite(b)];
    if (!knownA || !knownB) return Number(knownB) - Number(knownA);
    return direction * (a - b);
  };
}

// Buttons that copy a table, and save it as a file of comma-separated values.
function exports(table) {
  const make = (label, act) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = label;
    button.addEventListener("click", () => act(button));
    return button;
  };
  const quoted = (cell) => {
    const text = cell === null ? "" : String(cell);
    return /[",\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  };
  const copy = make("Copy", async (button) => {
    const text = table().map((row) => row.map((cell) => cell ?? "").join("\t")).join("\n");
    await navigator.clipboard.writeText(text);
    button.textContent = "Copied";
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  });
  const save = make("CSV", () => {
    const text = table().map((row) => row.map(quoted).join(",")).join("\r\n");
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], { type: "text/csv" }));
    link.download = "table.csv";
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  });
  return [copy, save];
}

// Fill a card with a table. `pick` says what a row chooses when it is clicked.
function fill(card, { columns, kinds, rows: all, of, about }, { sortBy = null, pick = null } = {}) {
  let column = sortBy;
  let direction = -1;
  let shown = ROWS_SHOWN;
  const scroll = document.createElement("div");
  const table = document.createElement("table");
  const titles = table.createTHead().insertRow();
  const body = table.createTBody();
  const more = document.createElement("div");
  const button = document.createElement("button");
  const note = document.createElement("span");
  scroll.className = "scroll";
  more.className = "more";
  button.type = "button";
  more.append(button, note, ...exports(() => [columns, ...all]));
  scroll.append(table);
  if (about) {
    const said = document.createElement("p");
    said.className = "about";
    said.textContent = about;
    card.append(said);
  }
  card.append(scroll, more);

  columns.forEach((title, index) => {
    const th = document.createElement("th");
    const sort = document.createElement("button");
    th.scope = "col";
    th.className = kinds[index];
    sort.type = "button";
    sort.textContent = title;
    sort.addEventListener("click", () => {
      direction = column === index ? -direction : -1;
      column = index;
      fillRows();
    });
    th.append(sort);
    titles.append(th);
  });

  function fillRows() {
    if (column !== null) all.sort(compare(column, direction));
    [...titles.cells].forEach((th, index) => {
      th.removeAttribute("aria-sort");
      if (index === column) th.setAttribute("aria-sort", direction < 0 ? "descending" : "ascending");
    });
    body.replaceChildren(...all.slice(0, shown).map((values) => {
      const row = document.createElement("tr");
      row.append(...values.map((value, index) => cell(value, kinds[index])));
      if (pick) {
        row.className = "link";
        row.tabIndex = 0;
        row.addEventListener("click", () => pick(values));
        row.addEventListener("keydown", ({ key }) => { if (key === "Enter") pick(values); });
      }
      return row;
    }));
    button.hidden = all.length <= ROWS_SHOWN;
    button.textContent = shown < all.length ? `Show all ${all.length}` : `Show ${ROWS_SHOWN}`;
    note.textContent = of > all.length
      ? `The first ${all.length} of ${of.toLocaleString("en-US")}.` : "";
  }

  button.addEventListener("click", () => {
    shown = shown < all.length ? all.length : ROWS_SHOWN;
    fillRows();
  });
  fillRows();
}

function startTables() {
  const tables = { ...page.tables };
  if (page.columns.length > 0) tables.heads = headsTable();
  const held = page.tokens?.prompts.length ?? 0;
  const show = (changes, id) => {
    choose(changes);
    byId(id)?.scrollIntoView({ block: "start" });
  };
  const options = {
    heads: { sortBy: 2, pick: ([layer, head]) => show({ layer, head }, "heads-title") },
    tokens: {
      pick: ([position, , prompt]) =>
        show(prompt < held ? { prompt, position } : { position }, "tokens-title"),
    },
    massive: { pick: ([, position]) => show({ position }, "tokens-title") },
    dims: { pick: ([layer]) => show({ layer }, "heads-title") },
  };
  for (const card of document.querySelectorAll("[data-table]")) {
    const table = tables[card.dataset.table];
    if (table && table.rows.length > 0) fill(card, table, options[card.dataset.table]);
    else card.remove();
  }
}
