/** Offers the window and the frame of a picture that has several. */

import { $, make, shown } from "./dom.js";

const WAIT = 150; // milliseconds until a moved slider asks the server

/** Calls `chosen({window, frame})` when a person wants another view of the same file. */
export class ViewForm {
  constructor(chosen) {
    this.chosen = chosen;
    $("window").addEventListener("change", () => this.#window());
    for (const id of ["centre", "width"]) $(id).addEventListener("change", () => this.#send());
    $("frame").addEventListener("input", () => {
      this.#number();
      clearTimeout(this.timer);
      this.timer = setTimeout(() => this.#send(), WAIT);
    });
    $("view").addEventListener("submit", (event) => event.preventDefault());
  }

  /** Shows what can be chosen for a picture; null for none. */
  show(picture) {
    this.picture = picture;
    clearTimeout(this.timer);
    const windows = picture?.windows ?? [], frames = picture?.frames ?? 1, dicom = picture?.kind === "dicom";
    shown($("view"), dicom || frames > 1);
    shown($("window-field"), dicom);
    shown($("frame-field"), frames > 1);
    const own = Array.isArray(picture?.window);
    $("window").replaceChildren(
      make("option", { value: "" }, "As the file says"),
      ...windows.map(({ name, centre, width }) => make("option", { value: name }, `${name} (${centre}, ${width})`)),
      make("option", { value: "own" }, "Your own …"),
    );
    $("window").value = own ? "own" : (picture?.window ?? "");
    this.#fields(own);
    if (own) [$("centre").value, $("width").value] = picture.window;
    $("frame").max = frames - 1;
    $("frame").value = picture?.frame ?? 0;
    this.#number();
  }

  #number() {
    $("frame-number").textContent = `${+$("frame").value + 1} of ${this.picture?.frames ?? 1}`;
  }

  #fields(own) {
    shown($("centre-field"), own);
    shown($("width-field"), own);
  }

  #window() {
    const own = $("window").value === "own";
    this.#fields(own);
    if (!own) return this.#send();
    $("centre").focus();
    this.#send(); // with what stood there before, if anything
  }

  #send() {
    if (!this.picture) return;
    const value = $("window").value, own = [$("centre").valueAsNumber, $("width").valueAsNumber];
    if (value === "own" && !own.every(Number.isFinite)) return;
    const window = value === "own" ? own : value || null;
    this.chosen({ window, frame: this.picture.frames > 1 ? +$("frame").value : null });
  }
}
