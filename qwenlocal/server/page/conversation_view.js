// The messages of a chat, and an answer that grows below them.

import { announce, create, find } from "./dom.js";
import { MessageView } from "./message_view.js";
import { t } from "./texts.js";

const NEAR = 90; // pixels from the end, within which the view follows the answer

export class ConversationView {
  constructor(actions) {
    this.actions = actions;
    this.scroller = find("#scroll");
    this.list = find("#messages");
    this.notice = find("#notice");
    this.views = [];
    this.follows = true;
    this.scroller.addEventListener("scroll", () => this.noteScroll());
    find("#to-end").addEventListener("click", () => this.scrollToEnd());
  }

  /**
   * Show the path of a chat; messages that are already shown keep their elements. `summary` replaces those that are no
   * longer in the context, "" if there is none.
   */
  show(path, summary = "") {
    const known = new Map(this.views.map((view) => [view.message.number, view]));
    const pending = this.views.at(-1)?.isGrowing ? this.views.at(-1) : null;
    this.views = path.map((message, index) => {
      const isPending = pending && index === path.length - 1 && message.role === "assistant" && !known.has(message.number);
      const view = isPending ? pending : known.get(message.number);
      if (!view || view.isUser !== (message.role === "user")) return new MessageView(message, this.actions);
      if (view === pending) view.setGrowing(false);
      view.update(message);
      return view;
    });
    this.list.replaceChildren(...this.views.map((view) => view.element));
    const outside = this.views.findLast((view) => view.message.is_in_context === false);
    if (summary && outside) outside.element.after(createSummary(summary));
    this.showWelcome();
  }

  get isEditing() {
    return this.views.some((view) => view.editor);
  }

  /** Forget all elements, for another chat. */
  clear() {
    this.views = [];
    this.list.replaceChildren();
    this.showNotice("");
    this.showWelcome();
  }

  /** Show a question that the server has not confirmed yet. */
  addQuestion(text) {
    this.add({ number: null, role: "user", text, versions: [], finish_reason: "" });
  }

  /** Begin an answer below the messages, and return its view. */
  beginAnswer(text = "") {
    const view = this.add({ number: null, role: "assistant", text, versions: [], finish_reason: "" });
    view.setGrowing(true);
    view.ondraw = () => this.follow();
    this.list.setAttribute("aria-busy", "true"); // screen readers read the answer when it is complete
    announce(t("answering"));
    this.scrollToEnd();
    return view;
  }

  add(message) {
    const view = new MessageView(message, this.actions);
    this.views.push(view);
    this.list.append(view.element);
    this.showWelcome();
    return view;
  }

  endAnswer() {
    this.list.removeAttribute("aria-busy");
    this.follow();
  }

  /** The last question or answer that is in the journal. */
  last(role) {
    return this.views.findLast((view) => view.message.role === role && view.message.number !== null);
  }

  /** Show a sentence below the messages, with a button if `action` is given; "" hides it. */
  showNotice(text, label = "", action = null) {
    this.notice.hidden = !text;
    this.notice.replaceChildren(create("span", {}, text));
    if (action) this.notice.append(create("button", { type: "button", onclick: action }, label));
    if (text) this.follow();
  }

  showWelcome() {
    find("#welcome").hidden = this.views.length > 0;
  }

  // --- scrolling

  noteScroll() {
    const { scrollHeight, scrollTop, clientHeight } = this.scroller;
    this.follows = scrollHeight - scrollTop - clientHeight < NEAR;
    find("#to-end").hidden = this.follows;
  }

  follow() {
    if (this.follows) this.scroller.scrollTop = this.scroller.scrollHeight;
    else this.noteScroll();
  }

  scrollToEnd() {
    this.follows = true;
    this.follow();
    find("#to-end").hidden = true;
  }
}

function createSummary(text) {
  const title = create("summary", {}, t("summary"));
  return create("details", { class: "summary" }, title, create("p", {}, text));
}
