// A small time series: the last two minutes as lines, and the newest value as a number.

import { make } from "./dom.js";

export const LENGTH = 120;
const SVG = "http://www.w3.org/2000/svg";

/** @typedef {number | null} Value null where there is nothing to show */

export class Series {
  /**
   * @param {string} title
   * @param {string[]} names of its lines
   * @param {(value: number) => string} format
   * @param {number} [top] the value at the upper edge, if it is not to be the largest that is shown
   */
  constructor(title, names, format, top) {
    this.top = top;
    this.title = title;
    this.names = names;
    this.format = format;
    /** @type {Value[][]} */
    this.values = names.map(() => []);
    this.svg = document.createElementNS(SVG, "svg");
    this.svg.setAttribute("viewBox", `0 0 ${LENGTH - 1} 1`);
    this.svg.setAttribute("preserveAspectRatio", "none");
    this.svg.setAttribute("role", "img");
    this.paths = names.map((_, i) => {
      const path = document.createElementNS(SVG, "path");
      path.setAttribute("class", `line line-${i}`);
      this.svg.append(path);
      return path;
    });
    this.now = make("p", { class: "now" });
    this.most = make("span", { class: "most" });
    const head = make("div", { class: "series-head" }, make("h3", {}, title), this.now);
    this.element = make("section", { class: "series" }, head, make("div", { class: "plot" }, this.svg, this.most));
    this.#draw();
  }

  /** @param {Value[]} values one for each line */
  push(values) {
    values.forEach((value, i) => {
      this.values[i].push(value);
      if (this.values[i].length > LENGTH) this.values[i].shift();
    });
    this.#draw();
  }

  #draw() {
    const most = this.top ?? Math.max(0, ...this.values.flat().map((value) => value ?? 0));
    this.values.forEach((values, i) => this.paths[i].setAttribute("d", line(values, most || 1)));
    const newest = this.values.map((values) => values.at(-1) ?? null);
    const texts = newest.map((value) => (value === null ? "–" : this.format(value)));
    this.now.replaceChildren(
      ...texts.map((text, i) =>
        make("span", { class: `value value-${i}` }, make("b", {}, text), this.names[i] ? ` ${this.names[i]}` : ""),
      ),
    );
    this.most.textContent = most ? this.format(most) : "";
    const said = texts.map((text, i) => `${text} ${this.names[i]}`.trim()).join(", ");
    this.svg.setAttribute("aria-label", `${this.title}, the last two minutes; now ${said}`);
  }
}

/** @param {Value[]} values @param {number} most */
function line(values, most) {
  let path = "";
  let drawing = false;
  values.forEach((value, i) => {
    if (value !== null) {
      const x = LENGTH - values.length + i;
      path += `${drawing ? "L" : "M"}${x} ${(1 - value / most).toFixed(4)}`;
      if (!drawing) path += "h.5"; // so that a value that stands alone can be seen
    }
    drawing = value !== null;
  });
  return path;
}
