// Rework: redraw a picture, completely or where a mask is painted.
import { html, nothing, signal } from "./lib.js";
import { check, choice, failure, number, range } from "./controls.js";
import { draw } from "./drawings.js";
import { easelKeys, easelView, fit, tools } from "./easel.js";
import { promptFields, settingFields } from "./fields.js";
import { problem, request } from "./form.js";
import { remember } from "./history.js";
import { kept } from "./kept.js";
import { drawButtons } from "./make.js";
import { deeds, png, reset } from "./mask.js";
import { defaults, does, limits, model, upscaler } from "./models.js";
import { drop, fetched, rework, source, strength, take, trouble } from "./source.js";
import { chosen, download, looked, stage } from "./stage.js";

const masked = kept("masked", false); // masked area only
const padding = kept("padding", "32");
const drawnAt = signal(null); // WIDTHxHEIGHT; null: the best size for the source

const SUBTLE = 0.35;
const STRONG = 0.7;

/** The source's aspect ratio at about the model's default number of pixels. */
function modelSize() {
  const [wide, high] = (defaults.value.size ?? "x").split("x").map(Number);
  if (!wide || !high) return "";
  const multiple = limits.value.size_multiple ?? 8;
  const scale = Math.sqrt((wide * high) / (source.value.width * source.value.height));
  const near = (side) => Math.max(multiple, Math.round((side * scale) / multiple) * multiple);
  return `${near(source.value.width)}x${near(source.value.height)}`;
}

/** A photo of many megapixels is drawn at the model's size, unless the user changes it. */
function bestSize() {
  const [wide, high] = (defaults.value.size ?? "x").split("x").map(Number);
  const pixels = source.value.width * source.value.height;
  return pixels > Math.min(limits.value.pixels ?? Infinity, 4 * wide * high || Infinity) ? modelSize() : "";
}

const size = () => drawnAt.value ?? bestSize();

export async function reworkNow() {
  if (!source.value) {
    trouble.value = "Drop, paste or choose a picture first.";
    return;
  }
  const { size: _, ...given } = request();
  const mask = await png();
  problem.value = null;
  if (given.prompt) remember(given.prompt);
  given.prompt ??= "";
  given.strength = strength.value;
  if (mask && masked.value) Object.assign(given, { masked_area_only: true, mask_padding: Number(padding.value) || 0 });
  else if (size()) given.size = size();
  chosen.value = null;
  draw("v1/images/edits", given, { sources: mask ? { image: source.value.blob, mask } : { image: source.value.blob } });
}

async function vary(picture, drawing, how) {
  const { n, seed, size, masked_area_only, mask_padding, guidance_rescale, ...same } = drawing.request;
  const image = await fetched(picture.src);
  chosen.value = null;
  draw("v1/images/edits", { prompt: "", ...same, strength: how }, { sources: { image } });
}

async function enlarge(picture, drawing) {
  const image = await fetched(picture.src);
  chosen.value = null;
  draw("v1/images/upscale", { ...upscaler.value, prompt: drawing.request.prompt ?? "" }, { sources: { image } });
}

/** Actions on a finished picture; below the stage of Make and of Rework. */
export const resultActions = (picture, drawing) => html`
  ${download(picture)}
  <button type="button" title="Use it as the source (R)" @click=${() => rework(picture, drawing)}>Rework it</button>
  ${does("image-to-image")
    ? html`<button type="button" @click=${() => vary(picture, drawing, SUBTLE)}>Vary a little</button>
        <button type="button" @click=${() => vary(picture, drawing, STRONG)}>Vary a lot</button>`
    : nothing}
  ${upscaler.value ? html`<button type="button" @click=${() => enlarge(picture, drawing)}>Enlarge ${upscaler.value.scale} times</button>` : nothing}`;

function another() {
  drop();
  reset();
}

export async function newSource(file) {
  if (!file) return;
  reset();
  drawnAt.value = null;
  await take(file);
  fit();
}

const chooser = (words) => html`<label class="button file">${words}
  <input type="file" accept="image/*" @change=${(event) => newSource(event.target.files[0])}></label>`;

const dropPlace = () => html`
  <div class="canvas bare"><div class="welcome">
    <h2>Which picture?</h2>
    <p>Drop one here, paste one, or choose a file. A phone’s photo is turned upright.</p>
    ${chooser("Choose a picture")}
  </div></div>`;

const sourceFields = () => html`
  ${range({ id: "strength", label: "Strength", value: strength.value, min: 0.05, max: 1, step: 0.05, shown: strength.value.toFixed(2),
    input: (value) => (strength.value = value) })}
  ${source.value
    ? choice({ id: "drawn-at", label: "Drawn at", value: size(), input: (value) => (drawnAt.value = value), wide: true,
        options: [["", `As the source: ${source.value.width} × ${source.value.height}`],
          ...(modelSize() ? [[modelSize(), `As the model: ${modelSize().replace("x", " × ")}`]] : [])] })
    : nothing}
  ${deeds.value.length
    ? html`<div class="wide">${check({ id: "masked", label: "Masked area only", value: masked.value, input: (value) => (masked.value = value) })}
        ${masked.value ? number({ id: "padding", label: "Padding around it", value: padding.value, min: 0, max: 4096, step: 1, input: (value) => (padding.value = value) }) : nothing}</div>`
    : nothing}`;

export function reworkKeys(event) {
  const now = looked();
  if (easelKeys(event)) return true;
  if (event.key === "r" && !event.ctrlKey && !event.metaKey && now?.picture?.done) rework(now.picture, now.drawing);
  else return false;
  return true;
}

export const reworkView = () => html`
  <main class="work rework">
    <section class="ask" aria-label="What to draw">${promptFields(reworkNow)}${drawButtons(reworkNow)}</section>
    <section class="desk" aria-label="Source">
      ${trouble.value ? failure(trouble.value) : nothing}
      ${source.value ? html`${easelView()}${tools()}
        <div class="actions">${chooser("Another picture")}<button @click=${another}>Put it away</button></div>
        <p class="hint">${does("inpainting") ? "Paint the area to redraw; without a mask everything is redrawn." : `${model.value?.id} does not support masks.`}</p>`
        : dropPlace()}
    </section>
    ${stage({ actions: resultActions, empty: html`<p class="quiet">The new picture appears here.</p>` })}
    <section class="settings" aria-label="Settings">${settingFields({ sized: false, before: sourceFields() })}</section>
  </main>`;
