// The page, rendered whenever a signal changes.
import { effect, html, nothing, render, signal, untracked } from "./lib.js";
import { compareView } from "./compare.js";
import { banner, online } from "./connection.js";
import { readRecipe, refusal } from "./dropped.js";
import { restore } from "./drawings.js";
import { load } from "./gallery.js";
import { galleryView } from "./galleryview.js";
import { failure } from "./controls.js";
import { keyDialog } from "./key.js";
import { loadModels } from "./models.js";
import { make } from "./make.js";
import { newSource, reworkKeys, reworkView } from "./rework.js";
import { fileOf } from "./source.js";
import { look, serverView } from "./server.js";
import { themeSwitch } from "./theme.js";
import { viewer } from "./viewer.js";

const TABS = {
  make: ["Make", make],
  rework: ["Rework", reworkView],
  gallery: ["Gallery", galleryView, load],
  compare: ["Compare", compareView],
  server: ["Server", serverView, look],
};

const tab = signal("make");
const trouble = signal("");
let entered = false;

function turn() {
  const named = location.hash.slice(1);
  const next = named in TABS ? named : "make";
  if (next !== tab.value || !entered) TABS[next][2]?.();
  entered = true;
  tab.value = next;
}

const page = () => html`
  ${banner()}
  <header class="top">
    <h1><a class="brand" href="#make"><img src="studio/icon.svg" alt="" width="22" height="22">Sfumato</a></h1>
    <nav aria-label="Views">
      ${Object.entries(TABS).map(([name, [words]]) => html`<a href="#${name}" aria-current=${tab.value === name ? "page" : nothing}>${words}</a>`)}
    </nav>
    ${themeSwitch()}
  </header>
  ${trouble.value ? failure(trouble.value, start) : nothing}
  ${refusal()}
  ${TABS[tab.value][1]()}
  ${viewer()}
  ${keyDialog()}`;

async function start() {
  trouble.value = "";
  try {
    await loadModels();
  } catch (error) {
    if (!error.offline) trouble.value = error.message;
  }
}

// On Rework it becomes the source; elsewhere its recipe is read.
function arrived(event, transfer) {
  const file = fileOf(transfer);
  if (!file) return;
  event.preventDefault();
  if (tab.value === "rework") newSource(file);
  else readRecipe(file);
}

turn();
addEventListener("hashchange", turn);
addEventListener("keydown", (event) => {
  const typing = event.target.closest?.("input:not([type=range], [type=checkbox]), textarea, select, dialog");
  if (!typing && ["make", "rework"].includes(tab.value) && reworkKeys(event)) event.preventDefault();
});
addEventListener("dragover", (event) => event.preventDefault());
addEventListener("drop", (event) => arrived(event, event.dataTransfer));
addEventListener("paste", (event) => arrived(event, event.clipboardData));
restore();
const root = document.getElementById("studio");
root.replaceChildren();
effect(() => render(page(), root));
effect(() => void (online.value && untracked(start))); // also when the server is back
