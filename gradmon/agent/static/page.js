"use strict";
/* The live page: polls the agent once a second for what is new, and draws it with uPlot.
 *
 * Words: a *column* is an array with one entry per step; a *series* is what one rank (or the run) holds, a set of
 * columns. `null` is a value that was not finite: the line has a gap there. `undefined` is a step this rank has no
 * point for: the line goes on.
 */

const POLL_MS = 1000;
const TIMEOUT_MS = 8000;
const LINES = 8; // more ranks than this are drawn as a band, with the most interesting ones as lines
const HELD_POINTS = 6000; // beyond this, ask for everything anew: the agent thins it
const RANK_ROWS = 256;

const KINDS = {
  nonfinite: { label: "non-finite", color: "--nonfinite", shape: "cross" },
  spike: { label: "spike", color: "--spike", shape: "triangle" },
  spike_streak: { label: "spikes in a row", color: "--backoff", shape: "square" },
  left_out: { label: "rank left out", color: "--nonfinite", shape: "square" },
  left_out_streak: { label: "rank left out again and again", color: "--nonfinite", shape: "square" },
  skip_streak: { label: "skips in a row", color: "--nonfinite", shape: "square" },
  scaler_streak: { label: "GradScaler skips in a row", color: "--nonfinite", shape: "square" },
  diverging: { label: "diverging", color: "--backoff", shape: "square" },
  drift: { label: "drift", color: "--spike", shape: "square" },
  vanish: { label: "vanished gradients", color: "--spike", shape: "square" },
  replicas: { label: "replicas differ", color: "--nonfinite", shape: "square" },
};
const OTHER_KIND = { color: "--dim", shape: "square" };
const DONE = { skip: ["skipped", "skip"], rescale: ["rescaled", "rescale"], backoff: ["rate lowered", "lower the rate"],
  leave_out: ["rank left out", "leave the rank out"], rollback: ["rolled back", "roll back"], stop: ["stopped", "stop"] };
const STATES = { running: "ok", busy: "warn", stuck: "bad", finished: "calm", failed: "bad", exception: "bad", crashed: "bad" };

const state = {
  run: null, // name of the run shown
  runs: [],
  cursor: "",
  answer: null, // the newest, for all that is not a column
  global: {},
  series: new Map(), // rank -> columns
  events: new Map(), // id -> event
  zoom: null, // [first step, last step] or null for all
  charts: [],
  picked: null, // ranks drawn as lines, as a key
  seen: 0, // when the agent last answered
};

// ---------------------------------------------------------------- small helpers

const byId = (id) => document.getElementById(id);

function el(tag, props = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (name in node) node[name] = value;
    else node.setAttribute(name, value);
  }
  node.append(...children.filter((c) => c !== null && c !== undefined));
  return node;
}

function text(node, value) {
  if (node.textContent !== value) node.textContent = value;
}


/** Ages jump around below a second; nobody needs to see that. */
const age = (v) => (finite(v) ? (v < 1.5 ? "now" : seconds(Math.round(v))) : "–");

function clock(unix) {
  if (!finite(unix)) return "";
  const date = new Date(unix * 1000);
  const time = date.toLocaleTimeString("en-GB");
  return date.toDateString() === new Date().toDateString() ? time : `${date.toISOString().slice(0, 10)} ${time}`;
}

const kindOf = (event) => KINDS[event.kind] || { ...OTHER_KIND, label: event.kind.replaceAll("_", " ") };

function done(event) {
  if (event.action === "none") return "noted";
  const [did, would] = DONE[event.action] || [event.action, event.action];
  return event.applied ? did : `would ${would}`;
}

// ---------------------------------------------------------------- data

/** Put new columns behind the old ones. Steps seen before are replaced: the run went back to a checkpoint. */
function append(columns, added) {
  if (!added.step.length) return;
  if (!columns.step) {
    Object.assign(columns, added);
    return;
  }
  let keep = columns.step.length;
  while (keep && columns.step[keep - 1] >= added.step[0]) keep -= 1;
  for (const name of Object.keys(added)) {
    columns[name].length = keep;
    for (const value of added[name]) columns[name].push(value);
  }
}

function take(answer) {
  if (answer.full) {
    state.global = {};
    state.series.clear();
    state.events.clear();
  }
  state.answer = answer;
  state.cursor = answer.cursor;
  append(state.global, answer.global);
  for (const [rank, columns] of Object.entries(answer.series)) {
    if (!state.series.has(rank)) state.series.set(rank, {});
    append(state.series.get(rank), columns);
  }
  for (const rank of state.series.keys()) if (!(rank in answer.series)) state.series.delete(rank);
  for (const event of answer.events) state.events.set(event.id, event);
  if ((state.global.step || []).length > HELD_POINTS) state.cursor = "";
}

const events = () => [...state.events.values()].sort((a, b) => a.step - b.step || a.wall_seconds - b.wall_seconds);

/** Ranks worth a line: all when they are few; else those in trouble, with incidents, or far from the median. */
function pickRanks() {
  const ranks = state.answer.ranks;
  if (ranks.length <= LINES) return ranks.map((r) => String(r.rank));
  const blamed = new Map();
  for (const event of state.events.values()) blamed.set(event.rank, (blamed.get(event.rank) || 0) + 1);
  const typical = median(ranks.map((r) => r.local_grad_norm).filter((v) => finite(v) && v > 0));
  const interest = (r) => {
    const trouble = STATES[r.state] === "bad" ? 1000 : 0;
    const off = r.local_grad_norm > 0 && typical > 0 ? Math.abs(Math.log(r.local_grad_norm / typical)) : 0;
    return trouble + 10 * Math.min(50, blamed.get(r.rank) || 0) + (off > 0.7 ? off : 0);
  };
  return ranks
    .filter((r) => interest(r) > 0)
    .sort((a, b) => interest(b) - interest(a) || a.rank - b.rank)
    .slice(0, LINES)
    .map((r) => String(r.rank))
    .sort((a, b) => a - b);
}

function median(values) {
  if (!values.length) return null;
  const sorted = [...values].sort((a, b) => a - b);
  return sorted[sorted.length >> 1];
}

/** One x axis for all ranks: every step any of them has. */
function unionSteps(columnsOfRanks) {
  const steps = new Set();
  for (const columns of columnsOfRanks) for (const step of columns.step || []) steps.add(step);
  return [...steps].sort((a, b) => a - b);
}

function spread(steps, place, columns, field) {
  const out = new Array(steps.length).fill(undefined);
  (columns.step || []).forEach((step, i) => {
    out[place.get(step)] = columns[field][i];
  });
  return out;
}

/** [steps, (lowest, highest, median)?, one column per line]. */
function rankData(field, lines, log) {
  const all = [...state.series.values()];
  const steps = unionSteps(all);
  const place = new Map(steps.map((step, i) => [step, i]));
  const clean = (column) => (log ? column.map(positive) : column);
  const drawn = lines.map((rank) => clean(spread(steps, place, state.series.get(rank) || {}, field)));
  if (all.length <= LINES) return [steps, ...drawn];
  const values = steps.map(() => []);
  for (const columns of all) {
    (columns.step || []).forEach((step, i) => {
      const v = columns[field][i];
      if (finite(v) && !(log && v <= 0)) values[place.get(step)].push(v);
    });
  }
  const over = (pick) => values.map((v) => (v.length ? pick(v) : null));
  const band = [over((v) => Math.min(...v)), over((v) => Math.max(...v)), over(median)];
  return [steps, ...band, ...drawn];
}

/** A log axis has no place for 0, which is what a skipped step applied. */
const positive = (v) => (v === undefined ? undefined : finite(v) && v > 0 ? v : null);

// ---------------------------------------------------------------- charts

/** What is drawn: title, whether wide, the y axis, and how its series and data come about. */
const SPECS = [
  {
    title: "Global gradient norm",
    wide: true,
    log: true,
    format: number,
    lines: () => [
      { label: "spike limit", color: "--limit", dash: [5, 4], width: 1.25 },
      { label: "applied", color: "--applied", width: 1.5 },
      { label: "norm", color: "--norm", width: 1.75, fill: true },
    ],
    data: () => {
      const g = state.global;
      const column = (name) => (g[name] || []).map(positive);
      return [g.step || [], column("grad_norm_limit"), column("grad_norm_applied"), column("grad_norm")];
    },
  },
  { title: "Local norm per rank, before the all-reduce", log: true, format: number, field: "local_grad_norm" },
  { title: "Loss", format: number, field: "loss", robust: true, none: "no loss yet: monitor.observe(loss=loss)" },
  {
    title: "Learning-rate scale",
    format: (v) => (finite(v) ? `×${number(v)}` : "–"),
    range: () => [0, 1.08],
    lines: () => [{ label: "scale", color: "--backoff", width: 1.75, fill: true }],
    data: () => [state.global.step || [], state.global.learning_rate_scale || []],
  },
  { title: "Memory per rank", format: bytes, field: "memory_bytes", range: (_, max) => [0, max * 1.15 || 1], binary: true },
];

function rankLines(ranks) {
  const lines = ranks.map((rank, i) => ({ label: `rank ${rank}`, color: `--s${i % LINES}`, width: 1.4 }));
  if (state.answer.ranks.length <= LINES) return lines;
  const edge = { color: "--band", width: 0, silent: true };
  return [{ ...edge, label: "lowest" }, { ...edge, label: "highest" }, { label: "median", color: "--text", width: 1.6 }, ...lines];
}

function dataOf(spec, ranks) {
  return spec.field ? rankData(spec.field, ranks, spec.log) : spec.data();
}

function yRange(spec) {
  return (u, min, max) => {
    if (!finite(min) || !finite(max)) return spec.log ? [0.1, 10] : spec.range ? spec.range(0, 1) : [0, 1];
    if (spec.range) return spec.range(min, max);
    if (spec.log) return [min / 1.35, max * 1.5];
    if (spec.robust) max = Math.min(max, usualTop(u));
    const pad = (max - min || Math.abs(max) || 1) * 0.08;
    return [min - pad, max + pad];
  };
}

function xRange(_u, min, max) {
  if (state.zoom) return state.zoom;
  if (!finite(min) || !finite(max)) return [0, 1];
  return min === max ? [min - 1, max + 1] : [min, max];
}

function axes(spec) {
  const common = { stroke: css("--dim"), grid: { stroke: css("--grid"), width: 1 }, ticks: { show: false }, font: "12px system-ui, sans-serif" };
  const y = { ...common, size: spec.binary ? 66 : 52, gap: 6, values: (_u, splits) => splits.map((v) => spec.format(v)) };
  if (spec.log) Object.assign(y, { splits: logSplits, filter: (_u, splits) => splits });
  if (spec.binary) y.incrs = BINARY_STEPS;
  const x = { ...common, size: 30, gap: 4, space: 64, values: (_u, splits) => splits.map((v) => (Number.isInteger(v) ? whole(v) : "")) };
  return [x, y];
}

function seriesOf(line) {
  const color = css(line.color);
  return {
    label: line.label,
    stroke: line.silent ? "transparent" : color,
    width: line.width,
    dash: line.dash,
    fill: line.fill ? (u) => shade(u, color) : undefined,
    fillTo: line.fill ? (u) => u.scales.y.min : undefined,
    points: { show: false },
    spanGaps: false,
  };
}

function buildChart(spec, ranks) {
  const lines = spec.field ? rankLines(ranks) : spec.lines();
  const plot = el("div", { className: "plot" });
  const none = el("div", { className: "none", hidden: true }, spec.none || "no values yet");
  const tip = el("div", { className: "tip", hidden: true });
  const where = el("span", { className: "where" });
  const legend = el("div", { className: "legend" });
  const chart = { spec, lines, ranks, plot, none, tip, where, values: [], width: 0 };
  for (const line of lines) {
    const value = el("b");
    chart.values.push(value);
    if (!line.silent) legend.append(el("span", { className: "item" }, swatch(line), line.label, value));
  }
  if (!spec.field) legend.prepend(...[...legend.children].reverse()); // the line drawn last lies on top: it matters most
  const head = el("div", { className: "card-head" }, el("h2", {}, spec.title), legend, where);
  plot.append(none);
  byId("charts").append(el("div", { className: spec.wide ? "card wide" : "card" }, head, plot, tip));
  chart.u = new uPlot(options(chart), dataOf(spec, ranks), plot);
  return chart;
}

function options(chart) {
  const { spec, lines, plot } = chart;
  chart.width = plot.clientWidth;
  const band = lines[0] && lines[0].silent ? [{ series: [2, 1], fill: css("--band") }] : undefined;
  return {
    width: chart.width,
    height: chartHeight(spec),
    padding: [spec.wide ? 20 : 12, 14, 0, 0],
    legend: { show: false },
    scales: { x: { time: false, range: xRange }, y: { distr: spec.log ? 3 : 1, range: yRange(spec) } },
    axes: axes(spec),
    series: [{}, ...lines.map(seriesOf)],
    bands: band,
    cursor: {
      sync: { key: "gradmon", scales: ["x", null] },
      drag: { x: true, y: false, setScale: false },
      points: { size: 7 },
      y: false,
      bind: { dblclick: () => () => zoomTo(null) },
    },
    hooks: {
      draw: [(u) => drawEvents(u, chart)],
      setCursor: [(u) => hover(u, chart)],
      setSelect: [(u) => select(u)],
    },
  };
}

const chartHeight = (spec) => (spec.wide ? (window.innerWidth < 640 ? 230 : 320) : window.innerWidth < 640 ? 180 : 216);

function select(u) {
  if (u.select.width > 4) {
    const first = u.posToVal(u.select.left, "x");
    const last = u.posToVal(u.select.left + u.select.width, "x");
    zoomTo([first, last]);
  }
  u.setSelect({ left: 0, width: 0, top: 0, height: 0 }, false);
}

function zoomTo(range) {
  state.zoom = range;
  byId("reset").hidden = !range;
  drawCharts();
}

// ---------------------------------------------------------------- events on the charts

function swatch(line) {
  const svg = svgNode("svg", { width: 14, height: 10, "aria-hidden": "true" });
  const dash = line.dash ? line.dash.map((d) => d * 0.7).join(" ") : "";
  const stroke = svgNode("line", { x1: 0, x2: 14, y1: 5, y2: 5, "stroke-width": 2.5, "stroke-dasharray": dash });
  stroke.style.stroke = `var(${line.color})`;
  svg.append(stroke);
  return svg;
}

function svgNode(tag, attributes) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  return node;
}

function mark(kind) {
  const svg = svgNode("svg", { width: 12, height: 12, "aria-hidden": "true", class: "mark" });
  const path = svgNode("path", { d: outline(kind.shape, 6, 6, 4.5), "stroke-width": 2.2, "stroke-linecap": "round" });
  path.style.stroke = `var(${kind.color})`;
  path.style.fill = kind.shape === "cross" ? "none" : `var(${kind.color})`;
  svg.append(path);
  return svg;
}

function drawEvents(u, chart) {
  const { ctx, bbox } = u;
  const ratio = window.devicePixelRatio || 1;
  const marks = [];
  ctx.save();
  ctx.lineWidth = ratio;
  for (const event of events()) {
    const x = Math.round(u.valToPos(event.step, "x", true));
    if (!(x >= bbox.left && x <= bbox.left + bbox.width)) continue;
    const kind = kindOf(event);
    marks.push([x, kind]);
    ctx.strokeStyle = css(kind.color);
    ctx.globalAlpha = chart.spec.wide ? 0.55 : 0.35;
    ctx.beginPath();
    ctx.moveTo(x + 0.5, bbox.top);
    ctx.lineTo(x + 0.5, bbox.top + bbox.height);
    ctx.stroke();
  }
  ctx.globalAlpha = 1;
  if (chart.spec.wide) drawMarks(ctx, marks, bbox.top - 9 * ratio, ratio);
  ctx.restore();
}

/** A mark above each event; close ones stand side by side, one of each kind. */
function drawMarks(ctx, marks, y, ratio) {
  let free = -Infinity; // where the next mark has room
  let cluster = new Set();
  for (const [x, kind] of marks) {
    if (x >= free) cluster = new Set();
    else if (cluster.has(kind)) continue;
    cluster.add(kind);
    const at = Math.max(x, free);
    free = at + 13 * ratio;
    ctx.strokeStyle = ctx.fillStyle = css(kind.color);
    ctx.lineWidth = 2 * ratio;
    const path = new Path2D(outline(kind.shape, at, y, 4.5 * ratio));
    if (kind.shape !== "cross") ctx.fill(path);
    ctx.stroke(path);
  }
}

/** Values under the cursor go into the legends of all charts; what happened there into a box on the one hovered. */
function hover(u, chart) {
  const idx = u.cursor.idx;
  const over = finite(idx) && u.cursor.left >= 0;
  chart.lines.forEach((line, i) => text(chart.values[i], valueAt(u, chart, i + 1, over ? idx : null)));
  const step = over ? u.data[0][idx] : null;
  text(chart.where, over && chart.spec.wide ? whereText(step) : "");
  const near = over && u.root.matches(":hover") ? eventsNear(u, u.cursor.left) : [];
  chart.tip.hidden = !near.length;
  if (near.length) showTip(u, chart, near);
}

function valueAt(u, chart, i, idx) {
  const column = u.data[i];
  if (idx !== null) return chart.spec.format(column[idx]);
  for (let k = column.length - 1; k >= 0; k -= 1) if (finite(column[k])) return chart.spec.format(column[k]);
  return "–";
}

function whereText(step) {
  const i = (state.global.step || []).indexOf(step);
  return `step ${whole(step)}${i >= 0 ? ` · ${clock(state.global.wall_seconds[i])}` : ""}`;
}

function eventsNear(u, left) {
  let best = 9; // CSS pixels
  let near = [];
  for (const event of events()) {
    const distance = Math.abs(u.valToPos(event.step, "x") - left);
    if (distance < best - 0.01) {
      best = distance;
      near = [event];
    } else if (Math.abs(distance - best) < 0.01) near.push(event);
  }
  return near;
}

function showTip(u, chart, near) {
  chart.tip.replaceChildren(
    ...near.slice(0, 4).flatMap((event) => [
      el("div", { className: "tip-head" }, mark(kindOf(event)), `Step ${whole(event.step)}: ${kindOf(event).label}`),
      el("p", {}, event.message),
    ]),
  );
  const at = u.valToPos(near[0].step, "x") + u.over.offsetLeft;
  const width = chart.tip.offsetWidth;
  const right = at + 18 + width < chart.width;
  chart.tip.style.left = `${Math.max(8, right ? at + 18 : at - width - 8)}px`;
  chart.tip.style.top = `${chart.plot.offsetTop + 26}px`;
}

// ---------------------------------------------------------------- drawing

function buildCharts() {
  for (const chart of state.charts) chart.u.destroy();
  byId("charts").replaceChildren();
  const ranks = pickRanks();
  state.picked = ranks.join();
  state.charts = SPECS.map((spec) => buildChart(spec, ranks));
  drawCharts();
}

function drawCharts() {
  for (const chart of state.charts) {
    const data = dataOf(chart.spec, chart.ranks);
    chart.none.hidden = data.slice(1).some((column) => column.some(finite));
    chart.u.setData(data);
    hover(chart.u, chart);
  }
}

function resize() {
  for (const chart of state.charts) {
    const width = chart.plot.clientWidth;
    if (width && width !== chart.width) {
      chart.width = width;
      chart.u.setSize({ width, height: chartHeight(chart.spec) });
    }
  }
}

function drawRun() {
  const { run, ranks, totals } = state.answer;
  const look = STATES[run.state] || "calm";
  text(byId("name"), run.run);
  text(byId("state"), run.state);
  byId("state").className = `badge ${look}`;
  text(byId("headline"), run.headline);
  byId("headline").className = `headline ${look}`;
  text(byId("mode"), run.mode === "observe" ? "observe: changes nothing" : `${run.mode} mode`);
  const place = ranks.length === run.world_size ? run.host : `${ranks.length} of ${run.world_size} ranks are on this node`;
  const again = run.attempt ? ` · attempt ${run.attempt + 1}` : "";
  text(byId("facts"), `${run.script} · ${place} · ${run.device} · started ${clock(run.started_seconds)}${again} · gradmon ${run.version}`);
  document.title = `${run.run} · ${run.state}`;
  drawTiles(run, totals);
  drawEventTable();
  drawRankTable(ranks);
}

/** "2 skipped · 1 rescaled", and in observe mode what would have been done. */
function interventions(totals) {
  const words = { skip: "skipped", rescale: "rescaled", leave_out: "rank left out", backoff: "backed off", rollback: "rolled back", stop: "stopped" };
  const said = (prefix) => Object.keys(words).filter((k) => totals[prefix + k]).map((k) => `${whole(totals[prefix + k])} ${words[k]}`);
  const count = (prefix) => Object.keys(words).reduce((sum, k) => sum + totals[prefix + k], 0);
  const [did, would] = [count(""), count("would_")];
  if (would && !did) return [whole(would), `would have: ${said("would_").join(" · ")}`];
  return [whole(did), said("").join(" · ") || "none needed"];
}

function drawTiles(run, totals) {
  const last = (name) => (state.global[name] || []).at(-1);
  const scale = last("learning_rate_scale");
  const limit = last("grad_norm_limit");
  const rate = run.step_seconds ? 1 / run.step_seconds : null;
  const [count, what] = interventions(totals);
  const norm = last("grad_norm");
  const last_step = age(Math.min(...state.answer.ranks.map((r) => r.step_age_seconds ?? Infinity)));
  const broken = run.step !== null && norm === null;
  const tiles = [
    ["Step", whole(run.step), run.step === null ? "none yet" : last_step === "now" ? "just now" : `${last_step} ago`, ""],
    ["Steps per second", number(rate), finite(run.step_seconds) ? `${seconds(run.step_seconds)} each` : "", ""],
    ["Gradient norm", broken ? "non-finite" : number(norm), finite(limit) ? `limit ${number(limit)}` : "no limit yet", broken ? "bad" : ""],
    ["Learning rate", number(run.learning_rate), finite(scale) ? `gradmon's scale ×${number(scale)}` : "", scale < 0.999 ? "warn" : ""],
    ["Interventions", count, what, ""],
    ["Ranks", whole(run.world_size), run.topology, run.topology.startsWith("unrecognised") ? "warn" : ""],
  ];
  const box = byId("tiles");
  if (box.children.length !== tiles.length) {
    box.replaceChildren(...tiles.map(() => el("div", {}, el("div", { className: "label" }), el("div", { className: "value" }), el("div", { className: "note" }))));
  }
  tiles.forEach(([label, value, note, look], i) => {
    const tile = box.children[i];
    tile.className = `tile ${look}`;
    [label, value, note].forEach((words, k) => text(tile.children[k], words));
    tile.children[2].title = note;
  });
}

function drawEventTable() {
  const newest = events().reverse();
  const key = `${state.run} ${newest.length} ${newest.length ? newest[0].id : ""}`;
  const body = byId("events").tBodies[0];
  if (body.dataset.key === key) return; // a table rebuilt each second can't be selected from
  body.dataset.key = key;
  text(byId("events-note"), newest.length ? `${whole(newest.length)}, newest first` : "");
  body.replaceChildren(...newest.slice(0, 500).map(eventRow));
  if (!newest.length) body.append(el("tr", { className: "none-yet" }, el("td", { colSpan: 6 }, "Nothing has happened: all gradients were healthy.")));
}

function eventRow(event) {
  const step = el("button", { className: "step", type: "button", title: "Show on the charts" }, whole(event.step));
  step.addEventListener("click", () => {
    zoomTo([event.step - 60, event.step + 60]);
    byId("charts").scrollIntoView({ behavior: "smooth", block: "start" });
  });
  return el(
    "tr",
    {},
    el("td", { className: "num" }, step),
    el("td", { className: "nowrap dim" }, clock(event.wall_seconds)),
    el("td", {}, event.rank === null ? "–" : String(event.rank)),
    el("td", { className: "mono" }, event.parameter || ""),
    el("td", {}, mark(kindOf(event)), event.message || kindOf(event).label),
    el("td", { className: "nowrap" }, done(event)),
  );
}

function drawRankTable(ranks) {
  const body = byId("ranks").tBodies[0];
  const bad = (r) => (STATES[r.state] === "bad" ? 0 : r.state === "busy" ? 1 : 2);
  const shown = ranks.length > LINES ? [...ranks].sort((a, b) => bad(a) - bad(b) || a.rank - b.rank).slice(0, RANK_ROWS) : ranks;
  text(byId("ranks-note"), ranks.length > shown.length ? `${shown.length} of ${ranks.length}, worst first` : ranks.length > LINES ? "worst first" : "");
  while (body.rows.length > shown.length) body.deleteRow(-1);
  while (body.rows.length < shown.length) body.append(rankRow());
  shown.forEach((r, i) => {
    const cells = body.rows[i].cells;
    const badge = cells[1].firstChild;
    const waiting = r.state === "busy" && r.step === null; // no step yet, which is no sign of trouble
    const shownState = waiting ? "waiting" : r.state;
    badge.className = `badge ${waiting ? "calm" : STATES[r.state] || "calm"}`;
    badge.title = r.detail;
    const words = [r.rank, null, r.host, r.device, whole(r.step), age(r.step_age_seconds), seconds(r.step_seconds), number(r.local_grad_norm), number(r.loss), bytes(r.memory_bytes)];
    words.forEach((word, k) => text(k === 1 ? badge : cells[k], k === 1 ? shownState : String(word)));
  });
}

function rankRow() {
  const row = el("tr");
  for (let i = 0; i < 10; i += 1) row.append(el("td", { className: i === 0 || i > 3 ? "num" : "nowrap" }));
  row.cells[1].append(el("span", { className: "badge" }));
  return row;
}

function drawPicker() {
  const box = byId("runs");
  const names = state.runs.map((r) => `${r.run}\t${r.living ? "" : ` (${r.state})`}`);
  if (box.dataset.key !== names.join("\n")) {
    box.dataset.key = names.join("\n");
    box.replaceChildren(...names.map((n) => el("option", { value: n.split("\t")[0] }, n.replace("\t", ""))));
  }
  byId("picker").hidden = names.length < 2;
  if (state.run) box.value = state.run;
}

// ---------------------------------------------------------------- polling

async function ask(path) {
  const answer = await fetch(path, { signal: AbortSignal.timeout(TIMEOUT_MS), cache: "no-store" });
  if (!answer.ok) throw Object.assign(new Error(`${path}: ${answer.status}`), { status: answer.status });
  return answer.json();
}

function choose(name) {
  if (name === state.run) return;
  Object.assign(state, { run: name, cursor: "", answer: null, zoom: null, picked: null });
  state.events.clear();
  byId("reset").hidden = true;
}

/** The run named in the address; a mangled one names none. */
function fromHash() {
  try {
    return decodeURIComponent(location.hash.slice(1));
  } catch {
    return "";
  }
}

/** The run named in the address if it is there, else the one shown, else the first: living ones come first. */
function chooseFrom(runs) {
  const names = runs.map((r) => r.run);
  const wanted = fromHash();
  choose([wanted, state.run, names[0]].find((name) => names.includes(name)) || null);
}

async function poll() {
  const { agent, runs } = await ask("/api/runs");
  state.runs = runs;
  chooseFrom(runs);
  text(byId("agent"), `agent on ${agent.host} · ${agent.version}`);
  text(byId("directory"), `${agent.directory} on ${agent.host}`);
  drawPicker();
  byId("empty").hidden = state.run !== null;
  byId("run").hidden = state.run === null;
  if (state.run === null) {
    document.title = "gradmon";
    return;
  }
  const asked = state.run;
  const answer = await ask(`/api/runs/${encodeURIComponent(asked)}?since=${encodeURIComponent(state.cursor)}`);
  if (asked !== state.run) return; // another one was chosen meanwhile
  take(answer);
  drawRun();
  if (pickRanks().join() !== state.picked) buildCharts();
  else drawCharts();
}

let timer = 0;
let polling = false;

async function loop() {
  polling = true;
  try {
    await poll();
    state.seen = Date.now();
    byId("banner").hidden = true;
  } catch (error) {
    if (error.status === 404) state.cursor = ""; // the run went away between two questions
    else if (!["TypeError", "TimeoutError", "AbortError"].includes(error.name) && !error.status) console.error(error);
    byId("banner").hidden = error.status === 404;
    text(byId("stale"), state.seen ? seconds(Math.round((Date.now() - state.seen) / 1000)) : "a moment");
  }
  polling = false;
  timer = setTimeout(loop, document.hidden ? 5 * POLL_MS : POLL_MS);
}

function pollNow() {
  if (polling) return;
  clearTimeout(timer);
  loop();
}

byId("runs").addEventListener("change", (e) => {
  location.hash = encodeURIComponent(e.target.value);
});
window.addEventListener("hashchange", () => {
  chooseFrom(state.runs);
  pollNow();
});
document.addEventListener("visibilitychange", () => document.hidden || pollNow());
byId("reset").addEventListener("click", () => zoomTo(null));
window.addEventListener("resize", () => requestAnimationFrame(resize));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => state.charts.length && state.answer && buildCharts());
loop();
