/** Lets a person draw a box on the image with a pointer, the arrow keys or numbers. */

const NEAR = 14; // screen pixels from a corner that still take hold of it

/** Holds one box in whole pixels of the image: [x0, y0, x1, y1], x0 < x1, y0 < y1, or null. */
export class BoxEditor {
  box = null;

  /**
   * @param viewer where it is drawn
   * @param {HTMLInputElement[]} fields left, top, right and bottom as numbers
   * @param {function} changed called after every change
   */
  constructor(viewer, fields, changed) {
    this.viewer = viewer;
    this.fields = fields;
    this.changed = changed;
    this.size = null;
    for (const field of fields) field.addEventListener("input", () => this.#typed());
  }

  /** Takes the size of another picture; a box that does not lie in it is dropped. */
  setSize(width, height) {
    this.size = { width, height };
    this.fields.forEach((field, i) => field.setAttribute("max", i % 2 ? height : width));
    if (this.box && (this.box[2] > width || this.box[3] > height)) this.set(null);
  }

  /** Sets the box, or none, and writes it into the fields. */
  set(box) {
    this.box = box;
    this.fields.forEach((field, i) => (field.value = box ? box[i] : ""));
    this.changed();
  }

  /** Takes hold of a corner or of the whole box, or begins another one; see Viewer. */
  take(event) {
    const start = this.viewer.at(event), before = this.box;
    let shape = (to) => [start.x, start.y, to.x, to.y];
    if (before) {
      const [x0, y0, x1, y1] = before, near = NEAR * this.viewer.unit;
      const corner = [[x0, y0, x1, y1], [x1, y0, x0, y1], [x0, y1, x1, y0], [x1, y1, x0, y0]]
        .map((ends) => [Math.hypot(ends[0] - start.x, ends[1] - start.y), ends])
        .sort((a, b) => a[0] - b[0])[0];
      if (corner[0] < near) {
        shape = (to) => [to.x, to.y, corner[1][2], corner[1][3]];
      } else if (start.x > x0 && start.x < x1 && start.y > y0 && start.y < y1) {
        shape = (to) => this.#moved(before, to.x - start.x, to.y - start.y);
      }
    }
    return {
      move: (point) => this.set(this.#inside(shape(point))),
      end: () => {},
      cancel: () => this.set(before),
    };
  }

  /** Moves the box by an arrow key, with shift its right and lower edges; returns whether it did. */
  key(event) {
    const arrows = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    if (event.key === "Delete" || event.key === "Backspace") {
      this.set(null);
      return true;
    }
    const arrow = arrows[event.key];
    if (!arrow) return false;
    const { width, height } = this.size;
    if (!this.box) {
      this.set([0.375 * width, 0.375 * height, 0.625 * width, 0.625 * height].map(Math.round));
      return true;
    }
    const step = Math.max(1, Math.round(Math.max(width, height) / 100));
    const [dx, dy] = arrow.map((way) => way * step), [x0, y0, x1, y1] = this.box;
    const grown = [x0, y0, Math.max(x1 + dx, x0 + 1), Math.max(y1 + dy, y0 + 1)];
    this.set(event.shiftKey ? this.#inside(grown) : this.#moved(this.box, dx, dy).map(Math.round));
    return true;
  }

  #moved([x0, y0, x1, y1], dx, dy) {
    const across = Math.min(Math.max(dx, -x0), this.size.width - x1);
    const down = Math.min(Math.max(dy, -y0), this.size.height - y1);
    return [x0 + across, y0 + down, x1 + across, y1 + down];
  }

  #inside([xa, ya, xb, yb]) {
    const { width, height } = this.size;
    const [x0, x1] = ordered(xa, xb, width), [y0, y1] = ordered(ya, yb, height);
    return [x0, y0, x1, y1];
  }

  #typed() {
    const typed = this.fields.map((field) => field.valueAsNumber);
    const [x0, y0, x1, y1] = typed;
    const valid = this.size && typed.every(Number.isFinite) && x0 >= 0 && y0 >= 0 && x0 < x1 && y0 < y1;
    this.box = valid && x1 <= this.size.width && y1 <= this.size.height ? typed : null;
    this.changed();
  }
}

/** Returns two ends in order, whole, inside the image and at least a pixel apart. */
function ordered(a, b, most) {
  const low = Math.min(Math.max(Math.round(Math.min(a, b)), 0), most - 1);
  return [low, Math.min(Math.max(Math.round(Math.max(a, b)), low + 1), most)];
}
