// The page: the key, what the server says of itself, and the stream of snapshots.

import * as batch from "./batch.js";
import * as chat from "./chat.js";
import * as load from "./load.js";
import { Refused, call, events, onKeyNeeded, wait } from "./api.js";
import { $, SOURCES, make } from "./dom.js";

const SLOWEST = 5000; // milliseconds between two attempts to reach the server
let build = null;

function state(name, text) {
  $("state").dataset.state = name;
  if ($("state").textContent !== text) $("state").textContent = text;
}

function warn(sentence) {
  $("banner-text").textContent = sentence;
  $("banner").hidden = false;
}

/** Ask the user for a key. */
function askForKey(wrong) {
  const dialog = $("key-dialog");
  $("key-note").textContent = wrong
    ? "The server does not take this key. Try another."
    : "It is kept in this tab until it is closed, and sent to this server alone.";
  $("key-note").classList.toggle("error", wrong);
  $("key").value = "";
  state("wait", "a key is needed");
  if (!dialog.open) dialog.showModal();
  $("key").focus();
  return new Promise((resolve) => {
    $("key-form").onsubmit = () => {
      dialog.onclose = null;
      state("wait", "connecting");
      resolve($("key").value.trim());
    };
    dialog.onclose = () => dialog.open || dialog.showModal(); // Escape; without a key there is nothing to see
  });
}

async function learn() {
  const about = await (await call("/live/about")).json();
  compare(about);
  $("model").textContent = about.models.at(-1);
  document.title = `${about.models.at(-1)} · echo-trt`;
  chat.know(about);
  load.know(about);
}

/** An old page beside a new server says so, and draws nothing that it may misread. */
function compare(hello) {
  build = build || hello.build;
  if (hello.build !== build) warn("The server has a newer page than this one.");
  if (hello.format !== batch.FORMAT) warn("The server's snapshots have another format than this page knows.");
  return hello.format === batch.FORMAT;
}

/** Read snapshots for as long as the page is seen. */
async function look() {
  let pause = 500, known = false;
  for (;;) {
    if (document.hidden) await new Promise((seen) => document.addEventListener("visibilitychange", seen, { once: true }));
    const hidden = new AbortController(), onChange = () => document.hidden && hidden.abort();
    document.addEventListener("visibilitychange", onChange);
    try {
      if (!known) await learn();
      known = true;
      let readable = true;
      for await (const { event, data } of events(await call("/live", null, hidden.signal))) {
        const told = JSON.parse(data);
        if (event === "hello") readable = compare(told);
        if (event === "away") {
          state("away", "the engine is away");
          batch.away();
        }
        if (event === "snapshot" && readable) {
          state("live", "live");
          pause = 500;
          batch.show(told);
        }
      }
    } catch (error) {
      if (!hidden.signal.aborted) {
        state("away", error instanceof Refused && error.status ? error.message : "the server cannot be reached");
        known = false;
        batch.away();
      }
    } finally {
      document.removeEventListener("visibilitychange", onChange);
    }
    await wait(pause);
    pause = Math.min(2 * pause, SLOWEST);
  }
}

function legends() {
  const key = (name, label, title = "") => {
    const item = make("li", "", make("span", `key ${name}`), label);
    item.title = title;
    return item;
  };
  $("legend").replaceChildren(...SOURCES.map(({ name, label, about }) => key(`s-${name}`, label, about)));
  $("fates").replaceChildren(
    key("f-root", "a request's last token"),
    key("f-accepted", "draft token, accepted"),
    key("f-rejected", "rejected"),
    key("f-pruned", "not worth checking"),
    key("g-open", "gate open"),
    key("g-closed", "gate closed"),
  );
  $("strip-legend").replaceChildren(
    key("b-roots", "last token of a request"),
    key("b-accepted", "accepted draft"),
    key("b-rejected", "rejected draft"),
    key("b-line", "limit"),
  );
}

onKeyNeeded(askForKey);
$("reload").addEventListener("click", () => location.reload());
legends();
chat.setUp();
batch.setUp();
load.setUp();
look();
