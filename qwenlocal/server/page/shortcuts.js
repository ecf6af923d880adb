// Keys for the whole page, and the list of them. Letters need Alt, because the cursor is in a text field most of the time.

import { create, find } from "./dom.js";
import { t } from "./texts.js";

const LIST = [
  [["Enter"], "key_send"],
  [["Shift", "Enter"], "key_newline"],
  [["Esc"], "key_stop"],
  [["/"], "key_search"],
  [["Alt", "N"], "key_new"],
  [["↑"], "key_edit"],
  [["Alt", "R"], "key_retry"],
  [["Alt", "C"], "key_continue"],
  [["Alt", ",", "."], "key_versions"],
  [["Alt", "S"], "key_settings"],
  [["?"], "key_help"],
];

/** `actions` maps the names of the actions to their functions. */
export function listenToKeys(actions) {
  const withAlt = {
    KeyN: actions.newChat,
    KeyR: actions.retry,
    KeyC: actions.continueAnswer,
    KeyS: actions.openSettings,
    Comma: actions.previousVersion,
    Period: actions.nextVersion,
  };
  const plain = { "/": actions.search, "?": showShortcuts };
  document.addEventListener("keydown", (event) => {
    if (event.isComposing || document.querySelector("dialog[open]")) return;
    const isTyping = event.target.matches("input, textarea, select");
    let action = null;
    if (event.key === "Escape") action = actions.escape;
    else if (event.altKey && !event.ctrlKey && !event.metaKey) action = withAlt[event.code];
    else if (!isTyping && !event.ctrlKey && !event.metaKey) action = plain[event.key];
    if (!action) return;
    event.preventDefault();
    action();
  });
  find("#show-shortcuts").addEventListener("click", showShortcuts);
}

function showShortcuts() {
  const rows = LIST.flatMap(([keys, text]) => [
    create("dt", {}, ...keys.map((key) => create("kbd", {}, key))),
    create("dd", {}, t(text)),
  ]);
  find("#shortcut-list").replaceChildren(...rows);
  find("#shortcuts").showModal();
}
