// Preferences, stored in this browser. The API key is kept only in this tab, until it is closed.

const PREFIX = "qwenlocal.";

export const SAMPLING = [
  { name: "temperature", min: 0, max: 10, step: 0.1 },
  { name: "top_p", min: 0, max: 1, step: 0.05 },
  { name: "top_k", min: 0, max: 1000000, step: 1 },
  { name: "min_p", min: 0, max: 1, step: 0.01 },
  { name: "repeat_penalty", min: 0.01, max: 10, step: 0.01 },
  { name: "seed", min: 0, max: 4294967294, step: 1 },
  { name: "max_tokens", min: 1, max: 2147483647, step: 1 },
];

export const getPreference = (name) => localStorage.getItem(PREFIX + name) || "";

export function setPreference(name, value) {
  if (value) localStorage.setItem(PREFIX + name, value);
  else localStorage.removeItem(PREFIX + name);
}

/** The sampling parameters that are set, the token limit of answers, and what to do when the context is full. */
export function readSampling() {
  const values = {};
  for (const { name } of SAMPLING) {
    const text = getPreference(name);
    if (text !== "") values[name] = Number(text);
  }
  const { max_tokens = null, ...sampling } = values;
  return { sampling, max_tokens, overflow: getPreference("overflow") || "shift" };
}

/** Store the key at the end of the address that the server has printed, /#key=KEY, and remove it from the address. */
export function readKeyFromAddress() {
  const match = /^#key=([\w-]+)$/.exec(location.hash);
  if (!match) return;
  setApiKey(match[1]);
  history.replaceState(null, "", location.pathname);
}

export const getApiKey = () => sessionStorage.getItem(PREFIX + "key") || "";
export const setApiKey = (key) => sessionStorage.setItem(PREFIX + "key", key);
