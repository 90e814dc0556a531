// The figures of an experiment, drawn again when the theme changes.

function drawAll() {
  const drawn = [...document.querySelectorAll(".figure")].map((element, number) => {
    const { data, layout } = coloured(structuredClone(page.figures[number]), theme.name);
    layout.template = page.themes[theme.name].template;
    return Plotly.react(element, data, sized(element, layout), config());
  });
  return Promise.all(drawn);
}

theme.watchers.push(drawAll);
startTheme();
drawAll().then(() => {
  document.documentElement.dataset.ready = String(Math.round(performance.now()));
});
