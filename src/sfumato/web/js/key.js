// The API key, stored in this browser.
import { html, nothing, signal } from "./lib.js";
import { modal } from "./controls.js";
import { kept } from "./kept.js";

export const key = kept("key", "");

const asking = signal(null); // { promise, resolve, wrong } while the question is open

/** Resolves once there is a key other than `used`. */
export function askForKey(used) {
  if (key.value !== used) return Promise.resolve();
  if (asking.value) return asking.value.promise;
  let resolve;
  const promise = new Promise((done) => (resolve = done));
  asking.value = { promise, resolve, wrong: Boolean(used) };
  return promise;
}

function answer(event) {
  event.preventDefault();
  const { resolve } = asking.value;
  key.value = event.target.elements.key.value.trim();
  asking.value = null;
  resolve();
}

export const keyDialog = () =>
  asking.value
    ? html`<dialog class="dialog" aria-labelledby="key-title" ${modal()} @cancel=${(event) => event.preventDefault()}>
        <form @submit=${answer}>
          <h2 id="key-title">This server asks for a key</h2>
          <p>${asking.value.wrong ? "That key is not valid. " : ""}Get one from the server's operator. It stays in this browser.</p>
          <label for="key">API key</label>
          <input id="key" name="key" type="password" autocomplete="current-password" required autofocus>
          <div class="actions"><button class="primary">Go on</button></div>
        </form>
      </dialog>`
    : nothing;
