// The dialog of settings: system prompt, sampling, appearance.

import { create, find } from "./dom.js";
import { SAMPLING, getPreference, setPreference } from "./preferences.js";
import { language, languages, t } from "./texts.js";

const OWN = "*"; // the choice for a prompt that is not in a file

export class SettingsDialog {
  /** `app` has ready, prompts, system and setSystem(text). */
  constructor(app) {
    this.app = app;
    this.dialog = find("#settings");
    find("#show-settings").addEventListener("click", () => this.open());
    find("#reset-settings").addEventListener("click", () => this.reset());
    find("#switch-theme").addEventListener("click", () => setTheme(isDark() ? "light" : "dark"));
    find("#theme-choice").addEventListener("change", (event) => setTheme(event.target.value));
    find("#language-choice").addEventListener("change", (event) => {
      setPreference("language", event.target.value);
      location.reload();
    });
    find("#overflow-choice").addEventListener("change", (event) => setPreference("overflow", event.target.value));
    find("#prompt-choice").addEventListener("change", (event) => this.choosePrompt(event.target.value));
    this.dialog.addEventListener("close", () => this.savePrompt());
  }

  async open() {
    await this.app.ready;
    const names = new Intl.DisplayNames(language, { type: "language" });
    find("#language-choice").replaceChildren(
      ...languages.map((tag) => new Option(nativeName(tag) || names.of(tag), tag, false, tag === language)),
    );
    find("#theme-choice").value = getPreference("theme");
    find("#overflow-choice").value = getPreference("overflow");
    find("#prompt-choice").replaceChildren(
      new Option(t("prompt_none"), ""),
      ...Object.entries(this.app.prompts).map(([name, text]) => new Option(name, text)),
      new Option(t("prompt_own"), OWN),
    );
    this.showPrompt(this.app.system);
    this.showSampling();
    this.dialog.showModal();
  }

  showPrompt(text) {
    find("#prompt-text").value = text;
    const choice = find("#prompt-choice");
    choice.value = text;
    if (choice.selectedIndex < 0) choice.value = OWN;
  }

  choosePrompt(value) {
    const area = find("#prompt-text");
    if (value === OWN) area.focus();
    else area.value = value;
  }

  savePrompt() {
    const text = find("#prompt-text").value.trim();
    if (text !== this.app.system) this.app.setSystem(text);
  }

  showSampling() {
    find("#sampling").replaceChildren(
      ...SAMPLING.map(({ name, ...limits }) => {
        const input = create("input", { type: "number", inputmode: "decimal", placeholder: "–", ...limits });
        input.value = getPreference(name);
        input.addEventListener("change", () => {
          if (!input.reportValidity()) input.value = getPreference(name);
          setPreference(name, input.value);
        });
        return create("label", {}, create("span", {}, t(name)), input);
      }),
    );
  }

  reset() {
    for (const name of ["overflow", ...SAMPLING.map((parameter) => parameter.name)]) setPreference(name, "");
    find("#overflow-choice").value = "";
    this.showSampling();
    this.showPrompt("");
  }
}

/** The name of a language in itself: "中文". */
const nativeName = (tag) => new Intl.DisplayNames(tag, { type: "language" }).of(tag);

const isDark = () => {
  const theme = document.documentElement.dataset.theme;
  return theme ? theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
};

function setTheme(theme) {
  setPreference("theme", theme);
  document.documentElement.dataset.theme = theme;
}
