"use strict";
// Draws the report from the JSON in #data. All text from rows goes in as text, never as HTML.
const data = JSON.parse(document.getElementById("data").textContent);
const at = (id) => document.getElementById(id);
const TYPE_COLORS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6d31", "#7a68d8", "#999999"];
const BIT_COLORS = { 1: "#7f0000", 2: "#c5283d", 3: "#e9724c", 4: "#2457c5", 5: "#2a9d8f", 6: "#6a994e", 7: "#8d7dca", 8: "#8d6a9f", 16: "#8a8f98" };
const COLUMNS = [
  ["label", "Run", (r) => r.label], ["bits", "Bits", (r) => r.bits], ["perWeight", "Bits/weight", (r) => digits(r.perWeight, 3)],
  ["megabytes", "MB", (r) => digits(r.megabytes, 3)], ["perplexity", "Perplexity", (r) => digits(r.perplexity, 4)],
  ["nll", "Nats/token", (r) => digits(r.nll, 4)], ["divergence", "KL from float", (r) => digits(r.divergence, 4)],
  ["agreement", "Same top token", (r) => (r.agreement === null ? "" : (100 * r.agreement).toFixed(1) + " %")],
  ["seconds", "Seconds", (r) => digits(r.seconds, 2)],
];
let group = data.groups[0];
let sorting = { column: "megabytes", up: true };
const hidden = { model: new Set(), dtype: new Set(), bits: new Set(), kind: new Set() };

function digits(value, places) {
  if (value === null || value === undefined) return "";
  return Math.abs(value) >= 10000 ? value.toExponential(1) : value.toFixed(places);
}
function color(name) { return getComputedStyle(document.documentElement).getPropertyValue(name).trim(); }
function shortName(model) { return model.replace(/\/+$/, "").split("/").pop(); }
function sizeText(bits) {
  const bytes = bits / 8;
  for (const [unit, factor] of [["GB", 1e9], ["MB", 1e6]]) if (bytes >= factor) return (bytes / factor).toPrecision(3) + " " + unit;
  return (bytes / 1e3).toPrecision(3) + " kB";
}
function unique(values) { return [...new Set(values)]; }
function byKey(key) { return group.rows.find((row) => row.key === key); }

function layout(x, y, more) {
  const titled = (a) => Object.assign({}, axis, a, { title: { text: a.title || "" } });
  const axis = { gridcolor: color("--line"), zerolinecolor: color("--line"), automargin: true };
  const phone = window.innerWidth < 640;
  return Object.assign({
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { color: color("--ink"), size: phone ? 11 : 13 },
    margin: { l: 55, r: 10, t: 10, b: 45 }, hovermode: "closest", hoverlabel: { align: "left" },
    legend: phone ? { orientation: "h", y: -0.3 } : { orientation: "v" },
    xaxis: titled(x), yaxis: titled(y),
  }, more || {});
}
function draw(id, traces, shape) {
  // A long legend below the plot would squeeze it on a phone: it gets room of its own, two names a line.
  const long = traces.length > 8 && shape.legend.orientation === "h";
  at(id).style.height = long ? `${18 + 1.1 * traces.length}rem` : "";
  return Plotly.react(id, traces, shape, { responsive: true, displaylogo: false, displayModeBar: false });
}
// Logarithms in titles where a collapsed run would flatten all others.
function lossAxis(title, values) {
  const known = values.filter((v) => v !== null && v > 0);
  const wide = known.length > 1 && Math.max(...known) / Math.min(...known) > 4;
  return wide ? { title, type: "log" } : { title };
}
function hover(row) {
  return `${row.label}<br>${digits(row.perWeight, 3) || 16} bits/weight, ${digits(row.megabytes, 3)} MB` +
    `<br>perplexity ${digits(row.perplexity, 4)}, KL ${digits(row.divergence, 4)}`;
}
function clickable(id) {
  at(id).removeAllListeners && at(id).removeAllListeners("plotly_click");
  at(id).on("plotly_click", (event) => { const key = event.points[0].customdata; if (key) detail(byKey(key)); });
}

function drawAdvice() {
  const advice = group.advice;
  at("budget").max = advice.length - 1;
  const item = advice[Math.min(+at("budget").value, advice.length - 1)];
  at("budget-size").textContent = sizeText(item.bits);
  at("sentence").textContent = item.sentence[0].toUpperCase() + item.sentence.slice(1) + ".";
  at("doubt").textContent = item.doubt ? item.doubt + "." : "";
}

function drawCurves() {
  const slice = group.slices[+at("curve-slice").value];
  if (!slice) { at("curves").textContent = "No data type was measured at three precisions on two models."; return; }
  const rows = slice.keys.map(byKey);
  const traces = unique(rows.map((r) => r.bits)).sort((a, b) => a - b).map((bits) => {
    const own = rows.filter((r) => r.bits === bits).sort((a, b) => a.modelBits - b.modelBits);
    return {
      // Collapsed widths would flatten the others; a click in the legend brings them in.
      visible: bits < 3 ? "legendonly" : true,
      name: bits === 16 ? "float" : bits + " bits", mode: "lines+markers+text", x: own.map((r) => Math.log2(r.modelBits)), y: own.map((r) => r.nll),
      text: own.map((r) => (bits === 16 ? shortName(r.model) : "")), textposition: "top center", customdata: own.map((r) => r.key),
      hovertext: own.map(hover), hoverinfo: "text", line: { color: BIT_COLORS[bits], dash: bits === 16 ? "dot" : "solid" }, marker: { size: 8 },
    };
  });
  draw("curves", traces, layout({ title: "log2 of total model bits" }, lossAxis("nats per token", rows.filter((r) => r.bits > 2).map((r) => r.nll))));
  clickable("curves");
  const law = slice.law;
  at("law").textContent = law === null ? "" : `Bivariate power law (parameters, bits): residual ${digits(law.rms, 3)} nats` +
    ` against a spread of ${digits(law.spread, 3)}; alpha ${digits(law.alpha, 2)}, beta ${digits(law.beta, 2)}.` +
    (law.interpolation_rms === null ? "" : ` Straight lines miss left-out points by ${digits(law.interpolation_rms, 3)} nats.`);
  drawOffsets();
}

function drawOffsets() {
  const slice = group.slices[+at("curve-slice").value];
  const measure = at("offset-measure").value;
  const found = (slice ? slice.offsets : []).filter((o) => o[measure] !== null);
  const traces = found.map((o) => {
    const [value, low, high] = o[measure];
    const name = o.bits === 16 ? "float" : o.bits + " bits";
    return {
      name, mode: "markers", x: [name], y: [value], visible: o.bits < 3 ? "legendonly" : true,
      error_y: { type: "data", symmetric: false, array: [high - value], arrayminus: [value - low] },
      marker: { size: 11, color: BIT_COLORS[o.bits] },
      hovertext: `${[value, low, high].map((v) => digits(v, 4)).join(" · ")} (estimate · low · high)`, hoverinfo: "text",
    };
  });
  const title = measure === "loss" ? "nats per token above 4 bits" : "log2(total bits) above 4 bits";
  draw("offsets", traces, layout({ title: slice ? slice.name : "", type: "category" }, { title, zeroline: true, zerolinewidth: 2 }));
}

function drawTypes() {
  const model = at("type-model").value;
  const bits = +at("type-bits").value;
  const float = group.rows.find((r) => r.model === model && r.bits === 16);
  const rows = group.rows.filter((r) => r.model === model && r.bits === bits && r.line !== "");
  // Blocks that run on across rows are another line at the same lengths.
  const flat = (r) => r.block.startsWith("flat:");
  const length = (r) => (flat(r) ? r.block.slice(5) : r.block);
  const order = (b) => (/^\d+$/.test(b) ? +b : b === "row" ? 1e6 : 1e7);
  const blocks = unique(rows.map(length)).sort((a, b) => order(a) - order(b));
  const name = (r) => r.line + (flat(r) ? ", across rows" : "");
  const values = [];
  const traces = unique(rows.map(name)).map((type, index) => {
    const own = rows.filter((r) => name(r) === type).sort((a, b) => order(length(a)) - order(length(b)));
    const y = own.map((r) => (float ? r.nll - float.nll : r.nll));
    values.push(...y);
    return {
      name: type, mode: "lines+markers", x: own.map(length), y, customdata: own.map((r) => r.key), hovertext: own.map(hover), hoverinfo: "text",
      line: { color: TYPE_COLORS[index % TYPE_COLORS.length], dash: index >= TYPE_COLORS.length ? "dot" : "solid" },
    };
  });
  draw("types", traces, layout({ title: "block", type: "category", categoryorder: "array", categoryarray: blocks },
    lossAxis(float ? "nats per token above float" : "nats per token", values)));
  clickable("types");
}

function drawPareto() {
  const rows = group.rows.filter((r) => !Object.keys(hidden).some((field) => hidden[field].has(r[field])));
  let best = Infinity;
  const front = [...rows].sort((a, b) => a.modelBits - b.modelBits || a.nll - b.nll).filter((r) => r.nll < best && ((best = r.nll), true));
  const traces = unique(rows.map((r) => r.bits)).sort((a, b) => a - b).map((bits) => {
    const own = rows.filter((r) => r.bits === bits);
    return {
      name: bits === 16 ? "float" : bits + " bits", mode: "markers", type: "scatter", x: own.map((r) => r.megabytes), y: own.map((r) => r.nll),
      customdata: own.map((r) => r.key), hovertext: own.map(hover), hoverinfo: "text", marker: { size: 7, color: BIT_COLORS[bits], opacity: 0.75 },
    };
  });
  traces.push({
    name: "front", mode: "lines", x: front.map((r) => r.megabytes), y: front.map((r) => r.nll), hoverinfo: "skip",
    line: { color: color("--ink"), width: 1.5, shape: "hv" },
  });
  draw("pareto", traces, layout({ title: "megabytes of weights", type: "log" }, lossAxis("nats per token", rows.map((r) => r.nll))));
  clickable("pareto");
}

function drawFilters() {
  const box = at("filters");
  box.replaceChildren();
  for (const [field, title] of [["model", "Models"], ["dtype", "Data types"], ["bits", "Bits"], ["kind", "Methods"]]) {
    hidden[field].clear();
    const details = document.createElement("details");
    const summary = document.createElement("summary");
    summary.textContent = title;
    details.append(summary);
    for (const value of unique(group.rows.map((r) => r[field])).sort((a, b) => (a > b ? 1 : -1))) {
      const label = document.createElement("label");
      const check = document.createElement("input");
      check.type = "checkbox";
      check.checked = true;
      check.dataset.field = field;
      check.dataset.value = value;
      check.addEventListener("change", () => { check.checked ? hidden[field].delete(value) : hidden[field].add(value); drawPareto(); });
      label.append(check, " " + (field === "model" ? shortName(value) : value));
      details.append(label);
    }
    box.append(details);
  }
}

function drawTasks() {
  at("tasks-card").hidden = group.tasks.length === 0;
  if (!group.tasks.length) return;
  const item = group.tasks[+at("task").value];
  const rows = group.rows.filter((r) => r.accuracies[item.task] !== undefined);
  draw("tasks", [{
    mode: "markers", x: rows.map((r) => r.nll), y: rows.map((r) => r.accuracies[item.task]), customdata: rows.map((r) => r.key),
    hovertext: rows.map(hover), hoverinfo: "text", marker: { size: 7, color: rows.map((r) => BIT_COLORS[r.bits]) },
  }], layout({ title: "nats per token" }, { title: "accuracy, " + item.task }));
  clickable("tasks");
  at("pearson").textContent = item.pearson ? `Pearson correlation ${item.pearson[0].toFixed(3)} over ${item.pearson[1]} rows.` : "";
}

function drawTable() {
  const head = document.createElement("tr");
  for (const [field, title] of COLUMNS) {
    const cell = document.createElement("th");
    const button = document.createElement("button");
    const sorted = sorting.column === field;
    button.textContent = title + (sorted ? (sorting.up ? " ↑" : " ↓") : "");
    cell.setAttribute("aria-sort", sorted ? (sorting.up ? "ascending" : "descending") : "none");
    button.addEventListener("click", () => { sorting = { column: field, up: sorted ? !sorting.up : true }; drawTable(); });
    cell.append(button);
    head.append(cell);
  }
  at("table").tHead.replaceChildren(head);
  const words = at("search").value.toLowerCase().split(/\s+/).filter(Boolean);
  const shown = group.rows.filter((r) => words.every((word) => (r.label + " " + r.kind).toLowerCase().includes(word)));
  const value = (row) => row[sorting.column];
  shown.sort((a, b) => {
    const [x, y] = [value(a), value(b)];
    if (x === y) return 0;
    if (x === null) return 1;
    if (y === null) return -1;
    return (x > y ? 1 : -1) * (sorting.up ? 1 : -1);
  });
  at("table").tBodies[0].replaceChildren(...shown.map((row) => {
    const line = document.createElement("tr");
    line.tabIndex = 0;
    line.className = row.front ? "front" : "";
    for (const [, , text] of COLUMNS) line.insertCell().textContent = text(row);
    line.addEventListener("click", () => detail(row));
    line.addEventListener("keydown", (event) => { if (event.key === "Enter") detail(row); });
    return line;
  }));
}

function detail(row) {
  at("detail-title").textContent = row.label;
  const figures = {
    "bits per weight": digits(row.perWeight, 4) || "16", "bits per parameter": digits(row.perParameter, 4), "size": sizeText(row.modelBits),
    "parameters": row.parameters.toLocaleString("en"), "perplexity": digits(row.perplexity, 4) || "above exp(709)", "nats per token": digits(row.nll, 5),
    "KL from float": digits(row.divergence, 5), "same top token": row.agreement === null ? "" : (100 * row.agreement).toFixed(2) + " %",
    "method": row.kind, "seconds": digits(row.seconds, 2), "device": row.device, "key": row.key, "notes": row.notes.join("; "),
  };
  for (const [task, accuracy] of Object.entries(row.accuracies)) figures[task] = (100 * accuracy).toFixed(2) + " %";
  at("detail-figures").replaceChildren(...Object.entries(figures).filter(([, text]) => text !== "").flatMap(([name, text]) => {
    const term = document.createElement("dt");
    const value = document.createElement("dd");
    term.textContent = name;
    value.textContent = text;
    return [term, value];
  }));
  at("detail-command").textContent = row.command;
  at("detail-recipe").textContent = row.recipe;
  at("detail").showModal();
}

function options(id, values, texts) {
  at(id).replaceChildren(...values.map((value, index) => new Option(texts[index], value)));
}
function show() {
  const models = unique(group.rows.map((r) => r.model));
  at("summary").textContent = `${group.rows.length} rows of ${models.length} models on ${group.text} (${group.tokens} tokens scored).`;
  options("curve-slice", group.slices.map((_, i) => i), group.slices.map((s) => s.name));
  const preferred = group.slices.findIndex((s) => s.offsets.length > 2);
  if (preferred > 0) at("curve-slice").value = preferred;
  options("type-model", models, models.map(shortName));
  const bits = unique(group.rows.filter((r) => r.bits !== 16).map((r) => r.bits)).sort((a, b) => a - b);
  options("type-bits", bits, bits);
  if (bits.includes(4)) at("type-bits").value = 4;
  options("task", group.tasks.map((_, i) => i), group.tasks.map((t) => t.task));
  at("budget").max = group.advice.length - 1;
  at("budget").value = Math.floor((group.advice.length - 1) / 2);
  drawFilters();
  drawAll();
  drawTable();
}
function drawAll() { drawAdvice(); drawCurves(); drawTypes(); drawPareto(); drawTasks(); }
function theme(name) {
  document.documentElement.dataset.theme = name;
  drawAll();
}

const dark = window.matchMedia("(prefers-color-scheme: dark)");
document.documentElement.dataset.theme = dark.matches ? "dark" : "light";
dark.addEventListener("change", (event) => theme(event.matches ? "dark" : "light"));
at("theme").addEventListener("click", () => theme(document.documentElement.dataset.theme === "dark" ? "light" : "dark"));
options("group", data.groups.map((_, i) => i), data.groups.map((g) => g.text));
at("group-label").hidden = data.groups.length < 2;
at("group").addEventListener("change", () => { group = data.groups[+at("group").value]; show(); });
at("budget").addEventListener("input", drawAdvice);
at("curve-slice").addEventListener("change", drawCurves);
at("offset-measure").addEventListener("change", drawOffsets);
for (const id of ["type-model", "type-bits"]) at(id).addEventListener("change", drawTypes);
at("task").addEventListener("change", drawTasks);
at("search").addEventListener("input", drawTable);
at("failed-card").hidden = data.failed.length === 0;
at("failed").replaceChildren(...data.failed.map((run) => {
  const item = document.createElement("li");
  item.textContent = `${run.label}: ${run.error}`;
  return item;
}));
show();
document.documentElement.dataset.ready = "yes";
