"use strict";

// The lineage of stages, and changes of the one that serves.

let lineage = null; // of GET /v1/stages
let drift = null; // of GET /v1/drift
let change = null; // what the dialog asks to confirm

async function showStages() {
  lineage = await call("v1/stages");
  const serves = lineage.stages.find((each) => each.serves);
  const how = { gate: "by the gate", promote: "by promotion", rollback: "by rollback" }[lineage.by];
  at("serves").textContent = serves
    ? `Stage ${serves.stage} serves since ${when(lineage.since)}${how ? `, ${how}` : ""}${lineage.reason ? `: ${lineage.reason}` : ""}.`
    : "No stage serves.";
  at("refusal").textContent = lineage.refusal ? `Changes of the stage are off: ${lineage.refusal}.` : "";
  at("rollback").hidden = lineage.refusal !== null || lineage.previous === null;
  at("rollback").textContent = `Roll back to stage ${lineage.previous}`;
  at("lineage").replaceChildren(...[...lineage.stages].reverse().map(stageCard));
  chooseMetric();
}

function when(time) {
  const date = new Date(time);
  return Number.isNaN(date.getTime()) ? "an unknown time"
    : date.toLocaleString("en", { dateStyle: "medium", timeStyle: "short" });
}

function stageCard(each) {
  const card = element("li", undefined, each.serves ? "serves" : "");
  const head = element("div", undefined, "head");
  head.append(element("h3", `Stage ${each.stage}${each.serves ? " · serves" : ""}`));
  if (!each.serves && lineage.refusal === null && each.pruned === null) {
    const button = element("button", "Promote", "quiet");
    button.type = "button";
    button.setAttribute("aria-label", `Promote stage ${each.stage}`);
    button.addEventListener("click", () => confirmPromotion(each));
    head.append(button);
  }
  card.append(head);
  const from = each.parent === null ? "Base stage" : `From stage ${each.parent}, strategy ${each.strategy}`;
  card.append(element("p", `${from}, trained ${when(each.trained)}${each.pruned ? "; weights removed" : ""}`, "note"));
  const data = dataLine(each);
  if (data) card.append(data);
  if (each.gate) {
    const passed = each.gate.decision === "passed";
    const line = element("p");
    line.append(element("span", passed ? "✓ Gate passed" : "✗ Gate not passed", `badge ${passed ? "passed" : "refused"}`));
    line.append(element("span", ` against stage ${each.gate.champion}: ${each.gate.says}`));
    card.append(line);
  }
  const metrics = Object.entries(each.metrics || {}).filter(([, value]) => Number.isFinite(value));
  const list = element("dl");
  for (const [name, value] of metrics) {
    const pair = element("div");
    pair.append(element("dt", name), element("dd", value.toFixed(4)));
    list.append(pair);
  }
  card.append(metrics.length ? list : element("p", "Not tested.", "note"));
  return card;
}

// -- metrics and drift over the stages

const DRIFTS = {
  "divergence of items": [(each) => each.item_divergence, "Jensen-Shannon divergence of the items' shares of events from those of the stage before, in bits."],
  "divergence of first codes": [(each) => each.code_divergence, "The same of the first codes of the semantic IDs, in bits."],
  "share of new users": [(each) => each.stage && each.users ? each.new_users / each.users : null, "Users of a stage whom no stage before had."],
  "share of new items": [(each) => each.stage && each.items ? each.new_items / each.items : null, "Items of a stage that no stage before had."],
};

async function showDrift() {
  drift = await call("v1/drift");
  if (lineage) await showStages();
}

function chooseMetric() {
  const names = [...new Set(lineage.stages.flatMap((each) => Object.keys(each.metrics || {})))];
  const drifts = drift && drift.stages.length > 1 ? Object.keys(DRIFTS) : [];
  const chosen = at("metric").value || "ndcg@10";
  const groups = [["Metrics on the test cases of each stage", names], ["Drift of the data", drifts]];
  at("metric").replaceChildren(...groups.filter(([, all]) => all.length).map(([label, all]) => {
    const group = element("optgroup");
    group.label = label;
    group.append(...all.map((name) => element("option", name)));
    return group;
  }));
  if (names.includes(chosen) || drifts.includes(chosen)) at("metric").value = chosen;
  at("chart-box").hidden = !names.length && !drifts.length;
  drawMetrics();
}

function drawMetrics() {
  if (!lineage || at("chart-box").hidden) return;
  const serves = lineage.stages.find((each) => each.serves), name = at("metric").value;
  const [value, note] = DRIFTS[name] || [];
  const limit = name === "divergence of items" ? drift.high : null;
  const points = value ? drift.stages.map((each) => ({ stage: each.stage, value: value(each) }))
    : lineage.stages.map((each) => ({ stage: each.stage, value: each.metrics && each.metrics[name] }));
  drawChart(at("chart"), name, points, serves && serves.stage, limit);
  at("chart-note").textContent = [note, limit !== null && `A warning is given above gate.drift ${limit}.`].filter(Boolean).join(" ");
}

function dataLine(each) {
  const data = drift && drift.stages.find((one) => one.stage === each.stage);
  if (!data) return null;
  const count = (value) => value.toLocaleString("en");
  const parts = [`Data: ${count(data.events)} events of ${count(data.users)} users`];
  if (data.stage) parts.push(`${count(data.new_users)} new users, ${count(data.new_items)} new items`);
  if (data.item_divergence !== null) {
    const high = drift.high !== null && data.item_divergence > drift.high ? ", which is high" : "";
    parts.push(`divergence ${data.item_divergence.toFixed(3)} bits${high}`);
  }
  return element("p", parts.join("; "), "note");
}

// -- changes of the stage, after a confirmation

function confirmPromotion(each) {
  const refused = each.gate && each.gate.decision !== "passed";
  openDialog({
    path: "v1/promote",
    body: { stage: each.stage },
    title: `Promote stage ${each.stage}?`,
    text: refused ? `Its gate did not pass it: ${each.gate.says}` : "All requests are then answered by this stage.",
    refused,
  });
}

function openDialog(asked) {
  change = asked;
  at("confirm-title").textContent = asked.title;
  at("confirm-text").textContent = asked.text;
  at("do").textContent = asked.title.replace("?", "");
  at("reason").value = "";
  at("force").checked = false;
  at("force").required = Boolean(asked.refused);
  at("force-row").hidden = !asked.refused;
  tell("confirm-problem", "");
  at("confirm").showModal();
  at("reason").focus();
}

async function makeChange() {
  const body = { ...change.body, reason: at("reason").value.trim() };
  if (change.refused) body.force = at("force").checked;
  let done;
  try {
    done = await call(change.path, body);
  } catch (error) {
    if (error.status === 401) {
      at("confirm").close();
      failed(error);
    } else tell("confirm-problem", error.message);
    return;
  }
  at("confirm").close();
  at("said").textContent = done.changed ? `Stage ${done.stage} is being loaded and then answers.` : `Stage ${done.stage} serves already.`;
  await showStages();
  at("stages-title").tabIndex = -1;
  at("stages-title").focus();
  for (let turn = 0; turn < 40 && answering !== done.stage; turn += 1) {
    await new Promise((ready) => setTimeout(ready, AGAIN));
    await look();
  }
}
