// Names, units, colours and tables of a dashboard's panels, as Grafana makes them from the JSON.
'use strict';

const COLORS = {
  green: '#73BF69', blue: '#5794F2', orange: '#FF9830', red: '#F2495C', purple: '#B877D9', yellow: '#FADE2A',
  transparent: 'transparent', text: '#ccccdc',
};
const PALETTE = ['#73BF69', '#F2CC0C', '#8AB8FF', '#FF780A', '#F2495C', '#5794F2', '#B877D9', '#96D98D', '#FFB357',
  '#C0D8FF', '#FF7383', '#DEB6F2', '#37872D', '#E0B400', '#1F60C4', '#C4162A'];

const color = (name) => COLORS[name] ?? name;
const defaults = (panel) => panel.fieldConfig?.defaults ?? {};

function overrides(panel, name) {
  const found = {};
  for (const { matcher, properties } of panel.fieldConfig?.overrides ?? []) {
    if (matcher.id === 'byName' && matcher.options === name) for (const { id, value } of properties) found[id] = value;
  }
  return found;
}

function plain(value, decimals) {
  if (decimals !== undefined) return value.toFixed(decimals);
  const size = Math.abs(value);
  if (size === 0) return '0';
  if (size < 1e-4 || size >= 1e7) return value.toExponential(1).replace('e+', 'e');
  return String(+value.toPrecision(3));
}

function scaled(value, base, names, decimals) {
  let i = 0;
  while (Math.abs(value) >= base && i < names.length - 1) { value /= base; i += 1; }
  return `${plain(value, decimals ?? (Math.abs(value) >= 100 || Number.isInteger(value) ? 0 : 1))} ${names[i]}`.trim();
}

function show(value, unit, decimals) {
  if (value === null || value === undefined || Number.isNaN(value)) return '-';
  if (!Number.isFinite(value)) return value > 0 ? '∞' : '-∞';
  switch (unit) {
    case 'percentunit': return `${plain(value * 100, decimals ?? (Math.abs(value) < 0.1 && value !== 0 ? 1 : 0))}%`;
    case 's':
      if (value === 0) return '0 s';
      if (Math.abs(value) < 1) return `${plain(value * 1e3, decimals)} ms`;
      if (Math.abs(value) < 120) return `${plain(value, decimals)} s`;
      return Math.abs(value) < 7200 ? `${plain(value / 60, 1)} min` : `${plain(value / 3600, 1)} h`;
    case 'bytes': return scaled(value, 1024, ['B', 'KiB', 'MiB', 'GiB', 'TiB'], decimals);
    case 'Bps': return scaled(value, 1000, ['B/s', 'kB/s', 'MB/s', 'GB/s'], decimals);
    case 'watt': return scaled(value, 1000, ['W', 'kW', 'MW'], decimals);
    case 'celsius': return `${plain(value, decimals)} °C`;
    case 'short': return scaled(value, 1000, ['', 'K', 'Mil', 'Bil'], decimals);
    case 'sci': return value.toExponential(decimals ?? 2);
    case 'dateTimeFromNow': return ago(DATA.end - value / 1000);
    default: return plain(value, decimals);
  }
}

function ago(seconds) {
  if (seconds < 90) return `${Math.round(seconds)} seconds ago`;
  return seconds < 5400 ? `${Math.round(seconds / 60)} minutes ago` : `${Math.round(seconds / 3600)} hours ago`;
}

function stepped(value, thresholds) {
  let found = thresholds.steps[0].color;
  for (const step of thresholds.steps) if (step.value === null || value >= step.value) found = step.color;
  return color(found);
}

function mapped(value, mappings) {
  for (const mapping of mappings ?? []) {
    if (mapping.type === 'value' && mapping.options[value] !== undefined) return mapping.options[value];
  }
  return undefined;
}

// [{name, points: [[time, value], ...]}] of all targets of a panel.
function seriesOf(panel) {
  const all = [];
  (panel.targets ?? []).forEach((target, i) => {
    const { series, step } = DATA.results[panel.id][i];
    for (const one of series) {
      const name = target.legendFormat?.replace(/\{\{\s*(\w+)\s*\}\}/g, (_, label) => one.metric[label] ?? '')
        || Object.entries(one.metric).map(([k, v]) => `${k}="${v}"`).join(', ') || 'Value';
      const points = (one.values ?? [one.value]).map(([t, v]) => [t, v === '+Inf' ? Infinity : +v]);
      all.push({ name, points, step });
    }
  });
  return all;
}

// Rows of a table panel after its transformations: [{title: value}].
function tableOf(panel) {
  const tables = panel.targets.map((target, i) => DATA.results[panel.id][i].series.map(({ metric, value }) => (
    { ...metric, [panel.targets.length > 1 ? `Value #${target.refId}` : 'Value']: +value[1] })));
  let rows = tables[0];
  if (panel.transformations.some(({ id }) => id === 'merge')) rows = merge(tables);
  const { renameByName, indexByName } = panel.transformations.find(({ id }) => id === 'organize').options;
  const columns = Object.entries(indexByName).sort((a, b) => a[1] - b[1]).map(([field]) => [field, renameByName[field]]);
  const there = columns.filter(([field]) => rows.some((row) => row[field] !== undefined));
  const made = rows.map((row) => Object.fromEntries(there.map(([field, title]) => [title, row[field]])));
  const [{ displayName, desc }] = panel.options.sortBy;
  made.sort((a, b) => (desc ? -1 : 1) * compare(a[displayName], b[displayName]));
  return { titles: there.map(([, title]) => title), rows: made };
}

function compare(a, b) {
  if (a === b) return 0;
  if (a === undefined || b === undefined) return a === undefined ? -1 : 1;
  return a < b ? -1 : 1;
}

function merge(tables) {
  const full = tables.filter((table) => table.length);
  if (!full.length) return [];
  const keys = Object.keys(full[0][0]).filter((key) => full.every((table) => table[0][key] !== undefined));
  const rows = new Map();
  for (const table of full) {
    for (const row of table) {
      const key = JSON.stringify(keys.map((name) => row[name]));
      rows.set(key, { ...rows.get(key), ...row });
    }
  }
  return [...rows.values()];
}
