// The server that this page came from. Addresses are relative, so that it may stand under a proxy's path.

import { eventData } from "./event_stream.js";

/** What went wrong, in words for the user. */
export class ServerError extends Error {
  /**
   * @param {string} message
   * @param {number} status of the answer; 0 if there was none
   * @param {string | null} [param] the parameter that was refused
   */
  constructor(message, status, param = null) {
    super(message);
    this.status = status;
    this.param = param;
  }
}

export class Server {
  /** @param {() => string} key the API key; empty if the user has given none */
  constructor(key) {
    this.key = key;
  }

  /**
   * @param {string} path without a slash at its beginning
   * @param {{refusable?: boolean}} [options] refusable: an error's status comes with JSON all the same
   * @returns {Promise<any>} the JSON of the answer
   * @throws {ServerError}
   */
  async get(path, { refusable = false } = {}) {
    const response = await this.#fetch(path, {});
    if (!response.ok && !refusable) throw await refusal(response, this.key() !== "");
    return response.json();
  }

  /**
   * @param {object} body of /v1/chat/completions, without `stream`
   * @param {AbortSignal} signal
   * @returns {AsyncGenerator<any>} the chunks
   * @throws {ServerError} also in the middle; an AbortError if the signal came
   */
  async *chat(body, signal) {
    const response = await this.#fetch("v1/chat/completions", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
      signal,
    });
    if (!response.ok) throw await refusal(response, this.key() !== "");
    if (response.body === null) throw new ServerError("The answer was empty.", response.status);
    try {
      for await (const data of eventData(response.body)) {
        if (data === "[DONE]") return;
        const chunk = JSON.parse(data);
        if (chunk.error) throw new ServerError(sentence(chunk.error.message), response.status, chunk.error.param);
        yield chunk;
      }
    } catch (error) {
      if (!(error instanceof TypeError)) throw error;
    }
    throw new ServerError("The connection broke off before the answer was complete.", 0);
  }

  /**
   * @param {string} path
   * @param {RequestInit} options
   */
  async #fetch(path, options) {
    const headers = new Headers(options.headers);
    const key = this.key();
    try {
      if (key) headers.set("Authorization", `Bearer ${key}`);
    } catch {
      throw new ServerError("The API key has characters that no key can have.", 401);
    }
    try {
      return await fetch(path, { ...options, headers, cache: "no-store" });
    } catch (error) {
      if (error instanceof DOMException && error.name === "AbortError") throw error;
      throw new ServerError(`The server at ${location.host} does not answer. Is it still running?`, 0);
    }
  }
}

/** @param {Response} response @param {boolean} keyGiven @returns {Promise<ServerError>} */
async function refusal(response, keyGiven) {
  let { message, param } = { message: `The server answered ${response.status}.`, param: null };
  try {
    ({ message, param } = (await response.json()).error);
  } catch {
    // not the server's own form: a proxy may have answered
  }
  if (response.status === 401) {
    const what = keyGiven ? "The server did not take this API key. Give another" : "The server wants an API key. Give it";
    message = `${what} under Settings.`;
  }
  return new ServerError(sentence(message), response.status, param);
}

/** @param {string} message */
function sentence(message) {
  return /[.?!]$/.test(message) ? message : `${message}.`;
}
