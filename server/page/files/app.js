// The page: what was chosen, what is asked, and what is shown of it.

import { getJson, Trouble, watch } from "/page/api.js";
import { Cloud } from "/page/cloud.js";
import { facts, offer } from "/page/downloads.js";
import { Film } from "/page/film.js";
import { askForKey, openKey, themed } from "/page/house.js";
import { Knobs, told } from "/page/knobs.js";
import { Marks } from "/page/marks.js";
import { Notice } from "/page/notice.js";
import { fetched, fitted, listen, pick, pictureOf, still } from "/page/pictures.js";
import { previewed, ready, Stage } from "/page/stage.js";
import { along, PHASES, TASKS } from "/page/tasks.js";
import { fill, lay } from "/page/tray.js";

const $ = (id) => document.getElementById(id);
const state = { task: "depth", image: null, next: null, answers: {}, running: null };

const notice = new Notice({ box: $("notice"), title: $("notice-title"), text: $("notice-text"), act: $("notice-act"), close: $("notice-close") });
const cloud = new Cloud($("cloud"), { relief: $("relief"), paint: $("cloud-paint"), spin: $("cloud-spin") });
const marks = new Marks($("marks"), {
  tools: document.querySelectorAll("[name=tool]"), brush: $("brush"), brushLine: $("brush-line"), help: $("tool-help"), undo: $("mark-undo"), clear: $("mark-clear"),
});
const stage = new Stage({
  frame: $("frame"), base: $("base"), over: $("over"), split: $("split"), readout: $("readout"), legend: $("legend"),
  low: $("legend-low"), high: $("legend-high"), scale: $("legend-scale"), cloudTools: $("cloud-tools"), cloud, marks,
});
const film = new Film($("film"), (canvas) => {
  if (!["compare", "estimate"].includes(view())) choose("estimate");
  canvas ? stage.lay(canvas) : stage.show(view(), answer());
});
const knobs = new Knobs();

const answer = () => state.answers[state.task];
const view = () => document.querySelector("[name=view]:checked")?.value;
const complete = () => Boolean(state.image) && (state.task !== "flow" || state.next) && (state.task !== "amodal" || !marks.empty);

function trouble(error, again) {
  if (error.name === "AbortError") return;
  const fault = error instanceof Trouble ? error : new Trouble({ title: "The page failed", detail: String(error?.message || error) });
  notice.show(fault, again);
  if (fault.status === 401) askForKey(again ?? (() => notice.hide()));
}

/** Run a thing that a person asked for; what goes wrong is told. */
const tried = (act) => (...given) => Promise.resolve(act(...given)).catch((error) => trouble(error));

// --- pictures

async function take(blob, slot, name) {
  const picture = await pictureOf(blob, name);
  stop();
  if (slot === "next") {
    state.next = state.image ? await fitted(picture, state.image) : picture;
    delete state.answers.flow;
  } else {
    state.image = picture;
    state.answers = {};
    if (state.next) state.next = await fitted(state.next, picture);
    marks.load(picture);
  }
}

async function takeAll(files) {
  if (!files.length) return;
  const second = state.task === "flow" && state.image && !state.next;
  await take(files[0], second ? "next" : "image", files[0].name);
  if (state.task === "flow" && files.length > 1) await take(files[1], "next", files[1].name);
  begin();
}

async function sample({ image, next, mask }) {
  state.next = null;
  await take(await fetched(`/page/samples/${image}`), "image", image);
  if (next) await take(await fetched(`/page/samples/${next}`), "next", next);
  if (mask) marks.load(state.image, await createImageBitmap(await fetched(`/page/samples/${mask}`)));
  begin();
}

async function photograph(slot) {
  const blob = await still($("camera-dialog"));
  if (!blob) return;
  await take(blob, slot, "camera.jpg");
  begin();
}

/** After pictures came: look at once where nothing else is to be said. */
function begin() {
  notice.hide();
  refresh();
  if (complete()) look();
}

// --- asking

/** The request as it now stands. */
async function asked() {
  const body = new FormData();
  body.set("image", state.image.blob, "image");
  if (state.task === "flow") body.set("next_image", state.next.blob, "next");
  if (state.task === "amodal") body.set("mask", await marks.blob(), "mask.png");
  for (const [name, value] of Object.entries(knobs.options)) body.set(name, value);
  return body;
}

function stop() {
  state.running?.abort();
  state.running = null;
  busy(false, "");
}

async function look() {
  stop();
  const { task, image } = state, mine = (state.running = new AbortController()), began = performance.now();
  const visible = task === "amodal" ? marks.bits() : null, current = () => state.running === mine;
  notice.hide();
  if (view() === "mark") {
    choose("compare");
    stage.show("compare", answer());
  }
  busy(true, "Sending …");
  try {
    const body = await asked();
    const wanted = { format: "json", output_uncertainty: knobs.uncertain, previews: Math.min(12, knobs.options.steps) };
    if (task !== "amodal") Object.assign(wanted, { encoding: "npy", match_input_resolution: false });
    for (const [name, value] of Object.entries(wanted)) body.set(name, String(value));
    let seen = 0;
    for await (const [name, data] of watch(`/${task}`, body, mine.signal)) {
      if (!current()) return;
      if (name === "progress") progress(data);
      if (name === "preview") {
        const canvas = await previewed(task, data, image, visible);
        if (current()) preview(canvas, data, seen++ === 0);
      }
      if (name === "answer") {
        const made = await ready(task, data, image, visible);
        if (current()) finish(task, made, (performance.now() - began) / 1000, seen === 0);
      }
    }
  } catch (error) {
    if (current()) {
      state.running = null;
      refresh();
      trouble(error, look);
    }
  } finally {
    if (current()) { state.running = null; busy(false); }
  }
}

function busy(on, words) {
  $("look").textContent = on ? "Stop" : answer() ? "Look again" : "Look";
  $("look").toggleAttribute("data-stop", on);
  $("look").disabled = !on && !complete();
  $("progress").hidden = !on;
  $("progress").style.setProperty("--done", 0);
  $("stage").setAttribute("aria-busy", String(on));
  if (words !== undefined) say(words);
}

const say = (words) => { if ($("status").textContent !== words) $("status").textContent = words; };

function progress(heard) {
  $("progress").style.setProperty("--done", along(heard));
  say(PHASES[heard.phase] ?? "");
}

function preview(canvas, { step, steps: of }, first) {
  if (first) film.clear();
  film.add(canvas, `step ${step}`, `The estimate after step ${step} of ${of}`);
  $("views").hidden = false;
  if (["compare", "estimate"].includes(view()) || !answer()) {
    if (!["compare", "estimate"].includes(view())) choose("compare");
    stage.show(view(), null);
    stage.lay(canvas);
    $("frame").removeAttribute("data-bare");
  }
}

function finish(task, made, seconds, unseen) {
  state.answers[task] = made;
  if (unseen) film.clear();
  film.add(made.estimate, "answer", "The answer", true);
  if (task === "depth") cloud.load(made.map, state.image.canvas);
  refresh();
  say(told(seconds, made.document.options));
}

// --- showing

function choose(name) {
  document.querySelector(`[name=view][value=${name}]`).checked = true;
}

/** The views there are now; the one shown stays if it can. */
function views() {
  const made = answer(), of = TASKS[state.task].views;
  const can = { mark: Boolean(state.image), compare: made, estimate: made, object: made?.object, uncertainty: made?.uncertainty, cloud: made };
  for (const label of document.querySelectorAll("[data-view]:is(label)")) {
    const { view: name } = label.dataset;
    label.hidden = !of.includes(name);
    label.querySelector("input").disabled = !can[name];
  }
  if (!of.includes(view()) || !can[view()]) choose(made || state.task !== "amodal" ? "compare" : "mark");
  $("views").hidden = !state.image || !(made || state.task === "amodal");
}

function refresh() {
  const { task, image, next } = state, made = answer(), words = TASKS[task];
  $("empty").hidden = Boolean(image);
  $("stage").toggleAttribute("data-empty", !image);
  $("frame").hidden = !image;
  $("empty-title").textContent = words.title;
  $("empty-text").textContent = words.text;
  $("tag-right").textContent = words.estimate;
  $("pictures").hidden = !image;
  $("slot-next").hidden = task !== "flow";
  $("pictures-title").textContent = task === "flow" ? "Pictures" : "Picture";
  $("marking").hidden = task !== "amodal" || !image;
  if (image) fill($("slot-image"), image);
  if (next) fill($("slot-next"), next);
  $("slot-next").querySelector("[data-choose]").firstChild.data = next ? "Change" : "Choose";
  if (image) stage.picture(image);
  views();
  if (image) stage.show(view(), made);
  $("frame").toggleAttribute("data-bare", !made);
  if (!made) film.clear();
  results(made);
  $("look").disabled = !state.running && !complete();
  if (!state.running) busy(false, image && !complete() ? missing() : made ? undefined : "");
}

const missing = () => (state.task === "flow" ? "Now add the next frame." : "Mark the object, then look.");

function results(made) {
  $("result").hidden = !made;
  if (!made) return;
  const { document: said, task } = made, stem = state.image.name.replace(/\.[^.]*$/, "") || "picture";
  const again = async () => {
    const body = await asked();
    for (const name of ["steps", "ensemble_size", "seed", "reduction", "processing_resolution"]) body.set(name, said.options[name]);
    return body;
  };
  offer($("downloads"), task, stem, { form: again, uncertain: Boolean(said.uncertainty), ply: task === "depth" ? () => cloud.ply() : null, trouble });
  facts($("facts"), said);
}

async function learn() {
  const { features } = await getJson("/");
  if (features?.mask === false) marks.byHandOnly();
  await knobs.learn();
  knobs.allow(state.task);
  if (!state.running) refresh();
}

function enter(task) {
  stop();
  state.task = task;
  notice.hide();
  film.clear();
  knobs.reset(task);
  lay($("samples"), task, tried(sample));
  refresh();
  const made = answer();
  if (made) film.add(made.estimate, "answer", "The answer", true);
  else if (complete() && task !== "amodal") look();
}

// --- wiring

for (const radio of document.querySelectorAll("[name=task]")) radio.addEventListener("change", () => enter(radio.value));
for (const radio of document.querySelectorAll("[name=view]")) radio.addEventListener("change", () => { stage.show(radio.value, answer()); film.last(); });
for (const button of document.querySelectorAll("[data-choose]")) {
  button.addEventListener("click", () => pick($("file"), tried(async (file) => { await take(file, button.dataset.choose, file.name); begin(); })));
}
for (const button of document.querySelectorAll("[data-camera]")) {
  button.hidden = !navigator.mediaDevices;
  button.addEventListener("click", tried(() => photograph(button.dataset.camera)));
}
knobs.addEventListener("change", () => { if (knobs.eager && complete() && (answer() || state.running)) look(); });
$("look").addEventListener("click", () => { if (state.running) { stop(); refresh(); } else look(); });
$("key-open").addEventListener("click", () => openKey(() => learn().catch(trouble)));
marks.addEventListener("trouble", (event) => trouble(event.detail));
marks.addEventListener("change", () => {
  if (!state.answers.amodal && state.task !== "amodal") return;
  stop();
  delete state.answers.amodal;
  if (state.task === "amodal") refresh();
});
listen($("stage"), tried(takeAll));
themed($("theme"), $("theme-name"));
enter(document.querySelector("[name=task]:checked").value);
learn().catch((error) => trouble(error, () => learn().catch(trouble)));
