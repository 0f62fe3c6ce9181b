"use strict";
// Figures are drawn when they come near the screen, and take their colours from the page.
(() => {
  const figures = dataOf("figures-data");
  const plots = [...document.querySelectorAll(".plot")];
  const touch = matchMedia("(pointer: coarse)").matches;
  const config = { responsive: true, displayModeBar: false };

  function theme(plot) {
    const found = getComputedStyle(plot);
    const [text, line, paper] = [found.color, found.borderTopColor, found.backgroundColor];
    const axis = { gridcolor: line, zerolinecolor: line, linecolor: line, tickcolor: line, zerolinewidth: 1, ticks: "" };
    return {
      layout: {
        paper_bgcolor: paper, plot_bgcolor: paper, xaxis: { ...axis, automargin: true }, yaxis: { ...axis, automargin: true },
        font: { family: found.fontFamily, size: 12, color: text }, hoverlabel: { bgcolor: paper, bordercolor: line, font: { color: text } },
        annotationdefaults: { font: { color: text }, bgcolor: paper },
      },
    };
  }
  function chosen(section) {
    const select = document.querySelector(`select[data-section="${section}"]`);
    return select ? select.value : null;
  }
  async function draw(plot) {
    const found = figures[plot.dataset.section][plot.dataset.panel];
    const figure = found[chosen(plot.dataset.section) ?? Object.keys(found)[0]];
    plot.closest("figure").hidden = !figure;
    if (!figure) return;
    const layout = { ...figure.layout, template: theme(plot), dragmode: touch ? false : "zoom" };
    layout.legend = { ...layout.legend, maxheight: 2000 };
    // What a legend takes is known once it is there: drawn with room for one entry a row, then cut to what it took,
    // and moved to the left edge of the figure.
    await Plotly.react(plot, figure.data, { ...layout, height: 360 + 30 * figure.data.length }, config);
    const area = plot.querySelector(".nsewdrag").getBoundingClientRect();
    const legend = plot.querySelector(".legend .bg")?.getBoundingClientRect();
    if (legend) layout.legend.x = (plot.getBoundingClientRect().left - area.left) / area.width;
    await Plotly.react(plot, figure.data, { ...layout, height: 340 + (legend?.height ?? 0) }, config);
  }

  const near = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (!entry.isIntersecting) continue;
      near.unobserve(entry.target);
      draw(entry.target).then(() => { entry.target.dataset.drawn = "yes"; });
    }
  }, { rootMargin: "300px" });
  plots.forEach((plot) => near.observe(plot));
  const redraw = (some) => some.filter((plot) => plot.dataset.drawn).forEach(draw);
  document.addEventListener("theme", () => redraw(plots));
  for (const select of document.querySelectorAll("select[data-section]")) {
    select.addEventListener("change", () => {
      const here = plots.filter((plot) => plot.dataset.section === select.dataset.section);
      here.forEach((plot) => { plot.closest("figure").hidden = false; });
      redraw(here);
    });
  }
})();
