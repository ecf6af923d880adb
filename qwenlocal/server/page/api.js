// Requests to this server; the page's security policy allows no other.

import { getApiKey } from "./preferences.js";
import { t } from "./texts.js";

export class ApiError extends Error {
  constructor(message, status = 0, code = "") {
    super(message);
    this.status = status;
    this.code = code;
  }
}

let askForKey = async () => {};

/** `ask` is called and awaited when the server needs another API key. */
export function onKeyNeeded(ask) {
  askForKey = ask;
}

async function send(method, path, body, signal) {
  const headers = {};
  if (getApiKey()) headers.Authorization = `Bearer ${getApiKey()}`;
  let response;
  try {
    response = await fetch(`/page/${path}`, { method, headers, body, signal, cache: "no-store" });
  } catch {
    throw new ApiError(t("connection_lost"));
  }
  if (response.ok) return response;
  if (response.status === 401) {
    await askForKey();
    return send(method, path, body, signal);
  }
  let error = {};
  try {
    ({ error } = await response.json());
  } catch {
    // not JSON: a proxy has answered
  }
  throw new ApiError(error.message || `${response.status} ${response.statusText}`, response.status, error.code);
}

const requestJson = async (method, path, content) =>
  (await send(method, path, content === undefined ? undefined : JSON.stringify(content))).json();

export const readSettings = () => requestJson("GET", "settings");
export const listChats = async () => (await requestJson("GET", "chats")).chats;
export const searchChats = async (words) => (await requestJson("GET", `chats?search=${encodeURIComponent(words)}`)).hits;
export const readChat = (id) => requestJson("GET", `chats/${id}`);
export const changeChat = (id, change) => requestJson("PATCH", `chats/${id}`, change);
export const deleteChat = (id) => requestJson("DELETE", `chats/${id}`);
export const countTokens = (model, chat, system) => requestJson("POST", "tokens", { model, chat, system });
export const stopAnswer = (key) => requestJson("DELETE", `answers/${key}`);

export async function readFile(file, model) {
  const query = new URLSearchParams({ name: file.name, model });
  return (await send("POST", `files?${query}`, file)).json();
}

export async function exportChat(id, format) {
  return (await send("GET", `chats/${id}/export?format=${format}`)).blob();
}

/** Ask a question, and yield the events of the answer as they arrive, until `signal` closes the connection. */
export async function* streamAnswer(question, signal) {
  const response = await send("POST", "answers", JSON.stringify(question), signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const parts = (rest + value).split("\n\n");
      rest = parts.pop();
      for (const part of parts) {
        if (part.startsWith("data: ")) yield JSON.parse(part.slice(6));
      }
    }
  } catch (error) {
    throw error instanceof ApiError ? error : new ApiError(t("connection_lost"));
  }
}
