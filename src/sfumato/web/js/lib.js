// lit-html renders the page, signals trigger it.
export { html, svg, nothing, render } from "../vendor/lit-html/lit-html.js";
export { live } from "../vendor/lit-html/directives/live.js";
export { repeat } from "../vendor/lit-html/directives/repeat.js";
export { ref } from "../vendor/lit-html/directives/ref.js";
export { signal, computed, effect, batch, untracked } from "../vendor/signals-core/signals-core.mjs";
