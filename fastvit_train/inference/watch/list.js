// The list of the runs: a row per run, which stays the same element for as long as the run is there.

import { element, swatch } from "./chart.js";

const WORDS = new Set(["model", "data"]); // columns of words; the others hold numbers
const AGES = [["d", 86400], ["h", 3600], ["min", 60], ["s", 1]];
const rows = new Map(); // by the run's id
const body = document.getElementById("rows");

function age(seconds) {
  const [unit, size] = AGES.find(([, length]) => seconds >= length) ?? AGES.at(-1);
  return `${Math.max(0, Math.floor(seconds / size))} ${unit} ago`;
}

function setText(target, text) {
  if (target.textContent !== text) target.textContent = text;
}

function createRow(run, columns, onTick) {
  const tick = element("input", { type: "checkbox" });
  const name = element("strong", { textContent: run.name });
  const mark = element("span");
  const note = element("small");
  const state = element("span");
  const values = columns.map(() => element("span"));
  const changed = element("span");
  const report = element("a", { href: `/report?run=${run.id}`, target: "_blank", rel: "noopener", textContent: "report", ariaLabel: `report of ${run.name}` });
  const cell = (className, label, ...content) => {
    const made = element("td", { className, role: "cell" }, ...content);
    made.dataset.label = label;
    return made;
  };
  const row = element("tr", { role: "row" },
    element("th", { scope: "row", role: "rowheader" }, element("label", {}, tick, name), mark, note),
    cell("words plain", "state", state),
    ...columns.map((column, i) => cell(WORDS.has(column) ? "words" : "", column, values[i])),
    cell("", "last change", changed),
    cell("words plain", "report", report),
  );
  tick.addEventListener("change", () => onTick(run.id, tick.checked));
  return { row, tick, mark, note, state, values, changed, report, number: undefined };
}

function update(parts, run, now, ticked, number) {
  parts.tick.checked = ticked.has(run.id);
  parts.tick.disabled = run.state === "damaged";
  parts.report.hidden = run.state === "damaged";
  setText(parts.note, run.note);
  parts.note.title = run.note;
  setText(parts.state, run.state);
  parts.state.className = `state ${run.state}`;
  run.cells.forEach((value, i) => setText(parts.values[i], value));
  setText(parts.changed, age(now - run.changed));
  if (parts.number !== number) parts.mark.replaceChildren(...(number === undefined ? [] : [swatch(number)]));
  parts.number = number;
}

// Show the runs whose names have `filter` in them; `numbers` has the number of the curve of each run that has one.
export function showRuns({ runs, columns }, { now, ticked, numbers, filter, onTick }) {
  const head = document.getElementById("columns");
  if (!head.children.length) {
    for (const name of ["run", "state", ...columns, "last change", "report"]) {
      const className = ["run", "state", "report", ...WORDS].includes(name) ? "words" : "";
      head.append(element("th", { scope: "col", role: "columnheader", className, textContent: name }));
    }
  }
  const present = new Set(runs.map((run) => run.id));
  for (const [id, parts] of rows) {
    if (present.has(id)) continue;
    parts.row.remove();
    rows.delete(id);
  }
  const focused = document.activeElement;
  runs.forEach((run, i) => {
    if (!rows.has(run.id)) rows.set(run.id, createRow(run, columns, onTick));
    const parts = rows.get(run.id);
    update(parts, run, now, ticked, numbers.get(run.id));
    parts.row.hidden = !run.name.toLowerCase().includes(filter.toLowerCase());
    if (body.children[i] !== parts.row) body.insertBefore(parts.row, body.children[i] ?? null);
  });
  if (focused !== document.activeElement && focused.isConnected) focused.focus(); // a row that moves loses the focus
}
