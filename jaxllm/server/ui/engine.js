// The engine at work: rows, pages, and what it gets done.

import { paintCells } from "./cells.js";
import { make } from "./dom.js";
import { Series } from "./series.js";

/** @typedef {import("./watch.js").State} State @typedef {import("./watch.js").Engine} EngineState */

const MOST_ROW_CELLS = 256;
/** Over how long the share of found prompt tokens is taken. */
const SECONDS = 60;
const number = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const count = (/** @type {number} */ value) => number.format(value);
const rate = (/** @type {number} */ value) => (value < 100 ? value.toFixed(1) : count(value));
const percent = (/** @type {number} */ value) => `${(value * 100).toFixed(value < 0.1 && value > 0 ? 1 : 0)}%`;
const milliseconds = (/** @type {number} */ value) => `${value < 100 ? value.toFixed(1) : count(value)} ms`;

export class EnginePanel {
  /** @type {Record<string, number> | null} */
  #before = null;
  /** @type {Record<string, number>[]} */
  #minute = [];
  /** @type {EngineState | null} */
  #engine = null;

  /** @param {HTMLElement} element */
  constructor(element) {
    this.note = make("p", { class: "note" });
    this.bar = /** @type {HTMLProgressElement} */ (make("progress", { "aria-label": "Programs compiled", hidden: true }));
    this.rows = picture("Rows", "rows-picture");
    this.pages = picture("Cache", "pages-picture");
    this.tokens = new Series("Tokens/s", ["written", "computed"], rate);
    this.steps = new Series("Time of a step", [""], milliseconds);
    this.hits = new Series("Found in the prefix cache", [""], percent, 1);
    this.facts = make("dl", { class: "facts" });
    const series = [this.tokens, this.steps, this.hits].map(({ element }) => element);
    this.figures = make("div", { hidden: true }, this.rows.element, this.pages.element, ...series, this.facts);
    element.append(make("h2", {}, "Engine"), this.note, this.bar, this.figures);
    new ResizeObserver(() => this.paint()).observe(element);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.paint());
  }

  /** @param {State} state */
  show({ status, progress, engine }) {
    this.#showProgress(progress, engine);
    this.figures.hidden = engine === null;
    this.figures.dataset.status = status;
    this.#engine = engine;
    if (engine === null) return;
    this.#push(engine.figures);
    this.#describe(engine);
    this.paint();
  }

  /** @param {string} reason why nothing is known any more */
  lose(reason) {
    this.note.hidden = false;
    this.note.textContent = reason;
    this.bar.hidden = true;
    this.figures.dataset.status = "lost";
    this.#before = null;
    this.#minute = [];
    for (const series of [this.tokens, this.steps, this.hits]) series.push(series.names.map(() => null));
  }

  /** @param {import("./watch.js").Progress} progress @param {EngineState | null} engine */
  #showProgress(progress, engine) {
    const all = engine ? engine.figures.programs : (progress.programs ?? 0);
    const done = engine ? all - engine.figures.programs_pending : (progress.programs_compiled ?? 0);
    this.note.hidden = this.bar.hidden = engine !== null && done >= all;
    this.note.textContent = engine ? `Serving; compiled ${done} of ${all} programs.` : loading(progress);
    if (all) {
      this.bar.max = all;
      this.bar.value = done;
    } else this.bar.removeAttribute("value"); // moves to and fro: nobody knows yet
  }

  /** @param {Record<string, number>} now */
  #push(now) {
    const before = this.#before;
    const hitRate = this.#hitRate(now);
    this.#before = now;
    if (before === null || now.uptime_seconds <= before.uptime_seconds) return; // it was started again
    const grown = (/** @type {string} */ name) => now[name] - before[name];
    const seconds = grown("uptime_seconds");
    this.tokens.push([grown("generation_tokens_total") / seconds, grown("scheduled_tokens_total") / seconds]);
    const steps = grown("steps_total");
    this.steps.push([steps > 0 ? (grown("step_seconds_total") / steps) * 1000 : null]);
    this.hits.push([hitRate]);
  }

  /** @param {Record<string, number>} now @returns {number | null} of the prompts of the last minute */
  #hitRate(now) {
    this.#minute.push(now);
    if (this.#minute.length > SECONDS) this.#minute.shift();
    const before = this.#minute[0];
    const queries = now.prefix_cache_queries_total - before.prefix_cache_queries_total;
    return queries > 0 ? (now.prefix_cache_hits_total - before.prefix_cache_hits_total) / queries : null;
  }

  /** @param {EngineState} engine */
  #describe({ figures, max_num_seqs: rows, page_size: size, pages }) {
    const { requests_running: running, requests_waiting: waiting } = figures;
    this.rows.say(`${count(running)} of ${count(rows)}`, [
      ["used", `${count(running)} running`],
      ["free", `${count(rows - running)} free`],
      ["waiting", `${count(waiting)} waiting for one`],
    ]);
    const [used, cached] = [sum(pages.used), sum(pages.cached)];
    const free = figures.num_pages - used - cached;
    this.pages.say(`${count(figures.num_pages)} pages of ${size} tokens`, [
      ["used", `${count(used)} used`],
      ["cached", `${count(cached)} cached`],
      ["free", `${count(free)} free`],
    ]);
    const { programs, programs_pending: pending, programs_compiled_late_total: late } = figures;
    const found = figures.prefix_cache_hits_total / (figures.prefix_cache_queries_total || 1);
    const facts = {
      Programs: pending ? `${count(programs - pending)} of ${count(programs)} compiled` : `${count(programs)} compiled`,
      "Compiled while serving": count(late),
      Preemptions: count(figures.preemptions_total),
      "Prompt tokens found, ever": percent(found),
      "Tokens written, ever": count(figures.generation_tokens_total),
      Up: duration(figures.uptime_seconds),
    };
    this.facts.replaceChildren(
      ...Object.entries(facts).map(([name, value]) => make("div", {}, make("dt", {}, name), make("dd", {}, value))),
    );
  }

  paint() {
    if (this.#engine === null) return;
    const { max_num_seqs: rows, figures, pages } = this.#engine;
    const shown = Math.min(MOST_ROW_CELLS, rows + figures.requests_waiting);
    const per = (rows + figures.requests_waiting) / shown;
    const rowCells = Array.from({ length: shown }, (_, i) => {
      if (i * per < figures.requests_running) return [{ color: "--used", share: 1 }];
      return [{ color: i * per < rows ? "--free" : "--waiting", share: 1 }];
    });
    paintCells(this.rows.canvas, rowCells);
    const last = figures.num_pages - pages.run * (pages.used.length - 1);
    const pageCells = pages.used.map((used, i) => {
      const size = i === pages.used.length - 1 ? last : pages.run;
      return [
        { color: "--used", share: used / size },
        { color: "--cached", share: pages.cached[i] / size },
        { color: "--free", share: 1 },
      ];
    });
    paintCells(this.pages.canvas, pageCells);
  }
}

/** @param {string} title @param {string} name the canvas's class */
function picture(title, name) {
  const canvas = /** @type {HTMLCanvasElement} */ (make("canvas", { class: name, role: "img" }));
  const now = make("p", { class: "now" });
  const key = make("ul", { class: "key" });
  const head = make("div", { class: "series-head" }, make("h3", {}, title), now);
  const say = (/** @type {string} */ size, /** @type {string[][]} */ legend) => {
    now.replaceChildren(make("b", {}, size));
    key.replaceChildren(...legend.map(([kind, text]) => make("li", { class: kind }, text)));
    canvas.setAttribute("aria-label", `${title}: ${[size, ...legend.map(([, text]) => text)].join(", ")}`);
  };
  return { element: make("section", { class: "series" }, head, canvas, key), canvas, say };
}

/** @param {import("./watch.js").Progress} progress */
function loading({ seconds, done, programs, programs_compiled: compiled, seconds_left: left }) {
  if (seconds === undefined) return "The model is not loaded.";
  if (!programs) return `Loading for ${Math.round(seconds)} s; done: ${Object.keys(done ?? {}).join(", ").replaceAll("_", " ") || "nothing yet"}.`;
  return `Compiled ${compiled} of ${programs} programs${left === undefined ? "" : `, about ${Math.ceil(left)} s left`}.`;
}

/** @param {number[]} values */
function sum(values) {
  return values.reduce((total, value) => total + value, 0);
}

/** @param {number} seconds */
function duration(seconds) {
  const [days, hours, minutes] = [seconds / 86400, (seconds / 3600) % 24, (seconds / 60) % 60].map(Math.floor);
  if (days) return `${days} d ${hours} h`;
  return hours ? `${hours} h ${minutes} min` : minutes ? `${minutes} min` : `${Math.floor(seconds)} s`;
}
