// The super-tree of one iteration, one row per request, depth to the right.

import { SOURCES, cleared, colour, showTip } from "./dom.js";

export const [ROOT, ACCEPTED, REJECTED, PRUNED] = [0, 1, 2, 3];
const FATES = ["last token", "accepted", "rejected", "not worth checking"];
const OTHERS = 3; // children of a node that are drawn though they were not verified
const CLOSE = 4.5; // pixels between two lines of a tree, at least
const COLUMN = 230, TALLEST = 360; // pixels: the least width of a column of trees, and the height of all

let drawn = [], deepest = 5, tallest = 3; // the latter fall slowly, so that the picture does not jump

/** Draw ``last`` of a snapshot on a canvas, and say in words what there is. */
export function drawTree(canvas, last) {
  const requests = last?.requests || [], count = Math.max(requests.length, 1);
  const wide = Math.max(Math.floor(canvas.clientWidth / COLUMN), 1);
  const columns = Math.min(wide, Math.ceil(count / 8));
  const rows = Math.ceil(count / columns);
  const trees = requests.map(arranged);
  tallest = Math.max(tallest * 0.97, 3, ...trees.map((tree) => tree.lines));
  const row = Math.round(Math.max(Math.min(TALLEST / rows, 15 * tallest + 14, 190), 14));
  const { pen, width } = cleared(canvas, Math.max(rows * row, 96));
  drawn = [];
  deepest = Math.max(deepest * 0.97, 5, ...trees.map((tree) => tree.deepest));
  const across = width / columns, step = (across - 58) / deepest;
  const look = theme();
  trees.forEach((tree) => fit(tree, row));
  const size = Math.min(Math.max(0.42 * Math.min(...trees.map((tree) => tree.space)), 1.8), 5);
  trees.forEach((tree, i) => {
    const left = Math.floor(i / rows) * across, top = (i % rows) * row;
    const label = row >= 20 ? 34 : 10;
    if (row >= 20) {
      pen.fillStyle = look.muted;
      pen.font = "11px ui-monospace, monospace";
      pen.fillText(`#${requests[i].id}`, left, top + 15, 30);
    }
    drawOne(pen, tree, requests[i], { left: left + label, top: top + 4, row, step, size, look, gates: last.gates });
  });
  return words(requests, last);
}

/** Depths, and lines for the nodes: the accepted path straight on, other branches below. */
function arranged(request) {
  const { parent, fate, chance } = request;
  const depth = new Array(parent.length).fill(0), children = parent.map(() => []);
  parent.forEach((above, node) => {
    if (above < 0) return;
    depth[node] = depth[above] + 1;
    children[above].push(node);
  });
  const told = new Array(parent.length).fill(false);
  const line = new Array(parent.length).fill(0), pending = [[0, false]];
  let lines = 1;
  while (pending.length) {
    const [node, fresh] = pending.pop();
    told[node] = true;
    line[node] = fresh ? lines++ : line[Math.max(parent[node], 0)]; // a first child goes straight on
    const sorted = children[node].sort((a, b) => fate[a] - fate[b] || chance[b] - chance[a]);
    let others = 0;
    const order = sorted.filter((each) => fate[each] !== PRUNED || others++ < OTHERS);
    for (let i = order.length - 1; i >= 0; i--) pending.push([order[i], i > 0]);
  }
  return { depth, line, lines, told, fate, deepest: Math.max(...depth.filter((_, node) => told[node])) };
}

/** What of a tree has room in a row, and how far its lines stand from each other. */
function fit(tree, row) {
  const { fate, line, told } = tree;
  const whole = row >= 26 && tree.lines * CLOSE <= row - 10; // else without what was not verified
  tree.kept = fate.map((each, node) => told[node] && (whole || each !== PRUNED));
  const lines = Math.max(...line.filter((_, node) => tree.kept[node])) + 1;
  tree.space = Math.min(15, (row - 10) / lines);
}

function theme() {
  const look = { text: colour("text"), muted: colour("muted"), faint: colour("faint"), card: colour("card") };
  look.sources = SOURCES.slice(1).map(({ name }) => colour(name));
  [look.open, look.closed] = [colour("open"), colour("closed")];
  return look;
}

function drawOne(pen, tree, request, place) {
  const { left, top, step, look, size } = place, { parent, fate, source } = request, { kept, space } = tree;
  const at = (node) => [left + 6 + tree.depth[node] * step, top + 6 + tree.line[node] * space];
  for (const late of [false, true]) {
    parent.forEach((above, node) => {
      if (above < 0 || !kept[node] || (fate[node] === ACCEPTED) !== late) return;
      const [x, y] = at(node), [x0, y0] = at(above);
      pen.beginPath();
      pen.moveTo(x0, y0);
      pen.bezierCurveTo(x0 + step * 0.5, y0, x - step * 0.5, y, x, y);
      pen.strokeStyle = late ? look.text : fate[node] === PRUNED ? look.faint : look.muted;
      pen.lineWidth = late ? 2.4 : fate[node] === PRUNED ? 0.8 : 1.1;
      pen.setLineDash(fate[node] === PRUNED ? [2, 3] : []);
      pen.stroke();
    });
  }
  pen.setLineDash([]);
  parent.forEach((above, node) => {
    if (!kept[node]) return;
    const [x, y] = at(node), ink = above < 0 ? look.text : look.sources[source[node]];
    drawNode(pen, x, y, fate[node] === PRUNED ? size * 0.55 : size, above < 0 ? -1 : source[node], fate[node], ink, look);
    drawn.push({ x, y, request, node });
  });
  drawGates(pen, tree, request, place, at);
}

/** One shape per source, filled where the target accepted it. */
function drawNode(pen, x, y, size, source, fate, ink, look) {
  pen.beginPath();
  if (source === 1) pen.rect(x - size * 0.9, y - size * 0.9, size * 1.8, size * 1.8);
  else if (source === 2) corners(pen, x, y, size * 1.25, 4, 0);
  else if (source === 3) corners(pen, x, y, size * 1.3, 3, -Math.PI / 2);
  else if (source === 4) corners(pen, x, y, size * 1.15, 6, 0);
  else pen.arc(x, y, size, 0, 2 * Math.PI);
  pen.fillStyle = fate <= ACCEPTED ? ink : look.card;
  pen.globalAlpha = fate === PRUNED ? 0.6 : 1;
  pen.fill();
  pen.strokeStyle = ink;
  pen.lineWidth = 1.4;
  pen.stroke();
  pen.globalAlpha = 1;
}

function corners(pen, x, y, size, number, turn) {
  for (let i = 0; i < number; i++) {
    const angle = turn + (2 * Math.PI * i) / number;
    pen.lineTo(x + size * Math.cos(angle), y + size * Math.sin(angle));
  }
  pen.closePath();
}

/** At the depths of gates: a bar where the request was too unsure to go deeper, a gap where it went on. */
function drawGates(pen, tree, request, { step, look, gates, row }, at) {
  for (const { depth, open, node } of gatesOf(tree.depth, request, gates)) {
    const [x, y] = at(node), half = Math.min(row * 0.3, 7), from = x + Math.min(step * 0.5, 16);
    pen.beginPath();
    pen.moveTo(from, y - half);
    pen.lineTo(from, open ? y - half * 0.45 : y + half);
    if (open) pen.moveTo(from, y + half * 0.45), pen.lineTo(from, y + half);
    pen.strokeStyle = open ? look.open : look.closed;
    pen.lineWidth = 2.5;
    pen.stroke();
    drawn.push({ x: from, y, gate: `gate at depth ${depth}: ${open ? "open" : "closed"}` });
  }
}

function gatesOf(depths, request, gates) {
  return Object.entries(gates || {}).flatMap(([key, threshold]) => {
    const depth = Number(key);
    let node = -1;
    depths.forEach((each, i) => {
      if (each === depth && (node < 0 || request.chance[i] > request.chance[node])) node = i;
    });
    return node < 0 ? [] : [{ depth, node, open: request.chance[node] > threshold }];
  });
}

function words(requests, last) {
  if (!last) return "No iteration yet";
  const counts = [0, 0, 0, 0];
  for (const { fate } of requests) for (const each of fate) counts[each]++;
  const rest = last.omitted ? `; ${last.omitted} more requests are not drawn` : "";
  return (
    `${requests.length} ${requests.length === 1 ? "request" : "requests"}, draft tokens: ${counts[ACCEPTED]} accepted, ${counts[REJECTED]} rejected, ` +
    `${counts[PRUNED]} not checked${rest}`
  );
}

/** What is under the pointer. */
export function point(canvas) {
  canvas.addEventListener("pointermove", (event) => {
    const box = canvas.getBoundingClientRect(), x = event.clientX - box.left, y = event.clientY - box.top;
    let best = null, least = 90;
    for (const each of drawn) {
      const far = (each.x - x) ** 2 + (each.y - y) ** 2;
      if (far < least) [best, least] = [each, far];
    }
    showTip(best ? best.gate || about(best) : "", event.clientX, event.clientY);
  });
  canvas.addEventListener("pointerleave", () => showTip(""));
}

function about({ request, node }) {
  if (request.parent[node] < 0) return `request ${request.id}: ${FATES[ROOT]}`;
  const source = SOURCES[1 + request.source[node]].label, chance = Math.round(100 * request.chance[node]);
  return `request ${request.id}: ${source}, expected with ${chance} %, ${FATES[request.fate[node]]}`;
}
