// A plot of one number over the last minutes.
import { html, svg } from "./lib.js";

const [WIDTH, HEIGHT] = [300, 48];

export function plot(samples, field, label) {
  const span = Math.max(60, samples[0]?.seconds_ago ?? 0);
  const values = samples.map((each) => each[field] ?? 0);
  const most = Math.max(...values, 0);
  const latest = samples.findLast((each) => each[field] != null)?.[field] ?? 0;
  const points = samples.map(({ seconds_ago: ago }, index) =>
    `${(WIDTH * (1 - ago / span)).toFixed(1)},${(HEIGHT - 2 - (HEIGHT - 6) * (most ? values[index] / most : 0)).toFixed(1)}`);
  const words = `${label}: ${latest} now, ${most} at most`;
  return html`<figure class="plot">
    <figcaption><span>${label}</span><b>${latest}</b><small>at most ${most}</small></figcaption>
    <svg viewBox="0 0 ${WIDTH} ${HEIGHT}" preserveAspectRatio="none" role="img" aria-label=${words}>
      ${points.length > 1
        ? svg`<polyline class="under" points="${points[0].split(",")[0]},${HEIGHT} ${points.join(" ")} ${WIDTH},${HEIGHT}"/><polyline points=${points.join(" ")}/>`
        : svg`<line x1="0" x2=${WIDTH} y1=${HEIGHT - 2} y2=${HEIGHT - 2}/>`}
    </svg></figure>`;
}
