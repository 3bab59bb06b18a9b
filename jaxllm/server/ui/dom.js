// Elements made from parts. Text stays text: nothing here, nor anywhere on the page, turns a string into HTML.

/**
 * @param {string} tag
 * @param {Record<string, string | number | boolean | EventListener>} [properties] attributes; `on...` are
 *   listeners; true and false set an attribute or leave it out
 * @param {...(Node | string)} children
 * @returns {HTMLElement}
 */
export function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (typeof value === "function") element.addEventListener(name.slice(2), value);
    else if (typeof value === "boolean") element.toggleAttribute(name, value);
    else element.setAttribute(name, String(value));
  }
  element.append(...children);
  return element;
}

/**
 * @template {HTMLElement} T
 * @param {string} id of an element of index.html
 * @param {new () => T} kind
 * @returns {T}
 */
export function find(id, kind) {
  const element = document.getElementById(id);
  if (!(element instanceof kind)) throw new Error(`index.html has no ${kind.name} #${id}`);
  return element;
}

/** @param {string} text for screen readers, which say it when they have time */
export function announce(text) {
  find("announcer", HTMLElement).textContent = text;
}
