// One answer as it comes: its tokens, marked by who proposed them, and its figures.

import { SOURCES, make, short, showTip, sourceOf } from "./dom.js";

const MOST_TOKENS = 6000; // that are marked one by one; larger: a long answer makes the page slow
const MOST_CHARACTERS = 1_000_000; // that are shown

export class Answer {
  /** ``title``: who answers, where two stand beside each other. */
  constructor(title = "") {
    this.text = make("div", "text");
    this.text.dir = "auto";
    this.figures = make("p", "figures");
    this.shares = make("div", "shares");
    this.shares.setAttribute("role", "img");
    this.shares.hidden = true;
    this.calls = make("pre", "calls");
    this.calls.hidden = true;
    this.error = make("p", "error");
    this.error.hidden = true;
    this.element = make("article", "answer");
    if (title) this.element.append(make("h3", "who", title));
    this.element.append(this.text, this.calls, this.shares, this.figures, this.error);
    this.content = ""; // what the next turn gets to see
    this.sources = new Map();
    this.tokens = []; // their texts, to compare two answers
    this.count = 0; // tokens, as the server counts
    this.begin = performance.now();
    this.first = this.last = this.firstCount = 0;
    this.shown = 0;
    this.decoder = new TextDecoder();
    this.waiting = [];
    this.plain = null; // a text node for what is not marked
    this.text.addEventListener("pointerover", (event) => {
      const about = event.target.dataset?.about;
      showTip(about, event.clientX, event.clientY);
    });
    this.text.addEventListener("pointerleave", () => showTip(""));
  }

  /** A chunk of the stream. */
  take(chunk) {
    const now = performance.now();
    if (chunk.usage?.completion_tokens) {
      if (!this.first) [this.first, this.firstCount] = [now, chunk.usage.completion_tokens];
      if (chunk.usage.completion_tokens > this.count) this.last = now;
      this.count = chunk.usage.completion_tokens;
    }
    for (const choice of chunk.choices || []) {
      const delta = choice.delta || {};
      this.content += delta.content || "";
      for (const call of delta.tool_calls || []) this.call(call);
      if (choice.token_sources) this.waiting.push(...choice.token_sources);
      else if (delta.content && !this.sources.size && !this.waiting.length) this.append(delta.content);
      if (choice.finish_reason) this.reason = choice.finish_reason;
    }
    this.draw();
  }

  call(call) {
    this.calls.hidden = false;
    if (call.function?.name) this.calls.append(`${this.calls.textContent ? "\n" : ""}${call.function.name} `);
    this.calls.append(call.function?.arguments || "");
  }

  /** At most once per frame. */
  draw() {
    if (this.frame) return;
    this.frame = requestAnimationFrame(() => this.flush());
  }

  flush() {
    cancelAnimationFrame(this.frame);
    this.frame = 0;
    const tokens = this.waiting.splice(0);
    const spans = document.createDocumentFragment();
    for (const token of tokens) {
      const text = this.decoder.decode(new Uint8Array(token.bytes), { stream: true });
      this.sources.set(token.source, (this.sources.get(token.source) || 0) + 1);
      if (this.tokens.length < MOST_TOKENS && this.shown + text.length < MOST_CHARACTERS) {
        this.tokens.push(text);
        this.shown += text.length;
        spans.append(...marked(text, token));
      } else {
        this.text.append(spans);
        this.append(text);
      }
    }
    this.text.append(spans);
    if (tokens.length) this.drawShares();
    this.drawFigures();
    this.onDraw?.();
  }

  /** Text without marks. */
  append(text) {
    const room = MOST_CHARACTERS - this.shown;
    if (room <= 0) return;
    if (!this.plain || this.plain !== this.text.lastChild) this.text.append((this.plain = document.createTextNode("")));
    this.plain.appendData(text.slice(0, room));
    this.shown += Math.min(text.length, room);
    if (text.length >= room) this.fail(`Only the first ${MOST_CHARACTERS.toLocaleString("en")} characters are shown.`);
  }

  drawShares() {
    const total = [...this.sources.values()].reduce((sum, each) => sum + each, 0);
    const parts = SOURCES.filter(({ name }) => this.sources.get(name));
    this.shares.hidden = false;
    this.shares.replaceChildren(
      ...parts.map(({ name }) => {
        const part = make("span", `share s-${name}`);
        part.style.flexGrow = this.sources.get(name);
        return part;
      }),
    );
    const told = parts.map(({ name, label }) => `${label} ${Math.round((100 * this.sources.get(name)) / total)} %`);
    this.shares.setAttribute("aria-label", `Tokens by source: ${told.join(", ")}`);
    this.shares.title = told.join(", ");
  }

  get rate() {
    return this.last > this.first ? (1000 * (this.count - this.firstCount)) / (this.last - this.first) : NaN;
  }

  get acceptedLength() {
    const total = [...this.sources.values()].reduce((sum, each) => sum + each, 0);
    return total / (this.sources.get("target") || NaN);
  }

  drawFigures() {
    const told = [];
    if (this.first) told.push(["first token", `${short(this.first - this.begin, 0)} ms`]);
    if (this.rate) told.push(["speed", `${short(this.rate)} tokens/s`]);
    if (this.sources.size) told.push(["tokens per pass", short(this.acceptedLength, 2)]);
    if (this.count) told.push(["tokens", String(this.count)]);
    if (this.reason === "length") told.push(["end", "at the limit"]);
    this.figures.replaceChildren(
      ...told.map(([name, value]) => make("span", "", make("span", "name", name), " ", make("b", "", value))),
    );
  }

  fail(sentence) {
    this.error.hidden = false;
    this.error.textContent = sentence;
  }

  /** The end of the stream, in good order or not. */
  end() {
    this.flush();
    this.element.dataset.ended = "yes";
  }
}

/** A token's text with its mark; the white space before a word is not marked. */
function marked(text, token) {
  const source = sourceOf(token.source), word = text.trimStart();
  if (!word) return [text];
  const span = make("span", `t s-${source.name}`, word);
  const chance = token.probability === null ? "" : `, expected with ${Math.round(100 * token.probability)} %`;
  span.dataset.about = `${source.label}${chance}`;
  return word === text ? [span] : [text.slice(0, text.length - word.length), span];
}
