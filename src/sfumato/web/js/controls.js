// Labelled controls; a hint or a problem describes them.
import { html, live, nothing, ref } from "./lib.js";
import { icon } from "./icons.js";

const described = (id, hint, problem) => (hint || problem ? `${id}-about` : nothing);

const about = (id, hint, problem) =>
  hint || problem
    ? html`<p id="${id}-about" class=${problem ? "problem" : "hint"} role=${problem ? "alert" : nothing}>${problem || hint}</p>`
    : nothing;

const field = ({ id, label, wide, hint, problem }, control) => html`
  <div class="field ${wide ? "wide" : ""}">
    <label for=${id}>${label}</label>
    ${control}
    ${about(id, hint, problem)}
  </div>`;

const invalid = (problem) => (problem ? "true" : nothing);

export const textarea = ({ id, value, input, rows = 3, placeholder = "", hint, problem, keydown, ...more }) =>
  field({ id, hint, problem, wide: true, ...more }, html`
    <textarea id=${id} rows=${rows} placeholder=${placeholder} .value=${live(value)} spellcheck="true"
      aria-describedby=${described(id, hint, problem)} aria-invalid=${invalid(problem)}
      @input=${(event) => input(event.target.value)} @keydown=${keydown ?? nothing}></textarea>`);

export const text = ({ id, value, input, placeholder = "", hint, problem, after = nothing, mode = nothing, type = "text", min, max, step, ...more }) =>
  field({ id, hint, problem, ...more }, html`
    <div class="joined">
      <input id=${id} type=${type} inputmode=${mode} autocomplete="off" placeholder=${placeholder} .value=${live(String(value))}
        min=${min ?? nothing} max=${max ?? nothing} step=${step ?? nothing}
        aria-describedby=${described(id, hint, problem)} aria-invalid=${invalid(problem)}
        @input=${(event) => input(event.target.value)}>${after}
    </div>`);

export const number = (given) => text({ step: "any", ...given, type: "number" });

export const range = ({ id, value, input, min, max, step, shown = value, ...more }) =>
  field({ id, wide: true, ...more }, html`
    <div class="joined">
      <input id=${id} type="range" min=${min} max=${max} step=${step} .value=${live(String(value))}
        @input=${(event) => input(Number(event.target.value))}>
      <output for=${id}>${shown}</output>
    </div>`);

/** `options` are [value, words]. */
export const choice = ({ id, value, input, options, hint, problem, ...more }) =>
  field({ id, hint, problem, ...more }, html`
    <select id=${id} aria-describedby=${described(id, hint, problem)} @change=${(event) => input(event.target.value)}>
      ${options.map(([each, words]) => html`<option value=${each} .selected=${live(each === value)}>${words}</option>`)}
    </select>`);

export const check = ({ id, label, value, input }) => html`
  <div class="check">
    <input id=${id} type="checkbox" .checked=${live(value)} @change=${(event) => input(event.target.checked)}>
    <label for=${id}>${label}</label>
  </div>`;

export const tool = (name, label, click, { pressed, disabled = false } = {}) => html`
  <button class="icon" title=${label} aria-label=${label} aria-pressed=${pressed === undefined ? nothing : String(pressed)}
    ?disabled=${disabled} @click=${click}>${icon(name)}</button>`;

export const failure = (message, again) => html`
  <div class="failure" role="alert">
    <p>${message}</p>
    ${again ? html`<button @click=${again}>Try again</button>` : nothing}
  </div>`;

const show = (dialog) => dialog && queueMicrotask(() => dialog.isConnected && !dialog.open && dialog.showModal());

/** On a <dialog>: opens it as soon as it is in the page. */
export const modal = () => ref(show);
