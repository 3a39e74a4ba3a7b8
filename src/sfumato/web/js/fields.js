// The fields below the prompt that the selected model supports; its defaults are the placeholders.
import { html, nothing } from "./lib.js";
import { adapters } from "./adapters.js";
import { choice, number, text, textarea, tool } from "./controls.js";
import { RARE, form, problemOf, randomSeed, seedIsValid, set } from "./form.js";
import { about, defaults, limits, model, models, schedulers, takes, wanted } from "./models.js";
import { forward, older, past, typed } from "./history.js";
import { sizeFields } from "./size.js";
import { lastSeed } from "./drawings.js";

const shown = (value) => (value === null || value === undefined ? "" : String(value));

export const promptFields = (draw) => html`
  <div class="prompt">
    ${textarea({ id: "prompt", label: "Prompt", value: form.prompt.value, rows: 4, placeholder: "What to draw",
      input: typed, keydown: (event) => enter(event, draw), problem: problemOf("prompt") })}
    <div class="history">
      ${tool("back", "Earlier prompt", () => older(), { disabled: !past.value.back })}
      ${tool("forward", "Later prompt", () => forward(), { disabled: !past.value.forward })}
    </div>
  </div>
  ${takes("negative")
    ? textarea({ id: "negative", label: "Negative prompt", value: form.negative.value, rows: 2,
        placeholder: defaults.value.negative_prompt ?? "What not to draw", input: (value) => set("negative", value),
        keydown: (event) => enter(event, draw), problem: problemOf("negative_prompt") })
    : nothing}`;

function enter(event, draw) {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    draw();
  }
}

export const modelField = () =>
  choice({ id: "model", label: "Model", value: model.value?.id ?? "", wide: true, problem: problemOf("model"),
    input: (value) => (wanted.value = value), options: models.value.map(({ id }) => [id, id]),
    hint: about.value?.description ?? "" });

/** `sized`: show width and height; `several`: show a count. */
export const settingFields = ({ sized = true, several = true, before = nothing } = {}) => html`
  <div class="fields">
    ${modelField()}
    ${before}
    ${sized ? sizeFields() : nothing}
    ${takes("steps")
      ? number({ id: "steps", label: "Steps", value: form.steps.value, input: (value) => set("steps", value),
          placeholder: shown(defaults.value.steps), min: 1, max: limits.value.steps, step: 1, problem: problemOf("steps") })
      : nothing}
    ${takes("guidance_scale")
      ? number({ id: "guidance", label: "Guidance", value: form.guidance.value, input: (value) => set("guidance", value),
          placeholder: shown(defaults.value.guidance_scale), min: 0, max: 100, problem: problemOf("guidance_scale") })
      : nothing}
    ${choice({ id: "scheduler", label: "Scheduler", value: form.scheduler.value, wide: true, problem: problemOf("scheduler"),
      input: (value) => set("scheduler", value),
      options: schedulerOptions() })}
    ${seedField()}
    ${several
      ? number({ id: "count", label: "Count", value: form.count.value, input: (value) => set("count", value), min: 1,
          max: limits.value.n, step: 1, problem: problemOf("n") })
      : nothing}
  </div>
  ${rareFields()}${adapters()}`;

const BOUNDS = { clip_skip: { label: "Clip skip", max: 64, step: 1 }, eta: { label: "Eta", max: 1 },
  guidance_rescale: { label: "Guidance rescale", max: 1 } };

/** Folded away, unless one of them has a value or was refused. */
function rareFields() {
  const names = RARE.filter(takes);
  if (!names.length) return nothing;
  return html`<details class="rare" ?open=${names.some((name) => form[name].value || problemOf(name))}>
    <summary>More</summary>
    <div class="fields">${names.map((id) => number({ id, value: form[id].value, input: (value) => set(id, value),
      placeholder: shown(defaults.value[id] ?? 0), min: 0, problem: problemOf(id), ...BOUNDS[id] }))}</div>
  </details>`;
}

function schedulerOptions() {
  const own = defaults.value.scheduler;
  const options = schedulers.value.map(({ id, description }) => [id, `${id} · ${description}`]);
  const { value } = form.scheduler; // from a recipe it may have a schedule at its end, which the list does not have
  if (value && !options.some(([id]) => id === value)) options.push([value, value]);
  return [["", own ? `As the model: ${own}` : "As the model"], ...options];
}

function seedField() {
  const { seed, locked } = form;
  const bad = seedIsValid(seed.value) ? "" : "A whole number from 0 to 9223372036854775807 is needed.";
  const type = (value) => {
    set("seed", value.trim());
    locked.value = value.trim() !== "";
  };
  return text({ id: "seed", label: "Seed", value: seed.value, input: type, placeholder: "Random", mode: "numeric", wide: true,
    problem: bad || problemOf("seed"), after: html`
      ${tool("dice", "New seed", () => set("seed", randomSeed()))}
      ${tool(locked.value ? "lock" : "unlock", "Keep the seed", () => (locked.value = !locked.value), { pressed: locked.value })}
      ${tool("repeat", "Seed of the last picture", () => type(lastSeed() ?? ""), { disabled: lastSeed() === null })}` });
}
