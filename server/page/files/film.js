// The estimates on the way to the answer, as a strip of small pictures that can be called back.

const HEIGHT = 116;

export class Film {
  /** `pick(canvas)` is called for what is chosen; null is the answer itself. */
  constructor(list, pick) {
    Object.assign(this, { list, pick });
  }

  clear() {
    this.list.replaceChildren();
    this.list.hidden = true;
  }

  add(canvas, words, label, last = false) {
    const small = document.createElement("canvas");
    Object.assign(small, { height: HEIGHT, width: Math.round((HEIGHT * canvas.width) / canvas.height) });
    const context = small.getContext("2d");
    context.imageSmoothingQuality = "high";
    context.drawImage(canvas, 0, 0, small.width, small.height);
    const item = document.createElement("li"), button = Object.assign(document.createElement("button"), { type: "button" });
    button.setAttribute("aria-label", label);
    button.append(small, words);
    button.addEventListener("click", () => { this.mark(button); this.pick(last ? null : canvas); });
    item.append(button);
    this.list.append(item);
    this.list.hidden = false;
    this.mark(button);
    this.list.scrollLeft = this.list.scrollWidth;
  }

  mark(button) {
    for (const other of this.list.querySelectorAll("[aria-current]")) other.removeAttribute("aria-current");
    button.setAttribute("aria-current", "true");
  }

  last() {
    const button = this.list.querySelector("li:last-child button");
    if (button) this.mark(button);
  }
}
