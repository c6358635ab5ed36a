// Load from this page: sample prompts, a bounded number of requests at once, for a bounded time.

import { Refused, call, wait } from "./api.js";
import { $ } from "./dom.js";

const MOST = 64, MINUTES = 3, TOKENS = 128;
const CONNECTIONS = 2; // a browser opens six to a server, and the chat needs some
const SUBJECTS = [
  "Why is the sky blue?",
  "Explain how a bicycle stays upright.",
  "Write a short story about a lighthouse keeper.",
  "List ten facts about the moon.",
  "How do I bake bread? Give me the steps.",
  "What is a binary search? Show it in Python.",
  "Describe the water cycle to a child.",
  "Name the planets, and say one thing about each.",
  "Write a polite letter that asks for a refund.",
  "What are the pros and cons of working from home?",
  "Translate 'good morning' into five languages.",
  "Summarise the story of Romeo and Juliet.",
  "Write a JSON object that describes a book.",
  "How does a vaccine work?",
  "Give me a workout plan for one week.",
  "What is the difference between weather and climate?",
];

let prompts = null, model = "echo", running = null, ended = 0;

export const know = (facts) => (model = facts.models[0]);

export function setUp() {
  const told = () => {
    const count = Number($("load").value);
    $("load-count").textContent = `${count} ${count === 1 ? "request" : "requests"}`;
  };
  $("load").addEventListener("input", told);
  $("load").addEventListener("change", () => running && restart());
  $("load-switch").addEventListener("click", () => (running ? stop("Off.") : start()));
  addEventListener("pagehide", () => stop("Off."));
  document.addEventListener("visibilitychange", () => document.hidden && running && stop("Off: the page was hidden."));
  told();
}

function note(sentence) {
  $("load-note").textContent = sentence;
}

function restart() {
  running.abort();
  running = new AbortController();
  drive(running.signal);
}

function start() {
  running = new AbortController();
  ended = performance.now() + 60_000 * MINUTES;
  $("load-switch").textContent = "Stop";
  $("load-switch").setAttribute("aria-pressed", "true");
  note("On.");
  drive(running.signal);
}

function stop(sentence) {
  running?.abort();
  running = null;
  $("load-switch").textContent = "Start";
  $("load-switch").setAttribute("aria-pressed", "false");
  note(sentence);
}

async function drive(signal) {
  const count = Math.min(Number($("load").value), MOST);
  try {
    prompts = prompts || (await Promise.all(SUBJECTS.map(tokens)));
    const lanes = Math.min(count, CONNECTIONS);
    await Promise.all(Array.from({ length: lanes }, (_, lane) => keep(lane, Math.floor((count + lane) / lanes), signal)));
  } catch (error) {
    if (!signal.aborted) stop(error instanceof Refused ? error.message : "The server cannot be reached; the load is off.");
  }
}

/** A prompt in the model's chat template. */
async function tokens(text) {
  const reply = await call("/tokenize", { model, messages: [{ role: "user", content: text }] });
  return (await reply.json()).tokens;
}

/** Keep ``count`` requests open, one call after the other. */
async function keep(lane, count, signal) {
  for (let round = lane; !signal.aborted; round += CONNECTIONS) {
    if (performance.now() > ended) return stop(`Off: ${MINUTES} minutes are over.`);
    const chosen = Array.from({ length: count }, (_, i) => prompts[(round * count + i) % prompts.length]);
    const body = { model, prompt: chosen, max_tokens: TOKENS, temperature: 0.7, seed: round * MOST };
    try {
      await (await call("/v1/completions", body, signal)).arrayBuffer();
    } catch (error) {
      if (!(error instanceof Refused && error.status === 429)) throw error;
      await wait(1000);
    }
  }
}
