// Draws what `Plot.spec` describes into each <div class="plot" data-name="...">, with uPlot.
"use strict";

const HEIGHT = 250;
const DASH = [5, 4];
const WHOLE = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1e3, 2e3, 5e3, 1e4, 1e5, 1e6]; // steps of an axis that counts

function colours() {
  const style = getComputedStyle(document.documentElement);
  return (name) => style.getPropertyValue(name).trim();
}

// One column of x for all lines; each line's own points stay where they are.
function aligned(lines) {
  return uPlot.join(lines.map((line) => [line.xs, line.ys]));
}

function number(value) {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  if (Number.isInteger(value) && size < 1e6) return value.toLocaleString("en");
  const short = Number(value.toPrecision(4));
  return size !== 0 && (size < 1e-3 || size >= 1e6) ? short.toExponential() : String(short);
}

// Of the line at the cursor, or of its last point before it: a decimated line has none at most places.
function nearest(plot, value, series, place) {
  let at = place;
  while (at !== null && at > 0 && plot.data[series][at] == null) at -= 1;
  return number(at === null ? null : plot.data[series][at]);
}

function lineOf(line, colour) {
  const stroke = colour(`--line-${line.colour % 8}`);
  const common = { label: line.label, stroke, spanGaps: true, points: { show: false }, value: nearest };
  if (line.kind === "dots") {
    return { ...common, width: 1.5, points: { show: true, size: 7, fill: colour("--paper"), width: 1.5 } };
  }
  if (line.kind === "bars") {
    const paths = uPlot.paths.bars({ size: [0.92, Infinity], align: 1 });
    return { ...common, width: 0, fill: stroke, paths };
  }
  if (line.kind === "faint") return { ...common, width: 1, alpha: 0.3 };
  return { ...common, width: 1.8, dash: line.kind === "dashed" ? DASH : undefined };
}

function axesOf(spec, colour) {
  const common = {
    stroke: colour("--quiet"),
    font: "12px system-ui, sans-serif",
    labelFont: "12px system-ui, sans-serif",
    grid: { stroke: colour("--rule"), width: 1 },
    ticks: { show: false },
  };
  const powers = (plot, splits) => splits.map((at) => (at > 0 && Number.isInteger(Math.log10(at)) ? at : null));
  const up = { ...common, size: 58, values: (plot, splits) => splits.map((at) => (at === null ? "" : number(at))) };
  if (spec.logY) Object.assign(up, { grid: { ...common.grid, filter: powers } });
  const across = { ...common, size: 32, grid: { show: false }, values: (plot, splits) => splits.map(number) };
  if (spec.logX) Object.assign(across, { values: (plot, splits) => powers(plot, splits).map((at) => (at === null ? "" : number(at))) });
  if (spec.lines.some((line) => line.kind === "bars")) Object.assign(up, { incrs: WHOLE });
  if (spec.xKind !== "step") Object.assign(across, { label: spec.xLabel, labelSize: 20 });
  return [across, up];
}

// A line that is flat gets room around it.
function rangeOf(plot, low, high) {
  if (low === null) return [0, 1];
  const room = high > low ? 0.05 * (high - low) : Math.abs(high) * 0.1 || 1;
  return [low >= 0 && low - room < 0 ? 0 : low - room, high + room];
}

function options(spec, width, colour) {
  return {
    width,
    height: HEIGHT,
    scales: { x: { time: false, ...(spec.logX ? { distr: 3, range: (plot, low, high) => [low, high] } : {}) }, y: spec.logY ? { distr: 3 } : { range: rangeOf } },
    axes: axesOf(spec, colour),
    series: [
      { label: spec.xLabel, value: (plot, value) => number(value) },
      ...spec.lines.map((line) => lineOf(line, colour)),
    ],
    cursor: { y: false, points: { size: 6 }, sync: spec.xKind === "step" ? { key: "step" } : undefined },
    padding: [10, 10, 0, 0],
  };
}

function draw(spec, place) {
  place.replaceChildren();
  if (!spec.lines.some((line) => line.ys.some((y) => y !== null))) return null;
  return new uPlot(options(spec, place.clientWidth, colours()), aligned(spec.lines), place);
}

function drawAll() {
  const specs = JSON.parse(document.getElementById("plots").textContent);
  const drawn = new Map();
  const all = () => {
    for (const spec of specs) {
      const place = document.querySelector(`.plot[data-name="${CSS.escape(spec.name)}"]`);
      if (place) drawn.set(place, draw(spec, place));
    }
  };
  all();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", all);
  const watch = new ResizeObserver((changes) => {
    for (const { target } of changes) {
      const plot = drawn.get(target);
      if (plot && plot.width !== target.clientWidth) plot.setSize({ width: target.clientWidth, height: HEIGHT });
    }
  });
  drawn.forEach((plot, place) => watch.observe(place));
}

drawAll();
