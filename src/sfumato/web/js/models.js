// The models, and what the selected one supports.
import { computed, signal } from "./lib.js";
import { get } from "./api.js";
import { kept } from "./kept.js";

export const EMBEDDED = "sfumato-tiny";

export const models = signal([]);
export const schedulers = signal([]);
export const wanted = kept("model", "");
const loras = signal([]);
const nets = signal([]);

export const model = computed(
  () => models.value.find((each) => each.id === wanted.value) ?? models.value[0] ?? null,
);
export const about = computed(() => model.value?.sfumato ?? null);
export const defaults = computed(() => about.value?.defaults ?? {});
export const limits = computed(() => about.value?.limits ?? {});

/** What the selected model makes: image, video or audio. */
export const kind = computed(() => model.value?.architecture.output_modalities[0] ?? "image");

/** Whether the selected model has this task. */
export const does = (task) => about.value?.tasks?.includes(task) ?? true;

// Our field → its name in `enable_parameters` of model files.
const ENABLED = { negative: "negative_prompt", steps: "num_inference_steps", clip_skip: "clip_skip" };

/** Fields that few people need. */
export const RARE = ["clip_skip", "eta", "guidance_rescale"];

// A loaded model has a default of these if it takes them.
const KNOWN = ["steps", "guidance_scale", "eta", "guidance_rescale"];

/** Whether a request to the selected model may have this field. */
export function takes(field) {
  const { enable_parameters: enabled, status } = about.value ?? {};
  const named = ENABLED[field];
  if (named && enabled && !enabled.includes(named)) return false;
  if (kind.value === "audio" && RARE.includes(field)) return false;
  // In memory it is fully known: no default means no such parameter.
  return status !== "ready" || !KNOWN.includes(field) || defaults.value[field] !== null;
}

/** LoRAs for the selected model. */
export const fitting = computed(() => loras.value.filter(({ models }) => models?.includes(model.value?.id) ?? true));

/** Names of ControlNets and IP-Adapters, if it takes some. */
export const controllable = computed(() =>
  about.value?.control_nets?.length === 0 && !about.value.ip_adapters ? [] : nets.value);

/** The first upscaling model and its factor; null if there is none. */
export const upscaler = computed(() => {
  const found = models.value.find(
    ({ sfumato }) => sfumato.tasks?.includes("upscaling") || /Upscale|SuperResolution/.test(sfumato.pipeline ?? ""),
  );
  return found ? { model: found.id, scale: /Latent/.test(found.sfumato.pipeline ?? "") ? 2 : 4 } : null;
});

export async function loadModels() {
  const paths = ["v1/models", "v1/schedulers", "v1/loras", "controlnet/model_list"];
  const [listed, named, adapters, { model_list }] = await Promise.all(paths.map((path) => get(path)));
  models.value = listed.data;
  schedulers.value = named.data;
  loras.value = adapters.data;
  nets.value = model_list;
}
