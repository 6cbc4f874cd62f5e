// Talks to the server: requests, the stream of events, problems, and the key.

const STORE = "saccade-key";

/** What went wrong, as the server's problem document says it. */
export class Trouble extends Error {
  constructor(problem, retryAfter = 0) {
    super(problem.detail || problem.title || "");
    this.problem = problem;
    this.status = problem.status || 0;
    this.retryAfter = retryAfter;
  }
}

export const key = {
  read: () => sessionStorage.getItem(STORE) || localStorage.getItem(STORE) || "",
  kept: () => Boolean(localStorage.getItem(STORE)),
  write(value, keep) {
    sessionStorage.removeItem(STORE);
    localStorage.removeItem(STORE);
    if (value) (keep ? localStorage : sessionStorage).setItem(STORE, value);
  },
};

/** A fetch with the key. Throws Trouble, or AbortError where `signal` ends it. */
async function send(path, init = {}) {
  const headers = new Headers(init.headers);
  if (key.read()) headers.set("Authorization", `Bearer ${key.read()}`);
  let response;
  try {
    response = await fetch(path, { ...init, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Trouble({ status: 0, title: "The server cannot be reached", detail: "Is it running, and are you online?" });
  }
  if (!response.ok) throw await trouble(response);
  return response;
}

async function trouble(response) {
  const wait = Number(response.headers.get("Retry-After")) || 0;
  const said = await response.json().catch(() => ({}));
  return new Trouble({ status: response.status, title: "Something went wrong", ...said }, wait);
}

export async function getJson(path) {
  return (await send(path, { headers: { Accept: "application/json" } })).json();
}

export async function postForBlob(path, form, signal) {
  return (await send(path, { method: "POST", body: form, signal })).blob();
}

/** The events of one request, as [name, data]. A server that does not stream sends its answer as the only one. */
export async function* watch(path, form, signal) {
  const response = await send(path, { method: "POST", body: form, signal, headers: { Accept: "text/event-stream, application/json;q=0.1" } });
  if (!response.headers.get("Content-Type")?.startsWith("text/event-stream")) {
    yield ["answer", await response.json()];
    return;
  }
  let ended = false;
  for await (const [name, data] of events(response.body)) {
    if (name === "problem") throw new Trouble(data, data.retry_after || 0);
    ended ||= name === "answer";
    yield [name, data];
  }
  if (!ended) throw new Trouble({ status: 0, title: "The connection broke", detail: "The answer did not arrive whole. Look again." });
}

async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let name = "message", data = [], rest = [];
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    // Chunks of a long line are joined only once its end is there.
    const lines = value.split("\n");
    if (lines.length === 1) { rest.push(value); continue; }
    lines[0] = rest.join("") + lines[0];
    rest = [lines.pop()];
    for (const raw of lines) {
      const line = raw.endsWith("\r") ? raw.slice(0, -1) : raw;
      if (line === "") {
        if (data.length) yield [name, JSON.parse(data.join("\n"))];
        name = "message"; data = [];
      } else if (line.startsWith("event:")) name = line.slice(6).trim();
      else if (line.startsWith("data:")) data.push(line.slice(5).replace(/^ /, ""));
    }
  }
}
