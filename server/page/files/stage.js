// What is on the stage: the picture, the estimate over it, and the views of an answer.

import { drawLegend, doubt, spectral, shaded, tinted, wheeled } from "/page/colours.js";
import { blobOf, bytesOf, peakOf, readNpy, resized, valueAt } from "/page/maps.js";

const sheet = (width, height) => Object.assign(document.createElement("canvas"), { width, height });
const painted = (image) => {
  const canvas = sheet(image.width, image.height);
  canvas.getContext("2d").putImageData(image, 0, 0);
  return canvas;
};

/** An answer made ready to look at: {task, map, estimate, object, uncertainty, peak, most, share}. */
export async function ready(task, document_, picture, visible) {
  const { width, height } = picture, out = { task, document: document_ };
  if (task === "amodal") return whole(out, picture, visible);
  out.map = readNpy(bytesOf(document_.prediction.data));
  if (task === "depth") {
    out.estimate = painted(shaded(resized(out.map, 0, height, width), height, width, spectral));
  } else {
    const shrink = out.map.width / width, [u, v] = [0, 1].map((plane) => resized(out.map, plane, height, width).map((px) => px / shrink));
    out.shrink = shrink;
    out.most = 0;
    for (let i = 0; i < u.length; i++) out.most = Math.max(out.most, Math.hypot(u[i], v[i]));
    out.estimate = painted(wheeled(u, v, height, width, out.most));
  }
  if (document_.uncertainty) {
    out.doubt = readNpy(bytesOf(document_.uncertainty.data));
    const small = peakOf(out.doubt.values);
    out.peak = task === "flow" ? small / out.shrink : small;
    out.uncertainty = painted(shaded(resized(out.doubt, 0, height, width), height, width, doubt, small || 1));
  }
  return out;
}

async function whole(out, picture, visible) {
  const { width, height } = picture;
  const levels = async (map) => {
    const context = sheet(width, height).getContext("2d", { willReadFrequently: true });
    context.drawImage(await createImageBitmap(blobOf(map)), 0, 0, width, height);
    return context.getImageData(0, 0, width, height).data;
  };
  const drawn = await levels(out.document.prediction);
  out.bits = Uint8Array.from({ length: width * height }, (_, i) => (drawn[i * 4] > 127 ? 1 : 0));
  out.visible = visible;
  out.estimate = overlay(picture, out.bits, visible);
  const count = (bits) => bits.reduce((sum, bit) => sum + bit, 0);
  out.share = 1 - count(visible) / Math.max(1, count(out.bits));
  if (out.document.completed) {
    out.object = sheet(width, height);
    out.object.getContext("2d").drawImage(await createImageBitmap(blobOf(out.document.completed)), 0, 0, width, height);
  }
  if (out.document.uncertainty) {
    const spread = await levels(out.document.uncertainty), values = Float32Array.from({ length: width * height }, (_, i) => spread[i * 4] / 255);
    out.peak = out.document.uncertainty.scale * 65535;
    out.doubt = { values, height, width, planes: 1 };
    out.uncertainty = painted(shaded(values, height, width, doubt));
  }
  return out;
}

export function overlay(picture, bits, visible) {
  const canvas = sheet(picture.width, picture.height), context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(picture.canvas, 0, 0);
  tinted(context, bits, visible, picture.height, picture.width);
  return canvas;
}

/** A preview as a canvas of the picture's size. */
export async function previewed(task, preview, picture, visible) {
  const bitmap = await createImageBitmap(blobOf({ data: preview.image, media_type: preview.media_type }));
  const canvas = sheet(picture.width, picture.height), context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(bitmap, 0, 0, picture.width, picture.height);
  if (task !== "amodal") return canvas;
  const { data } = context.getImageData(0, 0, picture.width, picture.height);
  return overlay(picture, Uint8Array.from({ length: data.length / 4 }, (_, i) => (data[i * 4] > 127 || visible[i] ? 1 : 0)), visible);
}

export class Stage {
  constructor(parts) {
    Object.assign(this, parts);
    this.split.addEventListener("input", () => this.frame.style.setProperty("--split", `${this.split.value}%`));
    const tell = (event) => this.tell(event);
    this.frame.addEventListener("pointermove", tell);
    this.frame.addEventListener("pointerdown", tell);
    this.frame.addEventListener("pointerleave", () => { this.readout.hidden = true; });
  }

  picture(picture) {
    this.frame.parentElement.style.setProperty("--ratio", picture.width / picture.height);
    this.put(this.base, picture.canvas);
    this.over.getContext("2d").clearRect(0, 0, this.over.width, this.over.height);
    this.answer = null;
  }

  put(canvas, source) {
    Object.assign(canvas, { width: source.width, height: source.height });
    canvas.getContext("2d").drawImage(source, 0, 0);
  }

  /** Lay a canvas over the picture. */
  lay(source) {
    this.put(this.over, source);
    this.over.removeAttribute("data-fresh");
    requestAnimationFrame(() => this.over.setAttribute("data-fresh", ""));
  }

  show(view, answer) {
    Object.assign(this, { view, answer });
    this.frame.dataset.view = view;
    this.cloud.canvas.hidden = view !== "cloud";
    this.marks.canvas.hidden = view !== "mark";
    this.cloudTools.hidden = view !== "cloud";
    this.cloud.show(view === "cloud");
    if (view === "mark") this.marks.draw();
    if (answer && view in { compare: 1, estimate: 1 }) this.lay(answer.estimate);
    if (answer && view in { object: 1, uncertainty: 1 }) this.lay(answer[view]);
    this.explain();
  }

  explain() {
    const { view, answer } = this, words = this.words(view, answer);
    this.legend.hidden = !words;
    if (!words) return;
    const [colours, low, high] = words;
    this.low.textContent = low;
    this.high.textContent = high;
    this.scale.hidden = colours === undefined;
    if (colours !== undefined) drawLegend(this.scale, colours);
  }

  words(view, answer) {
    if (!answer || ["mark", "cloud", "object"].includes(view)) return null;
    if (view === "uncertainty") return [doubt, "sure", `members differ by up to ${answer.peak.toPrecision(2)}${answer.task === "flow" ? " px" : ""}`];
    if (answer.task === "depth") return [spectral, "near", "far"];
    if (answer.task === "flow") return [null, "direction", `up to ${answer.most.toFixed(1)} px`];
    return [undefined, `${Math.round(answer.share * 100)} % of it was hidden`, ""];
  }

  tell(event) {
    const { answer, view } = this;
    this.readout.hidden = !answer || ["mark", "cloud", "object"].includes(view);
    if (this.readout.hidden) return;
    const box = this.frame.getBoundingClientRect();
    const right = Math.max(0, Math.min(0.9999, (event.clientX - box.left) / box.width)), down = Math.max(0, Math.min(0.9999, (event.clientY - box.top) / box.height));
    this.readout.textContent = this.reading(right, down);
  }

  reading(right, down) {
    const { answer, view } = this;
    if (view === "uncertainty") {
      const most = peakOf(answer.doubt.values) || 1, [value] = valueAt(answer.doubt, right, down);
      return `± ${((value / most) * answer.peak).toPrecision(2)}`;
    }
    if (answer.task === "depth") return `depth ${valueAt(answer.map, right, down)[0].toFixed(3)}`;
    if (answer.task === "flow") {
      const [u, v] = valueAt(answer.map, right, down).map((px) => px / answer.shrink);
      return `${Math.hypot(u, v).toFixed(1)} px: ${Math.abs(u).toFixed(1)} ${u < 0 ? "left" : "right"}, ${Math.abs(v).toFixed(1)} ${v < 0 ? "up" : "down"}`;
    }
    const at = Math.floor(down * this.base.height) * this.base.width + Math.floor(right * this.base.width);
    return answer.visible[at] ? "seen" : answer.bits[at] ? "hidden, yet there" : "not it";
  }
}
