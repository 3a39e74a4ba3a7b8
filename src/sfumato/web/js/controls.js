// Labelled controls. A label is the control's accessible name; a hint or a problem describes it.
import { html, live, nothing, ref } from "./lib.js";
import { icon } from "./icons.js";

const described = (id, hint, problem) => (hint || problem ? `${id}-about` : nothing);

const about = (id, hint, problem) =>
  hint || problem
    ? html`<p id="${id}-about" class=${problem ? "problem" : "hint"} role=${problem ? "alert" : nothing}>${problem || hint}</p>`
    : nothing;

export const textarea = ({ id, label, value, input, rows = 3, placeholder = "", hint, problem, keydown }) => html`
  <div class="field wide">
    <label for=${id}>${label}</label>
    <textarea id=${id} rows=${rows} placeholder=${placeholder} .value=${live(value)} spellcheck="true"
      aria-describedby=${described(id, hint, problem)} aria-invalid=${problem ? "true" : nothing}
      @input=${(event) => input(event.target.value)} @keydown=${keydown ?? nothing}></textarea>
    ${about(id, hint, problem)}
  </div>`;

export const text = ({ id, label, value, input, placeholder = "", hint, problem, after = nothing, mode = "text", type = "text", wide }) => html`
  <div class="field ${wide ? "wide" : ""}">
    <label for=${id}>${label}</label>
    <div class="joined">
      <input id=${id} type=${type} inputmode=${mode} autocomplete="off" placeholder=${placeholder} .value=${live(String(value))}
        aria-describedby=${described(id, hint, problem)} aria-invalid=${problem ? "true" : nothing}
        @input=${(event) => input(event.target.value)}>${after}
    </div>
    ${about(id, hint, problem)}
  </div>`;

export const number = ({ id, label, value, input, placeholder = "", min, max, step = "any", hint, problem, after = nothing }) => html`
  <div class="field">
    <label for=${id}>${label}</label>
    <div class="joined">
      <input id=${id} type="number" placeholder=${placeholder} min=${min ?? nothing} max=${max ?? nothing} step=${step}
        .value=${live(String(value))} aria-describedby=${described(id, hint, problem)}
        aria-invalid=${problem ? "true" : nothing} @input=${(event) => input(event.target.value)}>${after}
    </div>
    ${about(id, hint, problem)}
  </div>`;

export const range = ({ id, label, value, input, min, max, step, shown = value }) => html`
  <div class="field wide">
    <label for=${id}>${label}</label>
    <div class="joined">
      <input id=${id} type="range" min=${min} max=${max} step=${step} .value=${live(String(value))}
        @input=${(event) => input(Number(event.target.value))}>
      <output for=${id}>${shown}</output>
    </div>
  </div>`;

/** `options` are [value, words]. */
export const choice = ({ id, label, value, input, options, hint, problem, wide }) => html`
  <div class="field ${wide ? "wide" : ""}">
    <label for=${id}>${label}</label>
    <select id=${id} aria-describedby=${described(id, hint, problem)} @change=${(event) => input(event.target.value)}>
      ${options.map(([each, words]) => html`<option value=${each} .selected=${live(each === value)}>${words}</option>`)}
    </select>
    ${about(id, hint, problem)}
  </div>`;

export const check = ({ id, label, value, input }) => html`
  <div class="check">
    <input id=${id} type="checkbox" .checked=${live(value)} @change=${(event) => input(event.target.checked)}>
    <label for=${id}>${label}</label>
  </div>`;

export const tool = (name, label, click, { pressed, disabled = false } = {}) => html`
  <button type="button" class="icon" title=${label} aria-label=${label} aria-pressed=${pressed === undefined ? nothing : String(pressed)}
    ?disabled=${disabled} @click=${click}>${icon(name)}</button>`;

export const failure = (message, again) => html`
  <div class="failure" role="alert">
    <p>${message}</p>
    ${again ? html`<button type="button" @click=${again}>Try again</button>` : nothing}
  </div>`;

const show = (dialog) => dialog && queueMicrotask(() => dialog.isConnected && !dialog.open && dialog.showModal());

/** On a <dialog>: opens it as soon as it is in the page. */
export const modal = () => ref(show);
