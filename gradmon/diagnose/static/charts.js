"use strict";
/* Draws the charts of a report with uPlot, from the JSON that the report carries. It asks nobody for anything.
 *
 * A chart: title, format, x (steps), lines [{label, color, values, width, dash, fill}], band {low, high}, and whether
 * its axis is logarithmic, begins at 0 (`zero`), or leaves rare peaks out (`robust`). A mark: kind, first and last
 * step, text. `null` is a value that was not finite or not measured: the line has a gap there.
 */

const DATA = JSON.parse(document.getElementById("data").textContent);
const SHAPES = {
  nonfinite: ["--nonfinite", "cross"],
  spike: ["--spike", "triangle"],
  left_out: ["--nonfinite", "square"],
  left_out_streak: ["--nonfinite", "square"],
  skip_streak: ["--nonfinite", "square"],
  scaler_streak: ["--nonfinite", "square"],
  replicas: ["--nonfinite", "square"],
  spike_streak: ["--backoff", "square"],
  diverging: ["--backoff", "square"],
  drift: ["--spike", "square"],
  vanish: ["--spike", "square"],
  restart: ["--accent", "flag"],
};
const FINDING = ["--s6", "dot"]; // what the watches of data, loss and weights found
const shapeOf = (kind) => SHAPES[kind] || FINDING;

const charts = [];
let zoom = null; // [first step, last step] or null for all

// ---------------------------------------------------------------- small helpers

const byId = (id) => document.getElementById(id);

function el(tag, className, ...children) {
  const node = document.createElement(tag);
  node.className = className;
  node.append(...children);
  return node;
}

const FORMATS = { number, bytes, seconds };

// ---------------------------------------------------------------- axes

function yRange(chart) {
  return (u, min, max) => {
    if (!finite(min) || !finite(max)) return chart.log ? [0.1, 10] : [0, 1];
    if (chart.log) return [min / 1.35, max * 1.5];
    if (chart.robust) max = Math.min(max, usualTop(u));
    if (chart.zero) return [0, max > 0 ? max * 1.15 : 1];
    const pad = (max - min || Math.abs(max) || 1) * 0.08;
    return [min - pad, max + pad];
  };
}

/** All charts begin and end at the same steps, whatever points each of them kept. */
function xRange() {
  if (zoom) return zoom;
  const min = Math.min(...DATA.charts.map((chart) => chart.x[0]));
  const max = Math.max(...DATA.charts.map((chart) => chart.x.at(-1)));
  return min === max ? [min - 1, max + 1] : [min, max];
}

function axes(chart) {
  const format = FORMATS[chart.format] || number;
  const common = { stroke: css("--dim"), grid: { stroke: css("--grid"), width: 1 }, ticks: { show: false }, font: "12px system-ui, sans-serif" };
  const wide = chart.format === "number" ? 52 : 66;
  const y = { ...common, size: wide, gap: 6, values: (_u, splits) => splits.map((v) => format(v)) };
  if (chart.log) Object.assign(y, { splits: logSplits, filter: (_u, splits) => splits });
  if (chart.format === "bytes") y.incrs = BINARY_STEPS;
  const x = { ...common, size: 30, gap: 4, space: 64, values: (_u, splits) => splits.map((v) => (Number.isInteger(v) ? whole(v) : "")) };
  return [x, y];
}

// ---------------------------------------------------------------- charts

/** A log axis has no place for 0, which is what a skipped step applied. */
const positive = (v) => (finite(v) && v > 0 ? v : null);

function dataOf(chart) {
  const columns = chart.lines.map((line) => line.values);
  if (chart.band) columns.unshift(chart.band.low, chart.band.high);
  return [chart.x, ...columns.map((column) => (chart.log ? column.map(positive) : column))];
}

function seriesOf(line) {
  const color = css(line.color);
  return {
    stroke: color,
    width: line.width,
    dash: line.dash,
    fill: line.fill ? (u) => shade(u, color) : undefined,
    fillTo: line.fill ? (u) => u.scales.y.min : undefined,
    points: { show: (u, i) => u.data[0].length < 40 && u.data[i].some(finite), size: 4, fill: color },
    spanGaps: false,
  };
}

function build(chart) {
  const plot = el("div", "plot");
  const legend = el("div", "legend");
  const where = el("span", "where");
  const tip = el("div", "tip");
  tip.hidden = true;
  const shown = { chart, plot, where, tip, values: [], width: 0 };
  const items = chart.lines.map((line) => {
    const value = el("b", "");
    shown.values.push(value);
    return el("span", "item", swatch(line), line.label, value);
  });
  if (chart.fromTop) items.reverse();
  if (chart.band) items.push(el("span", "item", bandSwatch(), "lowest to highest"));
  legend.append(...items);
  const title = el("h2", "");
  title.textContent = chart.title;
  byId("charts").append(el("div", chart.wide || fillsRow(chart) ? "card wide" : "card", el("div", "card-head", title, legend, where), plot, tip));
  shown.width = plot.clientWidth;
  shown.u = new uPlot(options(shown), dataOf(chart), plot);
  hover(shown.u, shown);
  return shown;
}

/** The last of an odd number of half ones takes the whole row. */
function fillsRow(chart) {
  const halves = DATA.charts.filter((one) => !one.wide);
  return halves.length % 2 === 1 && halves.at(-1) === chart;
}

function options(shown) {
  const { chart } = shown;
  const edge = { stroke: "transparent", width: 0, points: { show: false } };
  const band = chart.band ? [{ ...edge }, { ...edge }] : [];
  return {
    width: shown.width,
    height: heightOf(chart),
    padding: [chart.wide ? 20 : 12, chart.x.at(-1) < 10_000 ? 14 : 26, 0, 0], // room for half of the last label
    legend: { show: false },
    scales: { x: { time: false, range: xRange }, y: { distr: chart.log ? 3 : 1, range: yRange(chart) } },
    axes: axes(chart),
    series: [{}, ...band, ...chart.lines.map(seriesOf)],
    bands: chart.band ? [{ series: [2, 1], fill: css("--band") }] : undefined,
    cursor: {
      sync: { key: "gradmon", scales: ["x", null] },
      drag: { x: true, y: false, setScale: false },
      points: { size: 7 },
      y: false,
      bind: { dblclick: () => () => zoomTo(null) },
    },
    hooks: {
      draw: [(u) => drawMarks(u, chart)],
      setCursor: [(u) => hover(u, shown)],
      setSelect: [(u) => select(u)],
    },
  };
}

const heightOf = (chart) => (chart.wide ? (window.innerWidth < 640 ? 230 : 320) : window.innerWidth < 640 ? 180 : 216);

function select(u) {
  if (u.select.width > 4) {
    zoomTo([u.posToVal(u.select.left, "x"), u.posToVal(u.select.left + u.select.width, "x")]);
  }
  u.setSelect({ left: 0, width: 0, top: 0, height: 0 }, false);
}

function zoomTo(range) {
  zoom = range;
  byId("reset").hidden = !range;
  for (const shown of charts) shown.u.setData(dataOf(shown.chart));
}

/** Values under the cursor go into the legends; what happened there into a box on the chart pointed at. */
function hover(u, shown) {
  const { chart } = shown;
  const over = finite(u.cursor.idx) && u.cursor.left >= 0;
  const format = FORMATS[chart.format] || number;
  const first = chart.band ? 3 : 1;
  shown.values.forEach((node, i) => {
    const column = u.data[first + i];
    node.textContent = format(over ? column[u.cursor.idx] : column.findLast(finite));
  });
  shown.where.textContent = over ? `step ${whole(u.data[0][u.cursor.idx])}` : "";
  const near = over && u.root.matches(":hover") ? marksNear(u, u.cursor.left) : [];
  shown.tip.hidden = !near.length;
  if (near.length) showTip(u, shown, near);
}

// ---------------------------------------------------------------- marks

function marksNear(u, left) {
  const away = (mark) => {
    const [a, b] = [u.valToPos(mark.first, "x"), u.valToPos(mark.last, "x")];
    return left < a ? a - left : left > b ? left - b : 0;
  };
  return DATA.marks.filter((mark) => away(mark) < 7).sort((a, b) => away(a) - away(b)).slice(0, 4);
}

function showTip(u, shown, near) {
  shown.tip.replaceChildren(
    ...near.flatMap((mark) => {
      const span = mark.first === mark.last ? `Step ${whole(mark.first)}` : `Steps ${whole(mark.first)} to ${whole(mark.last)}`;
      return [el("div", "tip-head", icon(mark.kind), span), el("p", "", mark.text)];
    }),
  );
  const at = u.valToPos(near[0].first, "x") + u.over.offsetLeft;
  const width = shown.tip.offsetWidth;
  const left = at + 18 + width < shown.width ? at + 18 : at - width - 8;
  shown.tip.style.left = `${Math.max(8, left)}px`;
  shown.tip.style.top = `${shown.plot.offsetTop + 26}px`;
}

function drawMarks(u, chart) {
  const { ctx, bbox } = u;
  const ratio = window.devicePixelRatio || 1;
  const [left, right] = [bbox.left, bbox.left + bbox.width];
  const heads = [];
  ctx.save();
  ctx.lineWidth = ratio;
  for (const mark of DATA.marks) {
    const a = Math.round(u.valToPos(mark.first, "x", true));
    const b = Math.round(u.valToPos(mark.last, "x", true));
    if (b < left || a > right) continue;
    const color = css(shapeOf(mark.kind)[0]);
    if (a >= left) {
      heads.push([a, mark.kind]);
      ctx.globalAlpha = chart.wide ? 0.55 : 0.3;
      ctx.strokeStyle = color;
      ctx.beginPath();
      ctx.moveTo(a + 0.5, bbox.top);
      ctx.lineTo(a + 0.5, bbox.top + bbox.height);
      ctx.stroke();
    }
    if (b > a + 2) {
      // an episode lasts: a bar at the top of the chart, as long as it
      ctx.globalAlpha = 0.5;
      ctx.fillStyle = color;
      ctx.fillRect(Math.max(a, left), bbox.top, Math.min(b, right) - Math.max(a, left), 3 * ratio);
    }
  }
  ctx.globalAlpha = 1;
  if (chart.wide) drawHeads(ctx, heads, bbox.top - 9 * ratio, ratio);
  ctx.restore();
}

/** A shape above each mark; close ones stand side by side, one of each kind. */
function drawHeads(ctx, heads, y, ratio) {
  let free = -Infinity; // where the next has room
  let cluster = new Set();
  for (const [x, kind] of heads) {
    if (x >= free) cluster = new Set();
    else if (cluster.has(kind)) continue;
    cluster.add(kind);
    const at = Math.max(x, free);
    free = at + 13 * ratio;
    const [color, shape] = shapeOf(kind);
    ctx.strokeStyle = ctx.fillStyle = css(color);
    ctx.lineWidth = 2 * ratio;
    const path = new Path2D(outline(shape, at, y, 4.5 * ratio));
    if (shape !== "cross") ctx.fill(path);
    ctx.stroke(path);
  }
}

function svg(width, height, tag, attributes, stroke, fill) {
  const name = "http://www.w3.org/2000/svg";
  const root = document.createElementNS(name, "svg");
  const node = document.createElementNS(name, tag);
  for (const [key, value] of Object.entries({ width, height, "aria-hidden": "true", class: "mark" })) root.setAttribute(key, value);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.style.stroke = stroke;
  node.style.fill = fill;
  root.append(node);
  return root;
}

function icon(kind) {
  const [color, shape] = shapeOf(kind);
  const path = { d: outline(shape, 6, 6, 4.5), "stroke-width": 2.2, "stroke-linecap": "round" };
  return svg(12, 12, "path", path, `var(${color})`, shape === "cross" ? "none" : `var(${color})`);
}

function swatch(line) {
  const dash = line.dash ? line.dash.map((d) => d * 0.7).join(" ") : "";
  const drawn = { x1: 0, x2: 14, y1: 5, y2: 5, "stroke-width": 2.5, "stroke-dasharray": dash };
  return svg(14, 10, "line", drawn, `var(${line.color})`, "none");
}

const bandSwatch = () => svg(14, 10, "rect", { width: 14, height: 10, rx: 2 }, "none", "var(--band)");

// ---------------------------------------------------------------- the page

function draw() {
  for (const shown of charts) shown.u.destroy();
  byId("charts").replaceChildren();
  charts.splice(0, charts.length, ...DATA.charts.map(build));
}

function resize() {
  for (const shown of charts) {
    const width = shown.plot.clientWidth;
    if (width && width !== shown.width) {
      shown.width = width;
      shown.u.setSize({ width, height: heightOf(shown.chart) });
    }
  }
}

for (const place of document.querySelectorAll("[data-kind]")) place.prepend(icon(place.dataset.kind));
for (const button of document.querySelectorAll("[data-first]")) {
  button.addEventListener("click", () => {
    const [first, last] = [Number(button.dataset.first), Number(button.dataset.last)];
    const room = Math.max(60, (last - first) * 0.1);
    zoomTo([first - room, last + room]);
    byId("charts").scrollIntoView({ behavior: "smooth", block: "start" });
  });
}
byId("reset").addEventListener("click", () => zoomTo(null));
window.addEventListener("resize", () => requestAnimationFrame(resize));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
draw();
