// Tables as GitHub writes them: https://github.github.com/gfm/#tables-extension-

/** @typedef {import("./markdown.js").Range} Range */
/** @typedef {"" | "left" | "center" | "right"} Alignment */

const DELIMITER = /^(:?)-+(:?)$/;
/** What may become the line below the head. */
const BEGUN = /^[ \t|:-]*$/;

/**
 * Whether a table begins in a line. While a text grows, a line that begins with | is taken for the head of one until
 * the line below it is there: else it would stand there as text at first.
 *
 * @param {string} source @param {Range[]} lines @param {number} i @param {boolean} growing
 */
export function beginsTable(source, lines, i, growing) {
  const [head, below] = lines.slice(i, i + 2).map(({ start, end }) => source.slice(start, end));
  if (growing && i + 2 >= lines.length && /^ {0,3}\|/.test(head)) return BEGUN.test(below ?? "");
  if (!below?.includes("|") || !BEGUN.test(below)) return false;
  const columns = cells(source, lines[i + 1]);
  const marked = columns.every(({ start, end }) => DELIMITER.test(source.slice(start, end)));
  return marked && columns.length === cells(source, lines[i]).length;
}

/** @param {string} source @param {Range | undefined} line the one below the head @returns {Alignment[]} of the columns */
export function alignments(source, line) {
  return (line ? cells(source, line) : []).map(({ start, end }) => {
    const [, left, right] = DELIMITER.exec(source.slice(start, end)) ?? [];
    return left && right ? "center" : right ? "right" : left ? "left" : "";
  });
}

/** @param {string} source @param {Range} row @returns {Range[]} its cells, without the space around them */
export function cells(source, row) {
  let { start, end } = trim(source, row);
  if (source[start] === "|") start += 1;
  const found = [];
  let from = start;
  for (let at = start; at < end; at += 1) {
    if (source[at] === "\\") at += 1;
    else if (source[at] === "|") {
      found.push(trim(source, { start: from, end: at }));
      from = at + 1;
    }
  }
  if (from < end || !found.length) found.push(trim(source, { start: from, end }));
  return found;
}

/** @param {string} source @param {Range} range @returns {Range} */
function trim(source, { start, end }) {
  while (start < end && /\s/.test(source[start])) start += 1;
  while (end > start && /\s/.test(source[end - 1])) end -= 1;
  return { start, end };
}
