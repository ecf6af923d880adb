// Dialogs: questions, and dialogs with a close button.

import { find } from "./dom.js";

for (const button of document.querySelectorAll("dialog [data-close]")) {
  button.addEventListener("click", () => button.closest("dialog").close());
}
for (const dialog of document.querySelectorAll("dialog")) {
  // A click outside the dialog hits its backdrop, which counts as the dialog itself.
  dialog.addEventListener("mousedown", (event) => {
    if (event.target === dialog && dialog.id !== "prompt") dialog.close();
  });
}

/** Ask a question; resolves to the text that was typed ("" without a field), or null. */
export function ask({ question, accept, hint = "", value = null, isSecret = false, isDangerous = false }) {
  const dialog = find("#prompt");
  const input = find("#prompt-input");
  find("#prompt-question").textContent = question;
  find("#prompt-hint").textContent = hint;
  find("#prompt-hint").hidden = !hint;
  const button = find("#prompt-accept");
  button.textContent = accept;
  button.classList.toggle("danger", isDangerous);
  input.hidden = value === null;
  input.type = isSecret ? "password" : "text";
  input.value = value ?? "";
  dialog.showModal();
  if (input.hidden) find("#prompt-cancel").focus();
  else input.select();
  return new Promise((resolve) => {
    let answer = null;
    const finish = () => {
      answer = input.value;
      dialog.close();
    };
    button.onclick = finish;
    input.onkeydown = (event) => {
      if (event.key === "Enter" && !event.isComposing) {
        event.preventDefault(); // the key would press the button that gets the focus next
        finish();
      }
    };
    find("#prompt-cancel").onclick = () => dialog.close();
    dialog.onclose = () => {
      input.value = "";
      resolve(answer);
    };
  });
}
