// Prompts that were drawn, to go back to and forward again.
import { computed, signal } from "./lib.js";
import { kept } from "./kept.js";
import { form, set } from "./form.js";

const MOST = 100;

const prompts = kept("prompts", []); // the newest last
const at = signal(null); // index into them while one of them is looked at; null at the present
let present = "";

export const past = computed(() => {
  const index = at.value ?? prompts.value.length;
  return { back: earlier(index) >= 0, forward: at.value !== null };
});

// The last before `index` that says something else than the field does.
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
