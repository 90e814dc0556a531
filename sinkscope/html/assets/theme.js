// What every page shares: its data and how numbers are read and written, the choices in its address, its theme, and the printed sheet.

const page = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);

// A number as the package writes it: three significant digits, whole from a thousand on.
function number(x) {
  if (x === null || x === undefined || Number.isNaN(x)) return "–";
  if (!Number.isFinite(x)) return x > 0 ? "∞" : "−∞";
  const rounded = Number(x.toPrecision(3));
  const size = Math.abs(rounded);
  if (size >= 1000) return x.toLocaleString("en-US", { maximumFractionDigits: 0, roundingMode: "halfEven" });
  if (size === 0 || size >= 1e-4) return String(rounded);
  const [digits, power] = x.toExponential(2).split("e-");
  return `${Number(digits)}e-${power.padStart(2, "0")}`;
}

const READERS = {
  float32: [Float32Array, 4], int32: [Int32Array, 4], uint16: [Uint16Array, 2], uint8: [Uint8Array, 1],
};

// An array of the page: its numbers in one run, with its shape. Files are little-endian, and so is
// every machine that runs a browser today.
function unpack(stored) {
  const bytes = Uint8Array.from(atob(stored.data), (c) => c.charCodeAt(0));
  const [Kind, size] = READERS[stored.dtype];
  return { values: new Kind(bytes.buffer, 0, bytes.length / size), shape: stored.shape };
}

// The choices that the address holds: "#layer=3&theme=dark".
const address = {
  read: () => Object.fromEntries(new URLSearchParams(location.hash.slice(1))),
  write(choices) {
    const all = new URLSearchParams(Object.entries({ ...address.read(), ...choices }));
    history.replaceState(null, "", `#${all}`);
  },
};

// A figure's colours in a theme: figures come in light ones, and each has a dark twin.
const RGBA = /^rgba\((\d+), ?(\d+), ?(\d+), ?([\d.]+)\)$/;
const hex = (parts) => `#${parts.map((x) => Number(x).toString(16).padStart(2, "0")).join("")}`;
const parts = (colour) => [1, 3, 5].map((at) => parseInt(colour.slice(at, at + 2), 16));

function twin(text) {
  if (Object.hasOwn(page.themes.twins, text)) return page.themes.twins[text];
  const rgba = text.match(RGBA);
  const dark = rgba && page.themes.twins[hex(rgba.slice(1, 4))];
  return dark ? `rgba(${parts(dark).join(",")},${rgba[4]})` : text;
}

function coloured(node, theme) {
  if (theme === "light" || node === null || ArrayBuffer.isView(node)) return node;
  if (typeof node === "string") return twin(node);
  if (Array.isArray(node)) return node.map((one) => coloured(one, theme));
  if (typeof node !== "object") return node;
  return Object.fromEntries(Object.entries(node).map(([key, one]) => [key, coloured(one, theme)]));
}

// The system's theme until one is chosen; paper is always white.
const theme = {
  name: "light",
  watchers: [],
  show(name) {
    theme.name = name;
    document.documentElement.dataset.theme = name;
    byId("theme").textContent = name === "dark" ? "Light" : "Dark";
    for (const draw of theme.watchers) draw();
  },
};

function startTheme() {
  const system = matchMedia("(prefers-color-scheme: dark)");
  const wanted = () => address.read().theme ?? (system.matches ? "dark" : "light");
  theme.show(wanted() === "dark" ? "dark" : "light");
  byId("theme").addEventListener("click", () => {
    address.write({ theme: theme.name === "dark" ? "light" : "dark" });
    theme.show(wanted());
  });
  system.addEventListener("change", () => theme.show(wanted()));
  addEventListener("beforeprint", () => {
    fitPaper(true);
    theme.show("light");
  });
  addEventListener("afterprint", () => {
    fitPaper(false);
    theme.show(wanted());
    for (const figure of document.querySelectorAll(".js-plotly-plot")) {
      Plotly.relayout(figure, { width: null, autosize: true }); // as wide as its place again
    }
  });
}

// Figures as wide as the sheet, at once, since printing does not wait; folded parts open.
const opened = [];
function fitPaper(printing) {
  document.documentElement.toggleAttribute("data-print", printing);
  if (printing) opened.push(...document.querySelectorAll("details:not([open])"));
  for (const part of opened) part.open = printing;
  if (!printing) opened.length = 0;
}

// The largest heights [px] of a report's figures on paper: the map ends the first sheet, the figures of
// the chosen head fill the second.
const TALLEST = { map: 500, rate: 310, positions: 400, dims: 330, embeddings: 300 };
const ABREAST = 262;

// A figure's size in the place it has: given on paper, found by itself on the screen.
function sized(element, layout) {
  if (!document.documentElement.hasAttribute("data-print")) return { ...layout };
  const { view } = element.dataset;
  const tallest = view ? (TALLEST[view] ?? ABREAST) : layout.height;
  return {
    ...layout, width: element.clientWidth, height: Math.min(layout.height, tallest), autosize: false,
  };
}

const touch = matchMedia("(hover: none)");
const config = () => ({
  displaylogo: false, responsive: true, displayModeBar: touch.matches ? false : "hover",
});
