// The part of Markdown that models write most, as a tree of ranges in the source. Nothing is thrown away: what has
// no meaning here stays text.

import { alignments, beginsTable, cells } from "./table.js";

/**
 * @typedef {{start: number, end: number}} Range
 * @typedef {Range & {kind: "text" | "code"}} Leaf
 * @typedef {{kind: "strong" | "em", children: Inline[]}} Span
 * @typedef {{kind: "link", href: string, children: Inline[]}} Link
 * @typedef {Leaf | Span | Link} Inline
 * @typedef {Range & {depth: number, ordered: boolean, number: number}} Item
 * @typedef {Range & ({kind: "paragraph" | "rule"} | {kind: "heading", level: number, body: Range}
 *   | {kind: "fence", language: string, body: Range} | {kind: "list", items: Item[]}
 *   | {kind: "quote", lines: Range[]} | {kind: "table", rows: Range[][], align: import("./table.js").Alignment[]})} Block
 */

const FENCE = /^[ \t]*(`{3,}|~{3,})[ \t]*([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})[ \t]+/;
const RULE = /^ {0,3}([-*_])(?:[ \t]*\1){2,}[ \t]*$/;
const ITEM = /^([ \t]*)(?:[-*+]|(\d{1,9})[.)])[ \t]+(?=\S)/;
const QUOTE = /^ {0,3}> ?/;
const MOST_NESTING = 8;

/** @param {string} source @param {boolean} [growing] whether more of it is to come @returns {Block[]} */
export function parseBlocks(source, growing = false) {
  const lines = lineRanges(source);
  /** @type {Block[]} */
  const blocks = [];
  for (let i = 0; i < lines.length; ) {
    const { start, end } = lines[i];
    const line = source.slice(start, end);
    const heading = HEADING.exec(line);
    if (!line.trim()) {
      i += 1;
    } else if (FENCE.test(line)) {
      i = fence(source, lines, i, blocks);
    } else if (heading) {
      const body = { start: start + heading[0].length, end };
      blocks.push({ kind: "heading", level: heading[1].length, start, end, body });
      i += 1;
    } else if (RULE.test(line)) {
      blocks.push({ kind: "rule", start, end });
      i += 1;
    } else if (ITEM.test(line)) {
      i = list(source, lines, i, blocks);
    } else if (QUOTE.test(line)) {
      i = quote(source, lines, i, blocks);
    } else if (beginsTable(source, lines, i, growing)) {
      i = table(source, lines, i, blocks);
    } else {
      let last = i;
      while (goesOn(source, lines, last + 1) && !beginsTable(source, lines, last + 1, growing)) last += 1;
      blocks.push({ kind: "paragraph", start, end: lines[last].end });
      i = last + 1;
    }
  }
  return blocks;
}

/** @param {string} line */
function continues(line) {
  return line.trim() !== "" && ![FENCE, HEADING, RULE, ITEM, QUOTE].some((form) => form.test(line));
}

/** @param {string} source @param {Range[]} lines @param {number} i */
function goesOn(source, lines, i) {
  return i < lines.length && continues(source.slice(lines[i].start, lines[i].end));
}

/** @param {string} source @returns {Range[]} without the line breaks */
function lineRanges(source) {
  const lines = [];
  for (let start = 0; start <= source.length; ) {
    const found = source.indexOf("\n", start);
    const end = found < 0 ? source.length : found;
    lines.push({ start, end });
    start = end + 1;
  }
  return lines;
}

/** @param {string} source @param {Range[]} lines @param {number} i @param {Block[]} blocks */
function fence(source, lines, i, blocks) {
  const [, marks, language] = /** @type {RegExpExecArray} */ (FENCE.exec(source.slice(lines[i].start, lines[i].end)));
  let last = i + 1;
  const closes = (/** @type {string} */ line) => line.startsWith(marks) && !line.replaceAll(marks[0], "").trim();
  while (last < lines.length && !closes(source.slice(lines[last].start, lines[last].end).trimStart())) last += 1;
  const first = i + 1;
  const body =
    last > first ? { start: lines[first].start, end: lines[last - 1].end } : { start: lines[i].end, end: lines[i].end };
  const end = lines[Math.min(last, lines.length - 1)].end; // one that is not closed goes to the end
  blocks.push({ kind: "fence", language: language.trim(), start: lines[i].start, end, body });
  return last + 1;
}

/** @param {string} source @param {Range[]} lines @param {number} i @param {Block[]} blocks */
function list(source, lines, i, blocks) {
  /** @type {Item[]} */
  const items = [];
  /** @type {number[]} */
  const indents = [];
  const { start } = lines[i];
  for (; i < lines.length; i += 1) {
    const line = source.slice(lines[i].start, lines[i].end);
    const found = RULE.test(line) ? null : ITEM.exec(line);
    if (found) {
      const indent = found[1].replaceAll("\t", "    ").length;
      while (indents.length && indent < indents[indents.length - 1]) indents.pop();
      if (!indents.length || indent >= indents[indents.length - 1] + 2) indents.push(indent);
      const ordered = found[2] !== undefined;
      const range = { start: lines[i].start + found[0].length, end: lines[i].end };
      items.push({ ...range, depth: indents.length - 1, ordered, number: ordered ? Number(found[2]) : 1 });
    } else if (!line.trim()) {
      const next = lines[i + 1];
      if (!next || !/^[ \t]*(?:[-*+]|\d{1,9}[.)])[ \t]+\S|^ {2,}\S/.test(source.slice(next.start, next.end))) break;
    } else if (!FENCE.test(line) && (/^\s/.test(line) || continues(line))) {
      if (!/^\s/.test(line) && !source.slice(lines[i - 1].start, lines[i - 1].end).trim()) break;
      items[items.length - 1].end = lines[i].end;
    } else break;
  }
  blocks.push({ kind: "list", items, start, end: items[items.length - 1].end });
  return i;
}

/** @param {string} source @param {Range[]} lines @param {number} i @param {Block[]} blocks */
function quote(source, lines, i, blocks) {
  const { start } = lines[i];
  const inside = [];
  for (; i < lines.length; i += 1) {
    const found = QUOTE.exec(source.slice(lines[i].start, lines[i].end));
    if (!found) break;
    inside.push({ start: lines[i].start + found[0].length, end: lines[i].end });
  }
  blocks.push({ kind: "quote", lines: inside, start, end: inside[inside.length - 1].end });
  return i;
}

/** @param {string} source @param {Range[]} lines @param {number} i @param {Block[]} blocks */
function table(source, lines, i, blocks) {
  const align = alignments(source, lines[i + 1]);
  const rows = [cells(source, lines[i])];
  let next = Math.min(i + 2, lines.length);
  for (; goesOn(source, lines, next); next += 1) rows.push(cells(source, lines[next]));
  blocks.push({ kind: "table", rows, align, start: lines[i].start, end: lines[next - 1].end });
  return next;
}

/**
 * @param {string} source @param {Range} range @param {number} [nesting]
 * @returns {Inline[]}
 */
export function parseInline(source, { start, end }, nesting = 0) {
  /** @type {Inline[]} */
  const found = [];
  /** @type {Set<string>} marks that do not come again before the end: none is looked for twice */
  const absent = new Set();
  let plain = start;
  for (let i = start; i < end; ) {
    const next = nesting < MOST_NESTING ? special(source, i, end, nesting, absent) : null;
    if (next === null) {
      i += 1;
      continue;
    }
    if (plain < i) found.push({ kind: "text", start: plain, end: i });
    if (next.node) found.push(next.node);
    plain = next.plain;
    i = next.end;
  }
  if (plain < end) found.push({ kind: "text", start: plain, end });
  return found;
}

/**
 * @param {string} source @param {number} i @param {number} end @param {number} nesting @param {Set<string>} absent
 * @returns {{node: Inline | null, end: number, plain: number} | null} where to look on, and where text goes on
 */
function special(source, i, end, nesting, absent) {
  const rest = source.slice(i, Math.min(i + 2, end));
  if (/^\\[!-/:-@[-`{-~]/.test(rest)) return { node: null, end: i + 2, plain: i + 1 }; // without the backslash
  if (rest[0] === "`") return codeSpan(source, i, end, absent);
  if (rest[0] === "[") return link(source, i, end, nesting);
  const mark = rest === "**" || rest === "__" ? rest : rest[0] === "*" || rest[0] === "_" ? rest[0] : "";
  if (!mark || absent.has(mark)) return null;
  const inner = i + mark.length;
  if (inner >= end || /\s/.test(source[inner]) || (mark[0] === "_" && /\w/.test(source[i - 1] ?? ""))) return null;
  for (let at = source.indexOf(mark, inner + 1); ; at = source.indexOf(mark, at + 1)) {
    if (at < 0 || at + mark.length > end) break;
    const after = source[at + mark.length] ?? "";
    if (/\s/.test(source[at - 1]) || (mark[0] === "_" && /\w/.test(after)) || (mark === "*" && after === "*")) continue;
    const children = parseInline(source, { start: inner, end: at }, nesting + 1);
    const outer = at + mark.length;
    return { node: { kind: mark.length === 2 ? "strong" : "em", children }, end: outer, plain: outer };
  }
  absent.add(mark);
  return null;
}

/** @param {string} source @param {number} i @param {number} end @param {Set<string>} absent */
function codeSpan(source, i, end, absent) {
  let inner = i + 1;
  while (inner < end && source[inner] === "`") inner += 1;
  const marks = source.slice(i, inner);
  for (let at = inner; at < end && !absent.has(marks); ) {
    at = source.indexOf(marks, at);
    if (at < 0 || at + marks.length > end) break;
    let after = at + marks.length;
    while (source[after] === "`") after += 1;
    if (after === at + marks.length) {
      return { node: /** @type {Leaf} */ ({ kind: "code", start: inner, end: at }), end: after, plain: after };
    }
    at = after;
  }
  absent.add(marks);
  return { node: null, end: inner, plain: i };
}

/** @param {string} source @param {number} i @param {number} end @param {number} nesting */
function link(source, i, end, nesting) {
  const found = /^\[([^[\]\n]{1,500})\]\((https?:\/\/[^\s()<>]{1,2000})\)/.exec(source.slice(i, Math.min(end, i + 2600)));
  if (!found) return null;
  const text = { start: i + 1, end: i + 1 + found[1].length };
  /** @type {Link} */
  const node = { kind: "link", href: found[2], children: parseInline(source, text, nesting + 1) };
  const after = i + found[0].length;
  return { node, end: after, plain: after };
}
