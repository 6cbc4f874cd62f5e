// Every format that the server writes, asked for again with the same seed, so at the picture's full size.

import { postForBlob } from "/page/api.js";

const ROWS = {
  depth: [["png", "PNG", "16-bit depth"], ["png", "PNG", "in colours", "color"], ["npy", "NPY", "float32"], ["npz", "NPZ", "with uncertainty"],
    ["pfm", "PFM", "float32"], ["exr", "EXR", "channel Z"], ["json", "JSON", "with everything"]],
  flow: [["flo", "FLO", "Middlebury"], ["png", "PNG", "KITTI, 16 bit"], ["png", "PNG", "in colours", "color"], ["npy", "NPY", "float32"],
    ["npz", "NPZ", "with uncertainty"], ["pfm", "PFM", "u, v, 0"], ["exr", "EXR", "channels U, V"], ["json", "JSON", "with everything"]],
  amodal: [["png", "PNG", "the object", "object"], ["png", "PNG", "its mask"], ["png", "PNG", "over the picture", "color"], ["npy", "NPY", "mask"],
    ["npz", "NPZ", "with uncertainty"], ["exr", "EXR", "channel A"], ["json", "JSON", "with everything"]],
};
const CARRIES_UNCERTAINTY = ["json", "npz", "exr"];

export function save(blob, name) {
  const link = Object.assign(document.createElement("a"), { href: URL.createObjectURL(blob), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

/** Fill `list` with a button for each format. `form()` gives the request of the answer that is shown. */
export function offer(list, task, stem, { form, uncertain, ply, trouble }) {
  const rows = ROWS[task].map(([format, title, words, render]) => {
    const fetch_ = async () => {
      const body = await form();
      body.set("format", format);
      if (render) body.set("render", render);
      body.set("output_uncertainty", String(uncertain && CARRIES_UNCERTAINTY.includes(format)));
      save(await postForBlob(`/${task}`, body), `${stem}-${task}${render ? `-${render}` : ""}.${format}`);
    };
    return [title, words, fetch_];
  });
  if (ply) rows.push(["PLY", "point cloud", async () => save(ply(), `${stem}-cloud.ply`)]);
  list.replaceChildren(...rows.map(([title, words, fetch_]) => row(title, words, fetch_, trouble)));
}

/** What made the answer. */
export function facts(list, { model, units, options, timings_ms }) {
  const count = (number, what) => `${number} ${what}${number === 1 ? "" : "s"}`;
  const said = {
    Model: model, Answer: units, Looks: `${count(options.steps, "step")} × ${count(options.ensemble_size, "member")}`,
    Seed: options.seed, "At the server": `${(timings_ms.total / 1000).toFixed(2)} s`,
  };
  const element = (tag, textContent) => Object.assign(document.createElement(tag), { textContent });
  list.replaceChildren(...Object.entries(said).flatMap(([name, value]) => [element("dt", name), element("dd", value)]));
}

function row(title, words, fetch_, trouble) {
  const item = document.createElement("li"), button = Object.assign(document.createElement("button"), { type: "button" });
  button.append(Object.assign(document.createElement("strong"), { textContent: title }), Object.assign(document.createElement("span"), { className: "small", textContent: words }));
  button.addEventListener("click", async () => {
    button.disabled = true;
    button.setAttribute("aria-busy", "true");
    try {
      await fetch_();
    } catch (error) {
      trouble(error);
    } finally {
      button.disabled = false;
      button.removeAttribute("aria-busy");
    }
  });
  item.append(button);
  return item;
}
