// The gallery: a search, an endless grid, keys.
import { html, live, nothing, ref, repeat } from "./lib.js";
import { picture, thumbnail } from "./api.js";
import { check, choice, failure } from "./controls.js";
import { readRecipe } from "./dropped.js";
import { busy, download, filter, fresh, items, load, loadMore, more, search, select, selectAll, selected, selectNone, star, total, trouble } from "./gallery.js";
import { icon } from "./icons.js";
import { small } from "./media.js";
import { models } from "./models.js";
import { many, short } from "./words.js";
import { open, sure } from "./viewer.js";

const SMALL = 320 * 320; // pixels; these are shown unscaled

let current = 0; // the tile that Tab leads to

const words = ({ recipe }) => recipe?.prompt || "Without words";

const shownAt = ({ name, recipe }) => (recipe && recipe.width * recipe.height <= SMALL ? picture(name) : thumbnail(name));

const tile = (one, index) => html`
  <li class=${selected.value.has(one.name) ? "selected" : ""}>
    <button class="tile" data-index=${index} tabindex=${index === current ? 0 : -1} title=${short(words(one), 300)}
      @click=${(event) => click(event, one, index)} @focus=${() => (current = index)}>
      ${small(short(words(one), 120), { src: shownAt(one), name: one.name })}
    </button>
    <button class="icon star" aria-pressed=${String(one.starred)} aria-label="Star" title="Star (S)" tabindex="-1"
      @click=${() => star([one.name], !one.starred)}>${icon("star")}</button>
    <input type="checkbox" class="mark" aria-label="Select" title="Select (Space)" tabindex="-1"
      .checked=${live(selected.value.has(one.name))} @change=${() => select(one.name)}>
  </li>`;

function click(event, one, index) {
  if (event.ctrlKey || event.metaKey) return select(one.name);
  if (event.shiftKey) return range(current, index);
  current = index;
  open(one);
}

function range(from, to) {
  const [first, last] = from < to ? [from, to] : [to, from];
  for (const one of items.value.slice(first, last + 1)) select(one.name, true);
}

const columns = (list) => {
  const tiles = [...list.querySelectorAll(".tile")];
  const below = tiles.findIndex((each) => each.offsetTop > tiles[0].offsetTop + 4 || each.parentElement.offsetTop > tiles[0].parentElement.offsetTop);
  return below < 0 ? tiles.length : below;
};

function keys(event) {
  const list = event.currentTarget;
  const from = Number(event.target.closest(".tile")?.dataset.index ?? current);
  const one = items.value[from];
  if (!one) return;
  const chosen = selected.value.size ? [...selected.value] : [one.name];
  const to = {
    ArrowLeft: () => from - 1, ArrowRight: () => from + 1, Home: () => 0, End: () => items.value.length - 1,
    ArrowUp: () => from - columns(list), ArrowDown: () => from + columns(list),
  }[event.key]?.();
  const act = {
    " ": () => select(one.name), s: () => star(chosen, !one.starred), d: () => download(chosen),
    Delete: () => sure(chosen), Escape: selectNone,
  }[event.key];
  if ((event.ctrlKey || event.metaKey) && event.key === "a") selectAll();
  else if (to !== undefined) go(list, from, Math.max(0, Math.min(items.value.length - 1, to)), event.shiftKey);
  else if (act && !event.ctrlKey && !event.metaKey) act();
  else return;
  event.preventDefault();
}

function go(list, from, to, extending) {
  if (extending) range(from, to);
  current = to;
  const next = list.querySelector(`[data-index="${to}"]`);
  for (const each of list.querySelectorAll('.tile[tabindex="0"]')) each.tabIndex = -1;
  next.tabIndex = 0;
  next.focus();
}

// Near the end of the list, the next page is loaded.
let seen = null;
const sentinel = (element) => {
  seen?.disconnect();
  seen = element ? new IntersectionObserver(([entry]) => entry.isIntersecting && loadMore(), { rootMargin: "800px" }) : null;
  if (element) seen.observe(element);
};

const selection = () => {
  const names = [...selected.value];
  return html`<div class="actions chosen" role="group" aria-label="Selection">
    <span>${many(names.length, "file")} selected</span>
    <button @click=${() => star(names, true)}>Star</button>
    <button @click=${() => download(names)}>Download</button>
    <button class="bad" @click=${() => sure(names)}>Delete</button>
    <button @click=${selectNone}>Clear selection</button>
  </div>`;
};

const filtered = () => filter.words.value || filter.model.value || filter.starred.value;

const nothingThere = () => html`<div class="welcome">
  <h2>${filtered() ? "Nothing like that" : "Nothing here yet"}</h2>
  <p>${filtered() ? "Try fewer words, or another filter." : "Everything made here is kept, with its recipe."}</p>
  ${filtered() ? nothing : html`<a class="button" href="#make">Go and draw one</a>`}
</div>`;

export const galleryView = () => html`
  <main class="gallery">
    <div class="filters">
      <div class="field"><label for="search">Search</label>
        <input id="search" type="search" placeholder="Words of a prompt" .value=${live(filter.words.value)}
          @input=${(event) => search(event.target.value)}></div>
      ${choice({ id: "of-model", label: "Made by", value: filter.model.value, options: [["", "Any"], ...models.value.map(({ id }) => [id, id])],
        input: (value) => ((filter.model.value = value), load()) })}
      ${check({ id: "starred", label: "Starred", value: filter.starred.value, input: (value) => ((filter.starred.value = value), load()) })}
      <label class="button file">Read a picture’s recipe
        <input type="file" accept="image/png,image/jpeg,image/webp" @change=${(event) => readRecipe(event.target.files[0])}></label>
      <p class="hint" role="status">${total.value === null ? "" : many(total.value, "file")}</p>
    </div>
    ${trouble.value ? failure(trouble.value, load) : nothing}
    ${selected.value.size ? selection() : nothing}
    ${fresh.value ? html`<button class="fresh" @click=${load}>${many(fresh.value, "new file")}: show</button>` : nothing}
    <ul class="grid" role="list" aria-label="Gallery" @keydown=${keys}>
      ${repeat(items.value, (one) => one.name, tile)}
    </ul>
    ${!items.value.length && !busy.value && total.value !== null ? nothingThere() : nothing}
    ${more.value ? html`<p class="quiet end" ${ref(sentinel)}>More …</p>` : nothing}
  </main>`;

