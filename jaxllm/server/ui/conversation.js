// A conversation and the answer that is being written: what was said, without how it is shown.

import { ServerError } from "./server.js";
import { Tokens } from "./tokens.js";

/**
 * @typedef {{role: "user", text: string}} Question
 * @typedef {{role: "assistant", text: string, tokens: Tokens, state: "writing" | "done" | "stopped" | "failed",
 *   reason: string, problem: ServerError | null, count: number, prompt: number, cached: number,
 *   first: number | null, last: number | null, model: string}} Reply
 *   `first` and `last`: seconds from the request to its first and last token
 * @typedef {Question | Reply} Turn
 */

export class Conversation {
  /** @type {AbortController | null} */
  #running = null;

  /**
   * @param {import("./server.js").Server} server
   * @param {() => {system: string, model: string, parameters: object}} settings asked for at each question
   * @param {(turn: Reply | null) => void} changed called with the reply that has grown or ended, or with null if
   *   there are other turns than before
   */
  constructor(server, settings, changed) {
    this.server = server;
    this.settings = settings;
    this.changed = changed;
    /** @type {Turn[]} */
    this.turns = [];
  }

  get writing() {
    return this.#running !== null;
  }

  /** Ends the answer that is being written; what there is of it stays. */
  stop() {
    this.#running?.abort();
  }

  clear() {
    this.stop();
    this.turns = [];
    this.changed(null);
  }

  /** @param {string} text */
  ask(text) {
    return this.#answer([...this.turns, { role: "user", text }]);
  }

  /** @param {Turn} reply Answered again; what followed it is dropped. */
  again(reply) {
    return this.#answer(this.turns.slice(0, this.turns.indexOf(reply)));
  }

  /** @param {Turn} question Asked in other words; what followed it is dropped. @param {string} text */
  edit(question, text) {
    return this.#answer([...this.turns.slice(0, this.turns.indexOf(question)), { role: "user", text }]);
  }

  /** @param {Turn[]} turns */
  async #answer(turns) {
    this.stop();
    const running = (this.#running = new AbortController());
    const { system, model, parameters } = this.settings();
    const messages = [
      ...(system ? [{ role: "system", content: system }] : []),
      ...answered(turns).map(({ role, text }) => ({ role, content: text })),
    ];
    /** @type {Reply} */
    const reply = {
      role: "assistant", text: "", tokens: new Tokens(), state: "writing", reason: "", problem: null,
      count: 0, prompt: 0, cached: 0, first: null, last: null, model,
    };
    this.turns = [...turns, reply];
    this.changed(null);
    try {
      await this.#write(reply, { ...parameters, model, messages }, running.signal);
      reply.state = "done";
    } catch (error) {
      reply.state = running.signal.aborted ? "stopped" : "failed";
      if (!running.signal.aborted) reply.problem = error instanceof ServerError ? error : new ServerError(String(error), 0);
    }
    reply.tokens.add([], reply.text, true);
    if (this.#running === running) this.#running = null;
    this.changed(reply);
  }

  /** @param {Reply} reply @param {object} body @param {AbortSignal} signal */
  async #write(reply, body, signal) {
    const begin = performance.now();
    for await (const chunk of this.server.chat(body, signal)) {
      const choice = chunk.choices?.[0];
      const tokens = choice?.logprobs?.content ?? [];
      if (chunk.usage) {
        reply.count = chunk.usage.completion_tokens;
        reply.prompt = chunk.usage.prompt_tokens;
        reply.cached = chunk.usage.prompt_tokens_details?.cached_tokens ?? 0;
      }
      if (!choice) continue;
      if (choice.delta?.content || tokens.length) {
        reply.last = (performance.now() - begin) / 1000;
        reply.first ??= reply.last;
      }
      reply.text += choice.delta?.content ?? "";
      reply.reason = choice.finish_reason ?? reply.reason;
      reply.tokens.add(tokens, reply.text);
      this.changed(reply);
    }
  }
}

/** @param {Turn[]} turns @returns {Turn[]} without the questions to which there was no answer, but for the last */
function answered(turns) {
  const isEmpty = (/** @type {Turn | undefined} */ turn) => turn?.role === "assistant" && !turn.text;
  return turns.filter((turn, i) => !isEmpty(turn) && !isEmpty(turns[i + 1]));
}
