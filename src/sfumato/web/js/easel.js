// The source with its mask on top: painted, zoomed and moved.
import { html, ref, signal } from "./lib.js";
import { range, tool } from "./controls.js";
import { begin, brush, clear, deeds, invert, on, resize, undo } from "./mask.js";
import { source } from "./source.js";

const view = { zoom: 1, x: 0, y: 0 }; // x and y in pixels of the screen, from the middle
const pan = signal(false);
let easel = null;
let canvas = null;
let stroke = null;
let spot = null; // where the keyboard's brush is, in pixels of the picture
const pointers = new Map();

const watcher = new ResizeObserver(() => place());

const mount = (element) => {
  watcher.disconnect();
  easel = element ?? null;
  if (easel) watcher.observe(easel);
};

const paintOn = (element) => {
  canvas = element ?? null;
  if (!canvas) return;
  queueMicrotask(() => {
    on(canvas);
    place();
  });
};

export function fit() {
  Object.assign(view, { zoom: 1, x: 0, y: 0 });
  place();
}

function place() {
  if (!easel || !canvas || !source.value) return;
  const { width, height } = source.value;
  const base = Math.min(easel.clientWidth / width, easel.clientHeight / height);
  const scale = base * view.zoom;
  const left = (easel.clientWidth - width * scale) / 2 + view.x;
  const top = (easel.clientHeight - height * scale) / 2 + view.y;
  const sheet = canvas.parentElement;
  sheet.style.width = `${width}px`;
  sheet.style.height = `${height}px`;
  sheet.style.transform = `translate(${left}px, ${top}px) scale(${scale})`;
}

function zoom(factor, x, y) {
  const box = easel.getBoundingClientRect();
  const [midX, midY] = [box.left + box.width / 2, box.top + box.height / 2];
  const [fromX, fromY] = [(x ?? midX) - midX, (y ?? midY) - midY];
  const next = Math.min(32, Math.max(0.5, view.zoom * factor));
  const real = next / view.zoom;
  Object.assign(view, { zoom: next, x: fromX - (fromX - view.x) * real, y: fromY - (fromY - view.y) * real });
  place();
}

const pointOf = ({ clientX, clientY }) => {
  const box = canvas.getBoundingClientRect();
  return [((clientX - box.left) * canvas.width) / box.width, ((clientY - box.top) * canvas.height) / box.height];
};

function cursor(event) {
  const ring = easel.querySelector(".ring");
  const box = easel.getBoundingClientRect();
  const size = (brush.size.value * canvas.getBoundingClientRect().width) / canvas.width;
  ring.style.width = ring.style.height = `${size}px`;
  ring.style.transform = `translate(${event.clientX - box.left - size / 2}px, ${event.clientY - box.top - size / 2}px)`;
}

function down(event) {
  if (event.pointerType === "mouse" && event.button > 1) return;
  event.preventDefault();
  canvas.focus({ preventScroll: true });
  easel.setPointerCapture(event.pointerId);
  pointers.set(event.pointerId, event);
  if (pointers.size > 1 && stroke) {
    stroke = null; // a second finger: it was to zoom
    undo();
  }
  if (pointers.size === 1 && event.button !== 1 && !pan.value) {
    stroke = begin(pointOf(event), event.buttons & 32 ? true : undefined);
  }
}

function move(event) {
  if (event.pointerType !== "touch") cursor(event);
  const before = pointers.get(event.pointerId);
  if (!before) return;
  if (stroke) {
    for (const each of event.getCoalescedEvents?.().length ? event.getCoalescedEvents() : [event]) stroke(pointOf(each));
  } else if (pointers.size === 1) {
    view.x += event.clientX - before.clientX;
    view.y += event.clientY - before.clientY;
    place();
  } else {
    pinch(before, event);
  }
  pointers.set(event.pointerId, event);
}

function pinch(before, event) {
  const other = [...pointers.values()].find((each) => each.pointerId !== event.pointerId);
  const apart = (one) => Math.hypot(one.clientX - other.clientX, one.clientY - other.clientY);
  view.x += (event.clientX - before.clientX) / 2;
  view.y += (event.clientY - before.clientY) / 2;
  zoom(apart(event) / Math.max(1, apart(before)), (event.clientX + other.clientX) / 2, (event.clientY + other.clientY) / 2);
}

function up(event) {
  pointers.delete(event.pointerId);
  stroke = null;
}

const wheel = {
  handleEvent(event) {
    event.preventDefault();
    zoom(Math.exp(-event.deltaY / 400), event.clientX, event.clientY);
  },
  passive: false,
};

/** Arrows move the keyboard's brush, Space paints with it. */
function keys(event) {
  const { width, height } = source.value;
  const step = Math.max(1, Math.round(brush.size.value / 3));
  const by = { ArrowLeft: [-step, 0], ArrowRight: [step, 0], ArrowUp: [0, -step], ArrowDown: [0, step] }[event.key];
  spot ??= [width / 2, height / 2];
  if (by) spot = [Math.min(width, Math.max(0, spot[0] + by[0])), Math.min(height, Math.max(0, spot[1] + by[1]))];
  else if (event.key === " ") begin(spot);
  else return;
  event.preventDefault();
  const box = canvas.getBoundingClientRect();
  cursor({ clientX: box.left + (spot[0] * box.width) / width, clientY: box.top + (spot[1] * box.height) / height });
}

export function easelKeys(event) {
  if (event.key === "[") resize(1 / 1.25);
  else if (event.key === "]") resize(1.25);
  else if ((event.ctrlKey || event.metaKey) && event.key === "z" && deeds.value.length) undo();
  else return false;
  return true;
}

export const tools = () => html`
  <div class="tools" role="group" aria-label="Mask tools">
    <button aria-pressed=${String(!brush.erase.value && !pan.value)} @click=${() => ((brush.erase.value = false), (pan.value = false))}>Brush</button>
    <button aria-pressed=${String(brush.erase.value && !pan.value)} @click=${() => ((brush.erase.value = true), (pan.value = false))}>Eraser</button>
    <button aria-pressed=${String(pan.value)} @click=${() => (pan.value = !pan.value)}>Move</button>
    ${range({ id: "brush", label: "Brush size", value: brush.size.value, min: 1, max: 256, step: 1, input: (value) => (brush.size.value = value) })}
    ${tool("undo", "Undo", undo, { disabled: !deeds.value.length })}
    <button @click=${invert}>Invert</button>
    <button ?disabled=${!deeds.value.length} @click=${clear}>Clear</button>
    ${tool("minus", "Zoom out", () => zoom(1 / 1.4))}${tool("plus", "Zoom in", () => zoom(1.4))}
    <button @click=${fit}>Fit</button>
  </div>`;

export const easelView = () => html`
  <div class="easel ${pan.value ? "moving" : ""}" ${ref(mount)} @pointerdown=${down} @pointermove=${move} @pointerup=${up} @pointercancel=${up}
    @wheel=${wheel} @contextmenu=${(event) => event.preventDefault()}>
    <div class="sheet">
      <img src=${source.value.src} alt="Source" draggable="false">
      <canvas ${ref(paintOn)} role="img" aria-label="Mask" tabindex="0" width=${source.value.width} height=${source.value.height}
        @keydown=${keys}></canvas>
    </div>
    <span class="ring" aria-hidden="true"></span>
  </div>`;
