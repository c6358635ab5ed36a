// The chat: one conversation, answered once, or twice where it stands beside plain decoding.

import { Refused, call, events } from "./api.js";
import { Answer } from "./answer.js";
import { running as load } from "./batch.js";
import { $, make, short } from "./dom.js";

const SAMPLES = [
  "Why is the sky blue?",
  "Write a haiku about the sea.",
  "List the planets of the solar system.",
  "Repeat this line three times: the quick brown fox jumps over the lazy dog.",
];

let about = null, turns = [], running = null;

export function setUp() {
  $("samples").replaceChildren(
    ...SAMPLES.map((text) => {
      const button = make("button", "quiet", text);
      button.type = "button";
      button.addEventListener("click", () => send(text));
      return make("li", "", button);
    }),
  );
  $("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    send($("prompt").value);
  });
  $("prompt").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      send($("prompt").value);
    }
  });
  addEventListener("keydown", (event) => {
    if (event.key === "Escape" && running) stop();
  });
  $("stop").addEventListener("click", stop);
  $("clear").addEventListener("click", clear);
  $("colours").addEventListener("change", () => {
    $("chat").classList.toggle("plain", !$("colours").checked);
  });
}

/** What the server says of its model. */
export function know(facts) {
  about = facts;
}

function stop() {
  running?.abort();
}

function clear() {
  stop();
  turns = [];
  for (const each of [...$("log").children]) if (each !== $("empty")) each.remove();
  $("empty").hidden = false;
  $("prompt").focus();
}

function tell(sentence) {
  $("told").textContent = sentence;
}

/** The body of a request, as the settings have it. Throws Refused for what is no JSON. */
function asked(text, seed) {
  const system = $("system").value.trim();
  const messages = [...(system ? [{ role: "system", content: system }] : []), ...turns, { role: "user", content: text }];
  const body = {
    model: about?.models[0] || "echo",
    messages,
    stream: true,
    stream_options: { include_usage: true, continuous_usage_stats: true },
    token_sources: true,
    temperature: Number($("temperature").value) || 0,
    seed,
    max_tokens: Number($("limit").value) || 256,
  };
  const schema = parsed("schema", "JSON schema");
  if (schema) body.response_format = { type: "json_schema", json_schema: { name: "answer", schema } };
  const tools = parsed("tools", "list of tools");
  if (tools) body.tools = tools;
  return body;
}

function parsed(id, name) {
  const text = $(id).value.trim();
  if (!text) return null;
  try {
    return JSON.parse(text);
  } catch (error) {
    $("settings").open = true;
    $(id).focus();
    throw new Refused(`The ${name} in the settings is no JSON (${error.message}); fix it, or empty the field.`, 0);
  }
}

async function send(text) {
  if (running || !text.trim()) return;
  const log = $("log"), seed = $("seed").value ? Number($("seed").value) : Math.floor(Math.random() * 2 ** 31);
  let body;
  try {
    body = asked(text, seed);
  } catch (error) {
    tell(error.message);
    log.append(make("p", "error", error.message));
    return;
  }
  const begun = turns; // a conversation that is cleared meanwhile has other turns
  running = new AbortController();
  $("stop").disabled = false;
  $("send").disabled = true;
  $("empty").hidden = true;
  $("prompt").value = "";
  const said = make("div", "said", text);
  said.dir = "auto";
  log.append(said);
  log.scrollTop = log.scrollHeight;
  tell("Answering.");
  const beside = $("beside").checked, pair = make("div", beside ? "beside" : "");
  log.append(pair);
  const answers = [];
  try {
    for (const plainly of beside ? [true, false] : [false]) {
      const title = beside ? (plainly ? "Plain decoding" : "With drafts") : "";
      const answer = new Answer(title);
      answers.push(answer);
      pair.append(answer.element);
      await stream(answer, plainly ? { ...body, speculate: false } : body, running.signal);
      if (running.signal.aborted) break;
    }
    if (answers.length === 2) pair.after(verdict(...answers));
  } finally {
    const last = answers.at(-1);
    if (last.content) begun.push({ role: "user", content: text }, { role: "assistant", content: last.content });
    running = null;
    $("stop").disabled = true;
    $("send").disabled = false;
    if (nearEnd(log, 400)) log.scrollTop = log.scrollHeight;
    tell(last.error.hidden ? `Answer complete, ${last.count} tokens.` : last.error.textContent);
  }
}

/** Read one answer to its end; what goes wrong is told under it. */
async function stream(answer, body, signal) {
  const log = $("log");
  answer.onDraw = () => {
    if (nearEnd(log, 160)) log.scrollTop = log.scrollHeight;
  };
  answer.element.setAttribute("aria-busy", "true");
  answer.begin = performance.now();
  let done = false;
  try {
    for await (const { data } of events(await call("/v1/chat/completions", body, signal))) {
      if (data === "[DONE]") {
        done = true;
        continue; // to the stream's own end
      }
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Refused(chunk.error.message, 0);
      answer.take(chunk);
      answer.load = Math.max(answer.load || 1, load());
    }
    if (!done) answer.fail("The connection was cut, so this answer is not complete.");
  } catch (error) {
    if (signal.aborted) answer.fail("Stopped.");
    else if (error instanceof Refused) answer.fail(error.message);
    else answer.fail("The connection was cut, so this answer is not complete.");
  } finally {
    answer.element.removeAttribute("aria-busy");
    answer.end();
  }
}

/** Whether the reader follows the text, within so many pixels of its end. */
const nearEnd = (log, pixels) => log.scrollHeight - log.scrollTop - log.clientHeight < pixels;

/** What two answers to the same prompt show. */
function verdict(plain, drafted) {
  const place = plain.tokens.findIndex((text, i) => text !== drafted.tokens[i]);
  const same = place < 0 && plain.tokens.length === drafted.tokens.length;
  const times = drafted.rate / plain.rate;
  const most = Math.max(plain.load || 1, drafted.load || 1), beside = most > 1 ? `while up to ${most} requests ran` : "alone on the server";
  const speed = Number.isFinite(times) ? `${short(times, 2)} times as fast as plain decoding, ${beside}` : "";
  let text = "The same text, token for token";
  if (!same) text = `The texts part at token ${(place < 0 ? plain.tokens.length : place) + 1}: rounding decides near-ties`;
  if (!plain.error.hidden || !drafted.error.hidden) text = "One of them did not end";
  return make("p", "verdict", make("b", "", text), speed ? `; ${speed}.` : ".");
}
