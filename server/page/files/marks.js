// Marking an object: clicks and a box go to the server, which finds the outline; strokes are painted here.

import { postForBlob, Trouble } from "/page/api.js";
import { encoded } from "/page/pictures.js";

const SENT = 640;
const MOST_POINTS = 32;
const HELP = {
  add: "Click on the object; its outline is found for you.",
  not: "Click on what does not belong to it.",
  box: "Draw a box around all that you see of it.",
  paint: "Paint over what you see of it.",
  erase: "Paint away what is not it.",
};

const sheet = (width, height) => new OffscreenCanvas(width, height).getContext("2d", { willReadFrequently: true });

/** Sends `change` when the mask is another, and `trouble` with a Trouble in `detail`. */
export class Marks extends EventTarget {
  constructor(canvas, { tools, brush, brushLine, help, undo, clear }) {
    super();
    Object.assign(this, { canvas, tools, brush });
    this.context = canvas.getContext("2d");
    this.acts = [];
    for (const radio of tools) {
      radio.addEventListener("change", () => {
        help.textContent = HELP[this.tool];
        brushLine.hidden = !this.brushes;
        this.draw();
      });
    }
    undo.addEventListener("click", () => this.undo());
    clear.addEventListener("click", () => { this.acts = []; this.given = null; this.settle(true); });
    canvas.addEventListener("pointerdown", (event) => this.down(event));
    canvas.addEventListener("pointermove", (event) => this.move(event));
    for (const end of ["pointerup", "pointercancel"]) canvas.addEventListener(end, () => this.up());
    canvas.addEventListener("keydown", (event) => this.key(event));
    for (const seen of ["focus", "blur"]) canvas.addEventListener(seen, () => this.draw());
  }

  get tool() { return [...this.tools].find((radio) => radio.checked).value; }
  get brushes() { return ["paint", "erase"].includes(this.tool); }
  get empty() { return !this.found && !this.given && !this.acts.some((act) => act.stroke && act.paint); }
  get radius() { return (Number(this.brush.value) / 1000) * Math.max(this.width, this.height); }

  /** For a server that finds no outlines: what is left is the brush. */
  byHandOnly() {
    for (const radio of this.tools) radio.closest("label").hidden = !["paint", "erase"].includes(radio.value);
    const paint = [...this.tools].find((radio) => radio.value === "paint");
    paint.checked = true;
    paint.dispatchEvent(new Event("change"));
  }

  /** Begin anew on a picture; `given` may be a mask to start from (a canvas of white on black). */
  load(picture, given = null) {
    this.request?.abort();
    Object.assign(this, { picture, width: picture.width, height: picture.height, acts: [], found: null, small: null });
    Object.assign(this.canvas, { width: this.width, height: this.height });
    this.given = given && this.alpha(given);
    this.mask = sheet(this.width, this.height);
    this.cursor = { x: this.width / 2, y: this.height / 2 };
    this.settle(false);
  }

  /** The mask as a PNG, white on black. */
  async blob() {
    const out = Object.assign(document.createElement("canvas"), { width: this.width, height: this.height }), context = out.getContext("2d");
    context.fillRect(0, 0, this.width, this.height);
    context.drawImage(this.mask.canvas, 0, 0);
    return encoded(out, "image/png");
  }

  /** [H * W] 0 or 1. */
  bits() {
    const { data } = this.mask.getImageData(0, 0, this.width, this.height);
    return Uint8Array.from({ length: this.width * this.height }, (_, i) => (data[i * 4 + 3] > 127 ? 1 : 0));
  }

  undo() {
    const last = this.acts.pop();
    if (last) this.settle(!last.stroke);
  }

  /** After an act: ask the server where clicks changed, then show. */
  async settle(ask) {
    const points = this.acts.filter((act) => act.point).map(({ x, y, inside }) => [x, y, inside ? 1 : 0]);
    const box = this.acts.findLast((act) => act.box)?.box;
    if (ask) {
      this.request?.abort();
      this.request = null;
      if (!box && !points.some(([, , inside]) => inside)) this.found = null;
      else await this.ask(points, box);
    }
    this.compose();
    this.dispatchEvent(new Event("change"));
  }

  async ask(points, box) {
    this.draw();
    const request = (this.request = new AbortController());
    this.canvas.setAttribute("aria-busy", "true");
    try {
      const [image, factor] = await this.smaller(), form = new FormData();
      form.set("image", image, "picture.jpg");
      form.set("points", JSON.stringify(points.map(([x, y, inside]) => [Math.floor(x * factor), Math.floor(y * factor), inside])));
      if (box) form.set("box", JSON.stringify(box.map((edge, i) => (i < 2 ? Math.floor : Math.ceil)(edge * factor))));
      const bitmap = await createImageBitmap(await postForBlob("/mask", form, request.signal));
      if (this.request === request) this.found = this.alpha(bitmap);
    } catch (error) {
      if (error.name === "AbortError") return;
      this.acts.pop();
      this.dispatchEvent(new CustomEvent("trouble", { detail: error instanceof Trouble ? error : new Trouble({ title: "No outline", detail: String(error) }) }));
    } finally {
      if (this.request === request) this.canvas.removeAttribute("aria-busy");
    }
  }

  /** The picture as it is sent with every click, and its scale. */
  async smaller() {
    const factor = Math.min(1, SENT / Math.max(this.width, this.height));
    if (!this.small) {
      const width = Math.max(2, Math.ceil(this.width * factor)), height = Math.max(2, Math.ceil(this.height * factor));
      const out = Object.assign(document.createElement("canvas"), { width, height });
      out.getContext("2d").drawImage(this.picture.canvas, 0, 0, width, height);
      this.small = encoded(out, "image/jpeg");
    }
    return [await this.small, factor];
  }

  /** White on black -> opaque on clear, at the picture's size. */
  alpha(source) {
    const context = sheet(this.width, this.height);
    context.drawImage(source, 0, 0, this.width, this.height);
    const image = context.getImageData(0, 0, this.width, this.height), { data } = image;
    for (let i = 0; i < data.length; i += 4) {
      data[i + 3] = data[i] > 127 ? 255 : 0;
      data[i] = data[i + 1] = data[i + 2] = 255;
    }
    context.putImageData(image, 0, 0);
    return context.canvas;
  }

  compose() {
    const { mask } = this;
    mask.clearRect(0, 0, this.width, this.height);
    for (const part of [this.given, this.found]) if (part) mask.drawImage(part, 0, 0);
    mask.lineCap = mask.lineJoin = "round";
    mask.strokeStyle = mask.fillStyle = "#fff";
    for (const { stroke, paint, radius } of this.acts.filter((act) => act.stroke)) {
      mask.globalCompositeOperation = paint ? "source-over" : "destination-out";
      mask.lineWidth = 2 * radius;
      mask.beginPath();
      stroke.forEach(([x, y], i) => (i ? mask.lineTo(x, y) : mask.moveTo(x, y)));
      if (stroke.length === 1) mask.lineTo(stroke[0][0] + 0.01, stroke[0][1]);
      mask.stroke();
    }
    mask.globalCompositeOperation = "source-over";
    this.draw();
  }

  draw() {
    if (!this.picture) return;
    const { context, width, height } = this, unit = Math.max(width, height) / 500;
    context.clearRect(0, 0, width, height);
    context.fillStyle = "#0008";
    context.fillRect(0, 0, width, height);
    context.globalCompositeOperation = "destination-out";
    context.drawImage(this.mask.canvas, 0, 0);
    context.globalCompositeOperation = "source-over";
    this.outline(unit);
    for (const act of this.acts) if (act.point) this.dot(act, unit);
    if (this.drawn) this.rectangle(this.drawn, unit);
    if (document.activeElement === this.canvas && this.canvas.matches(":focus-visible")) this.cross(unit);
  }

  outline(unit) {
    const ring = sheet(this.width, this.height), reach = 1.4 * unit;
    for (let turn = 0; turn < 8; turn++) ring.drawImage(this.mask.canvas, reach * Math.cos((turn * Math.PI) / 4), reach * Math.sin((turn * Math.PI) / 4));
    ring.globalCompositeOperation = "destination-out";
    ring.drawImage(this.mask.canvas, 0, 0);
    this.context.drawImage(ring.canvas, 0, 0);
  }

  dot({ x, y, inside }, unit) {
    this.context.beginPath();
    this.context.arc(x, y, 5 * unit, 0, 7);
    this.context.fillStyle = inside ? "#0d6b6b" : "#c2412d";
    this.context.strokeStyle = "#fff";
    this.context.lineWidth = 1.6 * unit;
    this.context.fill();
    this.context.stroke();
  }

  rectangle([x0, y0, x1, y1], unit) {
    this.context.strokeStyle = "#fff";
    this.context.lineWidth = 1.6 * unit;
    this.context.setLineDash([6 * unit, 4 * unit]);
    this.context.strokeRect(x0, y0, x1 - x0, y1 - y0);
    this.context.setLineDash([]);
  }

  cross(unit) {
    const { x, y } = this.cursor, { context } = this;
    const reach = this.brushes ? this.radius : 12 * unit;
    for (const [colour, thickness] of [["#000a", 4], ["#fff", 1.8]]) {
      context.strokeStyle = colour;
      context.lineWidth = thickness * unit;
      context.beginPath();
      if (this.brushes) context.arc(x, y, reach, 0, 7);
      else for (const [dx, dy] of [[1, 0], [0, 1]]) { context.moveTo(x - dx * reach, y - dy * reach); context.lineTo(x + dx * reach, y + dy * reach); }
      context.stroke();
    }
  }

  where(event) {
    const box = this.canvas.getBoundingClientRect();
    const along = (at, from, size, count) => Math.max(0, Math.min(count - 1, ((at - from) / size) * count));
    return { x: along(event.clientX, box.left, box.width, this.width), y: along(event.clientY, box.top, box.height, this.height) };
  }

  down(event) {
    this.canvas.setPointerCapture(event.pointerId);
    this.cursor = this.where(event);
    this.press();
    this.held = true;
  }

  move(event) {
    if (!this.held) return;
    const at = this.where(event), last = this.acts.at(-1);
    if (this.brushes && last?.stroke) { last.stroke.push([at.x, at.y]); this.compose(); }
    else if (this.corner) { this.stretch(at); this.draw(); }
  }

  up() {
    if (!this.held) return;
    this.held = false;
    if (this.brushes) this.settle(false);
    else if (this.tool === "box" && this.drawn) this.close();
    else this.corner = null;
  }

  /** The tool, used where the cursor is. */
  press() {
    const { x, y } = this.cursor;
    if (this.brushes) {
      this.acts.push({ stroke: [[x, y]], paint: this.tool === "paint", radius: this.radius });
      this.compose();
    } else if (this.tool === "box") this.corner = { x, y };
    else if (this.acts.filter((act) => act.point).length < MOST_POINTS) {
      this.acts.push({ point: true, x, y, inside: this.tool === "add" });
      this.settle(true);
    }
  }

  stretch({ x, y }) {
    const { corner } = this;
    this.drawn = [Math.min(x, corner.x), Math.min(y, corner.y), Math.max(x, corner.x), Math.max(y, corner.y)];
  }

  close() {
    const box = this.drawn, least = Math.max(this.width, this.height) / 50;
    this.corner = this.drawn = null;
    if (box[2] - box[0] > least && box[3] - box[1] > least) this.acts.push({ box });
    this.settle(true);
  }

  key(event) {
    const step = Math.max(this.width, this.height) * (event.shiftKey ? 0.005 : 0.025);
    const steps = { ArrowLeft: [-step, 0], ArrowRight: [step, 0], ArrowUp: [0, -step], ArrowDown: [0, step] };
    if (steps[event.key]) {
      this.cursor.x = Math.max(0, Math.min(this.width - 1, this.cursor.x + steps[event.key][0]));
      this.cursor.y = Math.max(0, Math.min(this.height - 1, this.cursor.y + steps[event.key][1]));
      if (this.corner) this.stretch(this.cursor);
    } else if (event.key === "Enter" || event.key === " ") {
      if (this.tool === "box" && this.corner) { this.stretch(this.cursor); this.close(); }
      else { this.press(); if (this.brushes) this.settle(false); }
    } else if (event.key === "Backspace" || (event.key === "z" && (event.ctrlKey || event.metaKey))) this.undo();
    else if (event.key === "Escape") this.corner = this.drawn = null;
    else return;
    event.preventDefault();
    this.draw();
  }
}
