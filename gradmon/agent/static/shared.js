"use strict";
/* What the live page and the report share: how numbers are written, an axis is divided, a kind is marked. */

const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const finite = (v) => v !== null && v !== undefined && Number.isFinite(v);
const whole = (v) => (finite(v) ? Math.round(v).toLocaleString("en-US") : "–");

/** Three significant digits; very large and small ones as 1.2e5. */
function number(v) {
  if (!finite(v)) return "–";
  const size = Math.abs(v);
  if (size !== 0 && (size >= 1e5 || size < 1e-3)) return v.toExponential(2).replace(/\.?0+e/, "e").replace("e+", "e");
  return String(Number(v.toPrecision(3)));
}

function bytes(v) {
  if (!finite(v)) return "–";
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let i = 0;
  while (v >= 1024 && i < units.length - 1) {
    v /= 1024;
    i += 1;
  }
  return `${v >= 1000 ? Math.round(v) : Number(v.toPrecision(3))} ${units[i]}`;
}

function seconds(v) {
  if (!finite(v)) return "–";
  if (v < 0.9995) return `${number(v * 1000)} ms`;
  if (v < 120) return `${number(v)} s`;
  if (v < 7200) return `${Math.round(v / 60)} min`;
  return v < 172800 ? `${Math.round(v / 3600)} h` : `${Math.round(v / 86400)} days`;
}

/** 1, 2 and 5 times powers of ten; the powers alone when there are many. */
function logSplits(_u, _axis, min, max) {
  const decades = Math.log10(max / min);
  const steps = decades > 3.2 ? [1] : decades > 1.6 ? [1, 3] : decades > 0.7 ? [1, 2, 5] : [1, 1.5, 2, 3, 4, 5, 7];
  const every = Math.max(1, Math.ceil(decades / 8));
  const out = [];
  for (let e = Math.floor(Math.log10(min)); e <= Math.ceil(Math.log10(max)); e += 1) {
    if (e % every) continue;
    for (const m of steps) {
      const v = Number(`${m}e${e}`);
      if (v >= min && v <= max) out.push(v);
    }
  }
  return out;
}

/** Top of what the values usually are: one broken batch's loss would flatten a whole run into a line at the bottom. */
function usualTop(u) {
  const values = u.data.slice(1).flat().filter(finite).sort((a, b) => a - b);
  const at = (share) => values[Math.min(values.length - 1, Math.floor(share * values.length))];
  return at(0.98) + 1.5 * (at(0.98) - at(0.02));
}

function shade(u, color) {
  const { top, height } = u.bbox;
  if (!Number.isFinite(top) || !height) return "transparent";
  const gradient = u.ctx.createLinearGradient(0, top, 0, top + height);
  gradient.addColorStop(0, `${color}2e`);
  gradient.addColorStop(1, `${color}05`);
  return gradient;
}

/** Steps of an axis of bytes. */
const BINARY_STEPS = Array.from({ length: 50 }, (_, i) => [2 ** i, 2.5 * 2 ** i]).flat().sort((a, b) => a - b);

/** Outline of a shape around (x, y), for a Path2D and for the `d` of an SVG path. */
function outline(shape, x, y, r) {
  if (shape === "cross") return `M${x - r} ${y - r}L${x + r} ${y + r}M${x - r} ${y + r}L${x + r} ${y - r}`;
  if (shape === "triangle") return `M${x} ${y - r}L${x + r} ${y + r * 0.85}L${x - r} ${y + r * 0.85}Z`;
  if (shape === "flag") return `M${x - r * 0.7} ${y - r}L${x + r} ${y}L${x - r * 0.7} ${y + r}Z`;
  if (shape === "dot") return `M${x - r * 0.8} ${y}a${r * 0.8} ${r * 0.8} 0 1 0 ${r * 1.6} 0a${r * 0.8} ${r * 0.8} 0 1 0 ${-r * 1.6} 0Z`;
  return `M${x - r * 0.85} ${y - r * 0.85}h${r * 1.7}v${r * 1.7}h${-r * 1.7}Z`;
}
