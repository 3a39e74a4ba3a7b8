// State that survives a reload.
import { effect, signal } from "./lib.js";

const read = (storage, name) => {
  try {
    return JSON.parse(storage.getItem(`sfumato.${name}`));
  } catch {
    return null; // not ours, or storage is off
  }
};

const write = (storage, name, value) => {
  try {
    storage.setItem(`sfumato.${name}`, JSON.stringify(value));
  } catch {
    // full or off: the page works without
  }
};

/** A signal whose value is stored under `name`. */
export function kept(name, initial, storage = localStorage) {
  const found = read(storage, name);
  const one = signal(typeof found === typeof initial && found !== null ? found : initial);
  effect(() => write(storage, name, one.value));
  return one;
}

export const session = {
  read: (name) => read(sessionStorage, name),
  write: (name, value) => write(sessionStorage, name, value),
};
