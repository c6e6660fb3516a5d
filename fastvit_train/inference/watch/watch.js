// Asks the server for the runs every few seconds, and shows them, their curves and their comparison.

import { createChart, element, swatch } from "./chart.js";
import { showRuns } from "./list.js";

const INTERVAL = 2000, INTERVAL_WHEN_HIDDEN = 20000; // milliseconds
const MAX_SHOWN = 12; // runs in a chart, as the server allows in a comparison
const loss = (value) => value.toFixed(4);
const PANELS = [["train loss", "train_loss", loss], ["test loss", "test_loss", loss], ["accuracy, %", "test_accuracy", (value) => `${value.toFixed(2)}%`]];
const charts = PANELS.map(([title, key, format]) => ({ key, ...createChart(title, format) }));
const byId = (id) => document.getElementById(id);
const state = {
  list: { runs: [], columns: [], root: "" },
  tag: "", // of the last answer about the runs
  now: 0, // the server's time, in seconds
  ticked: new Set(new URLSearchParams(location.search).getAll("run")),
  curves: new Map(), // by id: the version of the run that they are of, and their values
  compared: "", // the runs, in their versions, that the comparison shows
};
let timer;

async function ask(address, headers = {}) {
  const answer = await fetch(address, { headers });
  if (!answer.ok && answer.status !== 304) throw new Error((await answer.text()).trim());
  return answer;
}

const ticked = () => state.list.runs.filter((run) => state.ticked.has(run.id) && run.state !== "damaged");

// The runs whose curves are shown: those that are ticked, or else those in training, or else the newest one.
function shown() {
  const training = state.list.runs.filter((run) => run.state === "training");
  const newest = state.list.runs.filter((run) => run.state !== "damaged").slice(0, 1);
  return [ticked(), training, newest].find((runs) => runs.length)?.slice(0, MAX_SHOWN) ?? [];
}

function explain(runs) {
  const all = ticked();
  if (all.length > MAX_SHOWN) return `The first ${MAX_SHOWN} of the ${all.length} ticked runs.`;
  if (all.length) return all.length > 1 ? "The ticked runs." : "The ticked run. Tick another one to compare them.";
  const which = runs[0].state === "training" ? "The runs in training." : "The newest run.";
  return `${which} Tick runs in the list to choose and compare.`;
}

function points(run, key, axis) {
  const { epochs, steps } = state.curves.get(run.id)?.values ?? { epochs: [], steps: [] };
  const rows = axis === "step" && key === "train_loss" && steps.length ? steps : epochs;
  const factor = key === "test_accuracy" ? 100 : 1;
  const known = rows.filter((row) => row[axis] != null && row[key] != null);
  return known.map((row) => ({ x: row[axis], y: factor * row[key] }));
}

function show() {
  const { list } = state, runs = shown(), inTraining = list.runs.filter((run) => run.state === "training").length;
  const numbers = new Map(runs.map((run, number) => [run.id, number]));
  const axis = document.querySelector("[name=axis]:checked").value;
  byId("root").textContent = list.root;
  byId("empty").hidden = list.runs.length > 0;
  byId("untick").disabled = !ticked().length;
  document.title = inTraining ? `${inTraining} in training – fastvit watch` : "fastvit watch";
  showRuns(list, { now: state.now, ticked: state.ticked, numbers, filter: byId("filter").value, onTick: tick });
  byId("curves").hidden = !runs.length;
  if (!runs.length) return;
  byId("which").textContent = explain(runs);
  byId("legend").replaceChildren(...runs.map((run, number) => element("li", {}, swatch(number), ` ${run.name}`)));
  for (const { key, draw } of charts) {
    draw(runs.map((run, number) => ({ name: run.name, number, points: points(run, key, axis) })), axis);
  }
}

async function readCurves() {
  const changed = shown().filter((run) => state.curves.get(run.id)?.version !== run.version);
  await Promise.all(changed.map(async ({ id, version }) => {
    const values = await (await ask(`/api/curves?run=${id}`)).json();
    state.curves.set(id, { version, values });
  }));
}

async function compare() {
  const runs = ticked().slice(0, MAX_SHOWN);
  const wanted = runs.map((run) => `${run.id} ${run.version}`).join();
  byId("comparison").hidden = runs.length < 2;
  if (runs.length < 2 || wanted === state.compared) return;
  const rows = await (await ask(`/api/comparison?${query(runs.map((run) => run.id))}`)).json();
  byId("comparison-table").replaceChildren(comparisonTable(rows));
  state.compared = wanted;
}

const query = (ids) => new URLSearchParams(ids.map((id) => ["run", id])).toString();

function comparisonTable({ head, rows, results }) {
  const cell = (tag, scope, textContent) => element(tag, scope ? { scope, textContent } : { textContent });
  const row = ([name, ...values]) => element("tr", {}, cell("th", "row", name), ...values.map((value) => cell("td", "", value)));
  const names = element("tr", {}, cell("td", "", ""), ...head.slice(1).map((name) => cell("th", "col", name)));
  const title = (text) => element("tr", {}, element("th", { scope: "rowgroup", colSpan: head.length, className: "differs", textContent: text }));
  const group = (text, some) => (some.length ? [element("tbody", {}, title(text), ...some.map(row))] : []);
  const groups = [...group("Results", rows.slice(0, results)), ...group("Settings that differ", rows.slice(results))];
  return element("table", { className: "words" }, element("thead", {}, names), ...groups);
}

async function poll() {
  clearTimeout(timer);
  const status = byId("status");
  try {
    const answer = await ask("/api/runs", { "If-None-Match": state.tag });
    state.now = Date.parse(answer.headers.get("Date")) / 1000;
    if (answer.status !== 304) {
      state.list = await answer.json();
      state.tag = answer.headers.get("ETag");
    }
    await refresh();
    const count = state.list.runs.length, training = state.list.runs.filter((run) => run.state === "training").length;
    const text = `${count} ${count === 1 ? "run" : "runs"}, ${training} in training.`;
    if (status.textContent !== text) status.textContent = text;
    status.className = "";
  } catch (error) {
    status.textContent = `The page is not up to date: ${error instanceof TypeError ? "fastvit watch does not answer. Start it again" : error.message}.`;
    status.className = "lost";
  }
  clearTimeout(timer); // of another poll, if two overlapped
  timer = setTimeout(poll, document.hidden ? INTERVAL_WHEN_HIDDEN : INTERVAL);
}

async function refresh() {
  await readCurves();
  show();
  await compare();
}

function tick(id, on) {
  state.ticked[on ? "add" : "delete"](id);
  remember();
}

// The address names the ticked runs, so that it opens the same comparison again.
function remember() {
  history.replaceState(null, "", state.ticked.size ? `?${query([...state.ticked])}` : location.pathname);
  poll();
}

byId("charts").append(...charts.map(({ figure }) => figure));
byId("filter").addEventListener("input", show);
byId("untick").addEventListener("click", () => {
  state.ticked.clear();
  remember();
});
for (const choice of document.querySelectorAll("[name=axis]")) choice.addEventListener("change", show);
document.addEventListener("visibilitychange", () => document.hidden || poll());
poll();
