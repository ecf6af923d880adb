// An answer that is being generated, for the chat that it belongs to, whether that is shown or not.

import { stopAnswer, streamAnswer } from "./api.js";
import { formatShare, t } from "./texts.js";

export class Answer {
  text = "";
  promptTokens = 0;
  tokens = 0;
  size = 0;
  progress = "";
  isAtStart = true; // nothing is in the journal yet

  constructor(chat) {
    this.chat = chat;
    this.key = randomKey();
    this.progress = t("loading");
  }

  /** Ask, and call `onEvent` with each event after this object has taken it in. */
  async run(question, onEvent) {
    for await (const event of streamAnswer({ ...question, key: this.key })) {
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
      this.chat.state = "answering";
    } else if (event.type === "progress") {
      this.promptTokens = event.total;
      this.progress = t("reading_prompt", { share: formatShare(event.total ? event.done / event.total : 1) });
    } else if (event.type === "text") {
      this.begin ??= performance.now();
      this.text += event.text;
      this.tokens = event.tokens;
    } else if (event.type === "done") {
      this.promptTokens = event.stats.prompt_tokens || this.promptTokens;
      this.tokens = event.stats.answer_tokens;
      this.chat.path = event.path;
      this.chat.state = "free";
    }
  }

  /** Tokens per second so far. */
  get speed() {
    const seconds = this.begin ? (performance.now() - this.begin) / 1000 : 0;
    return seconds > 0.3 ? (this.tokens - 1) / seconds : 0;
  }

  async stop() {
    await stopAnswer(this.key);
  }
}

/** Browsers have crypto.randomUUID only for HTTPS and this machine. */
function randomKey() {
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}
