// The field for questions, and their attached files.

import { readFile } from "./api.js";
import { create, find, icon, iconButton, showToast } from "./dom.js";
import { formatNumber, formatShare, t } from "./texts.js";

export const MIN_TIMED_TOKENS = 200; // for shorter files no time is estimated

export class Composer {
  /** `app` has model, promptSpeed, freeTokens(), refreshContext(), ask(text, files, cut), stop() and editLast(). */
  constructor(app) {
    this.app = app;
    this.area = find("#question");
    this.files = [];
    this.area.addEventListener("input", () => this.refresh());
    this.area.addEventListener("keydown", (event) => this.handleKey(event));
    this.area.addEventListener("paste", (event) => this.addFiles(event.clipboardData.files, event));
    find("#send").addEventListener("click", () => this.send());
    find("#stop").addEventListener("click", () => this.app.stop());
    const input = find("#file-input");
    find("#attach").addEventListener("click", () => input.click());
    input.addEventListener("change", () => {
      this.addFiles(input.files);
      input.value = "";
    });
    const main = find("main");
    main.addEventListener("dragover", (event) => this.handleDrag(event, true));
    main.addEventListener("dragleave", (event) => this.handleDrag(event, false));
    main.addEventListener("drop", (event) => {
      this.handleDrag(event, false);
      this.addFiles(event.dataTransfer.files);
    });
  }

  handleKey(event) {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing && event.keyCode !== 229) {
      event.preventDefault();
      this.send();
    } else if (event.key === "ArrowUp" && !this.area.value) {
      event.preventDefault();
      this.app.editLast();
    }
  }

  handleDrag(event, isOver) {
    if (![...event.dataTransfer.types].includes("Files")) return;
    event.preventDefault();
    find("#composer").classList.toggle("over", isOver);
  }

  /** Update the height of the field, the buttons and the files. */
  refresh() {
    this.area.style.height = "auto";
    this.area.style.height = `${Math.min(this.area.scrollHeight, innerHeight * 0.4)}px`;
    const isReading = this.files.some((file) => !file.text);
    find("#send").disabled = this.app.isAnswering || isReading || !(this.area.value.trim() || this.files.length);
    find("#send").hidden = this.app.isAnswering;
    find("#stop").hidden = !this.app.isAnswering;
    this.showFiles();
  }

  send() {
    if (find("#send").disabled || find("#send").hidden) return;
    const cut = find("#cut").hidden ? "" : find("#cut-choice").value;
    const files = this.files.map(({ name, text }) => ({ name, text }));
    const text = this.area.value.trim();
    const kept = this.files;
    this.files = [];
    this.area.value = "";
    this.refresh();
    this.app.ask(text, files, cut, () => this.restore(text, kept));
  }

  /** Restore a question that could not be asked, unless a new one was begun. */
  restore(text, files) {
    if (this.area.value || this.files.length) return;
    this.area.value = text;
    this.files = files;
    this.refresh();
  }

  /** Focus the field, except on phones, where a keyboard would cover the chat. */
  focus() {
    if (!matchMedia("(pointer: coarse)").matches) this.area.focus();
  }

  // --- files

  async addFiles(list, event = null) {
    const added = [...list];
    if (added.length) event?.preventDefault();
    for (const file of added) {
      const entry = { name: file.name, text: "", tokens: 0 };
      this.files.push(entry);
      this.refresh();
      try {
        Object.assign(entry, await readFile(file, this.app.model));
      } catch (error) {
        this.files = this.files.filter((other) => other !== entry);
        showToast(error.message);
      }
      this.refresh();
    }
    if (!added.length) return;
    await this.app.refreshContext(); // reading a file loads the model, whose context was not known before
    this.focus();
  }

  showFiles() {
    const list = find("#files");
    list.hidden = !this.files.length;
    const free = this.app.freeTokens();
    list.replaceChildren(
      ...this.files.map((file) =>
        create(
          "li",
          {},
          icon("file"),
          create(
            "span",
            { class: "file-text" },
            create("span", { class: "file-name" }, file.text ? file.name : t("reading_file", { name: file.name })),
            create("span", { class: "file-cost" }, file.text ? describeCost(file, free, this.app.promptSpeed) : ""),
          ),
          iconButton("close", t("remove_file", { name: file.name }), () => this.removeFile(file)),
        ),
      ),
    );
    const total = this.files.reduce((sum, file) => sum + (file.tokens ?? Infinity), 0);
    find("#cut").hidden = free === null || total <= free;
  }

  removeFile(file) {
    this.files = this.files.filter((other) => other !== file);
    this.refresh();
    this.focus();
  }
}

/** The size of a file in tokens and the time to read it, as the terminal shows them. */
function describeCost({ tokens }, free, speed) {
  if (tokens === null) return t("file_huge");
  const count = formatNumber(tokens);
  const size = free > 0 ? t("file_share", { count, share: formatShare(tokens / free) }) : t("file_tokens", { count });
  const seconds = speed && tokens > MIN_TIMED_TOKENS ? tokens / speed : 0;
  const time = seconds >= 90 ? `${Math.round(seconds / 60)} min` : `${Math.round(seconds)} s`;
  return seconds >= 1 ? size + t("file_time", { time }) : size;
}
