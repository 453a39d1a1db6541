"use strict";

// A line over the stages, as an SVG that is drawn at the width of its box.

// points: {stage, value}; serving: the stage that serves; limit: a value to mark, or null.
function drawChart(box, name, all, serving, limit = null) {
  const points = all.filter((each) => Number.isFinite(each.value));
  box.replaceChildren();
  if (!points.length) return;
  const width = Math.max(240, box.clientWidth), height = 200;
  const left = 58, right = 16, top = 14, bottom = 28;
  const values = [...points.map((point) => point.value), ...(limit === null ? [] : [limit])];
  let low = Math.min(...values), high = Math.max(...values);
  const room = (high - low || Math.abs(high) || 1) * 0.15;
  low = low >= 0 ? Math.max(0, low - room) : low - room;
  high += room;
  const first = points[0].stage, last = points[points.length - 1].stage;
  const x = (stage) => first === last ? (left + width - right) / 2
    : left + (stage - first) / (last - first) * (width - left - right);
  const y = (value) => top + (high - value) / (high - low) * (height - top - bottom);

  const svg = shape("svg", { viewBox: `0 0 ${width} ${height}`, role: "img" });
  const told = points.map((point) => `stage ${point.stage}: ${point.value.toFixed(4)}`).join(", ");
  svg.setAttribute("aria-label", `${name}. ${told}`);
  for (let step = 0; step <= 3; step += 1) {
    const value = low + (high - low) * step / 3;
    svg.append(shape("line", { class: "grid", x1: left, x2: width - right, y1: y(value), y2: y(value) }));
    svg.append(shape("text", { x: left - 8, y: y(value) + 4, "text-anchor": "end" }, value.toFixed(4)));
  }
  const every = Math.ceil(points.length / Math.max(2, Math.floor(width / 60)));
  points.forEach((point, place) => {
    if (place % every === 0) {
      svg.append(shape("text", { x: x(point.stage), y: height - 6, "text-anchor": "middle" }, String(point.stage)));
    }
  });
  if (limit !== null) {
    svg.append(shape("line", { class: "limit", x1: left, x2: width - right, y1: y(limit), y2: y(limit) }));
  }
  svg.append(shape("polyline", {
    class: "line", points: points.map((point) => `${x(point.stage)},${y(point.value)}`).join(" "),
  }));
  for (const point of points) {
    const serves = point.stage === serving;
    const dot = shape("circle", {
      cx: x(point.stage), cy: y(point.value), r: serves ? 6 : 4, class: serves ? "serving" : "",
    });
    dot.append(shape("title", {}, `stage ${point.stage}: ${point.value.toFixed(4)}${serves ? ", serves" : ""}`));
    svg.append(dot);
  }
  box.append(svg);
}

function shape(name, attributes, text) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (text !== undefined) element.textContent = text;
  return element;
}
