// One result, large, with its recipe; and the question before deleting.
import { html, nothing, signal } from "./lib.js";
import { picture } from "./api.js";
import { modal, tool } from "./controls.js";
import { use } from "./form.js";
import { isSound, media } from "./media.js";
import { download, erase, items, star } from "./gallery.js";
import { rework, strengthOf } from "./source.js";
import { many, moment, short } from "./words.js";

/** `{ name }` of the gallery's, or `{ src, recipe, source, warnings }` of a file. */
export const opened = signal(null);
const doomed = signal(null); // names waiting for confirmation

export const open = (one) => (opened.value = one);
export const sure = (names) => (doomed.value = names);

// Words, and a field of the recipe or what is made of it.
const ROWS = [
  ["Negative prompt", "negative_prompt"],
  ["Model", "model"],
  ["Size", (recipe) => recipe.width ? `${recipe.width} × ${recipe.height}` : ""],
  ["Frames", "num_frames"],
  ["Frames a second", "fps"],
  ["Seconds", "seconds"],
  ["Steps", "steps"],
  ["Guidance", "guidance_scale"],
  ["Scheduler", "scheduler"],
  ["Seed", "seed"],
  ["Strength", "strength"],
  ["Clip skip", "clip_skip"],
  ["Eta", "eta"],
  ["Guidance rescale", "guidance_rescale"],
  ["LoRAs", (recipe) => recipe.loras?.map(([name, , , weight]) => `${name} ${weight}`).join(", ")],
  ["Controls", (recipe) => recipe.controls?.map(({ name }) => name).join(", ")],
  ["Pipeline", "pipeline"],
  ["Weights", "source"],
  ["Drawn on", (recipe) => recipe.device && `${recipe.device}, ${recipe.dtype}`],
  ["Made with", (recipe) => recipe.versions && Object.entries(recipe.versions).map((pair) => pair.join(" ")).join(", ")],
];

const said = (value) => value !== null && value !== undefined && value !== "";

const recipeList = (recipe, more = []) => html`<dl class="recipe">
  ${[...ROWS.map(([words, of]) => [words, of.call ? of(recipe) : recipe[of]]), ...more].filter(([, value]) => said(value))
    .map(([words, value]) => html`<dt>${words}</dt><dd>${value}</dd>`)}
</dl>`;

/** Use it, and go where it is used. */
function apply(recipe, what) {
  use(recipe, what);
  const edited = recipe.image_sha256?.length || (recipe.strength && !recipe.pipeline);
  if (what === "all" && edited) strengthOf(recipe.strength);
  opened.value = null;
  location.hash = what === "all" && edited ? "rework" : "make";
}

const neighbour = (step) => {
  const at = items.value.findIndex((each) => each.name === opened.value.name);
  const next = items.value[at + step];
  if (at >= 0 && next) opened.value = next;
};

const now = () => items.value.find((each) => each.name === opened.value.name) ?? opened.value;

function keys(event) {
  if (event.target.closest("input, textarea, select") || event.ctrlKey || event.metaKey) return;
  const one = now();
  const act = {
    ArrowLeft: () => neighbour(-1), ArrowRight: () => neighbour(1), s: () => one.name && star([one.name], !one.starred),
    d: () => one.name && download([one.name]), Delete: () => one.name && sure([one.name]),
  }[event.key];
  if (act) {
    event.preventDefault();
    act();
  }
}

const close = () => (opened.value = null);

export function viewer() {
  if (!opened.value) return doomed.value ? question() : nothing;
  const one = now();
  const recipe = one.recipe;
  const src = one.src ?? picture(one.name);
  return html`<dialog class="viewer" aria-label="Picture" ${modal()} @close=${close} @keydown=${keys}>
    <div class="looked">${media(short(recipe?.prompt || "Without words", 120), { src, name: one.name })}</div>
    <div class="told">
      <div class="actions">
        ${one.name ? html`
          ${tool("back", "Newer", () => neighbour(-1))}${tool("forward", "Older", () => neighbour(1))}
          ${tool("star", "Star", () => star([one.name], !one.starred), { pressed: one.starred })}
          ${tool("download", "Download", () => download([one.name]))}${tool("trash", "Delete", () => sure([one.name]))}` : nothing}
        <span class="spring"></span>${tool("close", "Close", close)}
      </div>
      ${one.source ? html`<p class="hint">Written by ${one.source}</p>` : nothing}
      ${recipe ? html`
        <p class="words">${recipe.prompt || "Without words"}</p>
        <div class="actions">
          <button class="primary" @click=${() => apply(recipe, "all")}>Use all</button>
          <button @click=${() => apply(recipe, "prompt")}>Use prompt</button>
          <button ?disabled=${!said(recipe.seed)} @click=${() => apply(recipe, "seed")}>Use seed</button>
          ${recipe.fps || isSound(one.name) ? nothing
            : html`<button @click=${() => (close(), rework({ src }, { request: recipe }))}>Rework it</button>`}
        </div>
        ${one.warnings?.length ? html`<ul class="warnings">${one.warnings.map((each) => html`<li>${each}</li>`)}</ul>` : nothing}
        ${recipeList(recipe, [["Made", one.created && moment(one.created)], ["File", one.name]])}`
        : html`<p class="quiet">This file contains no recipe.</p>`}
    </div>
    ${doomed.value ? question() : nothing}
  </dialog>`;
}

async function destroy() {
  const names = doomed.value;
  const at = items.value.findIndex((each) => each.name === opened.value?.name);
  doomed.value = null;
  await erase(names);
  if (opened.value && names.includes(opened.value.name)) opened.value = items.value[Math.min(at, items.value.length - 1)] ?? null;
}

const question = () => html`<dialog class="dialog" aria-labelledby="sure" ${modal()} @close=${() => (doomed.value = null)}>
  <div class="stack">
    <h2 id="sure">Delete ${many(doomed.value.length, "file")}?</h2>
    <p>This cannot be undone.</p>
    <div class="actions"><button class="bad" @click=${destroy}>Delete</button><button autofocus @click=${() => (doomed.value = null)}>Keep</button></div>
  </div>
</dialog>`;
