// Requests of this tab: sent, watched, and found or sent again.
import { batch, computed, signal, untracked } from "./lib.js";
import { Failure, failureOf, get, picture, remove, send } from "./api.js";
import { back } from "./connection.js";
import { events } from "./events.js";
import { ROUTES, problem } from "./form.js";
import { session } from "./kept.js";

const WATCH_MS = 500;
const MOST = 40; // drawings a tab remembers
const PREVIEWS = 3;

/** One request. `state`: waiting, drawing, done, failed or cancelled. */
class Drawing {
  constructor({ id = crypto.randomUUID(), path, request, state = "waiting", job, pictures, message = "", hidden = false }) {
    Object.assign(this, { id, path, request, job, hidden, stop: new AbortController(), again: true, sources: null });
    this.state = signal(state);
    this.progress = signal(null);
    this.message = signal(message);
    this.pictures = signal(pictures ?? Array.from({ length: request.n ?? 1 }, (_, index) => ({ index, done: false })));
  }
  get live() {
    return this.state.value === "waiting" || this.state.value === "drawing";
  }
  get isJob() { // a clip or a sound; `job` is the server's id
    return !this.path.startsWith("v1/images");
  }
  show(index, change) {
    this.pictures.value = this.pictures.value.map((each) => (each.index === index ? { ...each, ...change } : each));
  }
  end(state, message = "") {
    batch(() => {
      this.state.value = state;
      this.message.value = message;
    });
    remember();
    ended.value += 1;
  }
}

export const drawings = signal([]); // oldest first
export const ended = signal(0); // number of drawings that have ended
export const running = computed(() => drawings.value.filter((each) => each.live));

export const lastSeed = () => {
  const done = drawings.value.flatMap((each) => each.pictures.value).filter((each) => each.done);
  return done.length ? String(done.at(-1).seed) : null;
};

function remember() {
  session.write("drawings", untracked(() => drawings.value.filter((each) => each.job || !(each.sources || each.request.controls) || each.state.value === "done").map((each) => ({
    id: each.id, job: each.job, path: each.path, request: { ...each.request, controls: undefined }, hidden: each.hidden, state: each.state.value, message: each.message.value,
    pictures: each.pictures.value.map(({ src, ...rest }) => (src?.startsWith("data:") ? rest : { ...rest, src })),
  }))));
}

/** `sources`: files by field name; `hidden`: not in the strip. */
export function draw(path, request, { sources = null, hidden = false } = {}) {
  const drawing = new Drawing({ path, request, hidden });
  drawing.sources = sources;
  drawings.value = [...drawings.value, drawing].filter((each, index, all) => each.live || index >= all.length - MOST);
  remember();
  drawing.over = run(drawing);
  return drawing;
}

async function run(drawing) {
  watch();
  try {
    await (drawing.isJob ? job(drawing) : stream(drawing));
  } catch (error) {
    await fail(drawing, error);
  }
}

async function stream(drawing) {
  const body = { ...drawing.request, stream: true, partial_images: PREVIEWS, detached: true };
  const answer = await send("POST", drawing.path, { id: drawing.id, signal: drawing.stop.signal, ...payload(drawing, body) });
  if (!answer.headers.get("content-type").startsWith("text/event-stream")) return whole(drawing, await answer.json());
  for await (const event of events(answer)) {
    const index = event.index ?? 0;
    if (event.type.endsWith(".partial_image")) {
      drawing.state.value = "drawing";
      drawing.show(index, { src: `data:image/png;base64,${event.b64_json}` });
    } else {
      finish(drawing, index, event);
    }
  }
  if (drawing.pictures.value.every((each) => each.done)) drawing.end("done");
  else throw new Failure("The connection to the server broke.", { code: "offline" });
}

/** Sent again with its key, it is the same job. */
async function job(drawing) {
  drawing.followed = true;
  const { prompt, ...given } = drawing.request;
  const body = drawing.path === ROUTES.audio ? { ...given, input: prompt } : { ...given, prompt, partial_images: PREVIEWS };
  const more = { prefer: "respond-async", "idempotency-key": drawing.id };
  const answer = await send("POST", drawing.path, { more, ...payload(drawing, body) });
  drawing.job = (await answer.json()).id;
  if (!drawing.live) return stopped(drawing);
  remember();
  return follow(drawing);
}

/** The answer of a job, once it is there. */
async function answered(drawing) {
  const { status, response } = await get(`v1/jobs/${drawing.job}`);
  if (!response || !drawing.live) return;
  const { headers, body } = response;
  if (status === "cancelled") return drawing.end("cancelled");
  if (status === "failed") return fail(drawing, failureOf(body.error));
  const { seed, response_format } = drawing.request;
  const name = headers["x-sfumato-file"];
  drawing.show(0, { done: true, seed, name: name ?? `sound.${response_format}`, warnings: [headers["x-sfumato-warning"]].filter(Boolean),
    src: name ? picture(name) : `data:${headers["content-type"]};base64,${body}` });
  drawing.end("done");
}

function finish(drawing, index, { name, b64_json, seed, warnings = [] }) {
  const src = name ? picture(name) : `data:image/png;base64,${b64_json}`;
  drawing.show(index, { done: true, src, name, seed, warnings });
}

function whole(drawing, { data }) {
  data.forEach((each, index) => finish(drawing, index, { ...each, name: each.url?.split("/").at(-1) }));
  drawing.end("done");
}

function payload({ sources }, json) {
  if (!sources) return { json };
  const form = new FormData();
  for (const [name, value] of Object.entries(json)) form.append(name, typeof value === "object" ? JSON.stringify(value) : value);
  for (const [name, file] of Object.entries(sources)) form.append(name, file, `${name}.png`);
  return { form };
}

async function fail(drawing, error) {
  if (!drawing.live) return;
  if (error.code === "cancelled") return drawing.end("cancelled");
  if (!(error instanceof Failure)) {
    drawing.end("failed", `Error in the page: ${error.message}`);
    throw error;
  }
  if (error.offline) {
    batch(() => {
      drawing.state.value = "waiting";
      drawing.progress.value = null;
    });
    await back();
    return resume(drawing);
  }
  batch(() => {
    drawing.end("failed", error.message);
    if (!drawing.hidden) problem.value = { param: error.param, message: error.message };
  });
}

const resume = (drawing) => (drawing.isJob && !drawing.job ? run(drawing) : follow(drawing));

/** Follow a job or a lost drawing; one that the server does not know is drawn again, once. */
async function follow(drawing) {
  drawing.followed = true;
  while (drawing.live) {
    try {
      const [seen] = (await get(`v1/images/progress?preview=true&id=${encodeURIComponent(drawing.job ?? drawing.id)}`)).data;
      if (drawing.job && !["queued", "drawing"].includes(seen?.status)) await answered(drawing);
      else if (!seen) return redraw(drawing);
      else apply(drawing, seen);
    } catch (error) {
      if (error.offline) await back();
      else return drawing.end("failed", error.message);
    }
    if (drawing.live) await new Promise((resolve) => setTimeout(resolve, WATCH_MS));
  }
}

function apply(drawing, seen) {
  drawing.progress.value = seen;
  for (const { index, name, seed } of seen.kept) finish(drawing, index, { name, seed });
  if (seen.preview) drawing.show(seen.preview.index, { src: `data:image/png;base64,${seen.preview.b64_json}` });
  if (seen.status === "drawing") drawing.state.value = "drawing";
  if (seen.status === "completed") {
    const lost = drawing.pictures.value.some((each) => !each.done);
    drawing.end(lost ? "failed" : "done", lost ? "It was drawn while this page was closed, and the server does not keep pictures." : "");
  }
  if (seen.status === "failed") drawing.end("failed", seen.error?.message ?? "It failed.");
  if (seen.status === "cancelled") drawing.end("cancelled");
}

function redraw(drawing) {
  if (!drawing.again) return drawing.end("failed", "The server lost this request twice. Try again.");
  batch(() => {
    drawing.again = drawing.followed = false;
    drawing.id = crypto.randomUUID();
    drawing.progress.value = null;
    drawing.state.value = "waiting";
  });
  remember();
  return run(drawing);
}

let watching = false;

/** Streams do not report progress. */
async function watch() {
  if (watching) return;
  watching = true;
  while (running.value.length) {
    await new Promise((resolve) => setTimeout(resolve, WATCH_MS));
    const some = running.value.filter((each) => !each.followed);
    if (!some.length) continue;
    const ids = some.slice(0, MOST).map((each) => `id=${encodeURIComponent(each.id)}`);
    const { data } = await get(`v1/images/progress?${ids.join("&")}`).catch(() => ({ data: [] }));
    batch(() => data.forEach((seen) => note(some.find((each) => each.id === seen.id), seen)));
  }
  watching = false;
}

function note(drawing, seen) {
  if (!drawing.live) return;
  drawing.progress.value = seen;
  if (seen.status === "drawing") drawing.state.value = "drawing";
}

/** The request is detached: disconnecting alone would not end it. */
export async function cancel(drawing) {
  if (!drawing.live) return;
  drawing.stop.abort();
  drawing.end("cancelled");
  await stopped(drawing);
}

const stopped = ({ id, job }) => remove(job ? `v1/jobs/${job}` : `v1/images/progress/${id}`).catch(() => {});

export const cancelAll = () => Promise.all(running.value.map(cancel));

export const again = (drawing) => draw(drawing.path, drawing.request, { sources: drawing.sources, hidden: drawing.hidden });

/** After a reload. */
export function restore() {
  const found = (session.read("drawings") ?? []).map((each) => new Drawing(each));
  drawings.value = found;
  for (const drawing of found.filter((each) => each.live)) drawing.over = resume(drawing);
}
