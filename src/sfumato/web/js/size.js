// Width and height: shapes of the model's own size, or any.
import { batch, html } from "./lib.js";
import { choice, number, tool } from "./controls.js";
import { form, problemOf, set } from "./form.js";
import { defaults, limits } from "./models.js";

const SHAPES = [["Square", 1, 1], ["Portrait", 2, 3], ["Landscape", 3, 2], ["Tall", 9, 16], ["Wide", 16, 9]];

/** The model's own width and height, if they are known. */
export const own = () => (defaults.value.size ?? "").split("x").map(Number);

const multiple = () => limits.value.size_multiple ?? 8;
export const near = (side) => Math.max(multiple(), Math.round(side / multiple()) * multiple());

const presets = () => {
  const [width, height] = own();
  if (!width || !height) return [];
  return SHAPES.map(([name, wide, high]) => {
    const unit = Math.sqrt((width * height) / (wide * high));
    return [name, near(unit * wide), near(unit * high)];
  }).filter(([, wide, high]) => wide !== width || high !== height);
};

function choose(value) {
  const [width, height] = value.split("x");
  batch(() => {
    set("width", width ?? "");
    set("height", height ?? "");
  });
}

function swap() {
  const [width, height] = own();
  choose(`${form.height.value || height || ""}x${form.width.value || width || ""}`);
}

export function sizeFields() {
  const [width, height] = own();
  const chosen = form.width.value || form.height.value ? `${form.width.value}x${form.height.value}` : "";
  const options = [
    ["", width ? `As the model: ${width} × ${height}` : "As the model"],
    ...presets().map(([name, wide, high]) => [`${wide}x${high}`, `${name}: ${wide} × ${high}`]),
  ];
  if (!options.some(([value]) => value === chosen)) options.push([chosen, "Another"]);
  const side = (id, label, placeholder, after) =>
    number({ id, label, value: form[id].value, input: (value) => set(id, value), placeholder: String(placeholder || ""),
      min: multiple(), step: multiple(), after });
  return html`
    ${choice({ id: "size", label: "Size", value: chosen, input: choose, options, problem: problemOf("size", "width", "height"), wide: true })}
    <div class="pair wide">
      ${side("width", "Width", width)}
      ${tool("swap", "Swap width and height", swap)}
      ${side("height", "Height", height)}
    </div>`;
}
