// One message: its text and its buttons.

import { copyText, create, icon, iconButton } from "./dom.js";
import { MarkdownView } from "./markdown.js";
import { formatNumber, t } from "./texts.js";

// A file as `Document.to_markdown` writes it, at the beginning of a question.
const FILE = /^([^\n]{1,200}):\n(`{3,})[^\n`]*\n([\s\S]*?)\n\2(?:\n\n|$)/;
const MIN_DELAY = 60; // milliseconds between two drawings of a growing answer

/** `splitFiles(text)` returns the files that a question begins with, and the rest of it. */
export function splitFiles(text) {
  const files = [];
  for (let match; (match = FILE.exec(text)); text = text.slice(match[0].length)) {
    files.push({ name: match[1], text: match[3] });
  }
  return { files, text };
}

export class MessageView {
  /** `actions` has the functions edit(message, text), retry(message), continueAnswer() and selectVersion(number). */
  constructor(message, actions) {
    this.actions = actions;
    this.isUser = message.role === "user";
    this.body = create("div", { class: "body" });
    this.tools = create("div", { class: "tools" });
    this.author = create("h2", { class: "unseen" }, this.isUser ? t("you") : t("assistant"));
    this.element = create("article", { class: this.isUser ? "message user" : "message assistant" }, this.author, this.body, this.tools);
    if (!this.isUser) this.markdown = new MarkdownView(this.body);
    this.update(message);
  }

  update(message) {
    const isSame = this.message?.text === message.text && !this.editor;
    this.message = message;
    this.element.classList.toggle("outside", message.is_in_context === false);
    if (!isSame) this.showText(message.text);
    this.showTools();
  }

  showText(text) {
    if (!this.isUser) {
      this.markdown.show(text);
      return;
    }
    const parts = splitFiles(text);
    const files = parts.files.map(({ name, text: content }) =>
      create("details", { class: "file" }, create("summary", {}, icon("file"), name), create("pre", { tabindex: "0" }, content)),
    );
    this.body.replaceChildren(...files, create("div", { class: "words" }, parts.text));
    this.editor = null;
  }

  // --- growing

  /** Add text to an answer; it is drawn a moment later, so that fast models do not cause a redraw per token. */
  append(text) {
    this.message = { ...this.message, text: this.message.text + text };
    if (!this.hasGrown) {
      this.hasGrown = true;
      this.showTools(); // the progress is over
    }
    if (!this.timer) this.timer = setTimeout(() => this.draw(), this.delay || MIN_DELAY);
  }

  draw() {
    this.timer = null;
    const start = performance.now();
    this.markdown.show(this.message.text);
    this.delay = Math.max(MIN_DELAY, 5 * (performance.now() - start)); // a huge table takes longer
    this.ondraw?.();
  }

  setGrowing(isGrowing) {
    clearTimeout(this.timer);
    this.timer = null;
    this.element.classList.toggle("growing", isGrowing);
    if (!isGrowing) this.markdown.show(this.message.text);
    this.showTools();
  }

  get isGrowing() {
    return this.element.classList.contains("growing");
  }

  /** Show the progress before the first token. */
  showProgress(text) {
    this.progress = text;
    this.showTools();
  }

  // --- tools

  showTools() {
    this.tools.replaceChildren();
    if (this.isGrowing || this.message.number === null) {
      if (this.progress && !this.hasGrown) this.tools.append(create("span", { class: "progress" }, this.progress));
      return;
    }
    const note = this.note();
    if (note) this.tools.append(create("span", { class: "note" }, note));
    if (this.message.can_continue) {
      const attributes = { type: "button", class: "continue", onclick: () => this.actions.continueAnswer() };
      this.tools.append(create("button", attributes, t("continue")));
    }
    if (this.message.versions.length > 1) this.tools.append(this.versionSwitch());
    this.tools.append(iconButton("copy", t("copy"), (event) => this.copy(event.currentTarget)));
    if (this.isUser) this.tools.append(iconButton("edit", t("edit"), () => this.edit(), { "data-action": "edit" }));
    else this.tools.append(iconButton("retry", t("retry"), () => this.actions.retry(this.message), { "data-action": "retry" }));
    if (this.stats) this.tools.append(create("span", { class: "stats" }, this.stats));
  }

  note() {
    const reason = this.message.finish_reason;
    const notes = [];
    if (reason && reason !== "eos") notes.push(t(`reason_${reason}`));
    if (this.message.is_in_context === false) notes.push(t("out_of_context"));
    return notes.join(" ");
  }

  versionSwitch() {
    const { versions, number } = this.message;
    const index = versions.indexOf(number);
    const go = (step) => this.actions.selectVersion(versions[index + step]);
    const position = create("span", { "aria-hidden": "true" }, `${index + 1}/${versions.length}`);
    const spoken = create("span", { class: "unseen" }, t("version_of", { index: index + 1, count: versions.length }));
    return create(
      "span",
      { class: "versions", role: "group", "aria-label": t("versions") },
      iconButton("previous", t("previous_version"), () => go(-1), { disabled: index === 0, "data-action": "previous" }),
      position,
      spoken,
      iconButton("next", t("next_version"), () => go(1), { disabled: index === versions.length - 1, "data-action": "next" }),
    );
  }

  setStats({ answer_tokens: tokens, speed }) {
    if (!tokens) return;
    const values = { tokens: formatNumber(tokens), speed: formatNumber(speed, 1) };
    this.stats = speed ? t("stats", values) : t("file_tokens", { count: values.tokens });
    this.showTools();
  }

  async copy(button) {
    await copyText(this.message.text);
    button.replaceChildren(icon("done"));
    setTimeout(() => button.replaceChildren(icon("copy")), 1500);
  }

  // --- editing

  edit() {
    if (this.editor) return;
    const { text: words } = splitFiles(this.message.text);
    const files = this.message.text.slice(0, this.message.text.length - words.length);
    const area = create("textarea", { "aria-label": t("edit_question"), rows: "1" });
    area.value = words;
    const close = () => {
      this.showText(this.message.text);
      this.showTools();
      this.tools.querySelector('[data-action="edit"]')?.focus();
    };
    const accept = () => {
      const text = files + area.value.trim();
      if (!text) return;
      this.showText(this.message.text);
      this.actions.edit(this.message, text);
    };
    area.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
        event.preventDefault();
        accept();
      } else if (event.key === "Escape") {
        event.stopPropagation();
        close();
      }
    });
    this.editor = create(
      "div",
      { class: "editor" },
      area,
      create(
        "div",
        { class: "editor-foot" },
        create("button", { type: "button", onclick: close }, t("cancel")),
        create("button", { type: "button", class: "primary", onclick: accept }, t("send")),
      ),
    );
    this.body.querySelector(".words").replaceWith(this.editor);
    this.tools.replaceChildren();
    area.focus();
  }
}
