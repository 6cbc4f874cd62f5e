// Pictures from a file, the clipboard, a drop or the camera, made ready to be sent and shown.

import { Trouble } from "/page/api.js";

export const MOST = 1600;
const SAFE = new Set(["image/png", "image/jpeg", "image/webp", "image/bmp", "image/gif"]);

/** {blob, name, canvas, width, height, note}: upright; over `MOST` px it is sent smaller, and the note says so. */
export async function pictureOf(blob, name) {
  let bitmap;
  try {
    bitmap = await createImageBitmap(blob, { imageOrientation: "from-image" });
  } catch {
    throw new Trouble({ status: 415, title: "This file cannot be shown", detail: "The browser cannot read it as a picture. PNG, JPEG and WebP work best." });
  }
  const shrink = Math.min(1, MOST / Math.max(bitmap.width, bitmap.height));
  const width = Math.max(2, Math.round(bitmap.width * shrink)), height = Math.max(2, Math.round(bitmap.height * shrink));
  const canvas = Object.assign(document.createElement("canvas"), { width, height });
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.fillStyle = "#fff";
  context.fillRect(0, 0, width, height);
  context.imageSmoothingQuality = "high";
  context.drawImage(bitmap, 0, 0, width, height);
  const note = shrink < 1 ? `${bitmap.width} × ${bitmap.height}, sent as ${width} × ${height}` : `${width} × ${height}`;
  bitmap.close();
  const sent = shrink < 1 || !SAFE.has(blob.type) ? await encoded(canvas, "image/jpeg") : blob;
  return { blob: sent, name: name || "picture", canvas, width, height, note };
}

/** A picture brought to another's size, as a next frame must be. */
export async function fitted(picture, { width, height }) {
  if (picture.width === width && picture.height === height) return picture;
  const canvas = Object.assign(document.createElement("canvas"), { width, height });
  canvas.getContext("2d").drawImage(picture.canvas, 0, 0, width, height);
  return { ...picture, canvas, width, height, blob: await encoded(canvas, "image/png"), note: `brought to ${width} × ${height}` };
}

export function encoded(canvas, type) {
  return new Promise((resolve, reject) => canvas.toBlob((blob) => (blob ? resolve(blob) : reject(new Error("no blob"))), type, 0.93));
}

export async function fetched(path) {
  return (await fetch(path)).blob();
}

/** Let a person choose a file; `take(file)` is called for it. */
export function pick(input, take) {
  input.value = "";
  input.onchange = () => input.files.length && take(input.files[0]);
  input.click();
}

/** Call `take(files)` for whatever picture is dropped on `area` or pasted. */
export function listen(area, take) {
  const over = (on) => (event) => {
    event.preventDefault();
    area.toggleAttribute("data-over", on);
  };
  area.addEventListener("dragover", over(true));
  area.addEventListener("dragleave", over(false));
  area.addEventListener("drop", (event) => {
    over(false)(event);
    take([...event.dataTransfer.files]);
  });
  addEventListener("paste", (event) => {
    const files = [...(event.clipboardData?.files || [])].filter((file) => file.type.startsWith("image/"));
    if (files.length) take(files);
  });
}

/** Ask for a still of the camera; a blob, or null if nobody took one. Throws Trouble where there is no camera. */
export async function still(dialog) {
  const video = dialog.querySelector("video"), button = (id) => dialog.querySelector(`#camera-${id}`);
  let stream = null, facing = "environment";
  const stop = () => stream?.getTracks().forEach((track) => track.stop());
  const start = async () => {
    stop();
    stream = await navigator.mediaDevices.getUserMedia({ video: { facingMode: facing, width: { ideal: 1600 } } });
    video.srcObject = stream;
    await video.play();
  };
  try {
    await start();
  } catch {
    stop();
    throw new Trouble({ status: 0, title: "No camera", detail: "The browser gives this page no camera. Allow it, or choose a picture instead." });
  }
  dialog.showModal();
  return new Promise((resolve) => {
    const end = (blob) => { stop(); video.srcObject = null; dialog.close(); resolve(blob); };
    button("turn").onclick = () => { facing = facing === "user" ? "environment" : "user"; start().catch(() => end(null)); };
    button("cancel").onclick = () => end(null);
    dialog.oncancel = () => end(null);
    button("take").onclick = async () => {
      const canvas = Object.assign(document.createElement("canvas"), { width: video.videoWidth, height: video.videoHeight });
      canvas.getContext("2d").drawImage(video, 0, 0);
      end(await encoded(canvas, "image/jpeg"));
    };
  });
}
