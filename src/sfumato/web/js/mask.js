// The mask as a list of edits: undo repeats all but one.
import { signal } from "./lib.js";

export const brush = { size: signal(24), erase: signal(false) };
export const deeds = signal([]); // strokes and inversions, oldest first

const PAINT = "#c2410c";
let canvas = null;

// It is read back when it is sent.
const penOf = () => canvas.getContext("2d", { willReadFrequently: true });

/** Draw on this canvas, which has the picture's size. */
export function on(element) {
  if (canvas === element) return;
  canvas = element;
  again();
}

export function reset() {
  deeds.value = [];
  again();
}

export function again() {
  if (!canvas) return;
  penOf().clearRect(0, 0, canvas.width, canvas.height);
  for (const deed of deeds.value) perform(deed);
}

function perform(deed, from = 0) {
  const pen = penOf();
  pen.save();
  pen.fillStyle = pen.strokeStyle = PAINT;
  if (deed.invert) {
    pen.globalCompositeOperation = "xor";
    pen.fillRect(0, 0, canvas.width, canvas.height);
  } else {
    pen.globalCompositeOperation = deed.erase ? "destination-out" : "source-over";
    pen.lineWidth = deed.size;
    pen.lineCap = "round";
    // Segment by segment, so that it looks the same when repeated.
    deed.points.forEach((point, index) => index >= from && piece(pen, deed, index, point));
  }
  pen.restore();
}

function piece(pen, { points, size }, index, point) {
  pen.beginPath();
  if (index) {
    pen.moveTo(...points[index - 1]);
    pen.lineTo(...point);
    pen.stroke();
  } else {
    pen.arc(...point, size / 2, 0, 2 * Math.PI);
    pen.fill();
  }
}

const add = (deed) => {
  deeds.value = [...deeds.value, deed];
  perform(deed);
};

/** Begin a stroke at a point in pixels of the picture. */
export function begin(point, erase = brush.erase.value) {
  const stroke = { erase, size: brush.size.value, points: [point] };
  add(stroke);
  return (next) => {
    stroke.points.push(next);
    perform(stroke, stroke.points.length - 1);
  };
}

export const invert = () => add({ invert: true });
export const clear = () => reset();

export function undo() {
  deeds.value = deeds.value.slice(0, -1);
  again();
}

export const resize = (factor) => {
  const size = brush.size.value * factor;
  brush.size.value = Math.round(Math.min(512, Math.max(1, factor > 1 ? Math.max(size, brush.size.value + 1) : size)));
};

/** White where it is painted, else black; null if nothing is. */
export async function png() {
  if (!canvas || !deeds.value.length) return null;
  const { width, height } = canvas;
  const copy = new OffscreenCanvas(width, height);
  const pen = copy.getContext("2d", { willReadFrequently: true });
  pen.drawImage(canvas, 0, 0);
  if (!pen.getImageData(0, 0, width, height).data.some((value, index) => index % 4 === 3 && value)) return null;
  pen.globalCompositeOperation = "source-in";
  pen.fillStyle = "white";
  pen.fillRect(0, 0, width, height);
  pen.globalCompositeOperation = "destination-over";
  pen.fillStyle = "black";
  pen.fillRect(0, 0, width, height);
  return copy.convertToBlob({ type: "image/png" });
}
