// What this server made, in pages, newest first; and actions on it.
import { batch, effect, signal } from "./lib.js";
import { get, patch, picture, remove } from "./api.js";
import { ended } from "./drawings.js";

const PAGE = 60;
const LOOK_MS = 15000;

export const filter = { words: signal(""), model: signal(""), starred: signal(false) };
export const items = signal([]);
export const total = signal(null); // number of matches
export const fresh = signal(0); // made since the list was loaded
export const busy = signal(false);
export const trouble = signal("");
export const selected = signal(new Set()); // names
export const more = signal(null); // where the next page begins, or null

let asked = 0; // late responses to older requests are dropped

const query = (extra) => {
  const given = { q: filter.words.value, model: filter.model.value, starred: filter.starred.value || "", ...extra };
  return new URLSearchParams(Object.entries(given).filter(([, value]) => value !== "" && value !== null));
};

async function ask(extra, take) {
  const mine = (asked += 1);
  busy.value = true;
  try {
    const page = await get(`v1/images/gallery?${query({ limit: PAGE, ...extra })}`);
    if (mine === asked) batch(() => ((more.value = page.next), take(page)));
  } catch (error) {
    if (mine === asked && !error.offline) trouble.value = error.message;
  } finally {
    if (mine === asked) busy.value = false;
  }
}

/** Reload the list. */
export const load = () =>
  ask({}, ({ data, total: count }) => {
    [items.value, total.value, fresh.value, trouble.value] = [data, count, 0, ""];
    selected.value = new Set();
  });

/** Load the next page, if there is one. */
export async function loadMore() {
  if (!busy.value && more.value) await ask({ before: more.value }, ({ data }) => (items.value = [...items.value, ...data]));
}

/** Count new ones; the list changes when the user asks. */
async function look() {
  if (location.hash !== "#gallery" || document.hidden || busy.value || total.value === null) return;
  const page = await get(`v1/images/gallery?${query({ limit: 1 })}`).catch(() => null);
  if (!page || busy.value) return;
  if (!items.value.length && page.total) return load();
  if (page.data[0] && page.data[0].name !== items.value[0]?.name) fresh.value = Math.max(1, page.total - total.value);
}

setInterval(look, LOOK_MS);
effect(() => void (ended.value && queueMicrotask(look)));

let typing = 0;

export function search(words) {
  filter.words.value = words;
  clearTimeout(typing);
  typing = setTimeout(load, 200);
}

const change = (one) => {
  items.value = items.value.map((each) => (each.name === one.name ? one : each));
};

export async function star(names, starred) {
  for (const name of names) change(await patch(`v1/images/gallery/${name}`, { starred }));
}

export async function erase(names) {
  const gone = new Set();
  try {
    for (const name of names) {
      await remove(`v1/images/gallery/${name}`).catch((error) => {
        if (error.code !== "picture_not_found") throw error; // else it is gone
      });
      gone.add(name);
    }
  } catch (error) {
    trouble.value = error.message;
  }
  batch(() => {
    items.value = items.value.filter((each) => !gone.has(each.name));
    total.value -= gone.size;
    selected.value = new Set([...selected.value].filter((name) => !gone.has(name)));
  });
}

export function download(names) {
  for (const name of names) {
    const link = Object.assign(document.createElement("a"), { href: picture(name), download: name });
    link.click();
  }
}

export function select(name, on = !selected.value.has(name)) {
  const names = new Set(selected.value);
  if (on) names.add(name);
  else names.delete(name);
  selected.value = names;
}

export const selectAll = () => (selected.value = new Set(items.value.map((each) => each.name)));
export const selectNone = () => (selected.value = new Set());
