// Where in an answer's text its tokens stand. The two arrive side by side, but not in step: text waits for the rest
// of a character or for what may become a stop string, and some tokens have no text.

/**
 * @typedef {{token: string, logprob: number, bytes: number[] | null}} Choice
 * @typedef {Choice & {top_logprobs: Choice[], start: number, end: number}} Token `start` and `end` in the text
 */

export class Tokens {
  #decoder = new TextDecoder();
  /** @type {{token: Token, piece: string}[]} */
  #waiting = [];
  #cursor = 0;

  constructor() {
    /** @type {Token[]} those whose place is known, in order */
    this.placed = [];
  }

  /**
   * @param {(Choice & {top_logprobs: Choice[]})[]} tokens those that are new
   * @param {string} text all of the text so far
   * @param {boolean} [last] nothing more comes
   */
  add(tokens, text, last = false) {
    for (const token of tokens) {
      const { bytes } = token;
      const piece = bytes === null ? token.token : this.#decoder.decode(new Uint8Array(bytes), { stream: true });
      this.#waiting.push({ token: { ...token, start: 0, end: 0 }, piece });
    }
    while (this.#waiting.length) {
      const { token, piece } = this.#waiting[0];
      const end = this.#end(piece, text, last);
      if (end === null) return;
      token.start = this.#cursor;
      token.end = this.#cursor = end;
      this.placed.push(token);
      this.#waiting.shift();
    }
  }

  /**
   * @param {string} piece @param {string} text @param {boolean} last
   * @returns {number | null} where a piece ends that begins at the cursor; null if that cannot be told yet
   */
  #end(piece, text, last) {
    const rest = text.slice(this.#cursor, this.#cursor + piece.length);
    if (rest === piece) return this.#cursor + piece.length;
    if (piece.startsWith(rest)) return last ? this.#cursor + rest.length : null; // cut off, or still to come
    const trimmed = piece.trimStart(); // some tokenizers drop a space at the beginning
    if (this.#cursor === 0 && trimmed && text.startsWith(trimmed)) return trimmed.length;
    return this.#cursor; // a special token
  }
}

/**
 * @param {number} logprob
 * @returns {number} 0 for the least likely to 4 for those that are all but certain
 */
export function likeliness(logprob) {
  return [0.1, 0.3, 0.6, 0.9].filter((bound) => Math.exp(logprob) >= bound).length;
}
