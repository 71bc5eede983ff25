/** Shows an image with boxes and a map over it, and lets a person zoom and move it. */

import { draw } from "./dom.js";

const MOST = 40; // times the size that fits
const COARSE = 16; // screen pixels to a pixel of the image from which its pixels are seen as they are
const WRITTEN = 8; // cells a side up to which the weights are written on the map
// viridis: dark to bright in steps that look equal
const COLOURS = [[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]];

/**
 * Draws in an SVG whose view box is the part of the image in view, in the image's pixels.
 *
 * Pointers move the image, unless `capture(event)` returns an object with move(point) and end().
 */
export class Viewer {
  capture = () => null;
  changed = () => {}; // called with the zoom, 1 where the image fits

  #picture = null;
  #view = { x: 0, y: 0, width: 1, height: 1 };
  #pointers = new Map();
  #taken = null;

  constructor(stage, svg) {
    this.stage = stage;
    this.svg = svg;
    this.image = draw("image", { preserveAspectRatio: "none" });
    this.map = draw("g");
    this.boxes = draw("g");
    svg.append(this.image, this.map, this.boxes);
    stage.addEventListener("pointerdown", (event) => this.#down(event));
    stage.addEventListener("pointermove", (event) => this.#move(event));
    for (const name of ["pointerup", "pointercancel"]) {
      stage.addEventListener(name, (event) => this.#up(event));
    }
    stage.addEventListener("wheel", (event) => this.#wheel(event), { passive: false });
    stage.addEventListener("dblclick", () => this.fit());
    new ResizeObserver(() => this.#apply()).observe(stage);
  }

  /** Shows a picture, or none; the view stays where the size does. */
  show(picture) {
    const before = this.#picture;
    this.#picture = picture;
    if (!picture) {
      this.image.removeAttribute("href");
      this.map.replaceChildren();
      this.boxes.replaceChildren();
      return;
    }
    this.image.setAttribute("href", picture.url);
    this.image.setAttribute("width", picture.width);
    this.image.setAttribute("height", picture.height);
    if (before?.width !== picture.width || before?.height !== picture.height) this.fit();
  }

  /** Draws boxes: [{box: [x0, y0, x1, y1], kind: "asked"|"found", label, handles}]. */
  setBoxes(boxes) {
    this.drawn = boxes;
    if (!this.#picture) return;
    const unit = this.unit;
    const parts = boxes.flatMap(({ box, kind, label, handles }) => {
      const [x, y, right, bottom] = box;
      const shape = { x, y, width: Math.max(right - x, 0), height: Math.max(bottom - y, 0) };
      const out = [draw("rect", { ...shape, class: `box under ${kind}` }), draw("rect", { ...shape, class: `box ${kind}` })];
      if (handles) {
        for (const [px, py] of [[x, y], [right, y], [x, bottom], [right, bottom]]) {
          out.push(draw("circle", { cx: px, cy: py, r: 5 * unit, class: "handle" }));
        }
      }
      if (label) {
        const high = y - this.#view.y > 24 * unit; // above the box, or below where there is no space
        out.push(draw("text", {
          x, y: high ? y - 8 * unit : bottom + 20 * unit, "font-size": 14 * unit, "stroke-width": 4 * unit,
          class: `label ${kind}`,
        }, label));
      }
      return out;
    });
    this.boxes.replaceChildren(...parts);
  }

  /**
   * Lays a map of weights over the image.
   * @param {number[][]|null} rows weights from top to bottom; null for none
   * @param {[number, number]} range the weights that are darkest and brightest
   * @param {string} fit how the image was made square: the map covers what the model saw
   */
  setMap(rows, range = [0, 1], fit = "stretch") {
    this.map.replaceChildren();
    if (!rows || !this.#picture) return;
    const { width, height } = this.#picture;
    const side = { pad: Math.max(width, height), crop: Math.min(width, height) }[fit];
    const across = (side ?? width) / rows[0].length, down = (side ?? height) / rows.length;
    const left = side ? (width - side) / 2 : 0, top = side ? (height - side) / 2 : 0;
    const written = Math.max(rows.length, rows[0].length) <= WRITTEN;
    rows.forEach((row, r) => row.forEach((weight, c) => {
      const share = (weight - range[0]) / (range[1] - range[0] || 1);
      const x = left + c * across, y = top + r * down;
      this.map.append(draw("rect", { x, y, width: across, height: down, fill: colour(share), class: "cell" }));
      if (written) this.map.append(draw("text", { x, y, class: "weight" }, weight.toFixed(2)));
    }));
    this.#letter();
  }

  /** Returns the size of a screen pixel in pixels of the image. */
  get unit() {
    const { clientWidth, clientHeight } = this.stage;
    return Math.max(this.#view.width / (clientWidth || 1), this.#view.height / (clientHeight || 1));
  }

  /** Returns where a pointer is, in pixels of the image. */
  at(event) {
    const frame = this.stage.getBoundingClientRect(), unit = this.unit, view = this.#view;
    return {
      x: view.x + view.width / 2 + (event.clientX - frame.left - frame.width / 2) * unit,
      y: view.y + view.height / 2 + (event.clientY - frame.top - frame.height / 2) * unit,
    };
  }

  /** Shows the whole image. */
  fit() {
    if (!this.#picture) return;
    this.#view = { x: 0, y: 0, width: this.#picture.width, height: this.#picture.height };
    this.#apply();
  }

  /** Shows the whole image if a box does not lie in view. */
  reveal([x0, y0, x1, y1]) {
    const { x, y, width, height } = this.#view;
    if (x0 < x || y0 < y || x1 > x + width || y1 > y + height) this.fit();
  }

  /** Zooms by a factor; the given point of the image, else the middle, stays where it is. */
  zoom(factor, point = null) {
    if (!this.#picture) return;
    const { x, y, width } = this.#view, whole = this.#picture.width;
    const kept = point ?? { x: x + width / 2, y: y + this.#view.height / 2 };
    const scale = Math.min(Math.max(width / factor, whole / MOST), whole) / width;
    this.#view = {
      x: kept.x - (kept.x - x) * scale, y: kept.y - (kept.y - y) * scale,
      width: width * scale, height: this.#view.height * scale,
    };
    this.#apply();
  }

  /** Moves the view by pixels of the image. */
  pan(dx, dy) {
    this.#view.x += dx;
    this.#view.y += dy;
    this.#apply();
  }

  /** Moves the view by parts of its size. */
  panBy(across, down) {
    this.pan(across * this.#view.width, down * this.#view.height);
  }

  get zoomed() {
    return this.#picture ? this.#picture.width / this.#view.width : 1;
  }

  #apply() {
    if (!this.#picture) return;
    const { width, height } = this.#picture, view = this.#view;
    view.x = Math.min(Math.max(view.x, 0), width - view.width);
    view.y = Math.min(Math.max(view.y, 0), height - view.height);
    this.svg.setAttribute("viewBox", `${view.x} ${view.y} ${view.width} ${view.height}`);
    this.stage.classList.toggle("zoomed", this.zoomed > 1.001);
    this.stage.classList.toggle("coarse", 1 / this.unit > COARSE);
    this.setBoxes(this.drawn ?? []); // handles and labels keep their size on the screen
    this.#letter();
    this.changed(this.zoomed);
  }

  /** Gives the weights on the map their size on the screen. */
  #letter() {
    const unit = this.unit;
    for (const text of this.map.querySelectorAll("text")) {
      for (const [name, size] of [["font-size", 13], ["stroke-width", 3], ["dx", 8], ["dy", 20]]) {
        text.setAttribute(name, size * unit);
      }
    }
  }

  #down(event) {
    if (!this.#picture || event.button > 1) return;
    this.stage.setPointerCapture(event.pointerId);
    this.#pointers.set(event.pointerId, event);
    if (this.#pointers.size > 1) {
      this.#taken?.cancel();
      this.#taken = null;
    } else {
      this.#taken = event.button === 0 ? this.capture(event) : null;
    }
    this.stage.classList.toggle("moving", !this.#taken);
  }

  #move(event) {
    const before = this.#pointers.get(event.pointerId);
    if (!before) return;
    if (this.#taken) {
      this.#taken.move(this.at(event));
    } else if (this.#pointers.size === 1) {
      const from = this.at(before), to = this.at(event);
      this.pan(from.x - to.x, from.y - to.y);
    } else {
      this.#pinch(before, event);
    }
    this.#pointers.set(event.pointerId, event);
  }

  #pinch(before, event) {
    const other = [...this.#pointers.values()].find(({ pointerId }) => pointerId !== event.pointerId);
    const apart = ({ clientX, clientY }) => Math.hypot(clientX - other.clientX, clientY - other.clientY);
    const from = this.at(before), to = this.at(event);
    this.pan((from.x - to.x) / 2, (from.y - to.y) / 2);
    const middle = { clientX: (event.clientX + other.clientX) / 2, clientY: (event.clientY + other.clientY) / 2 };
    this.zoom(apart(event) / (apart(before) || 1), this.at(middle));
  }

  #up(event) {
    if (!this.#pointers.delete(event.pointerId)) return;
    if (event.type === "pointercancel") this.#taken?.cancel();
    else this.#taken?.end();
    this.#taken = null;
    this.stage.classList.toggle("moving", false);
  }

  #wheel(event) {
    if (!this.#picture || (event.deltaY > 0 && this.zoomed <= 1.001)) return; // the page scrolls on
    event.preventDefault();
    this.zoom(Math.exp(-event.deltaY / 400), this.at(event));
  }
}

function colour(share) {
  const place = Math.min(Math.max(share, 0), 1) * (COLOURS.length - 1);
  const low = Math.min(Math.floor(place), COLOURS.length - 2), part = place - low;
  const mixed = COLOURS[low].map((value, i) => Math.round(value + (COLOURS[low + 1][i] - value) * part));
  return `rgb(${mixed.join(" ")})`;
}
