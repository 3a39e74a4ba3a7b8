// Requests of this tab: each is sent, watched and, after the server was unreachable, found or sent again.
import { batch, computed, signal, untracked } from "./lib.js";
import { Failure, get, picture, remove, send } from "./api.js";
import { back } from "./connection.js";
import { events } from "./events.js";
import { problem } from "./form.js";
import { session } from "./kept.js";

const WATCH_MS = 500;
const MOST = 40; // drawings a tab remembers
const PREVIEWS = 3;

/** One request. `state`: waiting, drawing, done, failed or cancelled. */
class Drawing {
  constructor({ id = crypto.randomUUID(), path, request, state = "waiting", pictures, message = "", hidden = false }) {
    Object.assign(this, { id, path, request, hidden, stop: new AbortController(), again: true, sources: null });
    this.state = signal(state);
    this.progress = signal(null);
    this.message = signal(message);
    this.pictures = signal(pictures ?? Array.from({ length: request.n ?? 1 }, (_, index) => ({ index, done: false })));
  }
  get live() {
    return this.state.value === "waiting" || this.state.value === "drawing";
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
  session.write("drawings", untracked(() => drawings.value.filter((each) => !(each.sources || each.request.controls) || each.state.value === "done").map((each) => ({
    id: each.id, path: each.path, request: { ...each.request, controls: undefined }, hidden: each.hidden, state: each.state.value, message: each.message.value,
    pictures: each.pictures.value.map(({ src, ...rest }) => (src?.startsWith("data:") ? rest : { ...rest, src })),
  }))));
}

/** Draw. `sources` are its files by field name; `hidden` ones are not listed in the strip. */
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
    await stream(drawing);
  } catch (error) {
    await fail(drawing, error);
  }
}

async function stream(drawing) {
  const body = { ...drawing.request, stream: true, partial_images: PREVIEWS, detached: true };
  const options = { id: drawing.id, signal: drawing.stop.signal };
  if (drawing.sources) options.form = formOf(body, drawing.sources);
  else options.json = body;
  const answer = await send("POST", drawing.path, options);
  if (!answer.headers.get("content-type").startsWith("text/event-stream")) return whole(drawing, await answer.json());
  for await (const event of events(answer)) {
    const index = event.index ?? 0;
    if (event.type.endsWith(".partial_image")) {
      drawing.state.value = "drawing";
      drawing.show(index, { src: `data:image/png;base64,${event.b64_json}`, step: event.partial_image_index + 1 });
    } else {
      finish(drawing, index, event);
    }
  }
  if (drawing.pictures.value.every((each) => each.done)) drawing.end("done");
  else throw new Failure("The connection to the server broke.", { code: "offline" });
}

function finish(drawing, index, { name, b64_json, seed, warnings = [] }) {
  const src = name ? picture(name) : `data:image/png;base64,${b64_json}`;
  drawing.show(index, { done: true, src, name, seed, warnings });
}

function whole(drawing, { data }) {
  data.forEach((each, index) => finish(drawing, index, { ...each, name: each.url?.split("/").at(-1) }));
  drawing.end("done");
}

function formOf(body, sources) {
  const form = new FormData();
  for (const [name, value] of Object.entries(body)) form.append(name, typeof value === "object" ? JSON.stringify(value) : value);
  for (const [name, file] of Object.entries(sources)) form.append(name, file, `${name}.png`);
  return form;
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
    return follow(drawing);
  }
  batch(() => {
    drawing.end("failed", error.message);
    if (!drawing.hidden) problem.value = { param: error.param, message: error.message };
  });
}

/** Follow a drawing whose connection was lost to its end; if the server no longer knows it, draw it again, once. */
async function follow(drawing) {
  drawing.followed = true;
  while (drawing.live) {
    try {
      const [seen] = (await get(`v1/images/progress?preview=true&id=${encodeURIComponent(drawing.id)}`)).data;
      if (!seen) return redraw(drawing);
      apply(drawing, seen);
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

/** Progress of streaming drawings, which their streams do not report. */
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

/** Disconnect and cancel: the request is detached, so disconnecting alone would not end it. */
export async function cancel(drawing) {
  if (!drawing.live) return;
  drawing.stop.abort();
  drawing.end("cancelled");
  await remove(`v1/images/progress/${drawing.id}`).catch(() => {});
}

export const cancelAll = () => Promise.all(running.value.map(cancel));

export const again = (drawing) => draw(drawing.path, drawing.request, { sources: drawing.sources, hidden: drawing.hidden });

/** After a reload: this tab's earlier and running drawings. */
export function restore() {
  const found = (session.read("drawings") ?? []).map((each) => new Drawing(each));
  drawings.value = found;
  for (const drawing of found.filter((each) => each.live)) drawing.over = follow(drawing);
}
