// A dial: a range input for keys and screen readers, drawn as an arc that a finger or a mouse can turn.

const SVG = "http://www.w3.org/2000/svg";
const FROM = 135, SWEEP = 270, MIDDLE = 60, RADIUS = 48;

const shape = (name, attributes) => {
  const made = document.createElementNS(SVG, name);
  for (const [attribute, value] of Object.entries(attributes)) made.setAttribute(attribute, value);
  return made;
};
const place = (part, radius = RADIUS) => {
  const angle = ((FROM + SWEEP * part) * Math.PI) / 180;
  return [MIDDLE + radius * Math.cos(angle), MIDDLE + radius * Math.sin(angle)];
};

export class Dial extends EventTarget {
  /** `change` is sent when the value has come to rest: at the end of a turn, or after a key. */
  constructor(host, { label, values, value, says }) {
    super();
    this.host = host;
    this.says = says;
    this.input = Object.assign(document.createElement("input"), { type: "range", min: 0, step: 1, id: `${host.id}-input` });
    this.draw();
    const name = Object.assign(document.createElement("label"), { textContent: label, htmlFor: this.input.id });
    const turning = Object.assign(document.createElement("div"), { className: "turning" });
    turning.append(this.button("−", `Fewer ${label.toLowerCase()}`, -1), name, this.button("+", `More ${label.toLowerCase()}`, 1));
    host.append(this.input, this.svg, turning);
    this.input.addEventListener("input", () => this.show());
    this.input.addEventListener("change", () => this.rest());
    this.allow(values, value);
  }

  get value() { return this.values[Number(this.input.value)]; }
  set value(value) {
    const nearest = this.values.reduce((best, each, i) => (Math.abs(each - value) < Math.abs(this.values[best] - value) ? i : best), 0);
    this.input.value = nearest;
    this.show();
  }

  allow(values, value) {
    this.values = values;
    this.input.max = values.length - 1;
    this.ticks.replaceChildren(...values.map((_, i) => {
      const [cx, cy] = place(values.length > 1 ? i / (values.length - 1) : 0, RADIUS - 9);
      return shape("circle", { class: "tick", cx, cy, r: 1 });
    }));
    this.value = value;
  }

  draw() {
    const [x0, y0] = place(0), [x1, y1] = place(1), arc = `M${x0} ${y0} A${RADIUS} ${RADIUS} 0 1 1 ${x1} ${y1}`;
    this.svg = shape("svg", { viewBox: "0 0 120 116", "aria-hidden": "true" });
    this.arc = shape("path", { class: "value", d: arc, pathLength: 100 });
    this.knob = shape("circle", { class: "knob", r: 6.5 });
    this.number = shape("text", { class: "number", x: MIDDLE, y: 70 });
    this.ticks = shape("g", {});
    this.svg.append(shape("path", { class: "track", d: arc }), this.ticks, this.arc, this.knob, this.number);
    const turn = (event) => {
      const box = this.svg.getBoundingClientRect(), scale = box.width / 120;
      const angle = (Math.atan2(event.clientY - box.top - MIDDLE * scale, event.clientX - box.left - MIDDLE * scale) * 180) / Math.PI;
      const along = (angle - FROM + 720) % 360;
      const part = along <= SWEEP ? along / SWEEP : along < SWEEP + (360 - SWEEP) / 2 ? 1 : 0;
      this.input.value = Math.round(part * (this.values.length - 1));
      this.show();
    };
    this.svg.addEventListener("pointerdown", (event) => { this.before = this.value; this.svg.setPointerCapture(event.pointerId); turn(event); });
    this.svg.addEventListener("pointermove", (event) => this.svg.hasPointerCapture(event.pointerId) && turn(event));
    this.svg.addEventListener("pointerup", () => { if (this.value !== this.before) this.rest(); });
  }

  button(text, label, by) {
    const made = Object.assign(document.createElement("button"), { type: "button", className: "quiet", textContent: text });
    made.setAttribute("aria-label", label);
    made.addEventListener("click", () => { this.input.value = Number(this.input.value) + by; this.show(); this.rest(); });
    return made;
  }

  show() {
    const part = this.values.length > 1 ? Number(this.input.value) / (this.values.length - 1) : 0, [x, y] = place(part);
    this.arc.setAttribute("stroke-dasharray", `${part * 100} 200`);
    this.knob.setAttribute("cx", x);
    this.knob.setAttribute("cy", y);
    this.number.textContent = this.value;
    this.input.setAttribute("aria-valuetext", this.says(this.value));
    this.dispatchEvent(new Event("input"));
  }

  rest() { this.dispatchEvent(new Event("change")); }
}
