// A grid as one labelled picture to download.
const GAP = 12;
const MOST = 8192; // pixels per side

const loaded = (src) => {
  const image = Object.assign(new Image(), { src });
  return image.decode().then(() => image, () => null);
};

/** Lines of at most `width` pixels; longer words are broken. */
function wrapped(pen, text, width) {
  const lines = [];
  let line = "";
  for (const word of text.split(/\s+/)) {
    let rest = word;
    if (line && pen.measureText(`${line} ${rest}`).width <= width) {
      line += ` ${rest}`;
      continue;
    }
    if (line) lines.push(line);
    while (pen.measureText(rest).width > width && rest.length > 1) {
      let length = rest.length - 1;
      while (length > 1 && pen.measureText(rest.slice(0, length)).width > width) length -= 1;
      lines.push(rest.slice(0, length));
      rest = rest.slice(length);
    }
    line = rest;
  }
  return line ? [...lines, line] : lines;
}

export async function saveSheet({ prompt, columns, rows, cells, x, y }) {
  const images = await Promise.all(cells.flat().map(({ drawing }) => {
    const picture = drawing.value?.pictures.value[0];
    return picture?.done ? loaded(picture.src) : null;
  }));
  const seen = images.filter(Boolean);
  let width = Math.max(...seen.map((each) => each.naturalWidth), 192);
  let height = Math.max(...seen.map((each) => each.naturalHeight));
  height = Math.round((height * width) / Math.max(...seen.map((each) => each.naturalWidth)));
  const scale = Math.min(1, MOST / ((width + GAP) * (columns.length + 1)), MOST / ((height + GAP) * (rows.length + 1)));
  [width, height] = [Math.floor(width * scale), Math.floor(height * scale)];
  const size = Math.max(12, Math.min(28, Math.round(width / 14)));
  const line = Math.round(size * 1.35);

  const canvas = document.createElement("canvas");
  const pen = canvas.getContext("2d");
  const font = `${size}px system-ui, sans-serif`;
  pen.font = font;
  const side = y ? Math.min(width, Math.max(...rows.map(([, label]) => pen.measureText(label).width)) + GAP) : 0;
  const heads = x ? columns.map(([, label]) => wrapped(pen, label, width)) : [];
  const head = Math.max(0, ...heads.map((each) => each.length)) * line;
  const left = GAP + (side ? side + GAP : 0);
  canvas.width = left + columns.length * (width + GAP);
  const title = wrapped(pen, prompt, canvas.width - 2 * GAP);
  const top = GAP + title.length * line + GAP + (head ? head + GAP : 0);
  canvas.height = top + rows.length * (height + GAP);

  pen.fillStyle = "#fff";
  pen.fillRect(0, 0, canvas.width, canvas.height);
  Object.assign(pen, { font, fillStyle: "#211e1a", textBaseline: "top", imageSmoothingQuality: "high" });
  title.forEach((words, index) => pen.fillText(words, GAP, GAP + index * line));
  heads.forEach((words, column) => words.forEach((each, index) =>
    pen.fillText(each, left + column * (width + GAP), top - GAP - head + index * line)));
  rows.forEach(([, label], row) => {
    const at = top + row * (height + GAP);
    if (y) wrapped(pen, label, side).forEach((each, index) => pen.fillText(each, GAP, at + index * line));
    columns.forEach((_, column) => {
      const image = images[row * columns.length + column];
      if (!image) return;
      const fit = Math.min(width / image.naturalWidth, height / image.naturalHeight);
      pen.drawImage(image, left + column * (width + GAP), at, image.naturalWidth * fit, image.naturalHeight * fit);
    });
  });

  const blob = await new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
  const link = Object.assign(document.createElement("a"), { href: URL.createObjectURL(blob), download: "comparison.png" });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
}
