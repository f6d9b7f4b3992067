// What the page of `serve` does: sends images and texts to the server and shows what comes back. Everything that a user or
// the server names is shown by textContent.
import { Attention } from "./attention.js";
import { drawImage } from "./drawing.js";

const PREVIEW = 220; // pixels of an image, at most

const megabytes = Number(document.body.dataset.maxUpload);
const answerNames = { vqa: "the answer", retrieval: "the match", nlvr: "the judgment" };
const chosen = {}; // by picker: { file, bitmap }, bitmap null where the browser cannot show the image
const sections = [];

function make(tag, className, ...children) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  element.append(...children.filter((child) => child !== null));
  return element;
}

async function post(path, fields) {
  const body = new FormData();
  for (const [name, value] of fields) body.append(name, value);
  let response;
  try {
    response = await fetch(path, { method: "POST", body });
  } catch {
    throw new Error("the request failed; is the server still running?");
  }
  const isJson = (response.headers.get("Content-Type") ?? "").includes("json");
  const found = isJson ? await response.json() : {};
  if (!response.ok) throw new Error(found.error ?? `the server refused the request (${response.status})`);
  return found;
}

/* Images */

async function choose(name, file) {
  const picker = document.querySelector(`.picker[data-name="${name}"]`);
  const message = document.querySelector("#picked");
  message.textContent = "";
  if (file.size > megabytes * 2 ** 20) {
    message.textContent = `${file.name} has ${Math.ceil(file.size / 2 ** 20)} MB; ${megabytes} MB are taken`;
    return;
  }
  const bitmap = await createImageBitmap(file).catch(() => null);
  chosen[name] = { file, bitmap };
  picker.querySelector(".note").textContent = bitmap
    ? `${file.name}, ${bitmap.width} × ${bitmap.height} pixels`
    : `${file.name} (this browser cannot show it; the model may know its format)`;
  const canvas = picker.querySelector("canvas");
  canvas.hidden = bitmap === null;
  canvas.ariaLabel = file.name;
  if (bitmap) {
    drawImage(canvas, bitmap, PREVIEW);
  }
  for (const section of sections) if (section.pickers.includes(name)) section.clear();
}

function image(name) {
  if (!chosen[name]) throw new Error(name === "second" ? "choose the right image first" : "choose an image first");
  return chosen[name];
}

function addPickers() {
  for (const picker of document.querySelectorAll(".picker")) {
    const input = picker.querySelector("input");
    input.addEventListener("change", () => input.files.length && choose(picker.dataset.name, input.files[0]));
  }
  const under = (event) => event.target.closest?.(".picker") ?? document.querySelector(".picker");
  const mark = (picker) => {
    for (const each of document.querySelectorAll(".picker")) each.classList.toggle("over", each === picker);
  };
  // Anywhere on the page: a browser would leave the page for an image that is dropped beside its place.
  document.addEventListener("dragover", (event) => {
    if (!event.dataTransfer.types.includes("Files")) return;
    event.preventDefault();
    mark(under(event));
  });
  document.addEventListener("dragleave", (event) => event.relatedTarget || mark(null));
  document.addEventListener("drop", (event) => {
    mark(null);
    if (!event.dataTransfer.files.length) return;
    event.preventDefault();
    choose(under(event).dataset.name, event.dataTransfer.files[0]);
  });
}

/* A part of the page: a form, a line that says what happens, and what was found */

class Section {
  constructor(id, pickers, work) {
    this.element = document.querySelector(id);
    if (!this.element) return;
    Object.assign(this, { pickers, work, turn: 0, form: this.element.querySelector("form") });
    this.state = this.element.querySelector(".state");
    this.result = this.element.querySelector(".result");
    this.form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.run((found) => work(new FormData(this.form), found));
    });
    sections.push(this);
  }

  say(text, wrong = false) {
    this.state.textContent = text;
    this.state.classList.toggle("wrong", wrong);
  }

  clear() {
    this.turn += 1; // what is under way is about another image, and is not shown
    this.result.replaceChildren();
    this.say("");
    this.busy(false);
  }

  busy(on) {
    this.element.setAttribute("aria-busy", String(on));
    for (const button of this.form.querySelectorAll("button")) button.disabled = on;
  }

  async run(work) {
    this.clear();
    const turn = this.turn;
    const current = () => turn === this.turn;
    const began = performance.now();
    this.say("The model is at work …");
    this.busy(true);
    try {
      await work((...elements) => current() && this.result.append(...elements));
      if (current()) this.say(`Done in ${((performance.now() - began) / 1000).toFixed(1)} s.`);
    } catch (error) {
      if (current()) this.say(error.message, true);
    }
    if (current()) this.busy(false);
  }
}

// Columns: names, bars, then numbers and a button.
function scoreTable(headings, rows) {
  const table = make("table", "scores");
  const head = table.createTHead().insertRow();
  headings.forEach((heading, place) => head.append(make("th", place === 0 ? "" : place === 1 ? "b" : "n", heading)));
  const body = table.createTBody();
  for (const { name, share, numbers, action } of rows) {
    const row = body.insertRow();
    const bar = make("i");
    bar.style.width = `${100 * share}%`;
    row.append(make("th", "", name), make("td", "b", make("div", "bar", bar)));
    for (const number of numbers) row.append(make("td", "n", number));
    if (action) row.append(make("td", "n", action));
  }
  return make("div", "wide", table);
}

async function attentionOf(task, text, ...images) {
  const maps = images.map(({ file }) =>
    post("api/attention", [["task", task], ["image", file], ["text", text]]));
  return new Attention(await Promise.all(maps), images.map(({ bitmap }) => bitmap), answerNames[task]).element;
}

async function ask(fields, show) {
  const shown = image("image");
  const question = fields.get("question");
  const found = await post("api/answer", [["image", shown.file], ["question", question]]);
  const rows = found.answers.map(({ answer, probability }) =>
    ({ name: answer, share: probability, numbers: [probability.toFixed(4)] }));
  show(scoreTable(["Answer", "", "Probability"], rows));
  show(await attentionOf("vqa", question, shown));
}

async function compare(fields, show) {
  const shown = image("image");
  const texts = fields.get("texts").split("\n").map((text) => text.trim()).filter(Boolean);
  const found = await post("api/match", [["image", shown.file], ...texts.map((text) => ["text", text])]);
  const place = make("div");
  const look = async (text) => place.replaceChildren(await attentionOf("retrieval", text, shown));
  const ranked = found.matches.sort((a, b) => b.probability - a.probability);
  const rows = ranked.map(({ text, similarity, probability }) => {
    const action = make("button", "plain", "Attention");
    action.type = "button";
    action.addEventListener("click", () => look(text).catch((error) => matching.say(error.message, true)));
    return { name: text, share: probability, numbers: [probability.toFixed(4), similarity.toFixed(4)], action };
  });
  show(scoreTable(["Text", "", "They match", "Similarity", ""], rows), place);
  await look(ranked[0].text);
}

async function judge(fields, show) {
  const pair = [image("image"), image("second")];
  const statement = fields.get("statement");
  const files = pair.map(({ file }, side) => [`image_${side}`, file]);
  const found = await post("api/judge", [...files, ["statement", statement]]);
  const verdict = make("strong", found.true ? "right" : "wrong", found.true ? "true" : "false");
  show(make("p", "verdict", verdict, ` · probability of true ${found.probability.toFixed(4)}`));
  show(await attentionOf("nlvr", statement, ...pair));
}

async function search(query, show) {
  const { hits } = await post("api/search", [query, ["k", document.querySelector("#k").value]]);
  if (!hits.length) show(make("p", "note", "There is no image in the index."));
  const items = hits.map(({ row, path, score }, place) => {
    const thumbnail = make("img");
    Object.assign(thumbnail, { src: `thumbnail/${row}`, alt: path, loading: "lazy" });
    thumbnail.addEventListener("error", () => thumbnail.replaceWith(make("span", "absent", "no image")));
    return make("li", "", make("figure", "", thumbnail,
      make("figcaption", "", `${place + 1}. ${path} `, make("span", "num", score.toFixed(4)))));
  });
  show(make("ol", "hits", ...items));
}

new Section("#ask", ["image"], ask);
const matching = new Section("#match", ["image"], compare);
new Section("#judge", ["image", "second"], judge);
const searching = new Section("#search", [], (fields, show) => search(["text", fields.get("text")], show));
document.querySelector("#alike")?.addEventListener("click", () =>
  searching.run((show) => search(["image", image("image").file], show)));
addPickers();
