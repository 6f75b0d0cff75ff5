// The page: every panel of the dashboard at its place on the grid, in Grafana's dark look.
'use strict';

const UNIT = 38, GAP = 8;

function element(tag, className, parent, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  parent?.append(made);
  return made;
}

function nothing(box) {
  element('div', 'none', box, defaults(box.panel).noValue ?? 'No data');
}

function legendOf(panel, series, looks) {
  const legend = document.createElement('div');
  legend.className = 'legend';
  const calcs = panel.options.legend?.calcs ?? [];
  looks.forEach((look, i) => {
    if (look['custom.hideFrom']?.legend) return;
    const item = element('span', '', legend);
    element('i', '', item).style.background = look.stroke;
    item.append(look.name);
    for (const calc of calcs) {
      const values = series[i].points.map(([, v]) => v).filter(Number.isFinite);
      const value = { lastNotNull: values.at(-1), max: Math.max(...values), min: Math.min(...values) }[calc];
      element('em', '', item, `${{ lastNotNull: 'last', max: 'max', min: 'min' }[calc]} ${show(value, defaults(panel).unit)}`);
    }
  });
  return legend;
}

function drawStat(panel, box) {
  const config = defaults(panel), stat = element('div', 'stat', box);
  const points = seriesOf(panel)[0]?.points ?? [];
  const value = points.filter(([, v]) => Number.isFinite(v)).at(-1)?.[1];
  const word = mapped(value, config.mappings);
  const text = word?.text ?? (value === undefined ? config.noValue ?? 'No data' : show(value, config.unit, config.decimals));
  const paint = value === undefined ? SOFT : color(word?.color ?? stepped(value, config.thresholds));
  if (panel.options.graphMode === 'area' && points.length > 1) sparkline(stat, points, paint);
  const big = element('span', '', stat, text);
  big.style.fontSize = `${Math.max(17, Math.min(38, (box.clientWidth - 24) / (text.length * 0.6)))}px`;
  if (panel.options.colorMode === 'background' && value !== undefined) {
    box.parentElement.classList.add('filled');
    box.parentElement.style.background = `linear-gradient(120deg, ${fade(paint, 0.75)}, ${fade(paint, 0.5)})`;
  } else big.style.color = paint;
}

function cellOf(panel, title, value, td) {
  const found = overrides(panel, title), shown = mapped(value, found.mappings);
  const kind = found['custom.cellOptions']?.type, thresholds = found.thresholds ?? defaults(panel).thresholds;
  if (shown && kind === 'color-background') {
    element('span', 'chip', td, shown.text).style.background = fade(shown.color, 0.7);
    return;
  }
  const text = typeof value === 'number' ? show(value, found.unit, found.decimals) : value ?? '-';
  if (kind === 'gauge' && typeof value === 'number') {
    const gauge = element('div', 'gauge', td), bar = element('s', '', element('u', '', gauge));
    bar.style.width = `${Math.max(0, Math.min(100, (100 * value) / (found.max ?? 1)))}%`;
    bar.style.background = fade(stepped(value, thresholds), 0.8);
    element('b', '', gauge, text).style.color = stepped(value, thresholds);
    return;
  }
  if (found.links) element('a', '', td, text); else td.textContent = text;
  if (kind === 'color-text' && typeof value === 'number') td.style.color = stepped(value, thresholds);
}

function drawTable(panel, box) {
  const { titles, rows } = tableOf(panel);
  if (!rows.length) return nothing(box);
  const table = element('table', '', box), head = element('tr', '', element('thead', '', table));
  for (const title of titles) {
    const found = overrides(panel, title);
    const th = element('th', found['custom.align'] === 'right' ? 'right' : '', head,
      title + (panel.options.sortBy[0].displayName === title ? ' ↓' : ''));
    if (found['custom.width']) th.style.width = `${found['custom.width']}px`;
  }
  const body = element('tbody', '', table);
  for (const row of rows.slice(0, Math.floor((box.clientHeight - 30) / 27))) {
    const tr = element('tr', '', body);
    for (const title of titles) {
      cellOf(panel, title, row[title], element('td', overrides(panel, title)['custom.align'] === 'right' ? 'right' : '', tr));
    }
  }
}

function drawBars(panel, box) {
  const config = defaults(panel);
  const series = seriesOf(panel).map(({ name, points }) => [name, points.at(-1)[1]]);
  if (!series.length) return nothing(box);
  const most = config.max ?? Math.max(...series.map(([, v]) => v).filter(Number.isFinite));
  const long = Math.max(...series.map(([name]) => name.length)) > 22;
  const bars = element('div', long ? 'bars long' : 'bars', box);
  const names = [];
  for (const [name, value] of series) {
    const row = element('div', '', bars), paint = stepped(value, config.thresholds);
    names.push(element('label', '', row, name));
    const bar = element('s', '', element('u', '', row));
    bar.style.width = `${Math.max(0, Math.min(100, (100 * value) / (most || 1)))}%`;
    bar.style.background = fade(paint, 0.5);
    bar.style.borderColor = paint;
    element('b', '', row, show(value, config.unit, config.decimals)).style.color = paint;
  }
  if (!long) {
    const widest = Math.max(...names.map((label) => label.scrollWidth));
    bars.childNodes.forEach((row) => { row.style.gridTemplateColumns = `${widest + 4}px 1fr 66px`; });
  }
}

function drawText(panel, box) {
  element('div', 'text', box, panel.options.content);
}

const DRAW = {
  timeseries: drawTimeseries, stat: drawStat, table: drawTable, heatmap: drawHeatmap, 'state-timeline': drawStates,
  'status-history': drawStates, bargauge: drawBars, text: drawText,
};

function drawPage() {
  const page = document.getElementById('page'), { dashboard } = DATA;
  const header = element('header', '', page);
  const [first, ...rest] = dashboard.title.split(' / ');
  const title = element('h1', '', header);
  element('span', '', title, `${first} / `);
  title.append(rest.join(' / '));
  const pick = (parent, label, text) => { const box = element('div', 'pick', parent); element('b', '', box, label); element('span', '', box, text); };
  pick(header, 'Time', `${new Date(DATA.start * 1000).toISOString().slice(0, 16).replace('T', ' ')} to ${clock(DATA.end)}`);
  const nav = element('nav', '', page);
  for (const { label, text } of Object.values(DATA.variables)) pick(nav, label, text);
  for (const { name, color: paint } of DATA.events) {
    const box = element('div', 'pick', nav);
    element('span', '', box, '┆ ').style.color = color(paint);
    box.lastChild.append(name);
  }
  const grid = element('div', '', page);
  grid.id = 'grid';
  const column = (grid.clientWidth + GAP) / 24;
  let bottom = 0, drawn = 0;
  const failed = [];
  for (const panel of dashboard.panels) {
    const { x, y, w, h } = panel.gridPos;
    const box = element(panel.type === 'row' ? 'div' : 'section', panel.type === 'row' ? 'row' : 'panel', grid);
    Object.assign(box.style, { left: `${x * column}px`, top: `${y * UNIT}px`, width: `${w * column - GAP}px`, height: `${h * UNIT - GAP}px` });
    bottom = Math.max(bottom, (y + h) * UNIT);
    if (panel.type === 'row') { box.textContent = panel.title; continue; }
    const heading = element('h2', '', box, panel.title);
    if (panel.description) element('i', '', heading, 'i');
    const content = element('div', '', box);
    content.panel = panel;
    try {
      DRAW[panel.type](panel, content);
      drawn += 1;
    } catch (error) {
      failed.push(`${panel.title}: ${error}`);
    }
  }
  grid.style.height = `${bottom}px`;
  window.DRAWN = [drawn, failed];
}

drawPage();
