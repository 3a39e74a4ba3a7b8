// Rework: redraw a picture, completely or where a mask is painted.
import { html, nothing, signal } from "./lib.js";
import { check, choice, failure, number, range } from "./controls.js";
import { draw } from "./drawings.js";
import { easelKeys, easelView, fit, tools } from "./easel.js";
import { promptFields, settingFields } from "./fields.js";
import { ROUTES, problem, request } from "./form.js";
import { remember } from "./history.js";
import { kept } from "./kept.js";
import { drawButtons } from "./make.js";
import { deeds, png, reset } from "./mask.js";
import { does, kind, limits, model, upscaler } from "./models.js";
import { near, own } from "./size.js";
import { drop, fetched, rework, source, strength, take, trouble } from "./source.js";
import { chosen, download, looked, stage } from "./stage.js";

const masked = kept("masked", false); // masked area only
const padding = kept("padding", "32");
const drawnAt = signal(null); // WIDTHxHEIGHT; null: the best size for the source

const SUBTLE = 0.35;
const STRONG = 0.7;

/** The source's shape with about the model's number of pixels. */
function modelSize() {
  const [wide, high] = own();
  if (!wide || !high) return "";
  const { width, height } = source.value;
  const scale = Math.sqrt((wide * high) / (width * height));
  return `${near(width * scale)}x${near(height * scale)}`;
}

/** A large photo is drawn at the model's size. */
function bestSize() {
  const [wide, high] = own();
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
  const clip = kind.value === "video"; // whose first frame it is
  const mask = clip ? null : await png();
  problem.value = null;
  if (given.prompt) remember(given.prompt);
  given.prompt ??= "";
  if (!clip) given.strength = strength.value;
  if (mask && masked.value) Object.assign(given, { masked_area_only: true, mask_padding: Number(padding.value) || 0 });
  else if (size()) given.size = size();
  chosen.value = null;
  const image = source.value.blob;
  if (clip) draw(ROUTES.video, given, { sources: { input_reference: image } });
  else draw("v1/images/edits", given, { sources: mask ? { image, mask } : { image } });
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

/** Below the stage of Make and of Rework. */
export const resultActions = (picture, drawing) => html`
  ${download(picture)}
  ${drawing.isJob ? nothing : pictureActions(picture, drawing)}`;

const pictureActions = (picture, drawing) => html`
  <button title="Use it as the source (R)" @click=${() => rework(picture, drawing)}>Rework it</button>
  ${does("image-to-image")
    ? html`<button @click=${() => vary(picture, drawing, SUBTLE)}>Vary a little</button>
        <button @click=${() => vary(picture, drawing, STRONG)}>Vary a lot</button>`
    : nothing}
  ${upscaler.value ? html`<button @click=${() => enlarge(picture, drawing)}>Enlarge ${upscaler.value.scale} times</button>` : nothing}`;

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
  if (event.key === "r" && !event.ctrlKey && !event.metaKey && now?.picture?.done && !now.drawing.isJob) rework(now.picture, now.drawing);
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
