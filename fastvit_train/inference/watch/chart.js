// Charts of runs: lines in an SVG, the values under a pointer, a finger or the arrow keys, and a table of all values.

const WIDTH = 360, HEIGHT = 240, LEFT = 48, RIGHT = 350, TOP = 12, BOTTOM = 204;
const FEW = 3; // with fewer points, each has a marker
const UNITS = [["h", 3600], ["min", 60], ["s", 1]];
const MISSING = "—";

export function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

function drawing(tag, attributes, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

export function swatch(number) {
  const line = drawing("path", { class: style(number), d: "M1 5H31" });
  return drawing("svg", { class: "swatch", viewBox: "0 0 32 10", "aria-hidden": "true" }, line);
}

function style(number) {
  return `line s${number % 6} d${(number + Math.floor(number / 6)) % 6}`;
}

// Round numbers from below `low` to above `high`, about `count` of them.
function ticks(low, high, count, whole) {
  const least = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(least));
  let step = [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= least * 0.999);
  if (whole) step = Math.max(1, Math.round(step));
  const first = Math.floor(low / step + 1e-9), last = Math.ceil(high / step - 1e-9);
  return Array.from({ length: last - first + 1 }, (_, i) => Number(((first + i) * step).toPrecision(12)));
}

function scale(low, high, start, end) {
  return (value) => Math.round(10 * (start + (high > low ? (value - low) / (high - low) : 0.5) * (end - start))) / 10;
}

// The axis with its values in the unit that suits them.
function axisOf(kind, series) {
  const last = Math.max(...series.flatMap((one) => one.points.map((point) => point.x)));
  const [unit, size] = kind === "seconds" ? UNITS.find(([, seconds]) => last >= 2 * seconds) ?? UNITS[2] : ["", 1];
  const label = unit ? `training time, ${unit}` : kind;
  const text = (x) => (unit ? `${(x / size).toFixed(unit === "s" ? 1 : 2)} ${unit}` : `${kind} ${x.toLocaleString("en")}`);
  return { label, size, text, whole: !unit };
}

// The last point up to `x`: the runs of a chart by time have no points in common.
function pointAt(points, x, kind) {
  let found;
  for (const point of points) if (point.x <= x) found = point;
  return kind === "seconds" || found?.x === x ? found : undefined;
}

// A chart whose `draw` takes the series to show: [{name, number, points: [{x, y}]}], x in epochs, steps or seconds.
export function createChart(title, format) {
  const svg = drawing("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img" });
  const slider = element("div", { className: "slider", tabIndex: 0, role: "slider", ariaLabel: title, ariaOrientation: "horizontal" });
  const tooltip = element("div", { className: "tooltip", ariaLive: "polite" });
  const plot = element("div", { className: "plot" }, svg, slider, tooltip);
  const table = element("table");
  const box = element("div", { className: "scroll", role: "group", ariaLabel: `${title}, table`, tabIndex: 0 }, table);
  const details = element("details", {}, element("summary", { textContent: `${title} as a table` }), box);
  const figure = element("figure", { hidden: true }, element("figcaption", {}, element("h3", { textContent: title })), plot, details);
  let series = [], kind = "epoch", axis, xs = [], xOf, yOf;
  let selected = null; // the x whose values are shown

  function draw(all, by) {
    series = all.filter((one) => one.points.length);
    kind = by;
    figure.hidden = !series.length;
    if (figure.hidden) return;
    axis = axisOf(kind, series);
    xs = [...new Set(series.flatMap((one) => one.points.map((point) => point.x)))].sort((a, b) => a - b);
    svg.replaceChildren(grid(), ...series.flatMap(line));
    svg.setAttribute("aria-label", describe());
    slider.ariaValueMin = xs[0];
    slider.ariaValueMax = xs.at(-1);
    slider.ariaValueNow = xs.at(-1);
    slider.ariaValueText = axis.text(xs.at(-1));
    if (selected !== null) show(xs.findLast((x) => x <= selected) ?? xs[0]);
    if (details.open) fillTable();
  }

  function grid() {
    const ys = series.flatMap((one) => one.points.map((point) => point.y));
    const low = Math.min(...ys), high = Math.max(...ys), margin = low < high ? 0 : Math.abs(low) / 10 || 1;
    const yTicks = ticks(low - margin, high + margin, 5);
    const first = xs[0] / axis.size, last = xs.at(-1) / axis.size;
    const xTicks = ticks(first, last, 6, axis.whole).filter((tick) => tick >= first && tick <= last);
    xOf = scale(xs[0], xs.at(-1), LEFT + 6, RIGHT - 6);
    yOf = scale(yTicks[0], yTicks.at(-1), BOTTOM, TOP);
    const text = (x, y, anchor, label) => drawing("text", { x, y, "text-anchor": anchor }, label);
    const number = (value) => Number(value.toPrecision(4)).toString();
    const rows = yTicks.flatMap((tick) => [
      drawing("path", { d: `M${LEFT} ${yOf(tick)}H${RIGHT}` }),
      text(LEFT - 6, yOf(tick) + 4, "end", number(tick)),
    ]);
    const columns = xTicks.flatMap((tick) => [
      drawing("path", { d: `M${xOf(tick * axis.size)} ${BOTTOM}v5` }),
      text(xOf(tick * axis.size), BOTTOM + 18, "middle", number(tick)),
    ]);
    return drawing("g", { class: "grid" }, ...rows, ...columns, text((LEFT + RIGHT) / 2, HEIGHT - 2, "middle", axis.label));
  }

  function line({ number, points }) {
    const d = points.map(({ x, y }, i) => `${i ? "L" : "M"}${xOf(x)} ${yOf(y)}`).join("");
    const marked = points.length < FEW ? points : [];
    const markers = marked.map(({ x, y }) => drawing("circle", { class: `marker s${number % 6}`, cx: xOf(x), cy: yOf(y), r: 4 }));
    return [drawing("path", { class: style(number), d }), ...markers];
  }

  function describe() {
    const parts = series.map(({ name, points }) => {
      const [first, last] = [points[0], points.at(-1)];
      return `${name}: from ${format(first.y)} at ${axis.text(first.x)} to ${format(last.y)} at ${axis.text(last.x)}`;
    });
    return `Line chart of ${title} by ${axis.label}. ${parts.join("; ")}. The table below contains all values.`;
  }

  function fillTable() {
    const cell = (tag, scope, textContent) => element(tag, scope ? { scope, textContent } : { textContent });
    const head = element("tr", {}, cell("th", "col", axis.label), ...series.map((one) => cell("th", "col", one.name)));
    const rows = xs.map((x) => {
      const points = series.map((one) => one.points.find((point) => point.x === x));
      const values = points.map((point) => cell("td", "", point ? format(point.y) : MISSING));
      return element("tr", {}, cell("th", "row", axis.text(x)), ...values);
    });
    table.replaceChildren(element("thead", {}, head), element("tbody", {}, ...rows));
  }

  function show(x) {
    selected = x;
    const shown = series.map((one) => ({ ...one, point: pointAt(one.points, x, kind) }));
    const dots = shown.filter(({ point }) => point).map(({ number, point }) =>
      drawing("circle", { class: `dot s${number % 6}`, cx: xOf(point.x), cy: yOf(point.y), r: 4 }));
    const crosshair = drawing("path", { class: "crosshair", d: `M${xOf(x)} ${TOP}V${BOTTOM}` });
    svg.querySelector(".cursor")?.remove();
    svg.append(drawing("g", { class: "cursor" }, crosshair, ...dots));
    slider.ariaValueNow = x;
    slider.ariaValueText = axis.text(x);
    const rows = shown.map(({ name, number, point }) =>
      element("p", {}, swatch(number), ` ${name}: ${point ? format(point.y) : MISSING}`));
    tooltip.replaceChildren(element("p", { textContent: axis.text(x) }), ...rows);
    const right = xOf(x) > WIDTH / 2;
    tooltip.style.left = right ? "" : `${(100 * (xOf(x) + 10)) / WIDTH}%`;
    tooltip.style.right = right ? `${(100 * (WIDTH - xOf(x) + 10)) / WIDTH}%` : "";
    plot.classList.add("active");
  }

  function hide() {
    selected = null;
    plot.classList.remove("active");
    tooltip.replaceChildren();
  }

  function showNearest(event) {
    const frame = svg.getBoundingClientRect();
    const pointer = ((event.clientX - frame.left) / frame.width) * WIDTH;
    show(xs.reduce((best, x) => (Math.abs(xOf(x) - pointer) < Math.abs(xOf(best) - pointer) ? x : best)));
  }

  slider.addEventListener("pointerdown", showNearest);
  slider.addEventListener("pointermove", showNearest);
  slider.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && hide());
  slider.addEventListener("focus", () => selected === null && show(xs.at(-1)));
  slider.addEventListener("blur", hide);
  slider.addEventListener("keydown", (event) => {
    const at = xs.indexOf(selected ?? xs.at(-1)), last = xs.length - 1;
    const to = { ArrowLeft: at - 1, ArrowDown: at - 1, ArrowRight: at + 1, ArrowUp: at + 1, Home: 0, End: last }[event.key];
    if (event.key === "Escape") hide();
    if (to === undefined) return;
    event.preventDefault();
    show(xs[Math.min(Math.max(to, 0), last)]);
  });
  details.addEventListener("toggle", () => details.open && fillTable());
  return { figure, draw };
}
