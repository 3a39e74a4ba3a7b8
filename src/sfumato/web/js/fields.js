// The model's fields; its defaults are the placeholders.
import { html, nothing } from "./lib.js";
import { adapters } from "./adapters.js";
import { choice, number, text, textarea, tool } from "./controls.js";
import { LENGTHS, form, format, problemOf, randomSeed, seedIsValid, set } from "./form.js";
import { RARE, about, defaults, kind, limits, model, models, schedulers, takes, wanted } from "./models.js";
import { forward, older, past, typed } from "./history.js";
import { sizeFields } from "./size.js";
import { lastSeed } from "./drawings.js";

const shown = (value) => (value === null || value === undefined ? "" : String(value));

export const promptFields = (draw) => html`
  <div class="prompt">
    ${textarea({ id: "prompt", label: "Prompt", value: form.prompt.value, rows: 4, placeholder: kind.value === "audio" ? "What to hear" : "What to draw",
      input: typed, keydown: (event) => enter(event, draw), problem: problemOf("prompt", "input") })}
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

// A number of the form, and its name in requests.
const amount = (id, more, name = id) =>
  number({ id, value: form[id].value, input: (value) => set(id, value), placeholder: shown(defaults.value[name]), min: 0,
    problem: problemOf(name), ...more });

export const settingFields = ({ sized = true, several = true, before = nothing } = {}) => html`
  <div class="fields">
    ${modelField()}
    ${before}
    ${sized && kind.value !== "audio" ? sizeFields() : nothing}
    ${lengthFields()}
    ${takes("steps") ? amount("steps", { label: "Steps", min: 1, max: limits.value.steps, step: 1 }) : nothing}
    ${takes("guidance_scale") ? amount("guidance", { label: "Guidance", max: 100 }, "guidance_scale") : nothing}
    ${choice({ id: "scheduler", label: "Scheduler", value: form.scheduler.value, wide: true, problem: problemOf("scheduler"),
      input: (value) => set("scheduler", value),
      options: schedulerOptions() })}
    ${seedField()}
    ${several && kind.value === "image"
      ? amount("count", { label: "Count", min: 1, max: limits.value.n, step: 1, placeholder: "" }, "n")
      : nothing}
  </div>
  ${rareFields()}${adapters()}`;

function lengthFields() {
  const { frames, frame_step: step, seconds } = limits.value;
  const bounds = {
    num_frames: { label: "Frames", min: 1, max: frames, step: step ?? 1, hint: step > 1 ? `1 more than a multiple of ${step}` : "" },
    seconds: { label: "Seconds", max: seconds },
    fps: { label: "Frames a second", min: 1, max: 120 },
  };
  if (kind.value === "image") return nothing;
  return html`${LENGTHS[kind.value].map((id) => amount(id, bounds[id]))}
    ${choice({ id: "format", label: "Format", value: format(), input: (value) => set("format", value),
      problem: problemOf("output_format", "response_format"),
      options: (about.value.formats ?? []).map((each) => [each, each.toUpperCase()]) })}`;
}

const BOUNDS = { clip_skip: { label: "Clip skip", max: 64, step: 1 }, eta: { label: "Eta", max: 1 },
  guidance_rescale: { label: "Guidance rescale", max: 1 } };

/** Folded, unless one has a value or was refused. */
function rareFields() {
  const names = RARE.filter(takes);
  if (!names.length) return nothing;
  return html`<details class="rare" ?open=${names.some((name) => form[name].value || problemOf(name))}>
    <summary>More</summary>
    <div class="fields">${names.map((id) => amount(id, BOUNDS[id]))}</div>
  </details>`;
}

function schedulerOptions() {
  const own = defaults.value.scheduler;
  const options = schedulers.value.map(({ id, description }) => [id, `${id} · ${description}`]);
  const { value } = form.scheduler; // from a recipe it may have a schedule at its end
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
