// The fields of a request, which survive a reload, and the request.
import { batch, signal } from "./lib.js";
import { kept } from "./kept.js";
import { RARE, about, controllable, defaults, kind, limits, model, takes, wanted } from "./models.js";

const MAX_SEED = 9223372036854775807n;

/** The fields of a length. */
export const LENGTHS = { image: [], video: ["num_frames", "seconds", "fps"], audio: ["seconds"] };

// Fields that a recipe has by the same name.
const SAME = ["width", "height", "steps", ...RARE, ...LENGTHS.video];
const TEXTS = [...SAME, "prompt", "negative", "guidance", "scheduler", "seed", "format"];

export const form = {
  ...Object.fromEntries(TEXTS.map((name) => [name, kept(name, "")])),
  locked: kept("locked", false),
  count: kept("count", "1"),
  loras: kept("loras", []), // { name, weight, text_weight? }
  controls: signal([]), // { name, weight, preprocess, image } of this visit
};

/** Where requests go, by what the selected model makes. */
export const ROUTES = { image: "v1/images/generations", video: "v1/videos", audio: "v1/audio/generate" };

/** Of the file of a clip or a sound. */
export const format = () => {
  const formats = about.value?.formats ?? [];
  return formats.includes(form.format.value) ? form.format.value : formats[0];
};

/** `{ param, message }` of the field that the server refused. */
export const problem = signal(null);

export const problemOf = (...params) =>
  problem.value && params.includes(problem.value.param) ? problem.value.message : "";

export function set(field, value) {
  batch(() => {
    problem.value = null;
    form[field].value = value;
  });
}

export const randomSeed = () => String(crypto.getRandomValues(new Uint32Array(1))[0]);

/** The one in the field while it is locked, else a new one. */
function nextSeed() {
  const { seed, locked } = form;
  if (!locked.value || !seed.value) seed.value = randomSeed();
  return seed.value;
}

// One too large for a double is sent as text.
const whole = (text) => {
  const value = Number(text);
  return Number.isSafeInteger(value) ? value : text.trim();
};

export const size = () => {
  const [width, height] = (defaults.value.size ?? "x").split("x");
  const { width: wide, height: high } = form;
  return wide.value || high.value ? `${wide.value || width}x${high.value || height}` : "";
};

const weighted = (rows) => rows.map((row) => ({ ...row, weight: Number(row.weight || 1) }));

/** The body of a request to `ROUTES`. */
export function request() {
  const still = kind.value === "image";
  const given = {
    model: model.value?.id,
    prompt: form.prompt.value.trim(),
    n: !still ? undefined : Math.max(1, Math.min(Number(form.count.value) || 1, limits.value.n ?? 10)),
    seed: whole(nextSeed()),
    size: kind.value === "audio" ? "" : size(),
    ...Object.fromEntries(LENGTHS[kind.value].map((name) => [name, form[name].value])),
    [kind.value === "audio" ? "response_format" : "output_format"]: still ? undefined : format(),
    negative_prompt: takes("negative") ? form.negative.value.trim() : "",
    steps: takes("steps") ? form.steps.value : "",
    guidance_scale: takes("guidance_scale") ? form.guidance.value : "",
    scheduler: form.scheduler.value,
    ...Object.fromEntries(RARE.map((name) => [name, takes(name) ? form[name].value : ""])),
    loras: weighted(form.loras.value),
    controls: still && controllable.value.length ? weighted(form.controls.value) : [],
  };
  return Object.fromEntries(Object.entries(given).filter(([, value]) => value !== undefined && value?.length !== 0));
}

export const seedIsValid = (text) => /^\d{0,19}$/.test(text) && BigInt(text || 0) <= MAX_SEED;

/** Copy a recipe into the form: `what` is `all`, `prompt` or `seed`. */
export function use(recipe, what = "all") {
  const text = (value) => (value === null || value === undefined ? "" : String(value));
  batch(() => {
    problem.value = null;
    if (what !== "seed") {
      form.prompt.value = text(recipe.prompt);
      form.negative.value = text(recipe.negative_prompt);
    }
    if (what !== "prompt" && text(recipe.seed)) {
      form.seed.value = text(recipe.seed);
      form.locked.value = true;
    }
    if (what === "all") {
      if (recipe.model) wanted.value = recipe.model;
      form.guidance.value = text(recipe.guidance_scale);
      form.scheduler.value = /^[a-z]/.test(recipe.scheduler ?? "") ? recipe.scheduler : ""; // else a class: the model's own
      for (const name of SAME) form[name].value = text(recipe[name]);
      form.count.value = "1";
      const off = recipe.loras_off?.map((name) => [name, 0, 0, 0]) ?? []; // of the model file's own
      form.loras.value = [...(recipe.loras ?? []), ...off].map(([name, , , weight, text_weight]) => ({ name, weight: text(weight), text_weight }));
      form.controls.value = (recipe.controls ?? []).filter(({ name, joins }) => name && !joins).map(({ name, weight, preprocess }) =>
        ({ name, weight: text(weight), preprocess: preprocess ?? "none", image: "" }));
    }
  });
}
