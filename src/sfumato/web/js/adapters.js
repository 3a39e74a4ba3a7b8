// LoRAs and controls: a name and a weight each.
import { html, nothing } from "./lib.js";
import { choice, number, tool } from "./controls.js";
import { form, problem, set } from "./form.js";
import { controllable, fitting } from "./models.js";
import { fileOf } from "./source.js";

const same = (name) => [name, name];
const PREPROCESS = ["none", "canny", "depth", "pose", "invert"].map(same);
const wrong = (param) => (problem.value?.param?.startsWith(param) ? problem.value.message : "");

/** The rows of a field, and a button for another one, `fresh`. */
function rows(field, word, known, fresh) {
  const all = () => form[field].value;
  const controls = "image" in fresh;
  const row = (each, index) => {
    const id = `${field}-${index}`;
    const title = `${controls ? "Control" : word} ${index + 1}`;
    const put = (by) => set(field, all().map((one, at) => (at === index ? { ...one, ...by } : one)));
    const options = known.some(([name]) => name === each.name) ? known : [...known, same(each.name)];
    return html`<div class="wide fields" role="group" aria-label=${title}>
      ${choice({ id, label: title, value: each.name, wide: controls, options, input: (name) => put({ name }),
        problem: wrong(controls || index ? `${field}[${index}]` : field) })}
      ${controls ? pictureFields(id, title, each, put) : nothing}
      ${number({ id: `${id}-weight`, label: "Weight", value: each.weight,
        input: (weight) => put({ weight, text_weight: undefined }),
        after: tool("close", `Remove ${title}`, () => set(field, all().filter((_, at) => at !== index))) })}
    </div>`;
  };
  return html`${all().map(row)}${known.length
    ? html`<button @click=${() => set(field, [...all(), { name: known[0][0], ...fresh }])}>Add a ${word}</button>`
    : nothing}`;
}

function pictureFields(id, title, { image, preprocess }, put) {
  const take = (file) => {
    const reader = new FileReader(); // the file as it is: the server turns and scales it
    reader.onload = () => put({ image: reader.result });
    if (file) reader.readAsDataURL(file);
  };
  const drop = (event) => {
    event.preventDefault();
    event.stopPropagation(); // no source, no recipe
    take(fileOf(event.dataTransfer));
  };
  return html`<div class="wide actions" @drop=${drop}>
      ${image ? html`<img height="38" src=${image} alt="Picture of ${title}">` : nothing}
      <label class="button file">Choose or drop a picture
        <input type="file" accept="image/*" @change=${(event) => take(event.target.files[0])}></label>
    </div>
    ${choice({ id: `${id}-pre`, label: "Preprocess", value: preprocess, options: PREPROCESS, input: (preprocess) => put({ preprocess }) })}`;
}

export function adapters() {
  const nets = controllable.value.map(same);
  if (![...fitting.value, ...nets, ...form.loras.value].length) return nothing;
  return html`<div class="fields rare">
    ${rows("loras", "LoRA", fitting.value.map(({ id, base }) => [id, base ? `${id} · ${base}` : id]), { weight: "1" })}
    ${nets.length ? rows("controls", "control", nets, { weight: "1", preprocess: "none", image: "" }) : nothing}
  </div>`;
}
