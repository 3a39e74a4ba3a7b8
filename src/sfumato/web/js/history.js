// Earlier prompts, to go back and forward.
import { computed, signal } from "./lib.js";
import { kept } from "./kept.js";
import { form, set } from "./form.js";

const MOST = 100;

const prompts = kept("prompts", []); // newest last
const at = signal(null); // index of the prompt shown; null: the current one
let present = "";

export const past = computed(() => {
  const index = at.value ?? prompts.value.length;
  return { back: earlier(index) >= 0, forward: at.value !== null };
});

// The last one before `index` that differs from the field.
function earlier(index) {
  let found = index - 1;
  while (found >= 0 && prompts.value[found] === form.prompt.value) found -= 1;
  return found;
}

export function typed(value) {
  at.value = null;
  set("prompt", value);
}

export function older() {
  const index = earlier(at.value ?? prompts.value.length);
  if (index < 0) return;
  if (at.value === null) present = form.prompt.value;
  at.value = index;
  set("prompt", prompts.value[index]);
}

export function forward() {
  if (at.value === null) return;
  const index = at.value + 1;
  at.value = index < prompts.value.length ? index : null;
  set("prompt", at.value === null ? present : prompts.value[index]);
}

export function remember(prompt) {
  at.value = null;
  if (prompt) prompts.value = [...prompts.value.filter((each) => each !== prompt), prompt].slice(-MOST);
}
