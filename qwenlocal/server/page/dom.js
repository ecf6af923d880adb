// Elements of the document. Texts become text nodes, never HTML.

export const find = (selector, root = document) => root.querySelector(selector);

/** `create("button", {class: "x", onclick: f}, "text")`: functions become listeners, the rest attributes. */
export function create(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value !== undefined && value !== null) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

/** A symbol of index.html, hidden from screen readers. */
export function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("aria-hidden", "true");
  const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
  use.setAttribute("href", `#i-${name}`);
  svg.append(use);
  return svg;
}

export function iconButton(name, label, onclick, attributes = {}) {
  return create("button", { type: "button", class: "icon-button", "aria-label": label, title: label, onclick, ...attributes }, icon(name));
}

/** Announce a text to screen readers. */
export function announce(text) {
  find("#status").textContent = text;
}

/** Show a sentence for a while. */
export function showToast(text) {
  const toast = find("#toast");
  toast.textContent = text;
  toast.showPopover();
  clearTimeout(showToast.timer);
  showToast.timer = setTimeout(() => toast.hidePopover(), 6000);
}

/** Copy a text; without HTTPS, browsers have only the old way, except on this machine. */
export async function copyText(text) {
  if (navigator.clipboard) {
    await navigator.clipboard.writeText(text);
    return;
  }
  const area = create("textarea", { class: "unseen", readonly: true });
  area.value = text;
  document.body.append(area);
  area.select();
  document.execCommand("copy");
  area.remove();
}
