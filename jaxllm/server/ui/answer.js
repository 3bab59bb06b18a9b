// An answer's text as elements: Markdown, with its tokens as spans where their probabilities are known.

import { make } from "./dom.js";
import { parseBlocks, parseInline } from "./markdown.js";
import { likeliness } from "./tokens.js";

/**
 * @typedef {import("./markdown.js").Block} Block
 * @typedef {import("./markdown.js").Range} Range
 * @typedef {import("./tokens.js").Token} Token
 */

export class Answer {
  /** @type {{source: string, node: HTMLElement}[]} */
  #shown = [];

  /** @param {HTMLElement} element that is filled */
  constructor(element) {
    this.element = element;
  }

  /**
   * Shows a text that has grown. Blocks that have not changed keep their elements; the last one may still change.
   *
   * @param {string} text
   * @param {Token[]} tokens in order
   * @param {boolean} growing whether more is to come
   */
  show(text, tokens, growing) {
    const blocks = parseBlocks(text, growing);
    const kept = Math.max(0, this.#shown.length - 1);
    this.#shown = blocks.map((block, i) => {
      const source = text.slice(block.start, block.end);
      if (i < kept && this.#shown[i].source === source) return this.#shown[i];
      return { source, node: new Writer(text, tokens).block(block) };
    });
    const nodes = this.#shown.map(({ node }) => node);
    nodes.forEach((node, i) => {
      const before = this.element.children[i];
      if (before === node) return;
      this.element.insertBefore(node, before ?? null);
      if (before) node.scrollLeft = before.scrollLeft; // a wide table stays where it was moved to as it grows
    });
    while (this.element.childNodes.length > nodes.length) this.element.lastChild?.remove();
  }
}

class Writer {
  /** @param {string} text @param {Token[]} tokens */
  constructor(text, tokens) {
    this.text = text;
    this.tokens = tokens;
  }

  /** @param {Block} block @returns {HTMLElement} */
  block(block) {
    switch (block.kind) {
      case "heading":
        return make(`h${Math.min(6, block.level + 2)}`, {}, ...this.inline(block.body));
      case "rule":
        return make("hr");
      case "quote":
        return make("blockquote", {}, ...block.lines.map((line) => make("p", {}, ...this.inline(line))));
      case "list":
        return this.list(block.items);
      case "table":
        return this.table(block);
      case "fence":
        return this.fence(block);
      default:
        return make("p", {}, ...this.inline(block));
    }
  }

  /** @param {import("./markdown.js").Item[]} items */
  list(items) {
    /** @type {HTMLElement[]} */
    const open = [];
    for (const item of items) {
      open.length = Math.min(open.length, item.depth + 1);
      if (open.length <= item.depth) {
        const inner = make(item.ordered ? "ol" : "ul", item.ordered && item.number !== 1 ? { start: item.number } : {});
        open[open.length - 1]?.lastElementChild?.append(inner);
        open.push(inner);
      }
      open[item.depth].append(make("li", {}, ...this.inline(item)));
    }
    return open[0];
  }

  /** @param {{rows: Range[][], align: string[]}} block the first row is the head */
  table({ rows, align }) {
    const columns = rows[0].length;
    const [head, ...body] = rows.map((row, i) => {
      const missing = Array.from({ length: Math.max(0, columns - row.length) }, () => make("td"));
      const found = row.map((cell, column) => {
        const properties = { ...(align[column] && { class: align[column] }), ...(i === 0 && { scope: "col" }) };
        return make(i === 0 ? "th" : "td", properties, ...this.inline(cell));
      });
      return make("tr", {}, ...found, ...missing);
    });
    const inside = make("table", {}, make("thead", {}, head), make("tbody", {}, ...body));
    return make("div", { class: "table", role: "region", "aria-label": "Table", tabindex: 0 }, inside);
  }

  /** @param {Range & {language: string, body: Range}} block */
  fence({ language, body }) {
    const code = make("code", {}, ...this.leaf(body));
    const copy = () => navigator.clipboard.writeText(this.text.slice(body.start, body.end));
    const button = make("button", { type: "button", class: "quiet", "aria-label": "Copy code" }, "Copy");
    button.addEventListener("click", () => copied(button, copy()));
    const head = make("div", { class: "fence-head" }, language || "code", button);
    return make("div", { class: "fence" }, head, make("pre", { tabindex: 0 }, code));
  }

  /** @param {Range} range @returns {Node[]} */
  inline(range) {
    return parseInline(this.text, range).flatMap((node) => this.node(node));
  }

  /** @param {import("./markdown.js").Inline} node @returns {Node[]} */
  node(node) {
    if (!("children" in node)) return node.kind === "text" ? this.leaf(node) : [make("code", {}, ...this.leaf(node))];
    const children = node.children.flatMap((child) => this.node(child));
    if (node.kind !== "link") return [make(node.kind, {}, ...children)];
    return [make("a", { href: node.href, title: node.href, rel: "noopener noreferrer", target: "_blank" }, ...children)];
  }

  /** @param {Range} range @returns {Node[]} a range's text, cut where tokens begin and end */
  leaf({ start, end }) {
    const nodes = [];
    let at = start;
    for (let i = this.firstToken(start); i < this.tokens.length && this.tokens[i].start < end; i += 1) {
      const token = this.tokens[i];
      const [first, last] = [Math.max(at, token.start), Math.min(end, token.end)];
      if (last <= first) continue;
      if (at < first) nodes.push(document.createTextNode(this.text.slice(at, first)));
      const piece = { class: `token p${likeliness(token.logprob)}`, "data-token": i };
      nodes.push(make("span", piece, this.text.slice(first, last)));
      at = last;
    }
    if (at < end) nodes.push(document.createTextNode(this.text.slice(at, end)));
    return nodes;
  }

  /** @param {number} start @returns {number} the first token that ends after it */
  firstToken(start) {
    let [low, high] = [0, this.tokens.length];
    while (low < high) {
      const middle = (low + high) >> 1;
      if (this.tokens[middle].end <= start) low = middle + 1;
      else high = middle;
    }
    return low;
  }
}

/**
 * Says on a button whether what it copied was copied.
 *
 * @param {HTMLElement} button
 * @param {Promise<void>} result
 */
export async function copied(button, result) {
  const before = button.textContent;
  try {
    await result;
    button.textContent = "Copied";
  } catch {
    button.textContent = "Not allowed"; // by the browser, which lets pages from elsewhere copy over HTTPS only
  }
  setTimeout(() => (button.textContent = before), 1500);
}
