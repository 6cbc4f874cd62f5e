// Maps made visible, with the colours that the server's own renders have.

const SPECTRAL = "9e0142 d53e4f f46d43 fdae61 fee08b ffffbf e6f598 abdda4 66c2a5 3288bd 5e4fa2";
const DOUBT = "0b0a1f 3b0f70 8c2981 de4968 fe9f6d fcfdbf";
const WHEEL = [[15, [255, 0, 0]], [6, [255, 255, 0]], [4, [0, 255, 0]], [11, [0, 255, 255]], [13, [0, 0, 255]], [6, [255, 0, 255]]];

function table(knots) {
  const colours = knots.split(" ").map((hex) => [0, 2, 4].map((i) => parseInt(hex.slice(i, i + 2), 16)));
  return between(colours, 256);
}

function between(colours, count) {
  const out = new Uint8ClampedArray(count * 3);
  for (let i = 0; i < count; i++) {
    const at = (i / (count - 1)) * (colours.length - 1), low = Math.min(Math.floor(at), colours.length - 2), part = at - low;
    for (let c = 0; c < 3; c++) out[i * 3 + c] = Math.round(colours[low][c] * (1 - part) + colours[low + 1][c] * part);
  }
  return out;
}

export const spectral = table(SPECTRAL);
export const doubt = table(DOUBT);
const wheel = (() => {
  const corners = [...WHEEL, [0, WHEEL[0][1]]], hues = [];
  WHEEL.forEach(([count, from], i) => {
    const to = corners[i + 1][1];
    for (let k = 0; k < count; k++) hues.push(from.map((level, c) => level + Math.sign(to[c] - level) * Math.floor((255 * k) / count)));
  });
  return between(hues, 54 * 64 + 1);
})();

/** ImageData of values in 0..`top`. */
export function shaded(values, height, width, colours, top = 1) {
  const image = new ImageData(width, height), { data } = image;
  for (let i = 0; i < values.length; i++) {
    const at = Math.max(0, Math.min(255, Math.floor((values[i] / top) * 256))) * 3;
    data.set(colours.subarray(at, at + 3), i * 4);
    data[i * 4 + 3] = 255;
  }
  return image;
}

/** ImageData of a flow on Middlebury's wheel; full colour is `most` px. */
export function wheeled(u, v, height, width, most) {
  const image = new ImageData(width, height), { data } = image, last = wheel.length / 3 - 1;
  for (let i = 0; i < u.length; i++) {
    const radius = Math.hypot(u[i], v[i]) / (most || 1e-6);
    const place = Math.round((Math.atan2(-v[i], -u[i]) / Math.PI + 1) * (last / 2)) * 3;
    for (let c = 0; c < 3; c++) {
      const hue = wheel[place + c] / 255;
      data[i * 4 + c] = 255 * (radius <= 1 ? 1 - radius * (1 - hue) : 0.75 * hue);
    }
    data[i * 4 + 3] = 255;
  }
  return image;
}

/** A legend on a small canvas: a ramp of colours, or the wheel. */
export function drawLegend(canvas, colours) {
  const round = colours === null;
  canvas.classList.toggle("wheel", round);
  canvas.width = round ? 64 : 120;
  canvas.height = round ? 64 : 10;
  canvas.style.width = round ? "34px" : "";
  const { width, height } = canvas, first = new Float32Array(width * height), second = new Float32Array(width * height);
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < width; x++) {
      first[y * width + x] = round ? (x + 0.5) / (width / 2) - 1 : (x + 0.5) / width;
      second[y * width + x] = (y + 0.5) / (height / 2) - 1;
    }
  }
  const image = round ? wheeled(first, second, height, width, 1) : shaded(first, height, width, colours);
  canvas.getContext("2d").putImageData(image, 0, 0);
}

/** Outline a whole object in its picture, and tint what of it is not `visible`. */
export function tinted(context, whole, visible, height, width) {
  const image = context.getImageData(0, 0, width, height), { data } = image;
  const edge = (i, mask) => mask[i] && !(mask[i - 1] && mask[i + 1] && mask[i - width] && mask[i + width]);
  const thick = Math.max(1, Math.round(Math.max(width, height) / 500));
  const mix = (i, colour, part) => { for (let c = 0; c < 3; c++) data[i * 4 + c] += (colour[c] - data[i * 4 + c]) * part; };
  for (let i = 0; i < whole.length; i++) if (whole[i] && !visible[i]) mix(i, [255, 104, 64], 0.62);
  for (let i = 0; i < whole.length; i++) {
    if (!edge(i, whole)) continue;
    for (let y = -thick; y <= thick; y++) {
      for (let x = -thick; x <= thick; x++) {
        const j = i + y * width + x;
        if (j >= 0 && j < whole.length && whole[j] && Math.hypot(x, y) <= thick + 0.5) mix(j, [255, 255, 255], 0.75);
      }
    }
  }
  context.putImageData(image, 0, 0);
}
