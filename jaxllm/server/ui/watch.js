// Asks the server once a second how things stand, while somebody looks at the page.

import { ServerError } from "./server.js";

const MILLISECONDS = 1000;

/**
 * @typedef {{run: number, used: number[], cached: number[]}} Pages
 * @typedef {{max_num_seqs: number, max_model_len: number, max_logprobs: number, page_size: number,
 *   defaults: Record<string, number>, figures: Record<string, number>, pages: Pages}} Engine
 * @typedef {{seconds?: number, done?: Record<string, number>, programs?: number, programs_compiled?: number,
 *   seconds_left?: number}} Progress
 * @typedef {{status: string, names: string[], progress: Progress, engine: Engine | null}} State
 */

export class Watch {
  #timer = 0;
  #round = 0;

  /**
   * @param {import("./server.js").Server} server
   * @param {(state: State) => void} seen
   * @param {(error: ServerError, status: string | null) => void} failed with what `/ready` says, which needs no key
   */
  constructor(server, seen, failed) {
    this.server = server;
    this.seen = seen;
    this.failed = failed;
    document.addEventListener("visibilitychange", () => this.begin());
  }

  /** Asks now, and then once a second. */
  begin() {
    clearTimeout(this.#timer);
    this.#round += 1;
    if (!document.hidden) this.#ask(this.#round);
  }

  /** @param {number} round what an earlier one still waits for comes to nothing */
  async #ask(round) {
    try {
      const state = await this.server.get("ui/state");
      if (round === this.#round) this.seen(state);
    } catch (error) {
      if (!(error instanceof ServerError)) throw error;
      const ready = error.status === 401 ? await this.server.get("ready", { refusable: true }).catch(() => null) : null;
      if (round === this.#round) this.failed(error, ready?.status ?? null);
    }
    if (round === this.#round) this.#timer = setTimeout(() => this.begin(), MILLISECONDS);
  }
}
