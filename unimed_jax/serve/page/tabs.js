/** Makes the row of tabs, one a task, with the keys that the ARIA pattern asks for. */

import { make } from "./dom.js";

/**
 * What a person does in the tab of a task, and what its field is called.
 * empty: what stands for a question that was left out
 */
export const WORDS = {
  vqa: { label: "Ask", says: "Ask a question about the image.", question: "Question" },
  refer: { label: "Find", says: "Name a structure. The model draws a box around it.", question: "What to find" },
  identify: {
    label: "Identify", question: "Question",
    says: "Draw a box on the image. The model says what is inside.",
  },
  caption: {
    label: "Describe", question: "Instruction", empty: "what the image shows",
    says: "The model writes what the image shows.",
  },
  cls: { label: "Classify", says: "Ask for one class out of several.", question: "Question", empty: "class of the image" },
  qa: { label: "Text", says: "Ask a question without an image.", question: "Question" },
};

/** What a person must know of a task that the model never saw. */
export const UNTRAINED = "This model was not trained for it, so its answers mean nothing.";

/** Returns the words for a task of the server's list; one that is not known here has its title. */
export function wordsFor({ task, title }) {
  return WORDS[task] ?? { label: title ?? task, says: title ?? "", question: "Question" };
}

/** Chooses among tasks with a pointer, the arrow keys, Home and End. */
export class Tabs {
  /**
   * @param {HTMLElement} list element of role tablist
   * @param {HTMLElement} panel what all tabs control
   * @param {object[]} tasks as GET /v1/tasks gives them
   * @param {function} chosen called with a task's name
   */
  constructor(list, panel, tasks, chosen) {
    this.panel = panel;
    this.chosen = chosen;
    this.tabs = tasks.map((entry) => make("button", {
      type: "button", role: "tab", id: `tab-${entry.task}`, "aria-controls": panel.id, "data-task": entry.task,
      onclick: () => this.choose(entry.task),
    }, make("span", {}, wordsFor(entry).label), make("small", { "aria-hidden": "true" }, entry.task)));
    list.replaceChildren(...this.tabs);
    list.addEventListener("keydown", (event) => this.#key(event));
  }

  /** Selects the tab of a task. */
  choose(task) {
    for (const tab of this.tabs) {
      const yes = tab.dataset.task === task;
      tab.setAttribute("aria-selected", yes);
      tab.tabIndex = yes ? 0 : -1;
      if (yes) this.panel.setAttribute("aria-labelledby", tab.id);
    }
    this.chosen(task);
  }

  #key(event) {
    const here = this.tabs.indexOf(document.activeElement), count = this.tabs.length;
    const next = { ArrowRight: here + 1, ArrowLeft: here - 1, Home: 0, End: count - 1 }[event.key];
    if (next === undefined || here < 0) return;
    event.preventDefault();
    const tab = this.tabs[(next + count) % count];
    tab.focus();
    this.choose(tab.dataset.task);
  }
}
