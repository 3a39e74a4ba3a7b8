// The server: models, memory, the queue and throughput.
import { html, nothing, signal } from "./lib.js";
import { get, post } from "./api.js";
import { failure } from "./controls.js";
import { loadModels } from "./models.js";
import { plot } from "./plot.js";
import { bytes, duration, many, short } from "./words.js";

const EVERY_MS = 2000;

const state = signal(null);
const line = signal([]); // the caller's own; without keys all
const trouble = signal("");
const busy = signal(""); // the model with an operation in progress

export async function look() {
  try {
    const [now, running] = await Promise.all([get("v1/status"), get("v1/images/progress")]);
    [state.value, line.value, trouble.value] = [now, running.data, ""];
  } catch (error) {
    if (!error.offline) trouble.value = error.message;
  }
}

setInterval(() => location.hash === "#server" && !document.hidden && look(), EVERY_MS);

async function act(path, model, more = {}) {
  busy.value = model;
  try {
    await post(`v1/models/${path}`, { model, ...more });
    await loadModels();
  } catch (error) {
    if (!error.offline) trouble.value = error.message;
  } finally {
    busy.value = "";
    await look();
  }
}

const STATES = { unloaded: "not in memory", downloading: "downloading", loading: "loading", ready: "in memory", in_main_memory: "in main memory", failed: "failed" };

const modelRow = (model) => {
  const verb = ["ready", "in_main_memory"].includes(model.status) ? "Unload" : "Load";
  const where = model.status === "ready" && model.device ? ` · ${model.device}, ${model.dtype}` : "";
  const still = ["loading", "downloading"].includes(model.status) || busy.value === model.id;
  return html`<li>
    <div><h3>${model.id}</h3>
      <p class=${model.status === "failed" ? "problem" : "quiet"}><span class="lamp ${model.status}"></span>${STATES[model.status]}${where}${model.detail ? html` · ${short(model.detail, 300)}` : nothing}</p>
      ${model.progress != null ? html`<progress aria-label="Download of ${model.id}" max="1" value=${model.progress}></progress>` : nothing}</div>
    <div class="actions">
      <button ?disabled=${still} aria-label="${verb} ${model.id}" @click=${() => act(verb.toLowerCase(), model.id)}>${verb}</button>
      <button aria-pressed=${String(model.pinned)} aria-label="Pin ${model.id}" title="A pinned model stays in memory when others need room"
        @click=${() => act("pin", model.id, { pinned: !model.pinned })}>${model.pinned ? "Pinned" : "Pin"}</button>
    </div>
  </li>`;
};

const number = (words, value, more = "") => html`<div><dt>${words}</dt><dd>${value}<small>${more}</small></dd></div>`;

const lineRow = (one) => html`<li>
  <p class="words">${short(one.prompt || "Without words", 120)}</p>
  <p class="quiet">${one.model} · ${one.status === "queued" ? `waits, ${many(one.queue_position, "turn")} to go` : `step ${one.step} of ${one.total || "?"}`}${one.seconds_left != null ? ` · ${duration(one.seconds_left)} left` : ""}</p>
</li>`;

function panel({ models, memory, line: all, history, mean_batch: mean, pictures, steps, uptime_s: uptime, version }) {
  const hidden = all.waiting + all.drawing - line.value.reduce((sum, each) => sum + each.pictures - each.pictures_done, 0);
  return html`
    <section class="card" aria-labelledby="s-now"><h2 id="s-now">Now</h2>
      <dl class="numbers">
        ${number("Drawing", all.drawing, ` of ${all.places} places`)}
        ${number("Waiting", all.waiting, ` of at most ${all.limit}`)}
        ${number("Memory", bytes(memory.resident), memory.device ? ` and ${bytes(memory.device)} on the device` : "")}
        ${number("Mean batch", mean ?? "–", mean ? " requests share a step" : "")}
        ${number("Pictures", pictures, ` in ${duration(uptime)}`)}
        ${number("Steps", steps)}
      </dl></section>
    <section class="card" aria-labelledby="s-lately"><h2 id="s-lately">The last minutes</h2>
      ${plot(history, "steps_per_s", "Steps a second")}
      ${plot(history, "pictures_per_min", "Pictures a minute")}
      ${plot(history, "mean_batch", "Mean batch")}</section>
    <section class="card" aria-labelledby="s-models"><h2 id="s-models">Models</h2><ul class="rows">${models.map(modelRow)}</ul></section>
    <section class="card" aria-labelledby="s-line"><h2 id="s-line">Line</h2>
      ${line.value.length ? html`<ul class="rows">${line.value.map(lineRow)}</ul>` : html`<p class="quiet">You have no queued or running requests.</p>`}
      ${hidden > 0 ? html`<p class="quiet">${many(hidden, "picture")} of other callers.</p>` : nothing}</section>
    <p class="hint">Sfumato ${version} · <a href="docs">API</a></p>`;
}

export const serverView = () => html`
  <main class="panel">
    ${trouble.value ? failure(trouble.value, look) : nothing}
    ${state.value ? panel(state.value) : html`<p class="quiet">Asking …</p>`}
  </main>`;
