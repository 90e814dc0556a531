// The tokens of a prompt, each coloured by what it receives. Tokens are only ever set as text.

const PAGE_OF_TOKENS = 512;
let firstToken = 0;

// What tokens are shaded by: what the chosen head gives them, or a figure that each token has.
const OF_HEAD = {
  name: "received_attention", ofHead: true, label: "attention received in the chosen head",
};
const quantities = () => [
  ...(headReceived() ? [OF_HEAD] : []), ...(page.tokens?.quantities ?? []),
];
const quantity = () => quantities()[state.quantity];
const strip = byId("strip");

// Whether the page holds a figure a position of every head: long texts are binned.
function headReceived() {
  const stored = page.arrays.received_attention;
  return stored !== undefined && stored.shape[2] === page.sizes.position;
}

function tokenValues(stored = quantity()) {
  if (stored.ofHead) return ofHead();
  stored.unpacked ??= unpack(stored.values);
  const { values, shape } = stored.unpacked;
  return values.subarray(state.prompt * shape[1], (state.prompt + 1) * shape[1]);
}

// What the chosen head's queries pay each position: in this prompt, where the page holds its
// patterns, and otherwise on average over prompts.
function ofHead() {
  const at = page.patterns?.prompts.indexOf(state.prompt) ?? -1;
  if (at < 0) return slice("received_attention", ["layer", "head"]);
  const { values, shape } = array("patterns.received");
  const [, layers, heads, positions] = shape;
  const start = ((at * layers + state.layer) * heads + state.head) * positions;
  return Float32Array.from(values.subarray(start, start + positions), (x) => x / 65535);
}

// Where a value lies between the ends of the scale, 0 to 1.
function scaleOf(values) {
  const logarithmic = byId("log-tokens").checked;
  const known = values.filter((x) => Number.isFinite(x) && (!logarithmic || x > 0));
  const turn = logarithmic ? Math.log10 : (x) => x;
  const least = known.reduce((a, b) => Math.min(a, b), Infinity);
  const most = known.reduce((a, b) => Math.max(a, b), -Infinity);
  if (known.length === 0) return { low: NaN, high: NaN, at: () => 0 };
  const low = logarithmic ? Math.max(least, most * 1e-5) : Math.min(0, least);
  const reach = turn(most) - turn(low) || 1;
  return {
    low,
    high: most,
    at: (x) => Math.min(Math.max((turn(Math.max(x, low)) - turn(low)) / reach, 0), 1),
  };
}

// A shade of the sink's hue over the page's own colour, so that text stays ink on it.
function shade(share) {
  const [r, g, b] = parts(page.themes[theme.name].sink);
  const most = theme.name === "dark" ? 0.5 : 0.7;
  return `rgba(${r}, ${g}, ${b}, ${(most * share).toFixed(3)})`;
}

function drawTokens() {
  byId("prompt").value = state.prompt;
  const tokens = page.tokens.prompts[state.prompt];
  const values = tokenValues();
  const scale = scaleOf(values.subarray(0, tokens.length));
  const end = Math.min(firstToken + PAGE_OF_TOKENS, tokens.length);
  const shown = [];
  for (let position = firstToken; position < end; position += 1) {
    const span = document.createElement("span");
    span.textContent = tokens[position];
    span.dataset.position = position;
    span.setAttribute("role", "option");
    span.setAttribute("aria-selected", String(position === state.position));
    span.title = `position ${position}: ${quantity().label} ${number(values[position])}`;
    span.style.backgroundColor = shade(scale.at(values[position]));
    if (!page.tokens.spaced && position > firstToken && !tokens[position].startsWith("##")) shown.push(" ");
    shown.push(span);
    if (tokens[position].includes("⏎")) shown.push(document.createElement("br"));
  }
  strip.replaceChildren(...shown);
  drawScale(scale);
  describeColours();
  describePages(tokens.length, end);
  describeToken();
}

function drawScale({ low, high }) {
  byId("scale-low").textContent = number(low);
  byId("scale-high").textContent = number(high);
  byId("scale-bar").style.background = `linear-gradient(to right, ${shade(0)}, ${shade(1)})`;
}

// What the fields above the tokens say, for paper; and which tokens few queries see.
function describeColours() {
  const kind = byId("log-tokens").checked ? "logarithmic" : "linear";
  const said = quantity().ofHead
    ? `attention received in layer ${state.layer}, head ${state.head}` +
      (page.patterns?.prompts.includes(state.prompt) ? "" : ", mean over prompts")
    : quantity().label;
  byId("key").textContent = `Prompt ${state.prompt}, ${said}, ${kind}:`;
  const length = page.tokens.lengths[state.prompt];
  const start = length - Math.floor(length / 4);
  byId("few").textContent = page.causal && quantity().name.startsWith("received_") && start < length
    ? `From position ${start.toLocaleString("en-US")} on, keys are seen by few queries, above all by their own: ` +
      "what they receive is an average over these few."
    : "";
}

function describePages(shown, end) {
  const length = page.tokens.lengths[state.prompt];
  const pages = document.querySelector(".pages");
  pages.hidden = length <= PAGE_OF_TOKENS;
  byId("earlier").disabled = firstToken === 0;
  byId("later").disabled = end >= shown;
  const kept = shown < length ? `; the page holds the first ${shown.toLocaleString("en-US")}` : "";
  byId("span").textContent =
    `positions ${firstToken} to ${end - 1} of ${length.toLocaleString("en-US")}${kept}`;
}

function describeToken() {
  const tokens = page.tokens.prompts[state.prompt];
  const { position } = state;
  const said = byId("token-chosen");
  if (position === null || position >= tokens.length) {
    said.textContent = position === null ? "" : `Position ${position} lies beyond these tokens.`;
    return;
  }
  const figures = quantities().map((one) => `${one.label} ${number(tokenValues(one)[position])}`);
  said.textContent = `Position ${position}, “\u2068${tokens[position]}\u2069”: ${figures.join(", ")}`;
}

// Mark the chosen position, on the page of tokens that holds it.
function showPosition() {
  const tokens = page.tokens.prompts[state.prompt];
  const { position } = state;
  if (position !== null && position < tokens.length) {
    const start = Math.floor(position / PAGE_OF_TOKENS) * PAGE_OF_TOKENS;
    if (start !== firstToken) {
      firstToken = start;
      drawTokens();
    }
  }
  for (const span of strip.querySelectorAll("span")) {
    const is = Number(span.dataset.position) === position;
    span.setAttribute("aria-selected", String(is));
    if (is) strip.scrollTo({ top: span.offsetTop - strip.offsetTop - strip.clientHeight / 2 });
  }
  describeToken();
}

function moveAmongTokens(event) {
  const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (!step) return;
  event.preventDefault();
  const last = page.tokens.prompts[state.prompt].length;
  choose({ position: within((state.position ?? -step) + step, last) });
}

function startTokens() {
  if (!page.tokens) return;
  const { prompts, of } = page.tokens;
  for (const index of prompts.keys()) byId("prompt").add(new Option(index, index));
  if (prompts.length < of) {
    byId("prompts-held").textContent =
      `The page holds the first ${prompts.length} of ${of.toLocaleString("en-US")} prompts.`;
  }
  quantities().forEach((one, index) => byId("quantity").add(new Option(one.label, index)));
  byId("prompt").addEventListener("change", ({ target }) => {
    firstToken = 0;
    choose({ prompt: Number(target.value) });
  });
  byId("quantity").addEventListener("change", ({ target }) => choose({ quantity: Number(target.value) }));
  byId("log-tokens").addEventListener("change", drawTokens);
  const turn = (by) => () => { firstToken += by; drawTokens(); };
  byId("earlier").addEventListener("click", turn(-PAGE_OF_TOKENS));
  byId("later").addEventListener("click", turn(PAGE_OF_TOKENS));
  strip.addEventListener("click", ({ target }) => {
    if (target.dataset.position) choose({ position: Number(target.dataset.position) });
  });
  strip.addEventListener("keydown", moveAmongTokens);
  watch(["prompt", "quantity"], drawTokens);
  watch(["layer", "head"], () => { if (quantity().ofHead) drawTokens(); else describeToken(); });
  theme.watchers.push(drawTokens);
  watch(["position"], showPosition);
  drawTokens();
}
