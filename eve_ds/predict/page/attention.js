// Attention over the patches of one image or two, drawn over them: of a word or of the answer, in one block or on average.

import { drawHeat, drawImage, drawScale } from "./drawing.js";

const SIDE = 460; // pixels of an image, at most

export class Attention {
  // found: what api/attention gave of each image; bitmaps: the images, null for those that the browser cannot show.
  constructor(found, bitmaps, answerName) {
    const [{ shape, words, answer, tokens }] = found;
    [this.blocks, this.maps, this.rows, this.columns] = shape;
    this.values = found.map(({ maps }) => decoded(maps));
    this.bitmaps = bitmaps;
    this.names = answer ? [answerName, ...words] : words;
    this.answer = answer;
    this.cut = tokens ? ` The end of the text is cut: the model reads ${tokens} tokens.` : "";
    this.map = 0;
    this.element = document.createElement("div");
    this.element.className = "attention";
    this.element.innerHTML = `
      <h3>Where the model looks</h3>
      <div class="images"></div>
      <div class="words" role="group" aria-label="Attention of"></div>
      <div class="blocks">
        <label>Block <input type="range" min="1" step="1"> <output></output></label>
        <label><input type="checkbox"> Mean of all blocks</label>
        <span class="scale"><span></span> <canvas width="96" height="12"></canvas> <span></span></span>
      </div>
      <p class="note" role="status"></p>`;
    const find = (selector) => this.element.querySelector(selector);
    [this.range, this.mean, this.output, this.note] =
      ["input[type=range]", "input[type=checkbox]", "output", ".note"].map(find);
    [this.low, this.high] = this.element.querySelectorAll(".scale span");
    drawScale(find(".scale canvas"));
    this.range.max = this.range.value = this.blocks;
    this.addWords(find(".words"), answer);
    this.canvases = bitmaps.map((_, place) => this.canvasOf(place));
    find(".images").append(...this.canvases);
    for (const input of [this.range, this.mean]) input.addEventListener("input", () => this.draw());
    this.draw();
  }

  addWords(place, answer) {
    this.buttons = this.names.map((name, map) => {
      const button = document.createElement("button");
      Object.assign(button, { type: "button", textContent: name, className: answer && map === 0 ? "whole" : "" });
      button.addEventListener("click", () => {
        this.map = map;
        this.draw();
      });
      return button;
    });
    place.append(...this.buttons);
  }

  canvasOf(place) {
    const canvas = document.createElement("canvas");
    canvas.setAttribute("role", "img");
    canvas.addEventListener("pointermove", (event) => {
      const box = canvas.getBoundingClientRect();
      const row = Math.min(this.rows - 1, Math.floor((event.offsetY / box.height) * this.rows));
      const column = Math.min(this.columns - 1, Math.floor((event.offsetX / box.width) * this.columns));
      const value = this.shown(place)[row * this.columns + column];
      this.note.textContent = `Row ${row + 1}, column ${column + 1}: ${percent(value)}.`;
    });
    canvas.addEventListener("pointerleave", () => this.tell());
    return canvas;
  }

  // The map of an image that is shown: rows x columns shares of the attention.
  shown(place) {
    const size = this.rows * this.columns;
    const of = (block) => this.values[place].subarray((block * this.maps + this.map) * size).subarray(0, size);
    if (!this.mean.checked) return of(this.range.value - 1);
    const sum = new Float32Array(size);
    for (let block = 0; block < this.blocks; block++) of(block).forEach((value, patch) => (sum[patch] += value));
    return sum.map((value) => value / this.blocks);
  }

  draw() {
    this.range.disabled = this.mean.checked;
    this.output.textContent = this.mean.checked ? "all" : `${this.range.value} of ${this.blocks}`;
    this.buttons.forEach((button, map) => button.setAttribute("aria-pressed", String(map === this.map)));
    const all = this.canvases.map((_, place) => this.shown(place));
    const lowest = Math.min(...all.map((values) => Math.min(...values))); // of two images, one scale
    const highest = Math.max(...all.map((values) => Math.max(...values)));
    const range = Math.max(highest - lowest, 1e-9);
    this.canvases.forEach((canvas, place) => {
      drawImage(canvas, this.bitmaps[place], SIDE);
      drawHeat(canvas, all[place].map((value) => (value - lowest) / range), this.columns);
      canvas.heat = all[place];
      canvas.ariaLabel = `Attention of ${this.names[this.map]}`;
    });
    [this.low.textContent, this.high.textContent] = [percent(lowest), percent(highest)];
    this.tell();
  }

  tell() {
    const sums = this.canvases.map((canvas) => percent(canvas.heat.reduce((sum, value) => sum + value, 0)));
    const where = sums.length > 1 ? `left image (${sums[0]}) and the right one (${sums[1]})` : `image (${sums[0]})`;
    const name = this.map === 0 && this.answer ? this.names[0] : `“${this.names[this.map]}”`;
    this.note.textContent = `Attention of ${name} to the patches of the ${where}; the rest goes to words and the class token.${this.cut}`;
  }
}

// float32, little-endian, as base64.
function decoded(text) {
  const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  return new Float32Array(bytes.buffer);
}

function percent(share) {
  return `${(100 * share).toFixed(1)} %`;
}
