// The page put together.

import { Conversation } from "./conversation.js";
import { announce, find, make } from "./dom.js";
import { EnginePanel } from "./engine.js";
import { Server } from "./server.js";
import { Settings } from "./settings.js";
import { TokenCard } from "./token_card.js";
import { isSend, Transcript } from "./transcript.js";
import { Watch } from "./watch.js";

/** Pixels of width from which both panels are open beside the chat to begin with. */
const WIDE = 1180;
const STATUS = /** @type {Record<string, string>} */ ({
  ready: "ready", loading: "loading", sleeping: "sleeping", restarting: "starting over", draining: "stopping",
  failed: "failed", lost: "no answer", key: "key wanted",
});

const settings = new Settings();
const server = new Server(() => settings.key);
const panel = new EnginePanel(find("engine", HTMLElement));
const question = find("question", HTMLTextAreaElement);
const send = find("send", HTMLButtonElement);
const stop = find("stop-answer", HTMLButtonElement);
const wide = matchMedia(`(min-width: ${WIDE}px)`);
const models = find("model", HTMLSelectElement);

const transcript = new Transcript(find("transcript", HTMLElement), {
  ask: (text) => begin(conversation.ask(text)),
  again: (turn) => begin(conversation.again(turn)),
  edit: (turn, text) => begin(conversation.edit(turn, text)),
  editing: (open) => find("composer", HTMLElement).classList.toggle("aside", open),
});
const conversation = new Conversation(
  server,
  () => ({ system: settings.system, model: models.value, parameters: settings.parameters }),
  changed,
);
const card = new TokenCard(find("token-card", HTMLElement), transcript.element, (element) => transcript.tokenOf(element));
const watch = new Watch(server, seen, failed);

/** @param {Promise<void>} answer that has just been asked for */
function begin(answer) {
  settings.refuse(null);
  question.focus();
  return answer;
}

/** @param {import("./conversation.js").Reply | null} reply */
function changed(reply) {
  stop.hidden = !conversation.writing;
  send.hidden = conversation.writing;
  if (reply === null) {
    card.hide();
    transcript.show(conversation.turns);
    return;
  }
  transcript.grow(reply);
  if (reply.state === "writing") return;
  if (reply.problem) {
    settings.refuse(reply.problem.param);
    if (reply.problem.status === 401) wantKey();
    if (reply.problem.param && settings.form.elements.namedItem(reply.problem.param)) open("settings", true);
  } else announce(reply.state === "stopped" ? "Stopped." : `Answer: ${reply.text.slice(0, 1000)}`);
}

/** @param {import("./watch.js").State} state */
function seen(state) {
  showStatus(state.status, state.engine || !state.progress.programs ? "" : `${state.progress.programs_compiled}/${state.progress.programs}`);
  panel.show(state);
  if (state.engine) settings.describe(state.engine);
  if (models.options.length !== state.names.length) {
    models.replaceChildren(...state.names.map((name) => make("option", { value: name }, name)));
    models.hidden = state.names.length < 2;
    find("only-model", HTMLElement).textContent = state.names.length < 2 ? state.names[0] : "";
  }
}

/** @param {import("./server.js").ServerError} error @param {string | null} ready */
function failed(error, ready) {
  showStatus(error.status === 401 ? "key" : "lost", ready && ready !== "ready" ? STATUS[ready] : "");
  panel.lose(error.message);
  if (error.status === 401) wantKey();
}

let keyWanted = false;
function wantKey() {
  settings.wantKey(settings.key !== "");
  if (keyWanted) return; // once is enough: somebody may be typing
  keyWanted = true;
  open("settings", true);
  settings.keyInput.focus();
}

/** @param {string} status @param {string} more */
function showStatus(status, more) {
  const text = [STATUS[status] ?? status, more].filter(Boolean).join(" · ");
  const shown = find("status-text", HTMLElement);
  if (shown.textContent !== text) shown.textContent = text; // what stays the same is not said again
  find("status", HTMLElement).dataset.status = status;
}

/** @param {"settings" | "engine"} name @param {boolean} shown */
function open(name, shown) {
  find(name, HTMLElement).hidden = !shown;
  find(`${name}-toggle`, HTMLElement).setAttribute("aria-expanded", String(shown));
  if (shown && !wide.matches) open(name === "settings" ? "engine" : "settings", false);
  panel.paint();
}

for (const name of /** @type {("settings" | "engine")[]} */ (["settings", "engine"])) {
  find(`${name}-toggle`, HTMLElement).addEventListener("click", () => open(name, find(name, HTMLElement).hidden));
}
find("new-chat", HTMLElement).addEventListener("click", () => {
  conversation.clear();
  question.focus();
});
find("composer", HTMLFormElement).addEventListener("submit", (event) => {
  event.preventDefault();
  const text = question.value.trim();
  if (!text || conversation.writing) return;
  question.value = "";
  grow();
  begin(conversation.ask(text));
});
question.addEventListener("keydown", (event) => {
  if (!isSend(event)) return;
  event.preventDefault();
  find("composer", HTMLFormElement).requestSubmit();
});
question.addEventListener("input", grow);
function grow() {
  question.style.height = "auto";
  question.style.height = `${Math.min(question.scrollHeight + 2, innerHeight * 0.4)}px`;
}
stop.addEventListener("click", () => {
  conversation.stop();
  question.focus();
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  card.hide();
  conversation.stop();
});
settings.keyInput.addEventListener("change", () => watch.begin());

transcript.show([]);
for (const name of /** @type {("settings" | "engine")[]} */ (["settings", "engine"])) open(name, wide.matches);
wide.addEventListener("change", () => open("settings", wide.matches));
watch.begin();
