// What changes on a page without it being loaded again: parts that the server sends, the filter, the chat.
// The server has escaped every part; what the models say is put in as text.
"use strict";

const content = document.getElementById("content");

// --- parts ----------------------------------------------------------------------------------------

const shown = new Map();

function fill(name, html) {
  const part = document.getElementById(`part-${name}`);
  if (!part || shown.get(name) === html) return;
  const first = !shown.has(name);
  shown.set(name, html);
  const template = document.createElement("template");
  template.innerHTML = html;
  if (first && template.innerHTML === part.innerHTML) return;
  const chosen = new Set([...part.querySelectorAll("input:checked")].map((box) => box.value));
  const open = [...part.querySelectorAll("details")].map((each) => each.open);
  const search = part.querySelector("input[type=search]");
  const typed = search ? [search.value, document.activeElement === search] : ["", false];
  const held = part.contains(document.activeElement) ? mark(document.activeElement) : "";
  const log = part.querySelector(".log");
  const away = log ? log.scrollHeight - log.scrollTop - log.clientHeight : 0;
  const top = log ? log.scrollTop : 0;
  part.replaceChildren(template.content);
  for (const box of part.querySelectorAll("input[type=checkbox]")) box.checked = chosen.has(box.value);
  part.querySelectorAll("details").forEach((each, at) => { if (at in open) each.open = open[at]; });
  const again = part.querySelector("input[type=search]");
  if (again) {
    again.value = typed[0];
    if (typed[1]) again.focus();
  }
  if (held) [...part.querySelectorAll("a, button, input, summary, .log")].find((each) => mark(each) === held)?.focus();
  const now = part.querySelector(".log");
  // Whoever reads further up stays there.
  if (now) now.scrollTop = away < 8 ? now.scrollHeight : top;
  if (again) sift();
}

function mark(element) {
  return [element.tagName, element.getAttribute("href"), element.value, element.textContent.slice(0, 40)].join("|");
}

let source = null;

function listen() {
  const address = content.dataset.events;
  if (!address || source || document.hidden) return;
  source = new EventSource(address);
  source.onmessage = (event) => {
    document.getElementById("lost").hidden = true;
    for (const [name, html] of Object.entries(JSON.parse(event.data))) fill(name, html);
  };
  source.onopen = () => { document.getElementById("lost").hidden = true; };
  source.onerror = () => {
    document.getElementById("lost").hidden = false;
    // A browser gives up where the answer was no stream.
    if (source && source.readyState === EventSource.CLOSED) {
      source = null;
      setTimeout(listen, 3000);
    }
  };
}

// A browser keeps few connections to a server: a page that nobody sees needs none.
document.addEventListener("visibilitychange", () => {
  if (document.hidden && source) {
    source.close();
    source = null;
  }
  listen();
});
listen();
for (const log of document.querySelectorAll(".log")) log.scrollTop = log.scrollHeight;

// --- the list -------------------------------------------------------------------------------------

function sift() {
  const search = document.getElementById("filter");
  if (!search) return;
  const wanted = search.value.trim().toLowerCase();
  let left = 0;
  for (const row of document.querySelectorAll(".runs tbody tr")) {
    row.hidden = !row.textContent.toLowerCase().includes(wanted);
    row.style.display = row.hidden ? "none" : "";
    left += !row.hidden;
  }
  document.getElementById("none").hidden = left > 0;
}
document.addEventListener("input", (event) => { if (event.target.id === "filter") sift(); });
document.getElementById("choose")?.addEventListener("keydown", (event) => {
  if (event.target.id === "filter" && event.key === "Enter") event.preventDefault();
});

// --- the chat -------------------------------------------------------------------------------------

const ask = document.getElementById("ask");

class Side {
  constructor(section) {
    this.select = section.querySelector("select");
    this.list = section.querySelector(".said");
    this.doing = section.querySelector(".doing");
    this.messages = [];
    this.select.addEventListener("change", () => this.clear());
  }

  clear() {
    this.messages = [];
    this.list.replaceChildren();
    this.doing.textContent = "";
  }

  line(kind, who, text) {
    const item = document.createElement("li");
    item.className = kind;
    item.dataset.who = who;
    item.dir = "auto";
    item.textContent = text;
    this.list.append(item);
    return item;
  }

  async answer(text, signal) {
    const { run, model } = this.select.selectedOptions[0].dataset;
    const messages = this.messages;
    this.line("user", "you", text);
    const item = this.line("assistant", "model", "");
    try {
      const answer = await fetch("/chat", {
        method: "POST",
        headers: { "content-type": "application/json" },
        body: JSON.stringify({ run, model, messages, text }),
        signal,
      });
      if (!answer.ok) throw new Error(new DOMParser().parseFromString(await answer.text(), "text/html").querySelector("main p").textContent);
      for await (const told of lines(answer.body)) {
        this.doing.textContent = told.state ?? "";
        if (told.error) throw new Error(told.error);
        if (told.text) item.textContent = told.text;
        if ("answer" in told) {
          item.textContent = told.answer || "(the model ended its answer at once)";
          item.dataset.who = told.model === "base" ? "before training" : told.model;
          if (told.route) this.line("small muted", "", told.route);
          // A side that was begun anew meanwhile keeps nothing of it.
          if (this.messages === messages) {
            this.messages = [...messages, { role: "user", content: text }, { role: "assistant", content: told.answer }];
          }
        }
      }
    } catch (error) {
      item.remove();
      this.line("error", "", error.name === "AbortError" ? "stopped" : error.message);
    }
    this.doing.textContent = "";
  }
}

async function* lines(body) {
  const decoder = new TextDecoder();
  const reader = body.getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    rest += decoder.decode(value, { stream: true });
    const parts = rest.split("\n");
    rest = parts.pop();
    for (const part of parts) yield JSON.parse(part);
  }
}

if (ask) {
  const sides = [...document.querySelectorAll(".side")].map((section) => new Side(section));
  const text = document.getElementById("text");
  const stop = document.getElementById("stop");
  const send = ask.querySelector("button");
  let going = null;
  ask.addEventListener("submit", async (event) => {
    event.preventDefault();
    const asked = text.value.trim();
    if (!asked || going) return;
    going = new AbortController();
    text.value = "";
    send.disabled = true;
    stop.disabled = false;
    await Promise.all(sides.map((side) => side.answer(asked, going.signal)));
    going = null;
    send.disabled = false;
    stop.disabled = true;
    text.focus();
  });
  text.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      ask.requestSubmit();
    }
  });
  stop.addEventListener("click", () => going?.abort());
  document.getElementById("anew").addEventListener("click", () => {
    going?.abort();
    for (const side of sides) side.clear();
    text.focus();
  });
}
