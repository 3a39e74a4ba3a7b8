// The axes of a comparison.
const MOST = 100; // maximum values per axis

const numbers = (text) =>
  text.split(",").flatMap((part) => {
    const range = part.trim().match(/^(-?[\d.]+)\s*(?:-|\.\.|to)\s*([\d.]+)(?:\s*:\s*([\d.]+))?$/);
    if (!range) return part.trim() === "" ? [] : [Number(part)];
    const [from, to] = [Number(range[1]), Number(range[2])];
    const step = Number(range[3]) || (to - from) / 3 || 1;
    const count = Math.min(MOST, Math.floor((to - from) / step + 1e-9) + 1);
    return Array.from({ length: Math.max(0, count) }, (_, index) => Number((from + index * step).toFixed(6)));
  });

const words = (text) => text.split(",").map((part) => part.trim()).filter(Boolean);

/** `{a|b}` in a prompt, all ways. */
export function expanded(prompt) {
  const found = prompt.match(/\{([^{}]*\|[^{}]*)\}/);
  if (!found) return [prompt];
  const [before, after] = [prompt.slice(0, found.index), prompt.slice(found.index + found[0].length)];
  return found[1].split("|").flatMap((each) => expanded(before + each.trim() + after)).slice(0, MOST);
}

/** The first of these ways. */
export const plain = (prompt) => expanded(prompt)[0];

// Field of a request → label, parser, example.
export const AXES = {
  "": { label: "Nothing" },
  steps: { label: "Steps", read: numbers, example: "5, 10, 20" },
  guidance_scale: { label: "Guidance", read: numbers, example: "1-7:2" },
  seed: { label: "Seed", read: numbers, example: "1, 2, 3" },
  scheduler: { label: "Scheduler", read: words, example: "euler, ddim, k_dpmpp_2m" },
  prompt: { label: "Prompt variants {a|b}" },
  size: { label: "Size", read: words, example: "128x128, 192x128" },
  model: { label: "Model", read: words, example: "" },
  clip_skip: { label: "Clip skip", read: numbers, example: "0, 1" },
  eta: { label: "Eta", read: numbers, example: "0, 0.5, 1" },
  guidance_rescale: { label: "Guidance rescale", read: numbers, example: "0, 0.7" },
};

/** `[value, label]` of each step of a side. Raises Error in words. */
export function values(axis, text, prompt) {
  if (!axis) return [[undefined, ""]];
  if (axis === "prompt") {
    const all = expanded(prompt);
    if (all.length < 2) throw new Error("Write variants into the prompt, such as: a {cat|dog} on a blue background.");
    return all.map((each) => [each, each]);
  }
  const found = AXES[axis].read(text);
  if (!found.length) throw new Error(`${AXES[axis].label}: write values with commas between them, such as ${AXES[axis].example}.`);
  const wrong = found.find((each) => Number.isNaN(each));
  if (wrong !== undefined) throw new Error(`${AXES[axis].label}: only numbers are valid, such as ${AXES[axis].example}.`);
  return found.slice(0, MOST).map((each) => [each, `${AXES[axis].label} ${each}`]);
}
