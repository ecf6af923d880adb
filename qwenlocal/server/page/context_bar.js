// The context bar and the speed of the answer.

import { find } from "./dom.js";
import { formatNumber, t } from "./texts.js";

export class ContextBar {
  used = null;
  size = null;

  /** Show `used` of `size` tokens; null hides the bar. */
  show(used, size) {
    this.used = used;
    this.size = size;
    find("#context").hidden = used === null || !size;
    if (used === null || !size) return;
    const share = Math.min(1, used / size);
    const text = t("context_used", { used: formatNumber(used), size: formatNumber(size) });
    const bar = find("#context-bar");
    find("#context-fill").style.width = `${share * 100}%`;
    bar.classList.toggle("full", share > 0.85);
    bar.setAttribute("aria-valuemax", size);
    bar.setAttribute("aria-valuenow", Math.min(used, size));
    bar.setAttribute("aria-valuetext", text);
    find("#context-text").textContent = text;
  }

  /** Show the speed of an answer in tokens per second; 0 hides it. */
  showSpeed(speed) {
    find("#speed").textContent = speed ? t("tokens_per_second", { speed: formatNumber(speed, 1) }) : "";
  }
}
