// The settings: what requests are sent with.

import { find } from "./dom.js";

const NUMBERS = [
  "temperature", "top_p", "top_k", "min_p", "max_tokens", "seed",
  "presence_penalty", "frequency_penalty", "repetition_penalty",
];
const KEY = "jaxllm.key";
const MOST_CHOICES = 5;

export class Settings {
  /** @type {HTMLElement | null} */
  #refused = null;

  constructor() {
    this.form = find("settings-form", HTMLFormElement);
    this.keyField = find("key-field", HTMLElement);
    this.keyInput = find("key", HTMLInputElement);
    this.keyInput.value = sessionStorage.getItem(KEY) ?? "";
    this.mostChoices = MOST_CHOICES;
    this.form.addEventListener("submit", (event) => event.preventDefault());
    this.form.addEventListener("input", () => this.#input());
    this.#input();
  }

  /** The API key, which is kept in the tab's own storage and nowhere else. */
  get key() {
    return this.keyInput.value.trim();
  }

  get system() {
    return find("system", HTMLTextAreaElement).value.trim();
  }

  /** @returns {Record<string, unknown>} fields of /v1/chat/completions; what is empty is left to the server */
  get parameters() {
    /** @type {Record<string, unknown>} */
    const found = {};
    for (const name of NUMBERS) {
      const input = find(name, HTMLInputElement);
      // what is no number goes to the server as it stands, and is refused by name
      if (input.value.trim() || input.validity.badInput) found[name] = input.validity.badInput ? "?" : input.valueAsNumber;
    }
    const stop = find("stop", HTMLTextAreaElement).value.split("\n").filter((line) => line);
    if (stop.length) found.stop = stop.map((line) => line.replaceAll("\\n", "\n"));
    if (this.probabilities !== "off") Object.assign(found, { logprobs: true, top_logprobs: this.mostChoices });
    return found;
  }

  /** @returns {string} off, hover or colour */
  get probabilities() {
    return String(new FormData(this.form).get("probabilities"));
  }

  /** @param {{defaults: Record<string, number>, max_logprobs: number}} engine what it does where nothing is given */
  describe({ defaults, max_logprobs: most }) {
    for (const [name, value] of Object.entries(defaults)) find(name, HTMLInputElement).placeholder = String(value);
    find("max_tokens", HTMLInputElement).placeholder = "all";
    this.mostChoices = most < 0 ? MOST_CHOICES : Math.min(MOST_CHOICES, most);
  }

  /** Asks for the key. @param {boolean} refused whether one was given, and not taken */
  wantKey(refused) {
    this.keyField.hidden = false;
    const note = find("key-note", HTMLElement);
    note.textContent = refused
      ? "The server did not take this key."
      : "This server wants a key. It is kept in this tab until it is closed.";
    this.#mark(this.keyInput);
  }

  /** @param {string | null} param a parameter that was refused, or null */
  refuse(param) {
    const input = this.form.elements.namedItem(param ?? "");
    this.#mark(input instanceof HTMLElement ? input : null);
  }

  /** @param {HTMLElement | null} input */
  #mark(input) {
    this.#refused?.removeAttribute("aria-invalid");
    this.#refused = input;
    input?.setAttribute("aria-invalid", "true");
    const details = input?.closest("details");
    if (details) details.open = true;
  }

  #input() {
    if (this.key) sessionStorage.setItem(KEY, this.key);
    else sessionStorage.removeItem(KEY);
    this.#mark(null);
    document.documentElement.dataset.probabilities = this.probabilities;
  }
}
