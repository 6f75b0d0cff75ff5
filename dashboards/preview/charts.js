// Panels drawn on a canvas: time series with uPlot, heatmaps, state timelines, status histories, sparklines.
'use strict';

const BYTES = Array.from({ length: 50 }, (_, i) => 2 ** i);
const FONT = '11px Inter, Roboto, "DejaVu Sans", Arial, sans-serif';
const SOFT = 'rgba(204, 204, 220, 0.65)', GRID = 'rgba(204, 204, 220, 0.08)';

function fade(name, share) {
  const hex = color(name);
  if (!hex.startsWith('#')) return hex;
  return hex + Math.round(share * 255).toString(16).padStart(2, '0');
}

// All times of some series, and each series' values at them; null where it has none.
function aligned(series) {
  const times = [...new Set(series.flatMap(({ points }) => points.map(([t]) => t)))].sort((a, b) => a - b);
  const step = Math.max(...series.map((one) => one.step));
  // A gap in the data is a gap in the line.
  const filled = [];
  times.forEach((t, i) => { filled.push(t); if (times[i + 1] - t > 1.5 * step) filled.push(t + step); });
  const columns = series.map(({ points }) => { const at = new Map(points); return filled.map((t) => at.get(t) ?? null); });
  return [filled, columns];
}

function stack(columns) {
  const sums = columns[0].map(() => 0);
  return columns.map((column) => column.map((value, i) => (value === null ? null : (sums[i] += value))));
}

function drawTimeseries(panel, box) {
  const series = seriesOf(panel);
  if (!series.length) return nothing(box);
  const config = defaults(panel), custom = config.custom ?? {};
  const looks = series.map(({ name }, i) => {
    const found = overrides(panel, name);
    const fixed = found.color?.fixedColor ?? (config.color?.mode === 'fixed' ? config.color.fixedColor : undefined);
    return { name, ...found, stroke: color(fixed ?? PALETTE[i % PALETTE.length]) };
  });
  const legend = legendOf(panel, series, looks);
  box.append(legend);
  const height = box.clientHeight - legend.offsetHeight - 8, width = box.clientWidth - 16;
  const log = custom.scaleDistribution?.type === 'log', bars = custom.drawStyle === 'bars';
  let [times, columns] = aligned(series);
  if (log) columns = columns.map((column) => column.map((value) => (value > 0 ? value : null)));
  if (bars) columns = stack(columns).reverse();
  const order = bars ? [...looks].reverse() : looks;
  const right = order.some((look) => look['custom.axisPlacement'] === 'right');
  const axis = (unit, scale) => ({
    scale, stroke: SOFT, font: FONT, grid: { stroke: GRID, width: 1, show: scale === 'y' }, ticks: { show: false },
    size: 56, gap: 4, incrs: unit === 'bytes' ? BYTES : undefined, side: scale === 'y' ? 3 : 1, space: log ? 22 : 32,
    values: (_, ticks) => ticks.map((v) => (v === null || (log && Math.abs(Math.log10(v) % 1) > 1e-6) ? '' : show(v, unit))),
  });
  const plot = new uPlot({
    width, height, legend: { show: false }, cursor: { show: false },
    padding: [6, right ? 0 : 10, 0, 0],
    scales: {
      x: { time: true, range: () => [DATA.start, DATA.end] },
      y: { distr: log ? 3 : 1, range: (_, low, high) => (log ? uPlot.rangeLog(low, high, 10, false) : limits(config, low, high)) },
      right: { range: (_, low, high) => limits({ min: 0 }, low, high) },
    },
    axes: [
      { stroke: SOFT, font: FONT, grid: { stroke: GRID, width: 1 }, ticks: { show: false }, size: 24, space: 90,
        values: (_, ticks) => ticks.map(clock) },
      axis(config.unit, 'y'),
      ...(right ? [axis(order.find((look) => look['custom.axisPlacement'] === 'right').unit ?? config.unit, 'right')] : []),
    ],
    series: [{}, ...order.map((look) => ({
      stroke: look.stroke, scale: look['custom.axisPlacement'] === 'right' ? 'right' : 'y',
      width: look['custom.lineWidth'] ?? custom.lineWidth ?? 1, dash: look['custom.lineStyle']?.dash,
      fill: filling(look, custom, bars), points: { show: false }, spanGaps: false,
      paths: bars ? uPlot.paths.bars({ size: [0.9, 14, 2] }) : undefined,
    }))],
    bands: order.flatMap((look, i) => {
      const below = order.findIndex(({ name }) => name === look['custom.fillBelowTo']);
      return below < 0 ? [] : [{ series: [i + 1, below + 1], fill: fade(look.stroke, 0.2) }];
    }),
    hooks: { drawAxes: [marks], draw: [(u) => limitLines(u, config)] },
  }, [times, ...columns], box);
  box.prepend(plot.root);
}

function filling(look, custom, bars) {
  if (look['custom.fillBelowTo']) return undefined;
  const share = (look['custom.fillOpacity'] ?? custom.fillOpacity ?? 0) / 100;
  return share > 0 ? fade(look.stroke, bars ? 0.75 : share) : undefined;
}

function limits(config, low, high) {
  if (low === null || high === null) return [0, 1];
  let [from, to] = [config.min ?? low, config.max ?? high];
  if (from === to) { from -= config.min === undefined ? Math.abs(from) * 0.1 || 1 : 0; to += Math.abs(to) * 0.1 || 1; }
  const pad = (to - from) * 0.08;
  return [config.min ?? from - pad, config.max ?? to + pad];
}

function clock(seconds) {
  return new Date(seconds * 1000).toISOString().slice(11, 16);
}

function marks(u) {
  const { ctx } = u, { left, top, width, height } = u.bbox;
  ctx.save();
  const place = (time) => left + (Math.max(0, Math.min(1, (time - DATA.start) / (DATA.end - DATA.start)))) * width;
  for (const { color: name, regions } of DATA.events) {
    for (const [from, to] of regions) {
      const x = place(from), end = place(to);
      ctx.fillStyle = fade(name, 0.1); ctx.fillRect(x, top, end - x, height);
      ctx.strokeStyle = fade(name, 0.55); ctx.lineWidth = 1; ctx.setLineDash([3, 3]);
      for (const edge of new Set([x, end])) { ctx.beginPath(); ctx.moveTo(edge, top); ctx.lineTo(edge, top + height); ctx.stroke(); }
      ctx.fillStyle = color(name);
      if (end - x > 8) ctx.fillRect(x, top + height, end - x, 4);
      else { ctx.beginPath(); ctx.moveTo(x - 4, top + height + 5); ctx.lineTo(x + 4, top + height + 5); ctx.lineTo(x, top + height); ctx.fill(); }
    }
  }
  ctx.restore();
}

function limitLines(u, config) {
  if (!config.custom?.thresholdsStyle?.mode?.startsWith('dashed')) return;
  const { ctx } = u, { left, top, width, height } = u.bbox;
  ctx.save();
  ctx.setLineDash([8, 5]);
  for (const { value, color: name } of config.thresholds.steps) {
    if (value === null || value < u.scales.y.min || value > u.scales.y.max) continue;
    const y = u.valToPos(value, 'y', true);
    if (y < top || y > top + height) continue;
    ctx.strokeStyle = color(name); ctx.lineWidth = 1.5;
    ctx.beginPath(); ctx.moveTo(left, y); ctx.lineTo(left + width, y); ctx.stroke();
  }
  ctx.restore();
}

function canvasIn(box, width, height) {
  const canvas = document.createElement('canvas');
  canvas.width = width * devicePixelRatio; canvas.height = height * devicePixelRatio;
  canvas.style.width = `${width}px`; canvas.style.height = `${height}px`;
  canvas.style.display = 'block';
  box.append(canvas);
  const ctx = canvas.getContext('2d');
  ctx.scale(devicePixelRatio, devicePixelRatio);
  ctx.font = FONT;
  return ctx;
}

function sparkline(box, points, stroke) {
  const width = box.clientWidth + 16, height = box.clientHeight + 8;
  const ctx = canvasIn(box, width, height);
  const values = points.map(([, v]) => v).filter(Number.isFinite);
  const low = Math.min(...values), high = Math.max(...values);
  const place = ([t, v]) => [((t - DATA.start) / (DATA.end - DATA.start)) * width,
    height - 3 - (high > low ? (v - low) / (high - low) : 0.15) * height * 0.42];
  const line = points.filter(([, v]) => Number.isFinite(v)).map(place);
  if (line.length < 2) return;
  ctx.beginPath(); line.forEach(([x, y]) => ctx.lineTo(x, y));
  ctx.strokeStyle = fade(stroke, 0.8); ctx.lineWidth = 1; ctx.stroke();
  ctx.lineTo(line.at(-1)[0], height); ctx.lineTo(line[0][0], height);
  ctx.fillStyle = fade(stroke, 0.14); ctx.fill();
}

const VIRIDIS = ['#440154', '#482878', '#3e4989', '#31688e', '#26828e', '#1f9e89', '#35b779', '#6ece58', '#b5de2b', '#fde725'];
const TURBO = ['#23171b', '#4a58dd', '#2f9df5', '#27d7c4', '#4df884', '#95fb51', '#dedd32', '#ffa423', '#f65f18', '#ba2208', '#900c00'];

function heatColor(scheme, share) {
  const stops = scheme === 'Viridis' ? VIRIDIS : TURBO;
  // In 64 steps, as the JSON says.
  const at = (Math.round(Math.max(0, Math.min(1, share)) * 63) / 63) * (stops.length - 1), i = Math.min(stops.length - 2, Math.floor(at));
  const part = (hex) => [1, 3, 5].map((k) => parseInt(hex.slice(k, k + 2), 16));
  const [a, b] = [part(stops[i]), part(stops[i + 1])];
  return `rgb(${a.map((v, k) => Math.round(v + (b[k] - v) * (at - i))).join(',')})`;
}

function timeAxis(ctx, left, right, y) {
  ctx.fillStyle = SOFT; ctx.textAlign = 'center'; ctx.textBaseline = 'top';
  const span = DATA.end - DATA.start;
  const step = [60, 120, 300, 600, 900, 1800, 3600, 7200, 21600].find((s) => (right - left) / (span / s) > 80) ?? 86400;
  for (let t = Math.ceil(DATA.start / step) * step; t <= DATA.end; t += step) {
    const x = left + ((t - DATA.start) / span) * (right - left);
    if (x < right - 14 && x > left + 14) ctx.fillText(clock(t), x, y + 5);
  }
}

function rowNames(ctx, names, left, top, height) {
  ctx.fillStyle = SOFT; ctx.textAlign = 'right'; ctx.textBaseline = 'middle';
  const every = Math.ceil(12 / (height / names.length));
  names.forEach((name, i) => { if (i % every === 0) ctx.fillText(name, left - 6, top + ((i + 0.5) * height) / names.length); });
}

function longest(ctx, names) {
  return Math.ceil(Math.max(...names.map((name) => ctx.measureText(name).width)));
}

function drawHeatmap(panel, box) {
  const series = seriesOf(panel);
  if (!series.length) return nothing(box);
  const width = box.clientWidth - 16, height = box.clientHeight - 8, bottom = height - 44;
  const ctx = canvasIn(box, width, height);
  const left = longest(ctx, series.map(({ name }) => name)) + 14, right = width - 4, top = 4;
  const { color: wanted, cellValues } = panel.options;
  const values = series.flatMap(({ points }) => points.map(([, v]) => v)).filter(Number.isFinite);
  const low = wanted.min ?? Math.min(...values), high = wanted.max ?? Math.max(...values), step = series[0].step;
  const rows = panel.options.yAxis.reverse ? series : [...series].reverse();
  rows.forEach(({ points }, i) => {
    // Edges on whole pixels: sharp, and the picture stays small.
    const y = Math.round(top + (i * (bottom - top)) / rows.length);
    const h = Math.round(top + ((i + 1) * (bottom - top)) / rows.length) - y;
    for (const [t, v] of points) {
      if (!Number.isFinite(v)) continue;
      const place = (time) => left + Math.round(((time - DATA.start) / (DATA.end - DATA.start)) * (right - left));
      const from = Math.max(left, place(t)), to = Math.min(right, place(t + step));
      ctx.fillStyle = heatColor(wanted.scheme, high > low ? (v - low) / (high - low) : 0.5);
      if (to > from) ctx.fillRect(from, y, to - from, h > 7 ? h - 1 : h);
    }
  });
  rowNames(ctx, rows.map(({ name }) => name), left, top, bottom - top);
  timeAxis(ctx, left, right, bottom);
  for (let x = 0; x < 240; x += 1) {
    ctx.fillStyle = heatColor(wanted.scheme, x / 240);
    ctx.fillRect(left + x, height - 20, 1.5, 7);
  }
  ctx.fillStyle = SOFT; ctx.textBaseline = 'middle';
  ctx.textAlign = 'left'; ctx.fillText(`${show(low, cellValues.unit, cellValues.decimals)}  to  ${show(high, cellValues.unit, cellValues.decimals)}`, left + 250, height - 16);
}

function drawStates(panel, box) {
  const series = seriesOf(panel);
  if (!series.length) return nothing(box);
  const config = defaults(panel), history = panel.type === 'status-history';
  const legend = document.createElement('div');
  legend.className = 'legend';
  const words = config.mappings?.[0] ? Object.values(config.mappings[0].options)
    : config.thresholds.steps.map(({ value, color: name }) => ({ text: value === null ? 'none' : `${value}+`, color: name }));
  legend.innerHTML = words.map(({ text, color: name }) => `<span><i style="background:${color(name)};height:9px"></i>${text}</span>`).join('');
  const width = box.clientWidth - 16, height = box.clientHeight - 32, bottom = height - 20;
  const ctx = canvasIn(box, width, height);
  const left = longest(ctx, series.map(({ name }) => name)) + 14, right = width - 4, row = bottom / series.length;
  const place = (t) => Math.max(left, Math.min(right, left + ((t - DATA.start) / (DATA.end - DATA.start)) * (right - left)));
  series.forEach(({ points, step }, i) => {
    const y = i * row + row * 0.07, h = row * 0.86;
    for (let k = 0; k < points.length; k += 1) {
      const value = points[k][1], first = points[k][0], word = mapped(value, config.mappings);
      if (!history) while (k + 1 < points.length && points[k + 1][1] === value && points[k + 1][0] - points[k][0] < 1.5 * step) k += 1;
      const x = place(first), end = place(points[k][0] + step);
      ctx.fillStyle = word ? fade(word.color, 0.85) : stepped(value, config.thresholds);
      ctx.fillRect(x, y, Math.max(0, end - x - (history ? 1.5 : 0.5)), h);
      const text = word?.text ?? '';
      if (!history && ctx.measureText(text).width + 12 < end - x) {
        ctx.fillStyle = '#fff'; ctx.textAlign = 'left'; ctx.textBaseline = 'middle'; ctx.fillText(text, x + 6, y + h / 2);
      }
    }
  });
  rowNames(ctx, series.map(({ name }) => name), left, 0, bottom);
  timeAxis(ctx, left, right, bottom);
  box.append(legend);
}
