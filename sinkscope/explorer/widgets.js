// A box for a prompt and its button. A click sends the text that is in the box at that moment:
// an ipywidgets text box syncs on its own, and behind a busy kernel later than the click.
function render({ model, el }) {
  const box = document.createElement("textarea");
  box.rows = 2;
  box.placeholder = "Type a prompt, and measure it";
  box.setAttribute("aria-label", "Prompt");
  box.style.cssText = "width: 26em; margin-right: 4px; font: inherit; vertical-align: middle";
  const button = document.createElement("button");
  button.className = "lm-Widget jupyter-widgets jupyter-button widget-button";
  button.textContent = "Measure";
  button.addEventListener("click", () => model.send({ text: box.value }));
  for (const event of ["keydown", "keypress", "keyup"]) {
    box.addEventListener(event, (press) => press.stopPropagation()); // no shortcuts of the notebook
  }
  const follow = () => { button.disabled = model.get("disabled"); };
  model.on("change:disabled", follow);
  follow();
  el.append(box, button);
  return () => model.off("change:disabled", follow);
}

export default { render };
