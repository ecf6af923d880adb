// The chats of the journal, and their search.

import { changeChat, deleteChat, exportChat, listChats, searchChats } from "./api.js";
import { ask } from "./dialogs.js";
import { create, find, iconButton, showToast } from "./dom.js";
import { t } from "./texts.js";

const DAY = 86400; // seconds
const SEARCH_DELAY = 150; // milliseconds after the last key
const MAX_HITS = 100;

export class ChatList {
  /** `app` has chat, openChat(id) and forgetChat(id). */
  constructor(app) {
    this.app = app;
    this.list = find("#chat-list");
    this.search = find("#search");
    this.chats = [];
    this.search.addEventListener("input", () => {
      clearTimeout(this.timer);
      this.timer = setTimeout(() => this.refresh(), SEARCH_DELAY);
    });
    this.search.addEventListener("keydown", (event) => {
      if (event.key === "Escape" && this.search.value) {
        event.stopPropagation();
        this.clearSearch();
      }
    });
    find("#sidebar").addEventListener("keydown", (event) => this.moveFocus(event));
  }

  async refresh() {
    const words = this.search.value.trim();
    try {
      if (words) {
        const hits = await searchChats(words);
        if (words === this.search.value.trim()) this.showHits(hits, words);
      } else {
        this.chats = await listChats();
        this.showChats();
      }
    } catch (error) {
      this.list.replaceChildren(create("p", { class: "empty" }, error.message));
    }
  }

  clearSearch() {
    this.search.value = "";
    this.refresh();
  }

  showChats() {
    const groups = new Map();
    for (const chat of this.chats) {
      const name = groupName(chat.changed);
      groups.set(name, [...(groups.get(name) || []), chat]);
    }
    const sections = [...groups].map(([name, chats]) => {
      const list = create("ul", { "aria-label": t(name) }, ...chats.map((chat) => this.chatItem(chat)));
      return create("section", {}, create("h2", {}, t(name)), list);
    });
    this.list.replaceChildren(...(sections.length ? sections : [create("p", { class: "empty" }, t("no_chats"))]));
  }

  chatItem(chat) {
    const isCurrent = this.app.chat.id === chat.id;
    const link = create("a", { href: `#${chat.id}`, "aria-current": isCurrent ? "page" : null, title: chat.title }, chat.title);
    const label = t("chat_actions", { title: chat.title });
    const more = iconButton("more", label, () => this.openMenu(chat, more), { "aria-haspopup": "menu" });
    return create("li", { class: isCurrent ? "current" : null }, link, more);
  }

  showHits(hits, words) {
    const items = hits.slice(0, MAX_HITS).map((hit) =>
      create(
        "li",
        { class: "hit" },
        create(
          "a",
          { href: `#${hit.chat}` },
          create("span", { class: "hit-title" }, hit.title),
          create(
            "span",
            { class: "hit-text" },
            `${hit.cut_before ? "…" : ""}${hit.before}`,
            create("mark", {}, hit.found),
            `${hit.after}${hit.cut_after ? "…" : ""}`,
          ),
        ),
      ),
    );
    const none = create("p", { class: "empty", role: "status" }, t("search_none", { words }));
    this.list.replaceChildren(items.length ? create("ul", { "aria-label": t("search_chats") }, ...items) : none);
  }

  /** Arrow keys move among the search field and the chats. */
  moveFocus(event) {
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (!step || event.altKey) return;
    const stops = [this.search, ...this.list.querySelectorAll("a")];
    const index = stops.indexOf(document.activeElement.closest("li")?.querySelector("a") || document.activeElement);
    if (index < 0 || !stops[index + step]) return;
    event.preventDefault();
    stops[index + step].focus();
  }

  // --- the menu of a chat

  openMenu(chat, button) {
    const menu = find("#chat-menu");
    const item = (label, action, kind = null) =>
      create("button", { type: "button", role: "menuitem", class: kind, onclick: () => (menu.hidePopover(), action()) }, label);
    menu.replaceChildren(
      item(t("rename"), () => this.rename(chat)),
      ...["md", "json", "html"].map((format) => item(t(`export_${format}`), () => this.export(chat, format))),
      item(t("delete"), () => this.delete(chat), "danger"),
    );
    menu.onkeydown = (event) => {
      const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
      const items = [...menu.children];
      if (step) items[(items.indexOf(document.activeElement) + step + items.length) % items.length].focus();
      if (step || event.key === "Tab") event.preventDefault();
      event.stopPropagation();
    };
    menu.ontoggle = (event) => button.setAttribute("aria-expanded", String(event.newState === "open"));
    menu.showPopover();
    const { bottom, top, right } = button.getBoundingClientRect();
    const fits = bottom + menu.offsetHeight < innerHeight;
    menu.style.top = `${fits ? bottom + 4 : top - menu.offsetHeight - 4}px`;
    menu.style.left = `${Math.max(8, Math.min(right, innerWidth - 8) - menu.offsetWidth)}px`;
    menu.firstElementChild.focus();
  }

  async rename(chat) {
    const title = await ask({ question: t("rename_prompt"), accept: t("save"), value: chat.title });
    if (title?.trim()) await this.run(() => changeChat(chat.id, { title }));
  }

  async delete(chat) {
    const isSure = await ask({ question: t("delete_question", { title: chat.title }), accept: t("delete"), isDangerous: true });
    if (isSure === null) return;
    await this.run(async () => {
      await deleteChat(chat.id);
      this.app.forgetChat(chat.id);
    });
  }

  async export(chat, format) {
    await this.run(async () => {
      const url = URL.createObjectURL(await exportChat(chat.id, format));
      const name = chat.title.replace(/[^\p{L}\p{N} _-]+/gu, "").trim().slice(0, 60) || `chat-${chat.id}`;
      create("a", { href: url, download: `${name}.${format}` }).click();
      setTimeout(() => URL.revokeObjectURL(url), 10000);
    });
  }

  async run(action) {
    try {
      await action();
    } catch (error) {
      showToast(error.message);
    }
    await this.refresh();
  }
}

function groupName(seconds) {
  const midnight = new Date().setHours(0, 0, 0, 0) / 1000;
  if (seconds >= midnight) return "today";
  if (seconds >= midnight - DAY) return "yesterday";
  return seconds >= midnight - 7 * DAY ? "last_week" : "older";
}
