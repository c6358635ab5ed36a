// Requests to the API server that this page came from: the key, streams of events, and errors as sentences.

const KEY = "echo-trt.key";
export const LONGEST_EVENT = 4 << 20; // characters; an event that is longer ends its stream

/** Read or keep something in the tab. Where the browser denies that, the page asks for the key again. */
function inTab(use) {
  try {
    return use(sessionStorage);
  } catch {
    return null;
  }
}

let key = inTab((storage) => storage.getItem(KEY)) || "";
let askForKey = async () => "";

export class Refused extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

/** ``ask``: asks the user for a key, told whether the last one was wrong; resolves to it. */
export function onKeyNeeded(ask) {
  askForKey = ask;
}

let asking = null;

/** Ask until there is a key that a header can hold. */
async function anotherKey(wrong) {
  let given = "";
  do given = await askForKey(wrong);
  while (!/^[\x21-\x7e]+$/.test(given) && (wrong = true));
  key = given; // until now other requests go on with the key before
  inTab((storage) => storage.setItem(KEY, key));
  asking = null;
}

/** Fetch, asking for a key as often as it takes. Throws Refused with the server's sentence. */
export async function call(path, body, signal) {
  for (;;) {
    const used = key;
    const headers = used ? { authorization: `Bearer ${used}` } : {};
    const options = { headers, signal, cache: "no-store", credentials: "omit" };
    if (body) Object.assign(options, { method: "POST", body: JSON.stringify(body) });
    if (body) headers["content-type"] = "application/json";
    const reply = await fetch(path, options);
    if (reply.ok) return reply;
    if (reply.status === 401) {
      if (key === used) {
        asking = asking || anotherKey(Boolean(used));
        await asking;
      }
      signal?.throwIfAborted();
      continue;
    }
    let message = `The server answers with status ${reply.status}.`;
    try {
      message = (await reply.json()).error.message;
    } catch { /* no sentence of the server's */ }
    throw new Refused(message, reply.status);
  }
}

/** The server-sent events of a reply: {event, data}. Throws where the stream is cut or an event is too long. */
export async function* events(reply) {
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      text += value;
      let end;
      while ((end = text.indexOf("\n\n")) >= 0) {
        const found = { event: "message", data: "" };
        for (const line of text.slice(0, end).split("\n")) {
          if (line.startsWith("event: ")) found.event = line.slice(7);
          if (line.startsWith("data: ")) found.data += line.slice(6);
        }
        text = text.slice(end + 2);
        if (found.data) yield found;
      }
      if (text.length > LONGEST_EVENT) throw new Refused("The server sent an event that is too long.", 0);
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

export const wait = (ms) => new Promise((resolve) => setTimeout(resolve, ms));
