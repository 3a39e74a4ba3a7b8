// A picture dropped or chosen to read its recipe.
import { html, nothing, signal } from "./lib.js";
import { Failure, parse, send } from "./api.js";
import { failure } from "./controls.js";
import { take } from "./source.js";
import { open } from "./viewer.js";

const refused = signal(null); // { file, message } of the last one without a recipe

export async function readRecipe(file) {
  if (!file) return;
  refused.value = null;
  const form = new FormData();
  form.append("image", file);
  try {
    const answer = await send("POST", "v1/images/recipe", { form });
    open({ ...parse(await answer.text()), src: URL.createObjectURL(file) });
  } catch (error) {
    if (!(error instanceof Failure)) throw error;
    refused.value = { file, message: error.message };
  }
}

async function instead() {
  const { file } = refused.value;
  refused.value = null;
  location.hash = "rework";
  await take(file);
}

export const refusal = () =>
  refused.value
    ? html`<section class="notice" aria-label="Recipe">${failure(refused.value.message)}
        <div class="actions"><button @click=${instead}>Rework it all the same</button>
          <button @click=${() => (refused.value = null)}>Leave it</button></div></section>`
    : nothing;
