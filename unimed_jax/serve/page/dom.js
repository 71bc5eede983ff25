/** Makes and finds elements of the page. No text is ever read as HTML. */

const SVG = "http://www.w3.org/2000/svg";

/** Returns the element with an id. */
export const $ = (id) => document.getElementById(id);

/**
 * Makes an HTML element.
 * @param {string} tag its name
 * @param {object} attributes attributes; `onclick` and the like are listeners; false and null are left out
 * @param {...(Node|string|null)} children what it holds
 */
export function make(tag, attributes = {}, ...children) {
  return filled(document.createElement(tag), attributes, children);
}

/** Makes an SVG element in the way of `make`. */
export function draw(tag, attributes = {}, ...children) {
  return filled(document.createElementNS(SVG, tag), attributes, children);
}

function filled(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === false || value === null || value === undefined) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

/** Shows or hides an element. */
export function shown(element, yes) {
  element.hidden = !yes;
}

/** Writes a probability in per cent, which no line break parts from its sign. */
export function percent(value) {
  const hundredths = 100 * value;
  if (hundredths > 0 && hundredths < 0.05) return "< 0.1\u00a0%";
  const digits = (hundredths > 0 && hundredths < 10) || (hundredths > 99 && hundredths < 100) ? 1 : 0;
  return `${hundredths.toFixed(digits)}\u00a0%`;
}
