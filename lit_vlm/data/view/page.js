// The page of `lit-vlm data view`. What records hold becomes text, never markup: elements are made by `make` alone.
"use strict";

const at = (id) => document.getElementById(id);
const state = { set: null, index: 0, records: 0, found: [], after: null, search: 0, leftOut: false };

function make(tag, attributes, ...children) {
  const element = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes || {})) {
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) element.setAttribute(key, value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined && child !== ""));
  return element;
}

async function ask(path, query) {
  const given = new URLSearchParams(query);
  const response = await fetch(`${path}?${given}`);
  const answer = await response.json();
  if (!response.ok) throw new Error(answer.error);
  return answer;
}

const count = (number) => Number(number).toLocaleString("en");
const brief = (number) => (Number.isInteger(number) ? count(number) : number.toPrecision(4));

// ----- filters -----

function filters() {
  const given = {};
  for (const id of ["text", "source", "reason"]) if (at(id).value) given[id] = at(id).value;
  for (const input of at("ranges").querySelectorAll("input")) if (input.value.trim()) given[input.name] = input.value.trim();
  return given;
}

function fill(select, entries) {
  const chosen = select.value;
  select.replaceChildren(...entries.map(([value, label]) => make("option", { value }, label)));
  if (entries.some(([value]) => value === chosen)) select.value = chosen;
}

function fillReasons(reasons) {
  fill(at("reason"), [["", "usable or not"], ["-", "usable"], ["*", "not usable"], ...reasons.map((one) => [one, one])]);
}

function fillRanges(measures) {
  at("ranges").replaceChildren(...measures.flatMap((name) => [
    make("label", { for: `min.${name}`, title: name }, name),
    make("input", { id: `min.${name}`, name: `min.${name}`, placeholder: "at least", inputmode: "decimal" }),
    make("input", { name: `max.${name}`, placeholder: "at most", inputmode: "decimal", "aria-label": `${name} at most` }),
  ]));
}

// ----- search: pieces of at most a second, until there are enough matches -----

async function search(fresh) {
  const number = ++state.search;
  if (fresh) {
    state.found = [];
    at("matches").replaceChildren();
  }
  at("more").hidden = true;
  let start = fresh ? 0 : state.after;
  let wanted = 50;
  try {
    while (start !== null && wanted > 0) {
      if (fresh || wanted < 50) at("progress").textContent = `searched ${count(start)} of ${count(state.records)} ...`;
      const answer = await ask("/api/find", { ...filters(), start, limit: wanted });
      if (number !== state.search) return;
      state.found.push(...answer.matches);
      at("matches").append(...answer.matches.map(entry));
      fillReasons(answer.reasons);
      wanted -= answer.matches.length;
      start = answer.next;
    }
    state.after = start;
    at("more").hidden = start === null;
    const all = start === null ? "all" : "the first";
    at("progress").textContent = state.found.length ? `${all} ${count(state.found.length)}` : "nothing matches";
    mark();
  } catch (error) {
    if (number === state.search) complain(error);
  }
}

function complain(error) {
  at("progress").replaceChildren(make("span", { class: "wrong" }, error.message));
}

function entry(match) {
  const facts = Object.entries(match.facts).filter(([, value]) => value !== 0).map(([name, value]) => `${name} ${brief(value)}`);
  const thumb = match.facts.pictures && !match.reason
    ? make("img", { class: "thumb", loading: "lazy", alt: "", src: `/api/picture?index=${match.index}&number=0&side=108` })
    : make("span", { class: "thumb" });
  return make("li", { "data-index": match.index, onclick: () => show(match.index) }, thumb,
    make("div", { class: "body" },
      make("div", {}, make("b", {}, match.id), make("span", { class: "dim" }, ` ${match.source} `)),
      make("div", { class: "snippet" }, match.snippet),
      make("div", { class: match.reason ? "wrong" : "dim" }, match.reason || facts.join(" · "))));
}

function mark() {
  for (const item of at("matches").children) item.setAttribute("aria-current", item.dataset.index === String(state.index));
}

// ----- one record -----

async function show(index, note) {
  state.index = index;
  at("index").value = index;
  const hash = `#${new URLSearchParams({ index, ...filters() })}`;
  if (location.hash !== hash) history.replaceState(null, "", hash);
  mark();
  try {
    const record = await ask("/api/record", { index });
    if (state.index === index) at("record").replaceChildren(...view(record));
  } catch (error) {
    at("record").replaceChildren(make("p", { class: "wrong" }, error.message));
  }
}

function view(record) {
  const facts = Object.entries(record.facts).map(([name, value]) => make("span", {}, `${name} `, make("b", {}, brief(value))));
  const links = (record.urls || []).filter((url) => /^https?:\/\//i.test(url))
    .map((url) => make("a", { href: url, target: "_blank", rel: "noreferrer noopener" }, url));
  const head = [
    make("h1", {}, record.id ?? `record ${record.place}`),
    make("div", { class: "facts" }, make("span", {}, "source ", make("b", {}, record.source)),
      make("span", {}, "place ", make("b", {}, count(record.place))), ...facts,
      make("a", { href: `#index=${record.index}`, title: "the address of this record on this page" }, "link"), ...links),
  ];
  if (record.problem) head.push(problem(record.problem));
  if (!record.messages) return head;
  const legend = make("span", { class: "legend" }, make("span", { class: "taught" }, "supervised"));
  const body = [make("h2", {}, "the record", legend), ...record.messages.map((message) => messageOf(record, message))];
  if (record.options.length) body.push(make("div", { class: "facts" }, `options: ${record.options.join(" | ")}`));
  return [...head, ...body, ...(record.samples ? asModel(record) : [])];
}

function problem(found) {
  return make("p", { class: "wrong" }, make("b", {}, found.reason), ` ${found.detail}`);
}

function messageOf(record, message) {
  const parts = message.parts.map((part) => {
    if (part.picture === undefined) return make("span", { class: part.supervised ? "taught" : null }, part.text);
    const size = part.size ? `${part.size[0]} × ${part.size[1]}` : "";
    const moment = part.moment === null ? "" : `${part.moment.toFixed(2)} s`;
    return figure(`/api/picture?index=${record.index}&number=${part.picture}`,
      [`picture ${part.picture + 1}`, size, moment, part.name].filter(Boolean).join(" · "));
  });
  return make("section", { class: "message" }, make("div", { class: "role" }, message.role), make("div", { class: "content" }, ...parts));
}

function figure(src, caption) {
  const note = make("figcaption", {}, caption);
  const refused = async () => {
    const answer = await fetch(src).then((response) => response.json()).catch(() => ({ error: "it cannot be shown" }));
    note.replaceChildren(`${caption} · `, make("span", { class: "wrong" }, answer.error));
  };
  return make("figure", {}, make("img", { src, alt: caption, loading: "lazy", onerror: refused }), note);
}

function asModel(record) {
  const legend = make("span", { class: "legend" }, make("span", { class: "taught" }, "supervised"), " ",
    make("span", { class: "place" }, "positions of a picture"));
  const title = make("h2", {}, "as the model gets it", legend);
  if (record.samples.problem) return [title, problem(record.samples.problem)];
  return [title, ...record.samples.sequences.flatMap((sequence, number) => [
    make("div", { class: "facts" }, make("span", {}, "positions ", make("b", {}, count(sequence.positions))),
      make("span", {}, "supervised ", make("b", {}, count(sequence.supervised))), sequence.note ? make("span", { class: "wrong" }, sequence.note) : null),
    make("div", { class: "sequence content" }, ...sequence.pieces.map((piece) => {
      if (piece.picture === undefined) {
        const title = `positions ${piece.start} to ${piece.start + piece.tokens - 1}`;
        return make("span", { class: piece.supervised ? "taught" : null, title }, piece.text);
      }
      return figure(`/api/seen?index=${record.index}&sequence=${number}&number=${piece.picture}`,
        `picture ${piece.picture + 1} · positions ${piece.start} to ${piece.start + piece.tokens - 1} (${piece.rows} × ${piece.cols})`);
    })),
  ])];
}

// ----- what was left out -----

async function listLeftOut(start) {
  const number = ++state.search;
  try {
    const answer = await ask("/api/left_out", { reason: at("why").value, text: at("text").value, start });
    if (number !== state.search) return;
    if (start === 0) at("matches").replaceChildren();
    at("matches").append(...answer.entries.map((one) => make("li", { onclick: () => seek(one.id) },
      make("div", { class: "body" },
        make("div", {}, make("b", {}, one.id), make("span", { class: "dim" }, ` ${one.source}`)),
        make("div", { class: "wrong" }, one.reason), make("div", { class: "dim" }, one.detail)))));
    state.after = answer.next;
    at("more").hidden = answer.next === null;
    at("progress").textContent = at("matches").children.length ? "a click looks for the record in the set" : "nothing matches";
  } catch (error) {
    if (number === state.search) complain(error);
  }
}

async function seek(identity) {
  const number = ++state.search;
  try {
    for (let start = 0; start !== null;) {
      at("progress").textContent = `looking for ${identity}: ${count(start)} of ${count(state.records)} ...`;
      const answer = await ask("/api/find", { text: identity, start, limit: 50 });
      if (number !== state.search) return;
      const match = answer.matches.find((one) => one.id === identity);
      if (match) {
        at("progress").textContent = "";
        show(match.index);
        return;
      }
      start = answer.next;
    }
    at("progress").textContent = `${identity} is not in the set, as it was left out`;
  } catch (error) {
    if (number === state.search) complain(error);
  }
}

function choose(leftOut) {
  state.leftOut = leftOut;
  at("tab-records").setAttribute("aria-selected", String(!leftOut));
  at("tab-left-out").setAttribute("aria-selected", String(leftOut));
  for (const id of ["of-records", "ranges"]) at(id).hidden = leftOut;
  at("of-left-out").hidden = !leftOut;
  renew();
}

const renew = () => (state.leftOut ? listLeftOut(0) : search(true));

// ----- steps -----

async function step(backwards) {
  try {
    let start = state.index + (backwards ? -1 : 1);
    while (start !== null) {
      const answer = await ask("/api/find", { ...filters(), start, limit: 1, backwards: backwards ? 1 : 0 });
      if (answer.matches.length) return show(answer.matches[0].index);
      start = answer.next;
    }
    at("progress").textContent = backwards ? "there is none before it" : "there is none behind it";
  } catch (error) {
    complain(error);
  }
}

async function drawOne() {
  try {
    const answer = await ask("/api/random", filters());
    if (answer.matches.length) return show(answer.matches[0].index);
    at("progress").textContent = "no match was drawn in a second; search for them";
  } catch (error) {
    complain(error);
  }
}

function keys(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.target.matches("input, select")) {
    if (event.key === "Escape") event.target.blur();
    return;
  }
  const does = { ArrowLeft: () => step(true), ArrowRight: () => step(false), r: drawOne, "/": () => at("text").focus() }[event.key];
  if (does) {
    event.preventDefault();
    does();
  }
}

function takeHash() {
  const given = new URLSearchParams(location.hash.slice(1));
  for (const [key, value] of given) {
    const input = at("filters").elements[key];
    if (input) input.value = value;
  }
  const index = Number(given.get("index"));
  return Number.isInteger(index) && index >= 0 && index < state.records ? index : 0;
}

async function begin() {
  const set = await ask("/api/set", {});
  state.records = set.records;
  const from = set.sources.flatMap((source) => Object.entries(source.provenance).map(([key, value]) => `${key}: ${value}`));
  at("about").textContent = [`${set.sources.map((one) => `${one.name} (${one.kind})`).join(", ")}`, ...new Set(from), set.model]
    .filter(Boolean).join(" · ");
  at("about").title = at("about").textContent;
  document.title = `${set.sources.map((one) => one.name).join(", ")} · lit-vlm data view`;
  at("total").textContent = `of ${count(set.records)}`;
  fill(at("source"), [["", "all sources"], ...set.sources.map((one) => [one.name, one.name])]);
  fillReasons([]);
  fillRanges(set.measures);
  const leftOut = Object.entries(set.left_out);
  const total = leftOut.reduce((sum, [, number]) => sum + number, 0);
  at("tab-left-out").textContent = `left out (${count(total)})`;
  fill(at("why"), [["", "any reason"], ...leftOut.map(([reason, number]) => [reason, `${reason} (${count(number)})`])]);

  at("filters").addEventListener("submit", (event) => { event.preventDefault(); renew(); });
  for (const id of ["source", "reason", "why"]) at(id).addEventListener("change", renew);
  at("clear").addEventListener("click", () => { at("filters").reset(); renew(); });
  at("more").addEventListener("click", () => (state.leftOut ? listLeftOut(state.after) : search(false)));
  at("tab-records").addEventListener("click", () => choose(false));
  at("tab-left-out").addEventListener("click", () => choose(true));
  at("previous").addEventListener("click", () => step(true));
  at("next").addEventListener("click", () => step(false));
  at("random").addEventListener("click", drawOne);
  at("index").addEventListener("change", () => show(Math.max(0, Math.min(state.records - 1, Math.floor(Number(at("index").value)) || 0))));
  document.addEventListener("keydown", keys);
  window.addEventListener("hashchange", () => show(takeHash()));

  const index = takeHash();
  if (set.records) show(index);
  search(true);
}

begin().catch(complain);
