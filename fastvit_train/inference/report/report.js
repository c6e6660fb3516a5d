"use strict";

// Shows the values of a chart at the epoch that the pointer, a finger or the arrow keys select.
function addTooltip(plot) {
  const { epochs, x, runs } = JSON.parse(plot.dataset.values);
  const svg = plot.querySelector("svg");
  const slider = plot.querySelector(".slider");
  const tooltip = plot.querySelector(".tooltip");
  const crosshair = plot.querySelector(".crosshair");
  const dots = plot.querySelectorAll(".dot");
  const swatches = document.querySelectorAll(".legend .swatch");
  const width = svg.viewBox.baseVal.width;
  let current = epochs.length - 1;

  function show(index) {
    const shown = plot.classList.contains("active");
    if (shown && index === current) return;
    current = index;
    crosshair.setAttribute("transform", `translate(${x[current]} 0)`);
    dots.forEach((dot, run) => {
      const y = runs[run].y[current];
      dot.style.display = y === null ? "none" : "";
      dot.setAttribute("cx", x[current]);
      dot.setAttribute("cy", y ?? 0);
    });
    slider.setAttribute("aria-valuenow", epochs[current]);
    slider.setAttribute("aria-valuetext", `epoch ${epochs[current]}`);
    tooltip.replaceChildren(textRow(`epoch ${epochs[current]}`), ...runs.map(valueRow));
    const right = x[current] > width / 2;
    tooltip.style.left = right ? "" : `${(100 * (x[current] + 10)) / width}%`;
    tooltip.style.right = right ? `${(100 * (width - x[current] + 10)) / width}%` : "";
    plot.classList.add("active");
  }

  function valueRow(run, number) {
    const row = textRow(` ${run.name}: ${run.text[current]}`);
    row.prepend(swatches[number].cloneNode(true));
    return row;
  }

  function textRow(text) {
    const row = document.createElement("p");
    row.textContent = text;
    return row;
  }

  function hide() {
    plot.classList.remove("active");
    tooltip.replaceChildren();
  }

  function showNearest(event) {
    const box = svg.getBoundingClientRect();
    const pointer = ((event.clientX - box.left) / box.width) * width;
    let nearest = 0;
    for (let i = 1; i < x.length; i++) if (Math.abs(x[i] - pointer) < Math.abs(x[nearest] - pointer)) nearest = i;
    show(nearest);
  }

  slider.addEventListener("pointerdown", showNearest);
  slider.addEventListener("pointermove", showNearest);
  slider.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && hide());
  slider.addEventListener("focus", () => show(current));
  slider.addEventListener("blur", hide);
  slider.addEventListener("keydown", (event) => {
    const last = epochs.length - 1;
    const to = { ArrowLeft: current - 1, ArrowDown: current - 1, ArrowRight: current + 1, ArrowUp: current + 1, Home: 0, End: last }[event.key];
    if (event.key === "Escape") hide();
    if (to === undefined) return;
    event.preventDefault();
    show(Math.min(Math.max(to, 0), last));
  });
}

document.querySelectorAll(".plot").forEach(addTooltip);

// A table that does not fit scrolls within its box, which the Tab key can then focus.
const observer = new ResizeObserver((entries) => {
  for (const { target } of entries) {
    const fits = target.scrollWidth <= target.clientWidth && target.scrollHeight <= target.clientHeight;
    target.tabIndex = fits ? -1 : 0;
  }
});
document.querySelectorAll(".scroll").forEach((box) => observer.observe(box));

// Printing opens all collapsed sections.
const opened = [];
window.addEventListener("beforeprint", () => {
  for (const details of document.querySelectorAll("details:not([open])")) {
    details.open = true;
    opened.push(details);
  }
});
window.addEventListener("afterprint", () => {
  for (const details of opened.splice(0)) details.open = false;
});
