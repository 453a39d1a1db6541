"use strict";

// Why an item is where it is, its nearest items, and users to choose from.

const PAGE_SIZE = 20; // users
let lookups = 0; // number of the newest look at users: an older answer that comes later is dropped
let afterUser = null; // where the next page of users begins

// -- an item

function insightOf(each) {
  const more = element("details", undefined, "insight");
  const summary = element("summary", "Why here, and similar items");
  summary.setAttribute("aria-label", `Why here, and similar items: ${each.title || each.item}`);
  const body = element("div");
  more.append(summary, body);
  more.addEventListener("toggle", async () => {
    if (!more.open || body.hasChildNodes()) return;
    body.append(element("p", "Asking …", "note"));
    body.firstChild.setAttribute("role", "status");
    const { user, history } = shown.request;
    try {
      const asked = user === undefined ? { history, item: each.item } : { user, item: each.item };
      body.replaceChildren(...explanation(await call("v1/explain", asked)));
    } catch (error) {
      body.replaceChildren();
      more.open = false; // opened again, it asks again
      failed(error);
    }
  });
  return more;
}

function explanation(found) {
  const parts = [];
  if (found.says) parts.push(element("p", found.says));
  else if (found.before === null) parts.push(element("p", "There is no earlier stage in memory to compare with.", "note"));
  if (found.serving.codes.length) parts.push(codeTable(found));
  const by = {
    "item head": "by the vectors of the item head",
    texts: "by their texts",
    codes: "by the first codes of their semantic IDs",
  }[found.nearest_by];
  parts.push(element("h4", `Most similar items, ${by}`));
  const list = element("ol", undefined, "near");
  list.append(...found.nearest.map((each) => {
    const row = element("li");
    const part = element("span", each.similarity.toFixed(2), "similarity");
    row.append(part, element("span", each.title || each.item), detail(each));
    return row;
  }));
  parts.push(found.nearest.length ? list : element("p", "none", "note"));
  return parts;
}

// The log-probability of every code, and what the item head adds, under both stages.
function codeTable({ serving, before }) {
  const both = before && before.codes.length;
  const table = element("table");
  table.append(element("caption", "Log-probability"));
  const head = element("tr");
  for (const name of ["", ...(both ? [`stage ${before.stage}`] : []), `stage ${serving.stage}`, ...(both ? ["change"] : [])]) {
    const cell = element("th", name);
    cell.scope = "col";
    head.append(cell);
  }
  const rows = serving.codes.map((each, place) => [each.code, before && before.codes[place] && before.codes[place].log_probability, each.log_probability]);
  const heads = [before && before.item_head, serving.item_head];
  if (heads.some((head) => head !== null)) rows.push(["item head", ...heads.map((head) => head || 0)]);
  rows.push(["in the list", before && before.score, serving.score]);
  table.append(element("thead"), element("tbody"));
  table.tHead.append(head);
  for (const [name, then, now] of rows) {
    const row = element("tr"), first = element("th", name);
    first.scope = "row";
    row.append(first);
    if (both) row.append(element("td", then.toFixed(2)));
    row.append(element("td", now.toFixed(2)));
    if (both) row.append(changeCell(now - then));
    table.tBodies[0].append(row);
  }
  return table;
}

function changeCell(value) {
  if (Math.abs(value) < 0.005) return element("td", "0.00");
  return element("td", `${value < 0 ? "" : "+"}${value.toFixed(2)}`, value < 0 ? "fall" : "rise");
}

// -- users

async function lookForUsers(more = false) {
  lookups += 1;
  const mine = lookups, prefix = at("prefix").value;
  const query = new URLSearchParams({ limit: PAGE_SIZE });
  if (prefix) query.set("prefix", prefix);
  if (more) query.set("after", afterUser);
  const found = await call(`v1/users?${query}`).catch(failed);
  if (!found || mine !== lookups) return;
  const rows = found.users.map(userRow);
  if (more) at("users").append(...rows);
  else at("users").replaceChildren(...rows);
  afterUser = found.after;
  at("more-users").hidden = afterUser === null;
  const count = at("users").children.length;
  at("users-note").textContent = count ? `${count} ${count === 1 ? "user" : "users"}${afterUser === null ? "" : ", and more"}`
    : "No user id begins so.";
  if (more && rows.length) rows[0].firstChild.focus();
}

function userRow(each) {
  const row = element("li"), button = element("button", each.user, "quiet");
  button.type = "button";
  button.append(element("small", ` ${each.items} ${each.items === 1 ? "item" : "items"}`));
  button.addEventListener("click", () => {
    document.querySelector("input[name=kind][value=user]").checked = true;
    at("who-label").textContent = "User id";
    at("who").value = each.user;
    at("browse").open = false;
    at("ask").requestSubmit();
    at("browse").firstElementChild.focus();
  });
  row.append(button);
  return row;
}
