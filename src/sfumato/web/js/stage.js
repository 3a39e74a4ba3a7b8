// The current picture, and below it those of this tab.
import { html, nothing, repeat, signal } from "./lib.js";
import { online } from "./connection.js";
import { failure } from "./controls.js";
import { again, cancel, drawings } from "./drawings.js";
import { icon } from "./icons.js";
import { media, small } from "./media.js";
import { duration, many, short } from "./words.js";

/** What somebody looks at, `{ drawing, index }`; null: the newest. */
export const chosen = signal(null);

export const listed = () => drawings.value.filter((each) => !each.hidden);

export function looked() {
  const { drawing, index } = chosen.value ?? { drawing: listed().at(-1) };
  if (!drawing) return null;
  const pictures = drawing.pictures.value;
  const newest = pictures.findLast((each) => each.done) ?? pictures.find((each) => each.src) ?? pictures[0];
  return { drawing, picture: index === undefined ? newest : pictures[index] };
}

function said({ state, progress, pictures, message }) {
  const seen = progress.value;
  switch (state.value) {
    case "waiting":
      if (!online.value) return "Waiting for the server";
      return seen?.queue_position ? `Waiting: ${many(seen.queue_position, "turn")} to go` : "Waiting for the model";
    case "drawing": {
      const step = seen?.total ? `Step ${seen.step} of ${seen.total}` : "Drawing";
      const waits = seen?.queue_position ? `, ${many(seen.queue_position, "turn")} until the next picture` : "";
      const left = seen?.seconds_left != null ? `, ${duration(seen.seconds_left)} left` : "";
      return step + waits + left;
    }
    case "done":
      return pictures.value.length === 1 ? "Done" : `${pictures.value.length} pictures, all done`;
    case "cancelled":
      return "Stopped";
    default:
      return message.value ? "Failed" : "";
  }
}

const bar = ({ progress, live }) =>
  live
    ? html`<progress aria-label="Progress" max=${progress.value?.total || nothing}
        value=${progress.value?.total ? progress.value.step : nothing}></progress>`
    : nothing;

/** `empty`: with nothing to see; `actions`: below a picture. */
export function stage({ empty = nothing, actions = () => nothing } = {}) {
  const now = looked();
  const { drawing, picture } = now ?? {};
  return html`
    <section class="stage" aria-label="Pictures">
      <div class="canvas ${picture?.src ? "" : "bare"}">
        ${picture?.src
          ? media("Result", picture)
          : drawing?.live ? html`<p class="quiet">${said(drawing)}</p>` : drawing?.message.value ? nothing : empty}
        ${drawing && !drawing.live && drawing.message.value ? failure(drawing.message.value, () => again(drawing)) : nothing}
      </div>
      ${drawing ? bar(drawing) : nothing}
      <p class="status" role="status">${drawing ? said(drawing) : ""}</p>
      ${picture?.warnings?.length ? html`<ul class="warnings">${picture.warnings.map((each) => html`<li>${each}</li>`)}</ul>` : nothing}
      ${picture?.done ? html`<div class="actions">${actions(picture, drawing)}</div>` : nothing}
      ${strip(drawing, picture)}
    </section>`;
}

function look(drawing, picture) {
  const newest = listed().at(-1);
  chosen.value = drawing === newest && drawing.live && drawing.pictures.value.length === 1 ? null : { drawing, index: picture.index };
}

function strip(shownDrawing, shownPicture) {
  const all = listed().flatMap((drawing) => drawing.pictures.value.map((picture) => ({ drawing, picture }))).reverse();
  if (all.length < 2) return nothing;
  return html`
    <ul class="strip" aria-label="Made in this tab">
      ${repeat(all, ({ drawing, picture }) => `${drawing.id} ${picture.index}`, ({ drawing, picture }) => {
        const now = drawing === shownDrawing && picture.index === shownPicture?.index;
        const words = short(drawing.request.prompt || "Without words", 60);
        return html`<li class=${drawing.state.value}>
          <button class="tile" aria-label="Show: ${words}" aria-current=${now ? "true" : nothing} @click=${() => look(drawing, picture)}>
            ${picture.src ? small("", picture) : html`<span class="dots"></span>`}
          </button>
          ${drawing.live ? html`<button class="icon corner" aria-label="Stop: ${words}" title="Stop" @click=${() => cancel(drawing)}>${icon("close")}</button>` : nothing}
        </li>`;
      })}
    </ul>`;
}

export const download = ({ src, name }) =>
  html`<a class="button" href=${src} download=${name ?? "picture.png"}>Download</a>`;

