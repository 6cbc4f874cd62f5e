// The small pictures: what was brought, and what may be tried.

import { TASKS } from "/page/tasks.js";

/** Draw a picture into its slot, filling it. */
export function fill(box, picture) {
  const canvas = box.querySelector("canvas"), cover = Math.max(canvas.width / picture.width, canvas.height / picture.height);
  const [width, height] = [picture.width * cover, picture.height * cover];
  canvas.getContext("2d").drawImage(picture.canvas, (canvas.width - width) / 2, (canvas.height - height) / 2, width, height);
  box.querySelector(".name").textContent = picture.name;
  box.querySelector(".size").textContent = picture.note;
}

/** Offer a task's samples; `take(sample)` is called for the one that is chosen. */
export function lay(list, task, take) {
  list.replaceChildren(...TASKS[task].samples.map((sample) => {
    const item = document.createElement("li"), button = Object.assign(document.createElement("button"), { type: "button", title: sample.name });
    button.append(Object.assign(new Image(), { src: `/page/samples/${sample.image}`, alt: `Try ${sample.name}`, width: 132, height: 92 }));
    button.addEventListener("click", () => take(sample));
    item.append(button);
    return item;
  }));
}
