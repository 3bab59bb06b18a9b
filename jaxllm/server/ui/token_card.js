// What a token could have been: a card beside the token under the pointer, or the one that the arrow keys went to.

import { make } from "./dom.js";

/** @typedef {import("./tokens.js").Token} Token */

export class TokenCard {
  /** @type {HTMLElement | null} */
  #marked = null;

  /**
   * @param {HTMLElement} card
   * @param {HTMLElement} transcript in which the tokens are
   * @param {(element: HTMLElement) => Token | undefined} tokenOf
   */
  constructor(card, transcript, tokenOf) {
    this.card = card;
    this.tokenOf = tokenOf;
    transcript.addEventListener("pointerover", (event) => this.show(tokenElement(event.target)));
    transcript.addEventListener("pointerleave", () => this.hide());
    transcript.addEventListener("scroll", () => this.hide());
    transcript.addEventListener("focusout", () => this.hide());
    transcript.addEventListener("keydown", (event) => this.#move(event));
  }

  /** @param {HTMLElement | null} element a token's; null hides the card */
  show(element) {
    const token = element && this.tokenOf(element);
    this.hide();
    if (!element || !token) return;
    this.#marked = element;
    element.classList.add("marked");
    this.card.replaceChildren(...describe(token));
    this.card.hidden = false;
    place(this.card, element.getClientRects()[0] ?? element.getBoundingClientRect());
  }

  hide() {
    this.#marked?.classList.remove("marked");
    this.#marked = null;
    this.card.hidden = true;
  }

  /** @param {KeyboardEvent} event */
  #move(event) {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    const answer = event.target;
    if (!step || event.altKey || event.ctrlKey || event.metaKey) return;
    if (!(answer instanceof HTMLElement && answer.classList.contains("answer"))) return;
    const tokens = /** @type {HTMLElement[]} */ ([...answer.querySelectorAll(".token")]);
    if (!tokens.length) return;
    event.preventDefault();
    const at = this.#marked ? tokens.indexOf(this.#marked) + step : step > 0 ? 0 : tokens.length - 1;
    const next = tokens[Math.max(0, Math.min(tokens.length - 1, at))];
    next.scrollIntoView({ block: "nearest" });
    this.show(next);
    const token = this.tokenOf(next);
    if (token) answer.setAttribute("aria-label", `${visible(token.token)}, ${percent(token.logprob)}`);
  }
}

/** @param {EventTarget | null} target @returns {HTMLElement | null} */
function tokenElement(target) {
  return target instanceof HTMLElement ? target.closest(".token") : null;
}

/** @param {Token} token */
function describe(token) {
  const others = token.top_logprobs.map((choice) => {
    const bar = make("span", { class: "bar-of" });
    bar.style.width = `${Math.exp(choice.logprob) * 100}%`;
    return make(
      "tr",
      choice.token === token.token ? { class: "chosen" } : {},
      make("td", {}, make("code", {}, visible(choice.token))),
      make("td", { class: "bar-cell" }, bar),
      make("td", { class: "number" }, percent(choice.logprob)),
    );
  });
  const head = make("p", {}, make("code", {}, visible(token.token)), make("strong", {}, percent(token.logprob)));
  return others.length ? [head, make("table", {}, ...others)] : [head];
}

/** @param {string} token with its spaces and breaks made visible */
function visible(token) {
  return token.replaceAll(" ", "␣").replaceAll("\n", "⏎").replaceAll("\t", "⇥") || "∅";
}

/** @param {number} logprob */
function percent(logprob) {
  const value = Math.exp(logprob) * 100;
  return value < 0.01 ? "<0.01%" : `${value >= 10 ? value.toFixed(1) : value.toPrecision(2)}%`;
}

/** @param {HTMLElement} card @param {DOMRect} beside */
function place(card, beside) {
  const { width, height } = card.getBoundingClientRect();
  const below = beside.bottom + 6 + height < innerHeight;
  card.style.left = `${Math.max(8, Math.min(beside.left, innerWidth - width - 8))}px`;
  card.style.top = `${below ? beside.bottom + 6 : Math.max(8, beside.top - height - 6)}px`;
}
