// The server's public API.
import { askForKey, key } from "./key.js";
import { lost, reached } from "./connection.js";

export const at = (path) => new URL(path, document.baseURI);

export const picture = (name) => at(`generated-images/${encodeURIComponent(name)}`).href;
export const thumbnail = (name) => `${picture(name)}/thumbnail`;

/** What went wrong; `param` is the field at fault, `code` the kind of error. */
export class Failure extends Error {
  constructor(message, { status = 0, code = "", param = "" } = {}) {
    super(message);
    Object.assign(this, { status, code, param });
  }
  get offline() {
    return this.code === "offline";
  }
}

export const failureOf = (error) =>
  new Failure(error.message ?? "The server answered with an error.", { code: error.code, param: error.param });

// Seeds may be too large for a double: those stay text.
const exact = (_, value, context) =>
  typeof value === "number" && Number.isInteger(value) && !Number.isSafeInteger(value) && context?.source
    ? context.source
    : value;

export const parse = (text) => JSON.parse(text, exact);

/** The response. Raises Failure. Asks for a key if one is required. */
export async function send(method, path, { json, form, id, signal, more } = {}) {
  for (;;) {
    const headers = { ...more };
    if (json !== undefined) headers["content-type"] = "application/json";
    if (id) headers["x-request-id"] = id;
    if (key.value) headers.authorization = `Bearer ${key.value}`;
    const used = key.value;
    let answer;
    try {
      answer = await fetch(at(path), { method, headers, signal, body: json === undefined ? form : JSON.stringify(json) });
    } catch (error) {
      if (error.name === "AbortError") throw new Failure("Stopped.", { code: "cancelled" });
      lost();
      throw new Failure("The server does not respond.", { code: "offline" });
    }
    if (answer.status === 503 && answer.headers.has("x-sfumato-starting")) {
      lost();
      throw new Failure("The server is starting.", { code: "offline" });
    }
    reached();
    if (answer.status === 401) {
      await askForKey(used);
      continue;
    }
    if (answer.ok) return answer;
    throw await refused(answer);
  }
}

async function refused(answer) {
  try {
    const { error } = await answer.json();
    return new Failure(error.message, { status: answer.status, code: error.code, param: error.param ?? "" });
  } catch {
    return new Failure(`The server answered ${answer.status} without a reason.`, { status: answer.status });
  }
}

export const get = async (path, options) => parse(await (await send("GET", path, options)).text());
export const post = async (path, json) => parse(await (await send("POST", path, { json })).text());
export const patch = async (path, json) => parse(await (await send("PATCH", path, { json })).text());
export const remove = async (path) => parse(await (await send("DELETE", path)).text());
