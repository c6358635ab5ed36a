// Small helpers. What the model or the server says becomes text, never HTML.

export const $ = (id) => document.getElementById(id);

/** An element with a class and children; strings become text nodes. */
export function make(tag, name = "", ...children) {
  const element = document.createElement(tag);
  if (name) element.className = name;
  element.append(...children);
  return element;
}

/** A number in few characters. */
export function short(value, digits = 1) {
  if (!Number.isFinite(value)) return "–";
  if (value >= 1e6) return `${(value / 1e6).toFixed(1)}M`;
  if (value >= 1e4) return `${(value / 1e3).toFixed(1)}k`;
  return value >= 100 ? value.toFixed(0) : value.toFixed(digits);
}

const tip = $("tip");

/** Show a line beside the pointer; without one, hide it. */
export function showTip(text, x = 0, y = 0) {
  tip.hidden = !text;
  if (!text) return;
  tip.textContent = text;
  const left = Math.min(x + 12, innerWidth - tip.offsetWidth - 8);
  const below = y + 18 + tip.offsetHeight < innerHeight;
  tip.style.transform = `translate(${Math.max(left, 4)}px, ${below ? y + 18 : y - tip.offsetHeight - 8}px)`;
}

/** A colour of the theme in force. */
export const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

/** A canvas' context, in CSS pixels, cleared. */
export function cleared(canvas, height) {
  const width = canvas.clientWidth, scale = devicePixelRatio || 1;
  if (canvas.width !== Math.round(width * scale) || canvas.height !== Math.round(height * scale)) {
    canvas.width = Math.round(width * scale);
    canvas.height = Math.round(height * scale);
    canvas.style.height = `${height}px`;
  }
  const pen = canvas.getContext("2d");
  pen.setTransform(scale, 0, 0, scale, 0, 0);
  pen.clearRect(0, 0, width, height);
  return { pen, width };
}

/** Who can propose a token: the server's name, ours, and the shape of a node. */
export const SOURCES = [
  { name: "target", label: "target itself", about: "none: the target's own next token, one per verification" },
  { name: "head", label: "draft", about: "the draft network: a head, block drafter or small model" },
  { name: "lookup", label: "copied text", about: "prompt lookup: text copied from the prompt or the answer so far" },
  { name: "both", label: "draft and copy", about: "the draft network and prompt lookup, which agree" },
  { name: "ngram", label: "n-gram", about: "the table of the target's earlier answers" },
  { name: "grammar", label: "grammar", about: "the grammar, where it allows a single token" },
  { name: "prediction", label: "prediction", about: "the client's own prediction of the answer" },
  { name: "call", label: "tool call", about: "the declaration of a tool that is called: what stands between its arguments" },
  { name: "answer", label: "earlier answer", about: "answers of the same sender, learnt while serving" },
];
export const sourceOf = (name) => SOURCES.find((each) => each.name === name) || SOURCES[0];
