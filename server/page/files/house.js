// The key and the colours: what a browser remembers for its owner.

import { key } from "/page/api.js";

const $ = (id) => document.getElementById(id);
const THEMES = ["auto", "light", "dark"];
const STORE = "saccade-theme";

/** Open the key's dialog; `then` is called when a key was given. */
export function openKey(then, words = "A server with keys asks for one; whoever runs it can give you yours.") {
  const dialog = $("key-dialog");
  if (dialog.open) return;
  $("key-text").textContent = words;
  $("key").value = key.read();
  $("key-keep").checked = key.kept();
  $("key-forget").onclick = () => { key.write(""); dialog.close("forgot"); };
  $("key-cancel").onclick = () => dialog.close("");
  dialog.onclose = () => {
    if (dialog.returnValue !== "save") return;
    key.write($("key").value.trim(), $("key-keep").checked);
    then();
  };
  dialog.returnValue = "";
  dialog.showModal();
  $("key").select();
}

export function askForKey(then) {
  openKey(then, key.read() ? "The server does not know this key. Try another." : "This server asks for a key. Whoever runs it can give you one.");
}

export function themed(button, name) {
  const set = (theme) => {
    document.documentElement.toggleAttribute("data-theme", theme !== "auto");
    if (theme !== "auto") document.documentElement.dataset.theme = theme;
    name.textContent = theme[0].toUpperCase() + theme.slice(1);
  };
  let theme = localStorage.getItem(STORE) || "auto";
  set(theme);
  button.addEventListener("click", () => {
    theme = THEMES[(THEMES.indexOf(theme) + 1) % THEMES.length];
    localStorage.setItem(STORE, theme);
    set(theme);
  });
}
