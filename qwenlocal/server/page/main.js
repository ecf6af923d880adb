// The page: the chat that is shown, and the actions on it.

import { Answer } from "./answer.js";
import { ApiError, changeChat, countTokens, onKeyNeeded, readChat, readSettings } from "./api.js";
import { ChatList } from "./chat_list.js";
import { Composer, MIN_TIMED_TOKENS } from "./composer.js";
import { ContextBar } from "./context_bar.js";
import { ConversationView } from "./conversation_view.js";
import { ask } from "./dialogs.js";
import { announce, find, showToast } from "./dom.js";
import { getPreference, readKeyFromAddress, readSampling, setApiKey, setPreference } from "./preferences.js";
import { SettingsDialog } from "./settings_dialog.js";
import { listenToKeys } from "./shortcuts.js";
import { formatNumber, loadTexts, t } from "./texts.js";

const POLL = 1000; // milliseconds, while another tab answers the chat
const createChat = () => ({
  id: null, title: "", model: "", system: getPreference("system"), summary: "", state: "free", path: [],
});

class App {
  models = [];
  prompts = {};
  answerShare = 0.1;
  answers = new Set();
  chat = createChat();
  promptSpeed = 0; // tokens per second of the last long prompt, 0 if there was none

  async start() {
    await loadTexts(getPreference("language"));
    document.body.hidden = false;
    onKeyNeeded(askForKey);
    this.view = new ConversationView({
      edit: (message, text) => this.edit(message, text),
      retry: (message) => this.retry(message),
      continueAnswer: () => this.continueAnswer(),
      selectVersion: (number) => this.change({ version: number }),
    });
    this.context = new ContextBar();
    this.composer = new Composer(this);
    this.list = new ChatList(this);
    this.settings = new SettingsDialog(this);
    this.listen();
    this.ready = this.loadSettings();
    await this.ready;
    await this.followAddress();
    await this.list.refresh();
    document.body.removeAttribute("aria-busy");
  }

  listen() {
    find("#new-chat").addEventListener("click", () => this.showNewChat());
    find("#model").addEventListener("change", (event) => this.chooseModel(event.target.value));
    find("#show-menu").addEventListener("click", () => showMenu(true));
    find("#hide-menu").addEventListener("click", () => showMenu(false));
    find("#shade").addEventListener("click", () => showMenu(false));
    addEventListener("hashchange", () => this.followAddress());
    addEventListener("focus", () => this.catchUp());
    listenToKeys({
      newChat: () => this.showNewChat(),
      retry: () => this.retry(this.view.last("assistant")?.message),
      continueAnswer: () => this.continueAnswer(),
      openSettings: () => this.settings.open(),
      previousVersion: () => press("previous"),
      nextVersion: () => press("next"),
      search: () => (showMenu(true), find("#search").focus()),
      escape: () => this.escape(),
    });
  }

  async loadSettings() {
    const { models, prompts, version, answer_share: share } = await readSettings();
    Object.assign(this, { models, prompts, answerShare: share });
    find("#version").textContent = version;
    find("#model").replaceChildren(...models.map(({ name }) => new Option(shortName(name), name)));
    if (!models.length) this.view.showNotice(t("nothing_installed"));
  }

  // --- which chat

  /** Show the chat whose number is in the address. */
  async followAddress() {
    const id = Number(location.hash.slice(1));
    if (Number.isInteger(id) && id > 0) await this.openChat(id);
    else if (this.chat.id !== null || !this.answer) await this.display(createChat());
  }

  async openChat(id) {
    showMenu(false);
    if (this.chat.id === id && this.answer) return;
    const running = [...this.answers].find((answer) => answer.chat.id === id);
    try {
      await this.display(running?.chat || (await readChat(id)));
    } catch (error) {
      showToast(error.message);
      this.showNewChat();
    }
  }

  showNewChat() {
    showMenu(false);
    if (location.hash) history.pushState(null, "", location.pathname);
    this.display(createChat());
    this.composer.focus();
  }

  forgetChat(id) {
    if (this.chat.id === id) this.showNewChat();
  }

  /** Show a chat, with the answer that is being generated for it. */
  async display(chat) {
    clearTimeout(this.poll);
    this.chat = chat;
    this.view.clear();
    this.showPath();
    this.showAnswer();
    this.showTitle();
    this.showModel();
    this.view.scrollToEnd();
    this.list.showChats();
    this.showState();
    await this.refreshContext();
    this.composer.refresh();
    this.composer.focus();
  }

  showState() {
    const { state } = this.chat;
    clearTimeout(this.poll);
    if (this.answer) this.view.showNotice("");
    else if (state === "free") this.offerRetry();
    else if (state === "elsewhere") this.view.showNotice(t("open_elsewhere"));
    else {
      this.view.showNotice(t("answering_elsewhere"));
      this.poll = setTimeout(() => this.reread(), POLL);
    }
  }

  showPath(path = this.chat.path) {
    this.view.show(path, this.chat.summary);
  }

  /** Show the changes that a terminal or another tab has made while this page was in the background. */
  async catchUp() {
    if (!this.ready || document.body.hasAttribute("aria-busy")) return;
    await this.list.refresh();
    const { chat } = this;
    const known = this.list.chats.find(({ id }) => id === chat.id);
    const isCurrent = known?.changed === chat.changed && chat.state === "free";
    if (!known || isCurrent || this.answer || this.view.isEditing) return;
    await this.reread();
    if (chat === this.chat) await this.refreshContext();
  }

  /** Read the chat again, because another tab or a terminal changes it. */
  async reread() {
    const { chat } = this;
    try {
      const read = await readChat(chat.id);
      if (chat !== this.chat || this.answer) return;
      Object.assign(chat, read);
      this.showPath();
      this.view.follow();
      this.showState();
    } catch (error) {
      this.view.showNotice(error.message, t("reload"), () => this.reread());
    }
  }

  showTitle() {
    const title = this.chat.title || t("new_chat");
    find("#title").textContent = title;
    document.title = this.chat.title ? `${title} – qwenlocal` : "qwenlocal";
  }

  // --- model, prompt, context

  get model() {
    return find("#model").value;
  }

  showModel() {
    const names = this.models.map(({ name }) => name);
    const name = [this.chat.model, getPreference("model"), names[0]].find((one) => names.includes(one));
    find("#model").value = name || "";
  }

  chooseModel(name) {
    setPreference("model", name);
    this.chat.model = name;
    this.refreshContext();
  }

  get system() {
    return this.chat.system;
  }

  /** Set the system prompt of the chat; that of a new chat is kept for the next ones. */
  async setSystem(text) {
    if (this.chat.id === null) {
      this.chat.system = text;
      setPreference("system", text);
      await this.refreshContext();
    } else await this.change({ system: text });
  }

  async refreshContext() {
    const { chat } = this;
    if (this.answer) return;
    this.context.showSpeed(0);
    try {
      const { tokens, n_ctx: size } = await countTokens(this.model, chat.id, chat.system);
      if (chat === this.chat && !this.answer) this.context.show(tokens, size);
    } catch {
      this.context.show(null, null);
    }
    this.composer.refresh();
  }

  /** The maximum number of tokens of the next question; null if it is not known. */
  freeTokens() {
    const { used, size } = this.context;
    return used === null || !size ? null : Math.max(0, Math.floor(size * (1 - this.answerShare)) - used);
  }

  // --- answers

  /** The answer that is being generated for the chat that is shown. */
  get answer() {
    return [...this.answers].find((answer) => answer.chat === this.chat);
  }

  get isAnswering() {
    return Boolean(this.answer);
  }

  ask(text, files, cut, restore) {
    const shown = [...files.map(({ name, text: content }) => `${name}:\n\`\`\`\n${content}\n\`\`\``), text].join("\n\n");
    this.view.addQuestion(shown);
    this.run({ kind: "ask", text, files, cut }, restore);
  }

  edit(message, text) {
    this.showPath(this.chat.path.slice(0, this.chat.path.findIndex(({ number }) => number === message.number)));
    this.view.addQuestion(text);
    this.run({ kind: "edit", message: message.number, text }, () => this.composer.restore(text, []));
  }

  retry(message) {
    if (this.answer) return;
    const { path } = this.chat;
    if (!message && path.at(-1)?.role !== "user") return;
    this.showPath(message ? path.slice(0, path.findIndex(({ number }) => number === message.number)) : path);
    this.run({ kind: "retry", message: message?.number ?? null });
  }

  /** Continue the last answer, which was cut off, or answer a question that has no answer yet. */
  continueAnswer() {
    const last = this.chat.path.at(-1);
    if (last?.role === "user") this.retry(null);
    if (this.answer || !last?.can_continue) return;
    this.showPath(this.chat.path.slice(0, -1));
    this.run({ kind: "continue" }, () => {}, last.text);
  }

  async run(question, restore = () => {}, text = "") {
    const { chat } = this;
    const answer = new Answer(chat, text);
    this.answers.add(answer);
    this.view.showNotice("");
    this.showAnswer();
    this.composer.refresh();
    const settings = { chat: chat.id, model: this.model, system: chat.system, copies: chat.state === "elsewhere" };
    let failure = null;
    try {
      await answer.run({ ...question, ...settings, ...readSampling() }, (event) => this.handle(answer, event));
    } catch (error) {
      failure = error;
    }
    this.answers.delete(answer);
    if (failure) await this.fail(answer, failure, restore);
    if (chat === this.chat) {
      this.view.endAnswer();
      this.composer.refresh();
      this.composer.focus();
    }
    await this.list.refresh();
    chat.title = this.list.chats.find(({ id }) => id === chat.id)?.title || chat.title;
    if (chat === this.chat) this.showTitle();
  }

  /** Show the text so far of the answer that is being generated. */
  showAnswer() {
    const { answer } = this;
    if (!answer) return;
    answer.view = this.view.beginAnswer(answer.text);
    answer.view.showProgress(answer.progress);
    this.showMeters(answer);
  }

  showMeters(answer) {
    if (answer.size) this.context.show(answer.promptTokens + answer.tokens, answer.size);
    this.context.showSpeed(answer.speed);
  }

  handle(answer, event) {
    if (event.type === "error") throw new ApiError(event.message, 0, event.code);
    if (answer.chat !== this.chat) return;
    if (event.type === "start") {
      if (location.hash !== `#${event.chat}`) history.pushState(null, "", `#${event.chat}`);
      this.showPath();
      this.showAnswer();
      this.list.refresh();
    } else if (event.type === "progress" || event.type === "summarizing") {
      answer.view.showProgress(answer.progress);
    } else if (event.type === "text") {
      answer.view.append(event.text);
    } else if (event.type === "evicted") {
      showToast(describeEviction(event));
    } else if (event.type === "done") {
      this.finish(answer, event);
      return;
    }
    this.showMeters(answer);
  }

  finish(answer, { path, stats, error }) {
    if (stats.prompt_tokens - stats.reused_tokens >= MIN_TIMED_TOKENS) this.promptSpeed = stats.prompt_speed;
    this.showPath();
    if (path.at(-1)?.role === "assistant") this.view.views.at(-1).setStats(stats);
    this.context.show(answer.promptTokens + answer.tokens, answer.size);
    this.context.showSpeed(0); // the answer itself shows it now
    const reason = path.at(-1)?.finish_reason;
    announce(reason && reason !== "eos" ? t(`reason_${reason}`) : t("answered"));
    this.offerRetry();
    if (error) showToast(error);
  }

  /** Offer to answer a question that was stopped before its answer began. */
  offerRetry() {
    const isOpen = this.chat.path.at(-1)?.role === "user";
    this.view.showNotice(isOpen ? t("no_answer") : "", t("retry"), () => this.retry(null));
  }

  /** Show why the answer failed or is incomplete, and the current state of the journal. */
  async fail(answer, error, restore) {
    const { chat } = answer;
    if (answer.isAtStart) restore();
    try {
      Object.assign(chat, chat.id === null ? { path: [] } : await readChat(chat.id));
      if (chat === this.chat) this.showPath();
    } catch {
      answer.view?.setGrowing(false); // no connection: keep the text that is shown
    }
    if (chat !== this.chat) showToast(error.message);
    else if (answer.isAborted || chat.state !== "free") this.showState();
    else this.view.showNotice(error.message);
  }

  async stop() {
    try {
      await this.answer?.stop();
    } catch (error) {
      showToast(error.message);
    }
  }

  editLast() {
    if (!this.answer) this.view.last("user")?.edit();
  }

  /** Change the chat in the journal, and show it. */
  async change(change) {
    const { chat } = this;
    try {
      const read = await changeChat(chat.id, change);
      Object.assign(chat, read);
      if (chat !== this.chat) return;
      this.showPath();
      this.showTitle();
      await this.refreshContext();
    } catch (error) {
      showToast(error.message);
    }
  }

  escape() {
    if (this.answer) this.stop();
    else if (document.body.classList.contains("menu")) showMenu(false);
    else document.activeElement.blur();
  }
}

let keyQuestion = null;

/** Ask for the API key; requests that need it meanwhile wait for the same answer. */
function askForKey() {
  const question = { question: t("key_needed"), hint: t("key_hint"), accept: t("continue"), value: "", isSecret: true };
  keyQuestion ??= ask(question).then((key) => {
    setApiKey((key || "").trim().replace(/^.*#key=/, ""));
    keyQuestion = null;
  });
  return keyQuestion;
}

/** `To make room, the oldest 3 turns, starting with “Hello, …”, were removed from the context.` */
function describeEviction({ turns, first, lacks_room: lacksRoom }) {
  const text = turns === 1 ? t("evicted_one", { first }) : t("evicted_many", { turns: formatNumber(turns), first });
  return lacksRoom ? `${text} ${t("no_summary")}` : text;
}

/** Click a button of the last answer that has versions. */
function press(action) {
  [...document.querySelectorAll(`#messages [data-action="${action}"]`)].at(-1)?.click();
}

/** Show the chats on a narrow screen, where they cover the conversation. */
function showMenu(isShown) {
  if (isShown && !matchMedia("(width <= 48rem)").matches) return; // they are beside it
  if (document.body.classList.contains("menu") === isShown) return;
  document.body.classList.toggle("menu", isShown);
  find("#show-menu").setAttribute("aria-expanded", String(isShown));
  if (isShown) find("#search").focus({ preventScroll: true });
  else if (find("#sidebar").contains(document.activeElement)) find("#show-menu").focus();
}

/** "Qwen1.5-7B-Chat-GGUF/qwen1_5-7b-chat-q4_k_m.gguf" without the folders before it. */
const shortName = (name) => name.split(/[\\/]/).at(-1);

readKeyFromAddress();
const app = new App();
app.start();
