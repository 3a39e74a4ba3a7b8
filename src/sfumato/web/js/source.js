// The source picture of Rework. Always upright.
import { batch, signal } from "./lib.js";
import { Failure } from "./api.js";
import { use } from "./form.js";
import { kept } from "./kept.js";
import { reset } from "./mask.js";

/** `{ blob, src, width, height }`, or null. `blob` is a PNG, upright. */
export const source = signal(null);
export const trouble = signal("");

/** Take a picture file. */
export async function take(file) {
  trouble.value = "";
  try {
    const bitmap = await createImageBitmap(file); // upright
    const canvas = new OffscreenCanvas(bitmap.width, bitmap.height);
    canvas.getContext("2d").drawImage(bitmap, 0, 0);
    const blob = await canvas.convertToBlob({ type: "image/png" });
    if (source.value) URL.revokeObjectURL(source.value.src);
    source.value = { blob, src: URL.createObjectURL(blob), width: bitmap.width, height: bitmap.height };
  } catch {
    trouble.value = `${file.name || "That"} cannot be read as a picture by this browser. Try a PNG, JPEG or WebP.`;
  }
}

export function drop() {
  if (source.value) URL.revokeObjectURL(source.value.src);
  source.value = null;
}

const files = (list) => [...(list ?? [])].find((each) => each.kind === undefined || each.kind === "file");

/** The first file, or null. */
export function fileOf(transfer) {
  const item = files(transfer?.items);
  return item?.getAsFile() ?? transfer?.files?.[0] ?? null;
}

export async function fetched(src) {
  const answer = await fetch(src);
  if (!answer.ok) throw new Failure("The picture is gone.", { status: answer.status });
  return answer.blob();
}

/** Make a result the source, with the words that made it. */
export async function rework(picture, drawing) {
  reset();
  try {
    await take(await fetched(picture.src));
  } catch (error) {
    trouble.value = error.message;
  }
  batch(() => {
    if (drawing?.request.prompt) use({ prompt: drawing.request.prompt, negative_prompt: drawing.request.negative_prompt }, "prompt");
    location.hash = "rework";
  });
}

/** How far Rework may leave its source, 0.05 to 1. */
export const strength = kept("strength", 0.6);
export const strengthOf = (value) => (strength.value = Number(value) || strength.value);
