// A picture of many like things, such as the pages of the pool: a square for each, filled from below.

const GAP = 1;
const LEAST = 4;
const MOST = 14;

/**
 * How many squares stand side by side: about twice as many as above each other, and so that few are left over for
 * the last line.
 *
 * @param {number} count @param {number} width in pixels
 */
function bestColumns(count, width) {
  const [least, most] = [Math.ceil(width / MOST), Math.floor(width / LEAST)];
  const wanted = Math.max(least, Math.min(most, Math.round(Math.sqrt(count * 2))));
  let best = wanted;
  let lowest = Infinity;
  for (let columns = least; columns <= Math.min(most, wanted * 1.6); columns += 1) {
    const missing = (columns - (count % columns)) % columns;
    const cost = missing / columns + Math.abs(Math.log(columns / wanted));
    if (cost < lowest) [best, lowest] = [columns, cost];
  }
  return best;
}

/** @typedef {{color: string, share: number}[]} Cell parts from the bottom up; color is the name of a CSS variable */

/**
 * @param {HTMLCanvasElement} canvas whose width is its container's; its height follows
 * @param {Cell[]} cells
 */
export function paintCells(canvas, cells) {
  const width = canvas.clientWidth;
  if (!width || !cells.length) return;
  const ratio = devicePixelRatio;
  const columns = bestColumns(cells.length, width);
  const pitch = width / columns;
  const rows = Math.ceil(cells.length / columns);
  const height = Math.ceil(rows * pitch);
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(height * ratio);
  canvas.style.height = `${height}px`;
  const context = /** @type {CanvasRenderingContext2D} */ (canvas.getContext("2d"));
  const style = getComputedStyle(canvas);
  /** @type {Map<string, string>} */
  const colors = new Map();
  const colorOf = (/** @type {string} */ name) => {
    if (!colors.has(name)) colors.set(name, style.getPropertyValue(name));
    return colors.get(name) ?? "";
  };
  const snap = (/** @type {number} */ value) => Math.round(value * ratio);
  cells.forEach((cell, i) => {
    const left = snap((i % columns) * pitch);
    const right = snap(((i % columns) + 1) * pitch - GAP);
    const top = snap(Math.floor(i / columns) * pitch);
    let bottom = snap((Math.floor(i / columns) + 1) * pitch - GAP);
    const size = bottom - top;
    for (const { color, share } of cell) {
      const part = share >= 1 ? bottom - top : Math.ceil(share * size);
      context.fillStyle = colorOf(color);
      context.fillRect(left, bottom - part, right - left, part);
      bottom -= part;
    }
  });
}
