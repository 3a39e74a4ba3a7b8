// Make: pictures from a prompt.
import { html, nothing } from "./lib.js";
import { cancel, cancelAll, draw, drawings, running } from "./drawings.js";
import { promptFields, settingFields } from "./fields.js";
import { ROUTES, form, problem, request, seedIsValid } from "./form.js";
import { remember } from "./history.js";
import { EMBEDDED, kind, model } from "./models.js";
import { resultActions } from "./rework.js";
import { chosen, looked, stage } from "./stage.js";

const EXAMPLES = ["a rocket on a blue background", "a red apple on a white background", "a cat on a green background"];

export function drawNow() {
  if (!form.prompt.value.trim()) {
    problem.value = { param: "prompt", message: "Say what to draw." };
    document.getElementById("prompt")?.focus();
    return;
  }
  if (!seedIsValid(form.seed.value)) return document.getElementById("seed")?.focus();
  problem.value = null;
  remember(form.prompt.value.trim());
  chosen.value = null;
  draw(ROUTES[kind.value], request());
}

/** Of Make and Rework. */
export function drawButtons(start) {
  const now = looked()?.drawing;
  const target = now?.live ? now : running.value.at(-1);
  return html`
    <div class="actions main">
      <button class="primary" ?disabled=${!model.value} @click=${start}>Draw</button>
      ${target ? html`<button @click=${() => cancel(target)}>Cancel</button>` : nothing}
      ${running.value.length > 1 ? html`<button @click=${cancelAll}>Cancel all</button>` : nothing}
      <kbd class="hint">Ctrl + Enter</kbd>
    </div>`;
}

function example(words) {
  form.prompt.value = words;
  drawNow();
}

const welcome = () => html`
  <div class="welcome">
    <h2>What shall it be?</h2>
    ${model.value?.id === EMBEDDED
      ? html`<p>The built-in model draws small things on plain backgrounds. Try one of these, or write your own.</p>
          <ul class="examples">${EXAMPLES.map((each) => html`<li><button @click=${() => example(each)}>${each}</button></li>`)}</ul>`
      : html`<p>Describe it in the prompt, and press Ctrl + Enter.</p>`}
  </div>`;

export const make = () => html`
  <main class="work">
    <section class="ask" aria-label="What to draw">${promptFields(drawNow)}${drawButtons(drawNow)}</section>
    ${stage({
      empty: drawings.value.length ? nothing : welcome(),
      actions: resultActions,
    })}
    <section class="settings" aria-label="Settings">${settingFields()}</section>
  </main>`;
