// The conversation as it is shown.

import { Answer, copied } from "./answer.js";
import { make } from "./dom.js";

/**
 * @typedef {import("./conversation.js").Conversation} Conversation
 * @typedef {import("./conversation.js").Turn} Turn
 * @typedef {import("./conversation.js").Reply} Reply
 */

const EXAMPLES = [
  "What is a paged key-value cache good for?",
  "Write a Python function that counts words.",
  "Name three rivers in Europe.",
];
/** Pixels from the end within which the view follows an answer that grows. */
const NEAR = 80;

export class Transcript {
  /** @type {Map<Turn, HTMLElement>} */
  #elements = new Map();
  /** @type {Map<Reply, () => void>} */
  #refresh = new Map();
  /** @type {Set<Reply>} */
  #waiting = new Set();

  /**
   * @param {HTMLElement} element
   * @param {{ask: (text: string) => void, again: (turn: Turn) => void, edit: (turn: Turn, text: string) => void,
   *   editing: (open: boolean) => void}} actions
   */
  constructor(element, actions) {
    this.element = element;
    this.actions = actions;
  }

  /** @param {Turn[]} turns shown instead of those before */
  show(turns) {
    const gone = [...this.#elements.keys()].filter((turn) => !turns.includes(turn));
    for (const turn of gone) {
      this.#elements.delete(turn);
      if (turn.role === "assistant") this.#refresh.delete(turn);
    }
    const elements = turns.map((turn) => this.#elements.get(turn) ?? this.#make(turn));
    this.element.replaceChildren(...(elements.length ? elements : [this.#welcome()]));
    this.element.scrollTop = this.element.scrollHeight;
  }

  /** @param {Reply} reply that has changed; it is drawn once a frame */
  grow(reply) {
    if (!this.#waiting.size) requestAnimationFrame(() => this.#draw());
    this.#waiting.add(reply);
  }

  /** @param {HTMLElement} element a token's @returns {import("./tokens.js").Token | undefined} */
  tokenOf(element) {
    const article = element.closest("article");
    const [turn] = [...this.#elements].find(([, shown]) => shown === article) ?? [];
    return turn?.role === "assistant" ? turn.tokens.placed[Number(element.dataset.token)] : undefined;
  }

  #draw() {
    const { scrollHeight, scrollTop, clientHeight } = this.element;
    const follows = scrollHeight - scrollTop - clientHeight < NEAR;
    for (const reply of this.#waiting) this.#refresh.get(reply)?.();
    this.#waiting.clear();
    if (follows) this.element.scrollTop = this.element.scrollHeight;
  }

  #welcome() {
    const examples = EXAMPLES.map((text) =>
      make("li", {}, make("button", { type: "button", onclick: () => this.actions.ask(text) }, text)),
    );
    return make("div", { class: "welcome" }, make("h2", {}, "Ask the model"), make("ul", {}, ...examples));
  }

  /** @param {Turn} turn */
  #make(turn) {
    const element = turn.role === "user" ? this.#question(turn) : this.#reply(turn);
    this.#elements.set(turn, element);
    return element;
  }

  /** @param {import("./conversation.js").Question} turn */
  #question(turn) {
    const text = make("div", { class: "text" }, turn.text);
    const copy = button("Copy", () => copied(copy, navigator.clipboard.writeText(turn.text)));
    const edit = button("Edit", () => text.replaceWith(this.#editor(turn, text, edit)));
    return make("article", { class: "question", "aria-label": "You" }, text, make("footer", {}, edit, copy));
  }

  /** @param {Turn} turn @param {HTMLElement} text @param {HTMLElement} edit the button that opened it */
  #editor(turn, text, edit) {
    const area = /** @type {HTMLTextAreaElement} */ (make("textarea", { "aria-label": "Edited message", rows: 3 }));
    area.value = turn.text;
    const close = () => {
      form.replaceWith(text);
      edit.hidden = false;
      edit.focus();
      this.actions.editing(false);
    };
    const send = () => {
      if (!area.value.trim()) return;
      this.actions.editing(false);
      this.actions.edit(turn, area.value);
    };
    const form = make("form", { class: "editor" }, area, make("div", {}, button("Cancel", close), submit("Send")));
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      send();
    });
    area.addEventListener("keydown", (event) => {
      if (event.key === "Escape") {
        event.stopPropagation(); // it is this that ends, not an answer
        close();
      }
      if (isSend(event)) {
        event.preventDefault();
        send();
      }
    });
    edit.hidden = true;
    this.actions.editing(true);
    queueMicrotask(() => area.focus());
    return form;
  }

  /** @param {Reply} turn */
  #reply(turn) {
    const body = make("div", { class: "text answer" });
    const answer = new Answer(body);
    const problem = make("div", { class: "problem", role: "alert", hidden: true });
    const figures = make("span", { class: "figures" });
    const copy = button("Copy", () => copied(copy, navigator.clipboard.writeText(turn.text)));
    const again = button("Again", () => this.actions.again(turn));
    again.setAttribute("aria-label", "Answer again");
    const footer = make("footer", {}, copy, again, figures);
    const article = make("article", { class: "reply", "aria-label": turn.model || "Model" }, body, problem, footer);
    const refresh = () => {
      answer.show(turn.text, turn.tokens.placed, turn.state === "writing");
      body.toggleAttribute("tabindex", false);
      if (turn.tokens.placed.length && turn.state !== "writing") body.tabIndex = 0;
      article.dataset.state = turn.state;
      footer.hidden = turn.state === "writing";
      copy.hidden = !turn.text;
      figures.textContent = describe(turn);
      if (turn.problem && problem.hidden) {
        problem.hidden = false;
        problem.append(turn.problem.message);
      }
    };
    this.#refresh.set(turn, refresh);
    refresh();
    return article;
  }
}

/** @param {Reply} reply */
function describe({ state, reason, count, prompt, cached, first, last }) {
  const parts = [];
  if (count) {
    parts.push(`${count} token${count === 1 ? "" : "s"}`);
    if (first !== null) parts.push(`first after ${first < 1 ? `${Math.round(first * 1000)} ms` : `${first.toFixed(1)} s`}`);
    if (first !== null && last !== null && last > first && count > 1)
      parts.push(`${((count - 1) / (last - first)).toFixed(1)} tokens/s`);
    parts.push(`prompt ${prompt}${cached ? `, ${cached} cached` : ""}`);
  }
  if (state === "stopped") parts.push("stopped");
  if (reason === "length") parts.push("cut off at the most tokens");
  return parts.join(" · ");
}

/** @param {KeyboardEvent} event @returns {boolean} whether it means to send: Enter, but not while a character is composed */
export function isSend(event) {
  return event.key === "Enter" && !event.shiftKey && !event.isComposing;
}

/** @param {string} text @param {() => void} action */
function button(text, action) {
  return make("button", { type: "button", class: "quiet", onclick: action }, text);
}

/** @param {string} text */
function submit(text) {
  return make("button", { type: "submit", class: "main" }, text);
}
