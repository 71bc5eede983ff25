/** Writes questions and answers as a list, the newest first. */

import { make, percent } from "./dom.js";

const STATES = ["streaming", "done", "stopped", "failed"];

/** Writes a box for people. */
export const boxText = (box) => {
  const [x0, y0, x1, y1] = box.map((value) => +value.toFixed(1));
  return `${x0}, ${y0} to ${x1}, ${y1}`;
};

/**
 * Makes the entry of a turn; `write(turn)` brings it up to date.
 * @param {object} turn {label, empty, question, box, picture, state, text, result, error, task}
 * @param {function} show called when a person wants to see the turn on its image
 */
export function entry(turn, show) {
  const item = make("li", { class: "turn" });
  const body = make("div", { class: "turn-body" });
  const head = make("div", { class: "turn-head" },
    make("span", { class: "tag" }, turn.label),
    make("h3", {}, asked(turn)),
    turn.picture ? make("button", { type: "button", class: "quiet small", onclick: show }, "Show on the image") : null,
  );
  item.append(head, body);
  const write = () => {
    for (const state of STATES) item.classList.toggle(state, state === turn.state);
    item.setAttribute("aria-busy", turn.state === "streaming");
    body.replaceChildren(...answer(turn), ...notes(turn), ...sure(turn), ...compared(turn));
  };
  write();
  return { item, write, setShown: (yes) => item.classList.toggle("on-image", yes) };
}

/** Names so many earlier turns. */
export const previous = (count) => `the ${count === 1 ? "previous question and answer" : `${count} previous questions and answers`}`;

/** Says the answer of a finished turn in one sentence, for a screen reader. */
export function spoken(turn) {
  if (turn.state === "failed") return turn.error;
  if (turn.state === "stopped") return "Stopped.";
  const boxes = turn.result.boxes ?? [];
  if (boxes.length) return `Found at ${boxes.map(boxText).join(" and ")}, shown on the image.`;
  return `Answer: ${turn.text}`;
}

function asked(turn) {
  if (turn.box) return `${turn.question ? `${turn.question} – ` : ""}box ${boxText(turn.box)}`;
  return turn.question || turn.empty || turn.label;
}

function answer(turn) {
  if (turn.state === "failed") return [make("p", { class: "trouble" }, turn.error)];
  const boxes = turn.result?.boxes ?? [];
  if (boxes.length) {
    return [
      make("p", { class: "answer" }, ...boxes.flatMap((box, i) => [i ? "; " : "", boxText(box)]),
        make("span", { class: "unit" }, " px")),
      make("p", { class: "raw" }, turn.text),
    ];
  }
  const empty = turn.state === "done" && !turn.text.trim();
  return [make("p", { class: turn.givesBox ? "answer raw" : "answer" },
    empty ? make("em", {}, "The model's answer is empty.") : turn.text,
    turn.state === "streaming" ? make("span", { class: "caret", "aria-hidden": "true" }) : null)];
}

function notes(turn) {
  const out = [];
  if (turn.state === "stopped") out.push("You stopped this answer.");
  if (turn.result?.finish_reason === "length") out.push("The answer was cut at the longest length allowed.");
  if (turn.state === "done" && turn.givesBox && !turn.result.boxes?.length) out.push("The answer holds no valid box.");
  if (turn.earlier) out.push(`Asked with ${previous(turn.earlier)}.`);
  return out.map((text) => make("p", { class: "hint" }, text));
}

function sure(turn) {
  const value = turn.result?.confidence;
  if (value === null || value === undefined) return [];
  return [make("div", { class: "sure" },
    make("p", {}, "Mean probability of the answer's tokens ", make("b", {}, percent(value))),
    meter(value),
    make("p", { class: "hint" }, "How sure the model is of its words, not how often it is right."))];
}

function compared(turn) {
  const options = turn.result?.options ?? [];
  if (!options.length) return [];
  const sorted = [...options].sort((a, b) => b.probability - a.probability);
  return [make("table", { class: "compared" },
    make("caption", {}, "Given answers by likelihood"),
    make("thead", {}, make("tr", {}, ...["Answer", "Share", "Log likelihood"].map((name) => make("th", { scope: "col" }, name)))),
    make("tbody", {}, ...sorted.map(({ text, probability, log_likelihood: log }) => make("tr", {},
      make("th", { scope: "row" }, text),
      make("td", {}, make("div", { class: "share" }, meter(probability), make("b", {}, percent(probability)))),
      make("td", {}, log > -0.005 ? "0.00" : log.toFixed(2).replace("-", "−"))))),
  )];
}

function meter(share) {
  const bar = make("i", { class: "bar", "aria-hidden": "true" });
  bar.style.setProperty("--share", share);
  return bar;
}
