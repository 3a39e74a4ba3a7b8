// Light or dark.
import { effect, html } from "./lib.js";
import { kept } from "./kept.js";
import { icon } from "./icons.js";

const NEXT = { system: "light", light: "dark", dark: "system" };
const theme = kept("theme", "system");

effect(() => {
  document.documentElement.dataset.theme = theme.value;
});

export const themeSwitch = () =>
  html`<button class="icon" title="Colours: ${theme.value}" aria-label="Colours: ${theme.value}"
    @click=${() => (theme.value = NEXT[theme.value] ?? "system")}>${icon(theme.value)}</button>`;
