// Depth as a point cloud, drawn on a plain canvas: no graphics card is needed.

import { resized } from "/page/maps.js";
import { spectral } from "/page/colours.js";

const GRID = 300;
const FIELD_OF_VIEW = 55;
const TORN = 0.09;
const STRETCH = 3.5;
const still = matchMedia("(prefers-reduced-motion: reduce)");

export class Cloud {
  constructor(canvas, { relief, paint, spin }) {
    Object.assign(this, { canvas, relief, paint, spin });
    this.context = canvas.getContext("2d");
    this.pointers = new Map();
    this.spinning = !still.matches;
    this.shown = false;
    this.home();
    relief.addEventListener("input", () => { this.place(); this.draw(); });
    paint.addEventListener("change", () => this.draw());
    spin.addEventListener("click", () => this.turn(!this.spinning));
    canvas.addEventListener("pointerdown", (event) => this.grab(event));
    canvas.addEventListener("pointermove", (event) => this.drag(event));
    for (const end of ["pointerup", "pointercancel"]) canvas.addEventListener(end, (event) => this.pointers.delete(event.pointerId));
    canvas.addEventListener("wheel", (event) => { event.preventDefault(); this.near(Math.exp(event.deltaY * 0.001)); }, { passive: false });
    canvas.addEventListener("keydown", (event) => this.key(event));
    canvas.addEventListener("dblclick", () => { this.home(); this.draw(); });
    new ResizeObserver(() => this.shown && this.draw()).observe(canvas);
    this.turn(this.spinning);
  }

  home() { Object.assign(this, { yaw: 0.28, pitch: 0.12, distance: 1 }); }

  /** Show the points of a depth map ({values, height, width}) with the colours of `picture` (a canvas). */
  load(map, picture) {
    const shrink = Math.min(1, GRID / Math.max(picture.width, picture.height));
    this.columns = Math.max(2, Math.round(picture.width * shrink));
    this.rows = Math.max(2, Math.round(picture.height * shrink));
    this.depth = resized(map, 0, this.rows, this.columns);
    const small = new OffscreenCanvas(this.columns, this.rows).getContext("2d");
    small.imageSmoothingQuality = "high";
    small.drawImage(picture, 0, 0, this.columns, this.rows);
    this.colours = new Uint32Array(small.getImageData(0, 0, this.columns, this.rows).data.buffer);
    this.painted = new Uint32Array(this.depth.length);
    const levels = new Uint8Array(this.painted.buffer);
    this.depth.forEach((value, i) => {
      const at = Math.max(0, Math.min(255, Math.floor(value * 256))) * 3;
      levels.set([spectral[at], spectral[at + 1], spectral[at + 2], 255], i * 4);
    });
    this.home();
    this.place();
  }

  /** Points in front of a pinhole, the middle of their depth at the origin; larger where they are drawn apart, and
   * none where the surface tears. */
  place() {
    if (!this.depth) return;
    const { rows, columns, depth } = this, relief = Number(this.relief.value) / 100, longest = Math.max(rows, columns);
    const slope = Math.tan((FIELD_OF_VIEW * Math.PI) / 360) * 2, middle = 1 + relief / 2;
    this.points = new Float32Array(depth.length * 3);
    this.stretch = new Float32Array(depth.length);
    this.whole = [];
    for (let y = 0, i = 0; y < rows; y++) {
      for (let x = 0; x < columns; x++, i++) {
        const z = 1 + relief * depth[i];
        this.points[i * 3] = ((x - columns / 2) / longest) * slope * z;
        this.points[i * 3 + 1] = ((y - rows / 2) / longest) * slope * z;
        this.points[i * 3 + 2] = z - middle;
        const right = x + 1 < columns ? Math.abs(depth[i + 1] - depth[i]) : 0, down = y + 1 < rows ? Math.abs(depth[i + columns] - depth[i]) : 0;
        if (Math.max(right, down) < TORN) this.whole.push(i);
        this.stretch[i] = Math.min(STRETCH, Math.hypot(1, (Math.max(right, down) * relief * longest) / (slope * z)));
      }
    }
    this.middle = middle;
    this.pitchOfGrid = slope / longest;
  }

  show(shown) {
    if (shown === this.shown) return;
    this.shown = shown;
    if (!shown) return;
    this.draw();
    this.began = performance.now();
    const frame = (now) => {
      if (!this.shown) return;
      if (this.spinning && this.pointers.size === 0 && !document.hidden) {
        this.yaw += 0.0022 * Math.cos((now - this.began) / 2400) * 2;
        this.draw();
      }
      requestAnimationFrame(frame);
    };
    requestAnimationFrame(frame);
  }

  turn(on) {
    this.spinning = on;
    this.spin.setAttribute("aria-pressed", String(on));
  }

  near(factor) {
    this.distance = Math.max(0.25, Math.min(4, this.distance * factor));
    this.draw();
  }

  draw() {
    if (!this.points || !this.shown) return;
    const sharp = Math.min(devicePixelRatio || 1, 1.5), box = this.canvas.getBoundingClientRect();
    const width = Math.max(2, Math.round(box.width * sharp)), height = Math.max(2, Math.round(box.height * sharp));
    if (this.canvas.width !== width || this.canvas.height !== height || !this.image) {
      Object.assign(this.canvas, { width, height });
      this.image = new ImageData(width, height);
      this.pixels = new Uint32Array(this.image.data.buffer);
      this.nearest = new Float32Array(width * height);
    }
    this.pixels.fill(0);
    this.nearest.fill(Infinity);
    this.splat(width, height);
    this.context.putImageData(this.image, 0, 0);
  }

  splat(width, height) {
    const { points, pixels, nearest } = this, colours = this.paint.checked ? this.painted : this.colours;
    const [sy, cy, sp, cp] = [Math.sin(this.yaw), Math.cos(this.yaw), Math.sin(this.pitch), Math.cos(this.pitch)];
    const slope = Math.tan((FIELD_OF_VIEW * Math.PI) / 360) * 2, longest = Math.max(this.rows, this.columns);
    const fit = Math.min((width * longest) / this.columns, (height * longest) / this.rows);
    const scale = (fit * 0.84) / slope, far = this.middle * this.distance;
    for (const i of this.whole) {
      const x = points[i * 3], y = points[i * 3 + 1], z = points[i * 3 + 2];
      const x1 = x * cy + z * sy, z1 = z * cy - x * sy, y1 = y * cp - z1 * sp, z2 = y * sp + z1 * cp + far;
      if (z2 < 0.05) continue;
      const u = width / 2 + (x1 * scale) / z2, v = height / 2 + (y1 * scale) / z2;
      const size = Math.min(14, Math.ceil((this.pitchOfGrid * scale * (z + this.middle) * this.stretch[i]) / z2 + 0.35)), colour = colours[i];
      const left = Math.round(u - size / 2), top = Math.round(v - size / 2);
      if (left < 0 || top < 0 || left + size > width || top + size > height) continue;
      for (let py = top; py < top + size; py++) {
        for (let at = py * width + left, end = at + size; at < end; at++) {
          if (z2 < nearest[at]) { nearest[at] = z2; pixels[at] = colour; }
        }
      }
    }
  }

  grab(event) {
    this.canvas.setPointerCapture(event.pointerId);
    this.pointers.set(event.pointerId, [event.clientX, event.clientY]);
  }

  drag(event) {
    if (!this.pointers.has(event.pointerId)) return;
    const [x, y] = this.pointers.get(event.pointerId), other = [...this.pointers].find(([id]) => id !== event.pointerId)?.[1];
    this.pointers.set(event.pointerId, [event.clientX, event.clientY]);
    if (other) {
      const before = Math.hypot(x - other[0], y - other[1]), after = Math.hypot(event.clientX - other[0], event.clientY - other[1]);
      this.near(before / Math.max(after, 1));
      return;
    }
    this.yaw += (event.clientX - x) * 0.006;
    this.pitch = Math.max(-1.4, Math.min(1.4, this.pitch + (event.clientY - y) * 0.006));
    this.draw();
  }

  key(event) {
    const step = 0.09, acts = {
      ArrowLeft: () => { this.yaw -= step; }, ArrowRight: () => { this.yaw += step; },
      ArrowUp: () => { this.pitch -= step; }, ArrowDown: () => { this.pitch += step; },
      "+": () => this.near(0.9), "=": () => this.near(0.9), "-": () => this.near(1.1),
      Home: () => this.home(), " ": () => this.turn(!this.spinning),
    };
    if (!acts[event.key]) return;
    event.preventDefault();
    acts[event.key]();
    this.draw();
  }

  /** The points as a PLY file that every viewer of point clouds reads. */
  ply() {
    const head = `ply\nformat binary_little_endian 1.0\nelement vertex ${this.whole.length}\n${["x", "y", "z"].map((n) => `property float ${n}\n`).join("")}` +
      `${["red", "green", "blue"].map((n) => `property uchar ${n}\n`).join("")}end_header\n`;
    const body = new DataView(new ArrayBuffer(this.whole.length * 15)), levels = new Uint8Array(this.colours.buffer);
    this.whole.forEach((i, n) => {
      [1, -1, -1].forEach((sign, axis) => body.setFloat32(n * 15 + axis * 4, sign * this.points[i * 3 + axis], true));
      for (let c = 0; c < 3; c++) body.setUint8(n * 15 + 12 + c, levels[i * 4 + c]);
    });
    return new Blob([head, body.buffer], { type: "application/octet-stream" });
  }
}
