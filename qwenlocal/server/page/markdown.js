// Render a model's Markdown as elements. Its text is never trusted: `marked` converts it to HTML, and DOMPurify keeps
// only the tags and attributes below. Images become links, raw HTML is shown as text, nothing is loaded automatically.

import "./vendor/purify.min.js";
import highlighter from "./vendor/highlight.min.js";
import { Lexer, Marked } from "./vendor/marked.esm.js";
import { copyText, create, icon } from "./dom.js";
import { t } from "./texts.js";

const MAX_HIGHLIGHTED = 20000; // characters
const MAX_INLINE = 10000; // characters of a paragraph: links and emphasis take time that grows with the square of it
const CLASS = /^(?:hljs[\w-]*|language-[\w+#.-]+|[\w-]+_)(?: (?:hljs[\w-]*|[\w-]+_))*$/;
const purify = globalThis.DOMPurify;
const POLICY = {
  ALLOWED_TAGS: [
    "a", "blockquote", "br", "code", "del", "em", "h1", "h2", "h3", "h4", "h5", "h6", "hr", "li", "ol", "p", "pre",
    "span", "strong", "table", "tbody", "td", "th", "thead", "tr", "ul",
  ],
  ALLOWED_ATTR: ["align", "class", "href", "start"],
  ADD_URI_SAFE_ATTR: ["align", "start"],
  ALLOWED_URI_REGEXP: /^(?:https?:\/\/|mailto:)/i,
  ALLOW_ARIA_ATTR: false,
  ALLOW_DATA_ATTR: false,
  RETURN_DOM_FRAGMENT: true,
};

purify.addHook("uponSanitizeAttribute", (_element, data) => {
  if (data.attrName === "class") data.keepAttr = CLASS.test(data.attrValue);
});
purify.addHook("afterSanitizeAttributes", (element) => {
  if (element.tagName === "A" && element.hasAttribute("href")) {
    element.setAttribute("target", "_blank");
    element.setAttribute("rel", "noopener noreferrer nofollow");
  }
});

const escapeHtml = (text) => text.replace(/[&<>"']/g, (letter) => `&#${letter.charCodeAt(0)};`);

const marked = new Marked({
  gfm: true,
  renderer: {
    html: ({ text }) => escapeHtml(text),
    checkbox: ({ checked }) => (checked ? "☑ " : "☐ "),
    image: ({ href, text }) => `<a href="${escapeHtml(href)}">${escapeHtml(t("image_link", { text: text || href }))}</a>`,
    code: ({ text, lang }) => {
      const name = (lang || "").split(/\s/)[0].toLowerCase();
      const known = name && highlighter.getLanguage(name) && text.length <= MAX_HIGHLIGHTED;
      const html = known ? highlighter.highlight(text, { language: name, ignoreIllegals: true }).value : escapeHtml(text);
      return `<pre><code class="${name ? `language-${escapeHtml(name)}` : "hljs"}">${html}</code></pre>`;
    },
  },
});

class BoundedLexer extends Lexer {
  inlineTokens(text, tokens = []) {
    if (text.length <= MAX_INLINE) return super.inlineTokens(text, tokens);
    tokens.push(plainToken(text));
    return tokens;
  }
}

const plainToken = (text) => ({ type: "text", raw: text, text });

/** The blocks of a text; a single one if it is nested too deeply (thousands of levels) for `marked`. */
function splitBlocks(text) {
  try {
    return new BoundedLexer(marked.defaults).lex(text);
  } catch (error) {
    if (!(error instanceof RangeError)) throw error;
    return Object.assign([{ type: "paragraph", raw: text, text, tokens: [plainToken(text)] }], { links: {} });
  }
}

/**
 * Elements that show a growing text. Only the last blocks of it change, so the others keep their elements: a selection
 * in them stays, and a long answer costs no more than a short one.
 */
export class MarkdownView {
  constructor(element) {
    this.element = element;
    this.blocks = [];
  }

  show(text) {
    const tokens = splitBlocks(text);
    const links = JSON.stringify(tokens.links);
    let index = 0;
    if (links === this.links) {
      while (index < this.blocks.length && index < tokens.length && this.blocks[index].raw === tokens[index].raw) index++;
    }
    this.links = links;
    for (const block of this.blocks.splice(index)) block.nodes.forEach((node) => node.remove());
    for (const token of tokens.slice(index)) {
      const nodes = [...render(token, tokens.links).childNodes];
      this.element.append(...nodes);
      this.blocks.push({ raw: token.raw, nodes });
    }
  }
}

function render(token, links) {
  const fragment = purify.sanitize(toHtml(token, links), POLICY);
  for (const pre of fragment.querySelectorAll("pre")) frameCode(pre);
  for (const table of fragment.querySelectorAll("table")) {
    const frame = create("div", { class: "table", tabindex: "0", role: "region", "aria-label": t("table") });
    table.replaceWith(frame);
    frame.append(table);
  }
  return fragment;
}

function toHtml(token, links) {
  try {
    return marked.parser(Object.assign([token], { links }));
  } catch (error) {
    if (!(error instanceof RangeError)) throw error;
    return `<p>${escapeHtml(token.raw)}</p>`; // nested too deep
  }
}

/** Put a bar with the language and a button to copy above a code block. */
function frameCode(pre) {
  const code = pre.firstElementChild;
  const name = /language-(\S+)/.exec(code?.className || "")?.[1] || "";
  const button = create("button", { type: "button", class: "copy-code", onclick: () => copyFrom(button, pre.textContent) });
  button.append(icon("copy"), t("copy"));
  button.setAttribute("aria-label", t("copy_code"));
  const frame = create("div", { class: "code" }, create("div", { class: "code-head" }, create("span", {}, name), button));
  pre.replaceWith(frame);
  pre.tabIndex = 0;
  pre.setAttribute("role", "region");
  pre.setAttribute("aria-label", t("code"));
  frame.append(pre);
}

async function copyFrom(button, text) {
  await copyText(text.replace(/\n$/, ""));
  button.replaceChildren(icon("done"), t("copied"));
  setTimeout(() => button.replaceChildren(icon("copy"), t("copy")), 1500);
}
