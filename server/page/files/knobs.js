// Everything that may be turned: the two dials, and what stands under "More".

import { getJson } from "/page/api.js";
import { Dial } from "/page/dial.js";
import { detailsUpTo, membersUpTo, stepsUpTo, TASKS } from "/page/tasks.js";

const $ = (id) => document.getElementById(id);
const LIMITS = { steps: "steps", ensemble_size: "members", processing_resolution: "detail" };
const looksOf = (count) => `${count} ${count === 1 ? "look" : "looks"}`;
const option = (value, text) => Object.assign(document.createElement("option"), { value, textContent: text });

/** Sends `change` when something has been turned and come to rest. */
export class Knobs extends EventTarget {
  constructor() {
    super();
    this.most = { steps: 100, members: 20, detail: 768 };
    this.turned = new Set();
    this.steps = new Dial($("dial-steps"), { label: "Steps", values: [4], value: 4, says: (n) => `${n} ${n === 1 ? "step" : "steps"}` });
    this.members = new Dial($("dial-members"), { label: "Members", values: [5], value: 5, says: (n) => `${n} ${n === 1 ? "member" : "members"}` });
    const turned = (name) => { this.turned.add(name); this.dispatchEvent(new Event("change")); };
    for (const name of ["steps", "members"]) {
      this[name].addEventListener("input", () => this.cost());
      this[name].addEventListener("change", () => turned(name));
      this[name].host.addEventListener("pointerdown", () => this.turned.add(name));  // it is in somebody's hand
    }
    for (const id of ["seed", "detail", "reduction", "uncertainty"]) $(id).addEventListener("change", () => turned(id));
    $("seed-other").addEventListener("click", () => { $("seed").value = Math.floor(Math.random() * 1e6); turned("seed"); });
  }

  get eager() { return $("eager").checked; }
  get uncertain() { return $("uncertainty").checked && this.members.value > 1; }

  /** As the server names them; what is left to the model is left out. */
  get options() {
    const all = {
      steps: this.steps.value, ensemble_size: this.members.value, seed: $("seed").value || 0,
      reduction: $("reduction").value, processing_resolution: $("detail").value,
    };
    return Object.fromEntries(Object.entries(all).filter(([, value]) => value !== ""));
  }

  /** Ask the server what its model does by itself, and how far it may be turned. A key without leave to ask is no fault. */
  async learn() {
    try {
      this.card = (await getJson("/models")).models[0];
    } catch (error) {
      if (error.status !== 403) throw error;
    }
    const known = await getJson("/openapi.json").catch(() => null);
    for (const { name, schema } of known?.paths?.["/depth"]?.post?.parameters ?? []) {
      if (LIMITS[name] && schema?.maximum) this.most[LIMITS[name]] = schema.maximum;
    }
  }

  /** The model's own choice for a task. */
  reset(task) {
    this.turned.clear();
    this.allow(task);
  }

  /** What may be chosen for a task, by the model's own choice; what has been turned since `reset` stays where it is. */
  allow(task) {
    const own = this.card?.tasks[task]?.defaults ?? { steps: 4, ensemble_size: 5, reduction: "" };
    const { steps, members, detail, reduction } = this.kept();
    this.steps.allow(stepsUpTo(this.most.steps, own.steps), steps ?? own.steps);
    this.members.allow(membersUpTo(this.most.members, own.ensemble_size), members ?? own.ensemble_size);
    $("reduction").replaceChildren(...TASKS[task].reductions.map((name) => option(name, name.replace("_", " "))));
    if (reduction ?? own.reduction) $("reduction").value = reduction ?? own.reduction;
    const given = own.processing_resolution ? ` (${own.processing_resolution} px)` : "";
    $("detail").replaceChildren(option("", `the model’s own${given}`), ...detailsUpTo(this.most.detail).map((px) => option(px, `${px} px`)));
    $("detail").value = detailsUpTo(this.most.detail).includes(Number(detail)) ? detail : "";
    this.cost();
  }

  /** The values of what has been turned. */
  kept() {
    const values = { steps: this.steps.value, members: this.members.value, detail: $("detail").value, reduction: $("reduction").value };
    return Object.fromEntries(Object.entries(values).filter(([name]) => this.turned.has(name)));
  }

  cost() {
    const [steps, members] = [this.steps.value, this.members.value];
    $("cost").textContent = `${steps} × ${members} = ${looksOf(steps * members)}`;
    $("uncertainty-note").textContent = members > 1 ? "" : "(takes 2 members)";
    $("uncertainty").disabled = members < 2;
  }
}

export const told = (seconds, { steps, ensemble_size }) => `Found in ${seconds.toFixed(2)} s, ${looksOf(steps * ensemble_size)}.`;
