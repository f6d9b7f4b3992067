// Images and heat maps on a canvas.

const PIXELATED = 100; // pixels; smaller images are enlarged without interpolation
const LOW = [176, 24, 84];
const HIGH = [255, 196, 64];

// Give the canvas the image's proportions, its longer side at most `side`, and draw the image; null is a gray square.
export function drawImage(canvas, bitmap, side) {
  const [width, height] = bitmap ? [bitmap.width, bitmap.height] : [1, 1];
  const scale = side / Math.max(width, height);
  canvas.width = Math.max(1, Math.round(width * scale));
  canvas.height = Math.max(1, Math.round(height * scale));
  const context = canvas.getContext("2d");
  context.fillStyle = "#808080";
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.imageSmoothingEnabled = Math.max(width, height) >= PIXELATED;
  context.imageSmoothingQuality = "high";
  if (bitmap) context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
}

// Draw shares from 0 to 1, rows x columns of them, over what is on the canvas: 0 leaves it as it is, but darker.
export function drawHeat(canvas, shares, columns) {
  const small = new OffscreenCanvas(columns, shares.length / columns);
  const pixels = new ImageData(columns, shares.length / columns);
  shares.forEach((share, patch) => pixels.data.set([...colorOf(share), 190 * share], 4 * patch));
  small.getContext("2d").putImageData(pixels, 0, 0);
  const context = canvas.getContext("2d");
  context.fillStyle = "rgba(16, 18, 24, 0.4)";
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.imageSmoothingEnabled = true;
  context.drawImage(small, 0, 0, canvas.width, canvas.height);
}

// The colors from 0 to 1, from left to right.
export function drawScale(canvas) {
  const context = canvas.getContext("2d");
  for (let column = 0; column < canvas.width; column++) {
    const share = column / (canvas.width - 1);
    context.fillStyle = `rgba(${colorOf(share).join(",")}, ${0.15 + 0.85 * share})`;
    context.fillRect(column, 0, 1, canvas.height);
  }
}

function colorOf(share) {
  return LOW.map((low, channel) => Math.round(low + (HIGH[channel] - low) * share));
}
