// Compare: one prompt over a grid of two parameters.
import { batch, html, nothing, signal } from "./lib.js";
import { choice, failure, text } from "./controls.js";
import { cancel, draw } from "./drawings.js";
import { promptFields, settingFields } from "./fields.js";
import { form, request } from "./form.js";
import { remember } from "./history.js";
import { kept } from "./kept.js";
import { saveSheet } from "./sheet.js";
import { AXES, plain, values } from "./variants.js";

const MOST = 100; // cells
const AT_ONCE = 16; // requests in flight

const across = { axis: kept("across", "steps"), text: kept("across-values", "5, 10, 20") };
const down = { axis: kept("down", "guidance_scale"), text: kept("down-values", "1, 3, 6") };
const grid = signal(null); // { columns, rows, cells: { label, drawing }[][], x, y, prompt }
const trouble = signal("");

/** The rows and columns; raises Error with a readable message. */
function planned() {
  const prompt = form.prompt.value.trim();
  if (!prompt) throw new Error("Say what to draw.");
  if (across.axis.value && across.axis.value === down.axis.value) throw new Error("Both sides are the same. Choose another one.");
  const columns = values(across.axis.value, across.text.value, prompt);
  const rows = values(down.axis.value, down.text.value, prompt);
  if (columns.length * rows.length > MOST) throw new Error(`${columns.length} × ${rows.length} pictures; a grid may have at most ${MOST}.`);
  return { prompt, columns, rows };
}

function start() {
  let plan;
  try {
    plan = planned();
  } catch (error) {
    trouble.value = error.message;
    return;
  }
  const { n: _, ...base } = { ...request(), prompt: plain(plan.prompt) };
  const [x, y] = [across.axis.value, down.axis.value];
  const cells = plan.rows.map(([row, down]) => plan.columns.map(([column, across]) => ({
    request: { ...base, ...(x && { [x]: column }), ...(y && { [y]: row }) },
    label: [across, down].filter(Boolean).join(", ") || plan.prompt,
    drawing: signal(null),
  })));
  batch(() => {
    stop();
    trouble.value = "";
    grid.value = { ...plan, cells, x, y, stopped: false };
  });
  remember(plan.prompt);
  fill(grid.value);
}

/** Column by column: each is drawn together. */
async function fill(now) {
  const order = now.columns.flatMap((_, column) => now.rows.map((__, row) => now.cells[row][column]));
  const under = new Set();
  for (const cell of order) {
    while (under.size >= AT_ONCE) await Promise.race(under);
    if (now.stopped) return;
    const drawing = draw("v1/images/generations", cell.request, { hidden: true });
    cell.drawing.value = drawing;
    const over = drawing.over.catch(() => {}).finally(() => under.delete(over));
    under.add(over);
  }
}

const drawingsOf = (now) => now.cells.flat().map((cell) => cell.drawing.value).filter(Boolean);

function stop() {
  if (!grid.value) return;
  grid.value.stopped = true;
  for (const drawing of drawingsOf(grid.value)) cancel(drawing);
}

const side = (id, label, { axis, text: line }) => html`
  ${choice({ id, label, value: axis.value, wide: true, options: Object.entries(AXES).map(([value, { label }]) => [value, label]),
    input: (value) => batch(() => ((axis.value = value), (line.value = AXES[value].example ?? ""))) })}
  ${AXES[axis.value]?.read
    ? text({ id: `${id}-values`, label: `Values ${label.toLowerCase()}`, value: line.value, wide: true, placeholder: AXES[axis.value].example,
        input: (value) => (line.value = value) })
    : nothing}`;

const cellView = ({ drawing, label }) => {
  const one = drawing.value;
  const picture = one?.pictures.value[0];
  if (picture?.src) return html`<img src=${picture.src} alt=${label} class=${picture.done ? "" : "growing"}>`;
  if (one?.state.value === "failed") return html`<p class="problem">${one.message.value}</p>`;
  if (one?.state.value === "cancelled") return html`<p class="quiet">Stopped</p>`;
  return html`<span class="dots" role="img" aria-label="Waiting: ${label}"></span>`;
};

function table(now) {
  const done = drawingsOf(now).filter((each) => each.state.value === "done").length;
  const all = now.columns.length * now.rows.length;
  const live = drawingsOf(now).some((each) => each.live);
  return html`
    <div class="sheets" role="region" aria-label="Cells" tabindex="0">
      <table>
        <caption class="hidden">${now.prompt}</caption>
        <thead><tr>${now.y ? html`<td></td>` : nothing}${now.columns.map(([, label]) => html`<th scope="col">${now.x ? label : "Picture"}</th>`)}</tr></thead>
        <tbody>${now.cells.map((cells, row) => html`<tr>${now.y ? html`<th scope="row">${now.rows[row][1]}</th>` : nothing}
          ${cells.map((cell) => html`<td>${cellView(cell)}</td>`)}</tr>`)}</tbody>
      </table>
    </div>
    <div class="actions">
      <button ?disabled=${!done} @click=${() => saveSheet(now)}>Download as one picture</button>
      <p class="status" role="status">${done} of ${all} done${live ? "" : now.stopped ? ", stopped" : ""}</p>
    </div>`;
}

export const compareView = () => html`
  <main class="work compare">
    <section class="ask" aria-label="What to draw">
      ${promptFields(start)}
      <div class="fields">${side("across", "Across", across)}${side("down", "Down", down)}</div>
      <div class="actions main">
        <button class="primary" @click=${start}>Draw</button>
        ${grid.value && drawingsOf(grid.value).some((each) => each.live) ? html`<button @click=${stop}>Cancel</button>` : nothing}
        <kbd class="hint">Ctrl + Enter</kbd>
      </div>
      ${trouble.value ? failure(trouble.value) : nothing}
    </section>
    <section class="stage" aria-label="Grid">
      ${grid.value ? table(grid.value) : html`<div class="canvas bare"><div class="welcome">
        <h2>One prompt, side by side</h2>
        <p>Choose what changes across and what changes down. Everything else stays the same, including the seed. Each column is drawn together.</p>
      </div></div>`}
    </section>
    <section class="settings" aria-label="Settings">${settingFields({ several: false })}</section>
  </main>`;
