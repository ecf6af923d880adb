// The texts of the page, in the language of the browser or the one that was chosen.

let texts = {};
export let language = "en";
export let languages = ["en"];

export async function loadTexts(wanted) {
  const response = await fetch(`/page/assets/texts.json?language=${encodeURIComponent(wanted)}`);
  ({ texts, language, languages } = await response.json());
  document.documentElement.lang = language;
  applyTexts(document);
}

/** `t("copy")`; `t("remove_file", {name})` fills in the placeholders. */
export function t(key, values = {}) {
  return texts[key].replace(/\{(\w+)\}/g, (_, name) => values[name]);
}

/** Fill the elements that name their texts in data-text, data-label and data-placeholder. */
function applyTexts(root) {
  for (const element of root.querySelectorAll("[data-text]")) element.textContent = t(element.dataset.text);
  for (const element of root.querySelectorAll("[data-placeholder]")) element.placeholder = t(element.dataset.placeholder);
  for (const element of root.querySelectorAll("[data-label]")) {
    element.setAttribute("aria-label", t(element.dataset.label));
    if (element.tagName === "BUTTON") element.title = t(element.dataset.label);
  }
}

export const formatNumber = (value, digits = 0) =>
  new Intl.NumberFormat(language, { maximumFractionDigits: digits }).format(value);

export const formatShare = (value) => new Intl.NumberFormat(language, { style: "percent" }).format(value);
