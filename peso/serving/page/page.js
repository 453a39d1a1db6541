"use strict";

// Everything that comes from the server is put on the page as text, never as markup.

const KEY = "peso token";
const AGAIN = 1500; // milliseconds between two looks while something is loading
const PAUSE = 250; // milliseconds without a key before users are looked up
const TURN = 5000; // milliseconds between two looks at which stage answers
const at = (id) => document.getElementById(id);
let answering = null; // the stage that answers, of GET /v1/status
let shown = null; // the request on the page, and what the serving stage answered
let newest = 0; // number of the newest request: an older answer that comes later is dropped
let readOnly = false;

class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

async function call(path, body) {
  const headers = {};
  const token = sessionStorage.getItem(KEY);
  if (token) headers.authorization = `Bearer ${token}`;
  if (body !== undefined) headers["content-type"] = "application/json";
  let response;
  try {
    response = await fetch(path, {
      method: body === undefined ? "GET" : "POST",
      headers,
      body: body === undefined ? undefined : JSON.stringify(body),
    });
  } catch {
    throw new Refused(0, "The server does not answer; check that it runs.");
  }
  const answer = await response.json().catch(() => ({}));
  if (!response.ok) throw new Refused(response.status, answer.detail || `The server answers with status ${response.status}.`);
  return answer;
}

function element(name, text, kind) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  if (kind) made.className = kind;
  return made;
}

function tell(place, text) {
  at(place).textContent = text;
  at(place).hidden = !text;
}

function failed(error) {
  if (!(error instanceof Refused)) throw error;
  if (error.status === 401) askForToken();
  else tell("problem", error.message);
}

function askForToken() {
  const wrong = sessionStorage.getItem(KEY) !== null;
  sessionStorage.removeItem(KEY);
  at("sign-in").hidden = false;
  at("explore").hidden = at("stages").hidden = at("forget").hidden = true;
  at("server").textContent = "This server needs a token.";
  tell("problem", wrong ? "The server does not know this token." : "");
  at("token").focus();
}

// -- state of the server

async function look() {
  const status = await call("v1/status");
  const changed = answering !== null && answering !== status.stage;
  answering = status.stage;
  readOnly = status.read_only;
  const model = status.model === "ready" ? "" : ", model is loading";
  const by = status.hybrid ? ` with ${status.hybrid}` : "";
  const text = `Stage ${status.stage} answers${by}${model} · ${status.items.toLocaleString("en")} items · version ${status.version}`;
  if (at("server").textContent !== text) at("server").textContent = text; // else it is read aloud again
  tell("problem", status.problem ? `Another stage cannot be loaded: ${status.problem}` : "");
  if (changed) await showStages();
  const waited = shown && shown.answer.serving.reason === "loading" && status.model === "ready";
  if (shown && (changed || waited)) await ask(shown.request, `Stage ${status.stage} answers now.`);
}

async function begin() {
  await look();
  await showStages();
  showDrift().catch(failed); // reads the whole stream the first time
  at("sign-in").hidden = true;
  at("explore").hidden = at("stages").hidden = false;
  drawMetrics(); // has a width now
  at("forget").hidden = !sessionStorage.getItem(KEY);
}

async function keepLooking() {
  if (!document.hidden && at("sign-in").hidden) await look().catch(failed);
  setTimeout(keepLooking, TURN);
}

// -- recommendations

const kind = () => document.querySelector("input[name=kind]:checked").value;

function requested() {
  const who = at("who").value.trim(), k = Number(at("k").value);
  if (kind() === "user") return { user: who, k };
  return { history: who.split(/[\s,]+/).filter(Boolean), k };
}

async function ask(request, note = "") {
  newest += 1;
  const mine = newest;
  at("said").textContent = note || "Asking …";
  let answer;
  try {
    answer = await call("v1/compare", request);
  } catch (error) {
    if (mine !== newest) return;
    at("said").textContent = "";
    failed(error);
    return;
  }
  if (mine !== newest) return;
  const earlier = shown && shown.subject === subject(request) ? shown.answer : null;
  shown = { request, answer, subject: subject(request) };
  showHistory(answer);
  showLists(answer, earlier);
  at("answers").hidden = false;
  at("said").textContent = [note, note && earlier ? difference(earlier, answer) : ""].filter(Boolean).join(" ")
    || `${answer.serving.items.length} items of stage ${answer.serving.stage}.`;
  if (answer.before_state === "loading") setTimeout(() => again(mine), AGAIN);
}

// A user stays the same after an event; so does a history that grows on the page.
const subject = (request) => request.user === undefined ? "a history" : `user ${request.user}`;

async function again(mine) {
  if (mine !== newest) return;
  const answer = await call("v1/compare", shown.request).catch(failed);
  if (!answer || mine !== newest) return;
  showBefore(answer);
  markServing(answer);
  if (answer.before_state === "loading") setTimeout(() => again(mine), AGAIN);
}

function difference(earlier, answer) {
  const rank = ranks(earlier.serving);
  const places = answer.serving.items.map((each, place) => rank.get(each.item) === place);
  const moved = places.filter((same) => !same).length;
  const fresh = answer.serving.items.filter((each) => !rank.has(each.item)).length;
  if (!moved) return "The list of the serving stage stays the same.";
  return `In the list of the serving stage, ${moved} of ${places.length} places changed; ${fresh} ${fresh === 1 ? "item is" : "items are"} new.`;
}

const ranks = (list) => new Map(list.items.map((each, place) => [each.item, place]));

function showHistory(answer) {
  const { history, history_length: length } = answer;
  at("history").replaceChildren(...history.map((each) => {
    const row = element("li");
    row.append(element("span", each.title || each.item), detail(each));
    return row;
  }).reverse());
  const most = length > history.length ? `the last ${history.length} of ${length} items` : `${length} items`;
  at("history-note").textContent = length ? `${most}, newest first` : "none";
  at("history").tabIndex = history.length > 8 ? 0 : -1; // it may scroll
  at("event").hidden = readOnly && shown.request.user !== undefined;
  at("event-note").textContent = shown.request.user === undefined
    ? "The item is added to the history on this page and is not stored."
    : "The event is stored in the workspace as if the user had done it now.";
}

function detail(each) {
  const line = element("span", undefined, "detail");
  const parts = [];
  if (each.title) parts.push(element("span", each.item));
  if (each.semantic_id) parts.push(element("code", each.semantic_id.join(" ")));
  else parts.push(element("span", "not known to the stage"));
  if (each.score !== null && each.score !== undefined) {
    const score = element("span", each.score.toFixed(3));
    score.title = "log-probability";
    parts.push(score);
  }
  parts.forEach((part, place) => line.append(...(place ? [" · ", part] : [part])));
  return line;
}

function showLists(answer, earlier) {
  const { serving } = answer;
  const before = earlier && ranks(earlier.serving);
  at("serving-title").textContent = `Stage ${serving.stage}, serves`;
  at("serving-note").textContent = source(serving);
  at("serving").replaceChildren(...serving.items.map((each, place) => {
    const row = itemRow(each, place);
    if (before && before.get(each.item) !== place) row.classList.add("moved");
    return row;
  }));
  showBefore(answer);
  markServing(answer);
}

function itemRow(each, place) {
  const row = element("li");
  row.append(element("span", String(place + 1), "rank"), element("span", each.title || each.item, "title"));
  row.append(element("span", "", "badge"), detail(each), insightOf(each));
  return row;
}

function source(list) {
  if (list.source === "hybrid") return "Score: weighted sum of the log-probabilities of model and baselines.";
  if (list.source === "model") return "Score: log-probability that the item comes next.";
  const why = {
    loading: "the model is loading",
    unknown_user: "the user is not known",
    empty_history: "the history has no known item",
  };
  return `Popular items, because ${why[list.reason] || "the model was not asked"}.`;
}

function markServing({ serving, before }) {
  const rank = before && ranks(before);
  [...at("serving").children].forEach((row, place) => {
    const badge = row.querySelector(".badge");
    badge.className = "badge";
    badge.textContent = "";
    if (!rank) return;
    const then = rank.get(serving.items[place].item);
    if (then === undefined) mark(badge, "new", "new");
    else if (then > place) mark(badge, "up", `↑ from ${then + 1}`);
    else if (then < place) mark(badge, "down", `↓ from ${then + 1}`);
    else mark(badge, "same", "same");
  });
}

function mark(badge, name, text) {
  badge.classList.add(name);
  badge.textContent = text;
}

function showBefore({ serving, before, before_stage: stage, before_state: state }) {
  at("before-title").textContent = stage === null ? "Stage before" : `Stage ${stage}, before`;
  at("before-note").textContent = {
    ready: before ? source(before) : "",
    loading: "The model of this stage is loading …",
    failed: "The model of this stage cannot be loaded; the log of the server says why.",
    none: "There is no earlier stage to compare with.",
  }[state];
  const now = ranks(serving);
  at("before").replaceChildren(...(before ? before.items : []).map((each, place) => {
    const row = itemRow(each, place);
    if (!now.has(each.item)) mark(row.querySelector(".badge"), "gone", "gone");
    return row;
  }));
}

async function addEvent() {
  const item = at("item").value.trim();
  const { request } = shown;
  if (request.user === undefined) {
    at("item").value = "";
    const history = [...request.history, item];
    at("who").value = history.join(" ");
    await ask({ ...request, history }, `Added ${item}.`);
    return;
  }
  const found = await call("v1/events", { user: request.user, item });
  at("item").value = "";
  const unknown = found.unknown_items.length ? ", which the stage does not know" : "";
  await ask(request, `Event stored: ${item}${unknown}.`);
}

// -- what the user does

function onSubmit(id, action) {
  let busy = false;
  at(id).addEventListener("submit", async (event) => {
    event.preventDefault();
    if (busy) return;
    busy = true;
    const button = at(id).querySelector("[type=submit]");
    button.setAttribute("aria-disabled", "true");
    tell("problem", "");
    try {
      await action();
    } catch (error) {
      failed(error);
    } finally {
      busy = false;
      button.removeAttribute("aria-disabled");
    }
  });
}

onSubmit("ask", () => ask(requested()));
onSubmit("event", addEvent);
onSubmit("confirm-form", makeChange);
onSubmit("token-form", async () => {
  sessionStorage.setItem(KEY, at("token").value.trim());
  at("token").value = "";
  await begin();
  at("who").focus();
});
at("forget").addEventListener("click", () => {
  sessionStorage.removeItem(KEY);
  location.reload();
});
at("cancel").addEventListener("click", () => at("confirm").close());
at("metric").addEventListener("change", drawMetrics);
at("rollback").addEventListener("click", () => openDialog({
  path: "v1/rollback",
  body: { stage: lineage.previous },
  title: `Roll back to stage ${lineage.previous}?`,
  text: "All requests are then answered by the stage that served before.",
}));
for (const choice of document.querySelectorAll("input[name=kind]")) {
  choice.addEventListener("change", () => {
    at("who-label").textContent = kind() === "user" ? "User id" : "Item ids, oldest first, separated by spaces";
    at("who").value = "";
    at("browse").hidden = kind() !== "user";
  });
}
let typing;
at("prefix").addEventListener("input", () => {
  clearTimeout(typing);
  typing = setTimeout(lookForUsers, PAUSE);
});
at("browse").addEventListener("toggle", () => {
  if (!at("browse").open) return;
  at("prefix").focus();
  lookForUsers();
});
at("more-users").addEventListener("click", () => lookForUsers(true));
window.addEventListener("resize", drawMetrics);
begin().catch(failed);
setTimeout(keepLooking, TURN);
