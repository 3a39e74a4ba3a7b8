// Whether the server responds; a banner if not.
import { html, nothing, signal } from "./lib.js";

const AGAIN_MS = 1000;

export const online = signal(true);
let waiting = null;

export const reached = () => {
  online.value = true;
};

export function lost() {
  online.value = false;
  back();
}

/** Resolves once it responds again. */
export function back() {
  if (online.value) return Promise.resolve();
  waiting ??= ask().finally(() => {
    waiting = null;
  });
  return waiting;
}

async function ask() {
  while (!online.value) {
    await new Promise((resolve) => setTimeout(resolve, AGAIN_MS));
    try {
      // The page: healthz is answered before the server can do anything else.
      const answer = await fetch(document.baseURI, { cache: "no-store" });
      if (answer.ok) reached();
    } catch {
      // still gone
    }
  }
}

export const banner = () =>
  online.value
    ? nothing
    : html`<p class="banner" role="alert">
        The server does not respond. Is it running? This page retries every second and continues by itself.
      </p>`;
