// An answer that is being generated, for its chat, which may or may not be shown.

import { stopAnswer, streamAnswer } from "./api.js";
import { formatNumber, formatShare, t } from "./texts.js";

const PATIENCE = 1500; // milliseconds, for the server to stop an answer

export class Answer {
  promptTokens = 0;
  tokens = 0;
  size = 0;
  progress = "";
  connection = new AbortController();
  isAtStart = true; // nothing is in the journal yet

  /** `text` is the beginning of an answer that is continued. */
  constructor(chat, text) {
    this.chat = chat;
    this.text = text;
    this.key = randomKey();
    this.progress = t("loading");
  }

  /** Ask, and call `onEvent` with each event after this object has processed it. */
  async run(question, onEvent) {
    for await (const event of streamAnswer({ ...question, key: this.key }, this.connection.signal)) {
      this.take(event);
      onEvent(event);
    }
  }

  take(event) {
    if (event.type === "start") {
      this.isAtStart = false;
      this.size = event.n_ctx;
      this.chat.id = event.chat;
      this.chat.path = event.path;
      this.chat.summary = event.summary;
      this.chat.state = "answering";
      this.text = event.text;
    } else if (event.type === "progress") {
      this.promptTokens = event.total;
      this.progress = t("reading_prompt", { share: formatShare(event.total ? event.done / event.total : 1) });
    } else if (event.type === "summarizing") {
      this.progress = t("summarizing", { words: formatNumber(event.words) });
    } else if (event.type === "text") {
      this.begin ??= performance.now();
      this.text += event.text;
      this.tokens = event.tokens;
    } else if (event.type === "done") {
      this.promptTokens = event.stats.prompt_tokens || this.promptTokens;
      this.tokens = event.stats.answer_tokens;
      this.chat.path = event.path;
      this.chat.summary = event.summary;
      this.chat.state = "free";
    }
  }

  /** Tokens per second so far. */
  get speed() {
    const seconds = this.begin ? (performance.now() - this.begin) / 1000 : 0;
    return seconds > 0.3 ? (this.tokens - 1) / seconds : 0;
  }

  /**
   * Stop the answer with a request. Browsers open six connections to a server; if answers occupy all of them, stop it
   * by closing its connection.
   */
  async stop() {
    const timer = setTimeout(() => this.connection.abort(), PATIENCE);
    try {
      await stopAnswer(this.key);
    } finally {
      clearTimeout(timer);
    }
  }

  get isAborted() {
    return this.connection.signal.aborted;
  }
}

/** Browsers have crypto.randomUUID only with HTTPS or on this machine. */
function randomKey() {
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}
