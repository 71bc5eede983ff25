/** Connects the parts of the page: one picture, one form, the turns so far. All of it lies in memory. */

import { BoxEditor } from "./box.js";
import { $, shown } from "./dom.js";
import { develop, read } from "./picture.js";
import { Routing } from "./routing.js";
import { Server, ServerError } from "./server.js";
import { Tabs, UNTRAINED, wordsFor } from "./tabs.js";
import { boxText, entry, previous, spoken } from "./turns.js";
import { Viewer } from "./viewer.js";
import { ViewForm } from "./view_form.js";

const server = new Server();
const viewer = new Viewer($("stage"), $("canvas"));
const editor = new BoxEditor(viewer, ["x0", "y0", "x1", "y1"].map($), () => overlay());
const routing = new Routing(viewer);
const viewForm = new ViewForm((choice) => developAgain(choice));

let info = null; // what GET /v1/tasks says
let tabs = null;
let task = null; // the entry of the chosen tab
let picture = null;
let turns = []; // oldest first: {entry fields of turns.js, item, write, setShown}
let active = null; // the turn whose boxes and routing are on the image
let drafts = {}; // task -> the question typed there
let asking = null; // AbortController of the answer that streams
let loading = null; // AbortController of the picture that is being read

// --- start, access token, clear -------------------------------------------------------------------

async function start() {
  $("page-trouble").textContent = $("gate-trouble").textContent = "";
  try {
    info = await server.get("v1/tasks");
  } catch (error) {
    if (!refusedToken(error)) $("page-trouble").textContent = error.message;
    return;
  }
  shown($("gate"), false);
  shown($("columns"), true);
  $("model").textContent = $("model").title = info.model;
  $("routing").open = matchMedia("(min-width: 900px)").matches;
  shown($("route-field"), info.experts > 0);
  if (info.limits?.max_tokens) $("max-tokens").max = info.limits.max_tokens;
  if (info.limits?.question) $("question").maxLength = info.limits.question;
  const before = task?.task;
  tabs = new Tabs($("tabs"), $("panel"), info.tasks, choose);
  const first = info.tasks.find((known) => known.task === before)
    ?? info.tasks.find((known) => known.needs_image && known.trained !== false);
  tabs.choose((first ?? info.tasks[0]).task);
}

/** Asks for a token where the server wants one; returns whether it does. */
function refusedToken(error) {
  if (error.status !== 401) return false;
  shown($("gate"), true);
  if (server.token) $("gate-trouble").textContent = error.message;
  server.token = "";
  $("token").focus();
  return true;
}

function clear() {
  const guarded = Boolean(server.token);
  asking?.abort();
  loading?.abort();
  asking = loading = active = picture = null;
  turns = [];
  drafts = {};
  server.token = "";
  $("turns").replaceChildren();
  for (const form of document.forms) form.reset();
  for (const spot of document.querySelectorAll("[role=alert]")) spot.textContent = "";
  $("file").value = "";
  $("more").open = false;
  editor.set(null);
  routing.expert = null;
  running(false);
  setPicture(null);
  if (tabs) tabs.choose(task.task);
  if (guarded) {
    info = null;
    shown($("columns"), false);
    shown($("gate"), true);
  }
  say("Everything is cleared: the image, the answers and what you typed.");
}

function say(words) {
  $("status").textContent = words;
}

// --- the picture ----------------------------------------------------------------------------------

async function open(file) {
  if (!file || !info) return;
  await reading(async (signal) => {
    const original = await read(file, info.limits && 0.74 * info.limits.bytes); // base64 is longer by a third
    return develop(server, original, file.name || "pasted image", {}, signal);
  });
  $("file").value = "";
}

/** Asks for another window or frame of the same file. */
async function developAgain(choice) {
  if (!picture) return;
  const { original, name } = picture;
  await reading((signal) => develop(server, original, name, choice, signal));
}

/** Shows the picture that `work` returns, unless another one was asked for meanwhile. */
async function reading(work) {
  loading?.abort();
  const mine = (loading = new AbortController());
  $("picture-trouble").textContent = "";
  $("picture").setAttribute("aria-busy", "true");
  try {
    const found = await work(mine.signal);
    if (loading === mine) {
      setPicture(found);
      say(`${found.name} is shown, ${found.width} by ${found.height} pixels.`);
    }
  } catch (error) {
    if (loading === mine && error.name !== "AbortError" && !refusedToken(error)) {
      $("picture-trouble").textContent = error.message;
      viewForm.show(picture); // which says again how the picture is shown
    }
  } finally {
    if (loading === mine) {
      loading = null;
      $("picture").removeAttribute("aria-busy");
    }
  }
}

function setPicture(found) {
  const another = found?.original !== picture?.original;
  picture = found;
  updateHistory();
  if (another) editor.set(null);
  active = null;
  viewer.show(picture);
  shown($("drop"), !picture);
  shown($("stage-frame"), Boolean(picture));
  shown($("stage-foot"), Boolean(picture));
  shown($("choose-other"), Boolean(picture));
  viewForm.show(picture);
  if (picture) {
    const pages = picture.frames > 1 ? ` · ${picture.frames} frames` : "";
    $("picture-name").textContent = `${picture.name} · ${picture.width} × ${picture.height}${pages}`;
    $("stage").setAttribute("aria-label", `${picture.name}, ${picture.width} by ${picture.height} pixels`);
    editor.setSize(picture.width, picture.height);
  } else {
    $("picture-name").textContent = "";
    $("picture").removeAttribute("aria-busy");
    $("stage").removeAttribute("aria-label");
  }
  overlay();
}

/** Draws the boxes and the routing that belong to the tab, the picture and the active turn. */
function overlay() {
  const turn = active && active.task === task?.task && active.picture === picture ? active : null;
  const boxes = [];
  if (task?.needs_box && editor.box) {
    const same = turn?.box?.every((value, i) => value === editor.box[i]);
    boxes.push({ box: editor.box, kind: "asked", handles: true, label: same && turn.state === "done" ? turn.text : "" });
  }
  for (const box of turn?.result?.boxes ?? []) boxes.push({ box, kind: "found", label: turn.question });
  viewer.setBoxes(boxes);
  routing.show(turn?.result?.routing ?? null, info?.fit ?? "stretch");
  for (const one of turns) one.setShown(one === turn);
  const finger = matchMedia("(pointer: coarse)").matches;
  const view = finger ? "Pinch to zoom, drag to move." : "Wheel or + and − zoom, dragging or arrow keys move, 0 fits.";
  const keys = finger ? "" : " Keys: arrows move it, with Shift they resize it, Delete removes it.";
  $("stage-help").textContent = task?.needs_box ? `Drag to draw a box.${keys}` : view;
  shown($("hands"), Boolean(task?.needs_box));
  $("stage").classList.toggle("drawing", Boolean(task?.needs_box && hand() === "draw"));
}

const hand = () => document.querySelector("input[name=hand]:checked")?.value;

// --- the form -------------------------------------------------------------------------------------

function choose(name) {
  if (task) drafts[task.task] = $("question").value;
  task = info.tasks.find((known) => known.task === name);
  const words = wordsFor(task), optional = isOptional(task);
  $("task-title").textContent = task.trained === false ? `${words.says} ${UNTRAINED}` : words.says;
  $("question").value = drafts[name] ?? "";
  $("question-label").textContent = optional ? `${words.question} (optional)` : words.question;
  shown($("question-field"), !task.needs_box);
  shown($("example-line"), Boolean(task.example) && !task.needs_box);
  $("example").textContent = task.example ?? "";
  $("example").setAttribute("aria-label", `Fill in the example: ${task.example}`);
  shown($("box-fields"), task.needs_box);
  $("columns").classList.toggle("text-only", !task.needs_image);
  $("form-trouble").textContent = "";
  updateHistory();
  overlay();
}

const isOptional = (known) => !(known.needs_question ?? known.example);

/** Returns the turns of this tab and picture that can be sent along. */
function earlier() {
  return turns.filter((turn) => turn.task === task.task && turn.state === "done" && turn.text
    && turn.picture?.url === (task.needs_image ? picture?.url : undefined));
}

function updateHistory() {
  const count = task ? earlier().length : 0;
  shown($("history-field"), count > 0 && Boolean(task.example) && !task.needs_box && !task.gives_box);
  $("history-label").textContent = `Include ${previous(count)}`;
}

/** Returns what is missing before the question can be asked, in one sentence, and where; or null. */
function missing(question) {
  if (task.needs_image && !picture) return ["Choose an image first.", $("choose")];
  if (task.needs_box && !editor.box) return ["Draw a box on the image first, or type its four numbers.", $("x0")];
  if (!question && !task.needs_box && !isOptional(task)) {
    return [`Fill in “${$("question-label").textContent}” first.`, $("question")];
  }
  return null;
}

function body(question, history) {
  const number = (id) => ($(id).value === "" ? null : $(id).valueAsNumber);
  const options = $("options").value.split(",").map((text) => text.trim()).filter(Boolean);
  const out = { task: task.task, question, images: task.needs_image ? [picture.url] : [], confidence: true, stream: true };
  if (task.needs_box) out.box = editor.box;
  if (options.length) out.options = options;
  if (history.length) out.history = history.map((turn) => ({ question: turn.question, answer: turn.text }));
  if (info.experts > 0 && task.needs_image) out.routing = $("route").checked;
  for (const [key, id] of [["max_tokens", "max-tokens"], ["temperature", "temperature"], ["seed", "seed"]]) {
    if (number(id) !== null) out[key] = number(id);
  }
  return out;
}

async function ask() {
  if (asking || !info) return;
  const question = $("question-field").hidden ? "" : $("question").value.trim();
  const lack = missing(question);
  $("form-trouble").textContent = lack ? lack[0] : "";
  if (lack) {
    lack[1].focus();
    return;
  }
  const history = $("history").checked && !$("history-field").hidden ? earlier() : [];
  const request = body(question, history);
  const { label, empty } = wordsFor(task);
  const turn = {
    task: task.task, label, empty, givesBox: task.gives_box, question, text: "", state: "streaming",
    box: task.needs_box ? [...editor.box] : null, picture: task.needs_image ? picture : null, earlier: history.length,
  };
  Object.assign(turn, entry(turn, () => showTurn(turn)));
  turns.push(turn);
  $("turns").prepend(turn.item);
  turn.item.scrollIntoView({ block: "nearest" });
  active = turn;
  const mine = (asking = new AbortController());
  running(true);
  overlay();
  try {
    await stream(turn, request, mine.signal);
    turn.state = "done";
  } catch (error) {
    turn.state = error.name === "AbortError" ? "stopped" : "failed";
    turn.error = error.message;
    if (asking === mine) refusedToken(error);
    if (!(error instanceof ServerError) && turn.state === "failed") throw error; // a fault of this page
  } finally {
    if (asking === mine) {
      asking = null;
      running(false);
      turn.write();
      updateHistory();
      overlay();
      if (active === turn) turn.result?.boxes?.forEach((box) => viewer.reveal(box));
      say(spoken(turn));
    }
  }
}

async function stream(turn, request, signal) {
  for await (const event of server.stream("v1/tasks", request, signal)) {
    if (signal.aborted) return;
    if (event.text !== undefined) turn.text += event.text;
    if (event.result) {
      turn.result = event.result;
      turn.text = event.result.answer;
    }
    turn.write();
  }
  if (!turn.result) throw new ServerError("The server sent no result; ask again.");
}

function running(yes) {
  shown($("stop"), yes);
  $("send").setAttribute("aria-disabled", yes);
  $("send").textContent = yes ? "Answering…" : "Ask";
  shown($("answers-title"), turns.length > 0);
  shown($("no-turns"), turns.length === 0);
  if (yes) say("The model answers.");
}

/** Brings back the picture, the tab and the box of a turn, with what was found on it. */
function showTurn(turn) {
  if (picture !== turn.picture) setPicture(turn.picture);
  tabs.choose(turn.task);
  if (turn.box) editor.set(turn.box);
  active = turn;
  overlay();
  for (const box of [turn.box, ...(turn.result?.boxes ?? [])]) if (box) viewer.reveal(box);
  $("stage").focus();
}

// --- events ---------------------------------------------------------------------------------------

viewer.capture = (event) => (task?.needs_box && hand() === "draw" ? editor.take(event) : null);
viewer.changed = (zoom) => ($("zoom-level").textContent = `${Math.round(100 * zoom)}\u00a0%`);

$("stage").addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const moves = { ArrowLeft: [-0.1, 0], ArrowRight: [0.1, 0], ArrowUp: [0, -0.1], ArrowDown: [0, 0.1] };
  const does = {
    "+": () => viewer.zoom(1.25), "=": () => viewer.zoom(1.25), "-": () => viewer.zoom(0.8), 0: () => viewer.fit(),
  }[event.key];
  if (task?.needs_box && editor.key(event)) {
    event.preventDefault();
    say(editor.box ? `Box from ${boxText(editor.box)}` : "No box.");
  } else if (does || moves[event.key]) {
    event.preventDefault();
    does ? does() : viewer.panBy(...moves[event.key]);
  }
});

$("zoom-in").addEventListener("click", () => viewer.zoom(1.5));
$("zoom-out").addEventListener("click", () => viewer.zoom(1 / 1.5));
$("zoom-fit").addEventListener("click", () => viewer.fit());
$("hands").addEventListener("change", overlay);
for (const id of ["choose", "choose-other"]) $(id).addEventListener("click", () => $("file").click());
$("file").addEventListener("change", () => open($("file").files[0]));
$("clear").addEventListener("click", () => {
  clear();
  [$("token"), $("choose"), $("question")].find((field) => field.checkVisibility())?.focus();
});
$("stop").addEventListener("click", () => {
  asking?.abort();
  $("send").focus();
});
$("example").addEventListener("click", () => {
  $("question").value = task.example;
  $("question").focus();
});
$("question").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  $("form").requestSubmit();
});
$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  ask();
});
$("gate-form").addEventListener("submit", (event) => {
  event.preventDefault();
  server.token = $("token").value.trim();
  $("token").value = "";
  start();
});

const carriesFiles = (event) => [...(event.dataTransfer?.types ?? [])].includes("Files");
addEventListener("dragover", (event) => {
  if (!carriesFiles(event)) return;
  event.preventDefault();
  document.body.classList.add("dragging");
});
addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) document.body.classList.remove("dragging");
});
addEventListener("drop", (event) => {
  document.body.classList.remove("dragging");
  if (!carriesFiles(event)) return;
  event.preventDefault();
  open(event.dataTransfer.files[0]);
});
addEventListener("paste", (event) => {
  const file = [...(event.clipboardData?.files ?? [])][0];
  if (!file) return;
  event.preventDefault();
  open(file);
});
addEventListener("pagehide", clear); // nor may the browser's history bring anything back

start();
