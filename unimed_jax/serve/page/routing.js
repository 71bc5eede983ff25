/** Shows how much each expert contributes, and lays the map of one of them over the image. */

import { $, make, percent, shown } from "./dom.js";

/** Holds which expert's map is shown: its number from 0, or null. */
export class Routing {
  constructor(viewer) {
    this.viewer = viewer;
    this.expert = null;
  }

  /**
   * Shows the routing of an answer.
   * @param {object|null} routing {experts: [{mean, map}]}
   * @param {string} fit how the image was made square
   */
  show(routing, fit) {
    this.routing = routing;
    this.fit = fit;
    shown($("routing"), Boolean(routing?.experts?.length));
    if (!routing?.experts?.length) {
      this.viewer.setMap(null);
      $("experts").replaceChildren();
      return;
    }
    const { experts } = routing;
    const means = experts.map(({ mean }) => mean), most = Math.max(...means, 1e-9);
    $("routing-most").textContent = `expert ${means.indexOf(most) + 1} contributes most`;
    if (this.expert !== null && !experts[this.expert]?.map) this.expert = null;
    const mapped = experts.some(({ map }) => map);
    $("experts").replaceChildren(
      ...(mapped ? [this.#choice(null, make("span", {}, "No map"))] : []),
      ...experts.map(({ mean, map }, i) => {
        const bar = make("i", { class: "bar", "aria-hidden": "true" });
        bar.style.setProperty("--share", mean / most);
        return this.#choice(map ? i : undefined, make("span", {}, `Expert ${i + 1}`), bar, make("b", {}, percent(mean)));
      }),
    );
    this.#draw();
  }

  /** Makes one choice; an expert without a map is a line that cannot be chosen. */
  #choice(expert, ...children) {
    if (expert === undefined) return make("div", { class: "expert" }, ...children);
    const input = make("input", {
      type: "radio", name: "expert", checked: this.expert === expert,
      onchange: () => {
        this.expert = expert;
        this.#draw();
      },
    });
    return make("label", { class: expert === null ? "expert none" : "expert" }, input, ...children);
  }

  #draw() {
    const maps = this.routing.experts.map(({ map }) => map).filter(Boolean);
    const map = this.expert === null ? null : this.routing.experts[this.expert].map;
    const weights = maps.flat(2);
    const range = [Math.min(...weights), Math.max(...weights)]; // one scale, so that experts compare
    this.viewer.setMap(map, range, this.fit);
    shown($("legend"), Boolean(map));
    $("legend-low").textContent = range[0].toFixed(2);
    $("legend-high").textContent = range[1].toFixed(2);
  }
}
