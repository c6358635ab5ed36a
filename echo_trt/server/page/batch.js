// The batch half: figures, budget, time and the latest iterations, from the server's snapshots.

import { $, cleared, colour, make, short } from "./dom.js";
import { ACCEPTED, REJECTED, drawTree, point } from "./tree.js";

export const FORMAT = 1;
const MINUTES = 3, WINDOW = 2; // of the curves; seconds over which rates are taken
const BARS = 96; // iterations that are drawn
const PARTS = [
  ["plan", "choosing drafts"],
  ["draft", "draft network"],
  ["verify", "target network"],
  ["other", "the rest"],
];
const TILES = [
  ["saved", "Time saved by drafts"],
  ["rate", "Tokens per second"],
  ["length", "Tokens per pass of a request"],
  ["gain", "Speedup at this load"],
  ["running", "Requests running"],
  ["blocks", "KV blocks in use"],
  ["cache", "Prompt tokens reused"],
];

let past = [], curve = [], bars = [], latest = null, paused = false, shownAt = 0, toldAt = -Infinity;

export function setUp() {
  $("tiles").replaceChildren(
    ...TILES.map(([id, name]) => {
      const graph = id === "rate" || id === "length" ? make("canvas", "spark") : make("div", "level");
      graph.id = `graph-${id}`;
      graph.setAttribute("aria-hidden", "true");
      const value = make("dd", "", make("span", "value", "–"), make("span", "unit", ""), graph);
      value.id = `tile-${id}`;
      return make("div", "tile", make("dt", "", name), value);
    }),
  );
  $("parts").replaceChildren(
    ...PARTS.map(([id, name]) => {
      const value = make("dd", "", "–");
      value.id = `part-${id}`;
      return make("div", "", make("dt", `p-${id}`, name), value);
    }),
  );
  $("pause").addEventListener("click", () => {
    paused = !paused;
    $("pause").setAttribute("aria-pressed", String(paused));
    $("pause").textContent = paused ? "Go on" : "Pause";
  });
  point($("tree"));
  addEventListener("resize", () => latest && draw());
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => latest && draw());
  draw();
}

/** A snapshot of the server's; its fields are described in echo_trt/engine/service/snapshots.py. */
export function show(now) {
  const time = performance.now() / 1000;
  if (past.length && past.at(-1).totals.iterations > now.totals.iterations) past = [];
  past.push({ time, totals: now.totals, running: now.running });
  while (past.length > 2 && past[1].time < time - WINDOW) past.shift();
  note(now, time);
  now.last = now.last || latest?.last; // a server at which nobody looked has forgotten it
  if (paused) return;
  latest = now;
  if (document.hidden || time - shownAt < 0.09) return;
  shownAt = time;
  requestAnimationFrame(draw);
}

/** Requests that run now, as far as is known. */
export const running = () => past.at(-1)?.running || 0;

/** The engine is away. */
export function away() {
  past = [];
}

function note(now, time) {
  const first = past[0], span = time - first.time;
  const gained = (name) => now.totals[name] - first.totals[name];
  now.rate = span > 0.3 ? gained("emitted_tokens") / span : NaN;
  now.length = gained("verifications") ? gained("emitted_tokens") / gained("verifications") : NaN;
  if (!curve.length || time - curve.at(-1).time >= 1) curve.push({ time, rate: now.rate || 0, length: now.length });
  while (curve.length && curve[0].time < time - 60 * MINUTES) curve.shift();
  const { recent } = now;
  recent.time.forEach((_, i) => {
    if (!recent.requests[i]) return;
    const bar = { requests: recent.requests[i], accepted: recent.accepted[i], verified: recent.verified[i] };
    bars.push({ ...bar, rung: recent.rung[i] || shared(now) });
  });
  bars = bars.slice(-BARS);
}

/** K_max, where a verification may not have more; goodput's rungs stand in its place. */
const shared = (now) => (now.policy.startsWith("goodput") ? 0 : now.budget);

function draw() {
  const now = latest;
  const said = drawTree($("tree"), now?.last);
  drawStrip();
  if (!now) return;
  const kept = Object.entries(now.latency).map(([name, [all, kept]]) => `${name} ${Math.round((100 * kept) / all)} %`);
  const targets = kept.length ? `, targets kept: ${kept.join(", ")}` : "";
  const limit = shared(now) ? `, at most ${shared(now)} tokens per pass (K_max)` : "";
  $("policy").textContent = `policy ${now.policy}${limit}${targets}`;
  const [saved, error] = now.saved;
  tile("saved", `${short(saved, 1)} s`, saved || error ? `± ${short(error, 1)} s, since the start` : "not known");
  tile("rate", short(now.rate, 0), "all requests");
  tile("length", short(now.length, 2), "plain decoding: 1");
  tile("gain", now.gain ? `${short(now.gain, 2)} ×` : "–", now.gain ? "estimated" : "not known");
  tile("running", `${now.running}`, `of ${now.slots} slots${now.queued ? `, ${now.queued} wait` : ""}`);
  level("running", [["held", now.running / now.slots]]);
  const { all, held, cached } = now.blocks;
  tile("blocks", `${held}`, `of ${all}, ${cached} reusable`);
  level("blocks", [["held", held / all], ["cached", cached / all]]);
  const { asked_tokens: asked, cached_tokens: found } = now.totals;
  tile("cache", asked ? `${Math.round((100 * found) / asked)} %` : "–", "from the prefix cache");
  level("cache", [["held", asked ? found / asked : 0]]);
  spark("rate", curve.map((each) => each.rate));
  spark("length", curve.map((each) => each.length));
  if (now.last) drawLast(now, said);
}

function drawLast(now, said) {
  const { last } = now, canvas = $("tree");
  const nodes = last.requests.reduce((sum, each) => sum + each.parent.length, 0);
  Object.assign(canvas.dataset, { requests: last.requests.length, nodes, time: last.time });
  const time = performance.now();
  if (time - toldAt > 3000) {
    toldAt = time;
    canvas.setAttribute("aria-label", said); // a screen reader's user reads it when it is wanted
  }
  $("tree-note").textContent = said.replace(/^.*?, /, "");
  $("fates").classList.toggle("gated", Object.keys(last.gates || {}).length > 0);
  budget(now);
  const total = Object.values(last.milliseconds).reduce((sum, each) => sum + each, 0) || 1;
  $("time").replaceChildren(
    ...PARTS.map(([id]) => {
      const part = make("span", `p-${id}`);
      part.style.flexGrow = last.milliseconds[id] / total;
      return part;
    }),
  );
  const told = PARTS.map(([id, name]) => `${name} ${short(last.milliseconds[id])} ms`);
  $("time").setAttribute("aria-label", told.join(", "));
  for (const [id] of PARTS) {
    const share = Math.round((100 * last.milliseconds[id]) / total);
    $(`part-${id}`).textContent = `${short(last.milliseconds[id])} ms, ${share} %`;
  }
}

/** Tokens of the verification against what it may have. */
function budget(now) {
  const { last } = now, most = shared(now);
  const counts = { roots: last.requests.length, accepted: 0, rejected: 0 };
  for (const { fate } of last.requests) {
    for (const each of fate) {
      if (each === ACCEPTED) counts.accepted++;
      if (each === REJECTED) counts.rejected++;
    }
  }
  const used = counts.roots + counts.accepted + counts.rejected, limit = last.rung || most;
  const free = Math.max(limit - used, 0);
  const box = $("budget");
  box.replaceChildren(
    ...Object.entries({ ...counts, free }).map(([name, number]) => {
      const part = make("span", `b-${name}`);
      part.style.flexGrow = number;
      return part;
    }),
  );
  const of = limit ? ` of at most ${limit}` : "";
  const told = `${used} tokens verified${of}: ${counts.roots} last tokens, ${counts.accepted} accepted, ${counts.rejected} rejected`;
  box.setAttribute("aria-label", told);
  box.title = told;
}

function tile(id, value, unit) {
  const [number, small] = $(`tile-${id}`).children;
  number.textContent = value;
  small.textContent = unit ? ` ${unit}` : "";
}

function level(id, parts) {
  $(`graph-${id}`).replaceChildren(
    ...parts.map(([name, share]) => {
      const part = make("span", `l-${name}`);
      part.style.width = `${Math.min(100 * share, 100)}%`;
      return part;
    }),
  );
}

function spark(id, values) {
  const { pen, width } = cleared($(`graph-${id}`), 30), known = values.filter(Number.isFinite);
  const most = Math.max(...known, 1e-9) * 1.1, least = id === "length" ? 1 : 0;
  const y = (value) => 28 - (26 * (value - least)) / Math.max(most - least, 1e-9);
  const step = width / Math.max(values.length - 1, 30);
  pen.beginPath();
  let on = false;
  values.forEach((value, i) => {
    const x = width - (values.length - 1 - i) * step;
    if (!Number.isFinite(value)) return void (on = false);
    if (on) pen.lineTo(x, y(value));
    else pen.moveTo(x, y(value));
    on = true;
  });
  pen.strokeStyle = colour("accent");
  pen.lineWidth = 1.5;
  pen.lineJoin = "round";
  pen.stroke();
}

/** A bar per iteration: last tokens, accepted and rejected draft tokens; the line is what a verification may have. */
function drawStrip() {
  const canvas = $("strip"), { pen, width } = cleared(canvas, 104), high = 96;
  const most = Math.max(8, ...bars.map((bar) => Math.max(bar.verified, bar.rung)));
  const step = width / BARS, y = (tokens) => high + 4 - (high * tokens) / most;
  const [root, accepted, rejected] = [colour("bar-root"), colour("bar-accepted"), colour("bar-rejected")];
  bars.forEach((bar, i) => {
    const x = width - (bars.length - i) * step;
    let from = 0;
    for (const [tokens, ink] of [
      [bar.requests, root],
      [bar.accepted, accepted],
      [bar.verified - bar.requests - bar.accepted, rejected],
    ]) {
      pen.fillStyle = ink;
      pen.fillRect(x, y(from + tokens), Math.max(step - 1, 1), y(from) - y(from + tokens));
      from += tokens;
    }
  });
  pen.beginPath();
  bars.forEach((bar, i) => {
    if (!bar.rung) return;
    const x = width - (bars.length - i) * step;
    pen.moveTo(x, y(bar.rung));
    pen.lineTo(x + step, y(bar.rung));
  });
  pen.strokeStyle = colour("text");
  pen.lineWidth = 1.5;
  pen.stroke();
  const bar = bars.at(-1);
  if (bar) canvas.dataset.bars = bars.length;
  if (bar) canvas.setAttribute("aria-label", `Up to ${most} tokens per iteration, ${bar.verified} in the last one`);
}
