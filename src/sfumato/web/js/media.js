// The element for a file, by its name. WebP and GIF are pictures.
import { html } from "./lib.js";
import { thumbnail } from "./api.js";
import { icon } from "./icons.js";

const isVideo = (name) => /\.(mp4|webm)$/.test(name);
export const isSound = (name) => /\.(wav|flac|mp3|opus)$/.test(name);

export const media = (label, { src, name, done = true }) => {
  if (isVideo(name)) return html`<video controls loop aria-label=${label} src=${src}></video>`;
  if (isSound(name)) return html`<audio controls aria-label=${label} src=${src}></audio>`;
  return html`<img alt=${label} src=${src} aria-busy=${String(!done)} class=${done ? "" : "growing"}>`;
};

/** Small, inside a button. */
export const small = (alt, { src, name }) =>
  isSound(name)
    ? html`${icon("sound")}<span class="hint">${alt}</span>`
    : html`<img src=${isVideo(name) ? thumbnail(name) : src} alt=${alt} loading="lazy" decoding="async">`;
