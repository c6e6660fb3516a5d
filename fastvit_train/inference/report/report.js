"use strict";

// Values of a chart under the pointer, the finger or the arrow keys.
function follow(plot) {
  const { epochs, x, runs } = JSON.parse(plot.dataset.values);
  const svg = plot.querySelector("svg");
  const reach = plot.querySelector(".reach");
  const tip = plot.querySelector(".tip");
  const hair = plot.querySelector(".hair");
  const dots = plot.querySelectorAll(".dot");
  const samples = document.querySelectorAll(".legend .sample");
  const width = svg.viewBox.baseVal.width;
  let at = epochs.length - 1;

  function show(index) {
    const shown = plot.classList.contains("read");
    if (shown && index === at) return;
    at = index;
    hair.setAttribute("transform", `translate(${x[at]} 0)`);
    dots.forEach((dot, run) => {
      const y = runs[run].y[at];
      dot.style.display = y === null ? "none" : "";
      dot.setAttribute("cx", x[at]);
      dot.setAttribute("cy", y ?? 0);
    });
    reach.setAttribute("aria-valuenow", epochs[at]);
    reach.setAttribute("aria-valuetext", `epoch ${epochs[at]}`);
    tip.replaceChildren(line(`epoch ${epochs[at]}`), ...runs.map(value));
    const right = x[at] > width / 2;
    tip.style.left = right ? "" : `${(100 * (x[at] + 10)) / width}%`;
    tip.style.right = right ? `${(100 * (width - x[at] + 10)) / width}%` : "";
    plot.classList.add("read");
  }

  function value(run, number) {
    const row = line(` ${run.name}: ${run.said[at]}`);
    row.prepend(samples[number].cloneNode(true));
    return row;
  }

  function line(text) {
    const row = document.createElement("p");
    row.textContent = text;
    return row;
  }

  function hide() {
    plot.classList.remove("read");
    tip.replaceChildren();
  }

  function under(event) {
    const box = svg.getBoundingClientRect();
    const place = ((event.clientX - box.left) / box.width) * width;
    let nearest = 0;
    for (let i = 1; i < x.length; i++) if (Math.abs(x[i] - place) < Math.abs(x[nearest] - place)) nearest = i;
    show(nearest);
  }

  reach.addEventListener("pointerdown", under);
  reach.addEventListener("pointermove", under);
  reach.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && hide());
  reach.addEventListener("focus", () => show(at));
  reach.addEventListener("blur", hide);
  reach.addEventListener("keydown", (event) => {
    const last = epochs.length - 1;
    const to = { ArrowLeft: at - 1, ArrowDown: at - 1, ArrowRight: at + 1, ArrowUp: at + 1, Home: 0, End: last }[event.key];
    if (event.key === "Escape") hide();
    if (to === undefined) return;
    event.preventDefault();
    show(Math.min(Math.max(to, 0), last));
  });
}

document.querySelectorAll(".plot").forEach(follow);

// What doesn't fit scrolls in its own box, which then is reached by the tab key.
const boxes = new ResizeObserver((entries) => {
  for (const { target } of entries) {
    const fits = target.scrollWidth <= target.clientWidth && target.scrollHeight <= target.clientHeight;
    target.tabIndex = fits ? -1 : 0;
  }
});
document.querySelectorAll(".scroll").forEach((box) => boxes.observe(box));

// On paper, what is folded away is shown.
const folded = [];
window.addEventListener("beforeprint", () => {
  for (const details of document.querySelectorAll("details:not([open])")) {
    details.open = true;
    folded.push(details);
  }
});
window.addEventListener("afterprint", () => {
  for (const details of folded.splice(0)) details.open = false;
});
