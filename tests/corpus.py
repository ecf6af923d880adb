"""
About five thousand lines for comparing tokenizers: fifteen languages, code, emoji, unusual white space, numbers,
decomposed accents, control tokens. The lines are the same on every machine.
"""

from __future__ import annotations

import random
import unicodedata
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")

SENTENCES = {
    "English": "The quick brown fox jumps over the lazy dog while 17 others watch from the garden's edge, don't they?",
    "Chinese": "通义千问1.5版本支持三万两千个词元的上下文，我们希望大家喜欢它。今天的天气真好，适合去公园散步！",
    "Arabic": "مرحبا بالعالم، اليوم الطقس جميل جدا ونريد أن نذهب إلى الحديقة مع أصدقائنا في المساء؟ الرقم ١٢٣٤٥",
    "Spanish": "¿Dónde está la biblioteca más antigua de la ciudad? ¡Mañana iremos allí con los niños pequeños del señor Núñez!",
    "French": "L'élève a déjà goûté à la crème brûlée chez sa grand-mère ; c'était, paraît-il, délicieux — n'est-ce pas ?",
    "Portuguese": "Não há ninguém à espera no aeroporto, mas amanhã às três horas a minha irmã chegará de São Paulo.",
    "German": "Die Straßenbahn fährt über die schöne Brücke; der müde Schaffner grüßt höflich alle Fahrgäste aus Österreich.",
    "Italian": "Perché non andiamo più al mare? L'estate è già finita, però c'è ancora un po' di sole laggiù in città.",
    "Russian": "Съешь же ещё этих мягких французских булок, да выпей чаю; завтра утром поезд отправляется в 8:45.",
    "Japanese": "吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。ｶﾀｶﾅとひらがな、そしてＡＢＣ１２３。",
    "Korean": "동해 물과 백두산이 마르고 닳도록 하느님이 보우하사 우리나라 만세. 오늘은 2024년 2월 5일입니다!",
    "Vietnamese": "Tôi muốn học tiếng Việt vì nó rất thú vị; thời tiết hôm nay đẹp quá, chúng ta đi dạo quanh hồ nhé?",
    "Thai": "สวัสดีครับ วันนี้อากาศดีมาก เราไปเดินเล่นที่สวนสาธารณะกันไหม ราคา ๑๒๓ บาท เท่านั้น",
    "Indonesian": "Selamat pagi, apa kabar? Kami akan berangkat ke pasar tradisional untuk membeli buah-buahan yang segar.",
    "Hindi": "नमस्ते दुनिया, आज मौसम बहुत अच्छा है और हम बगीचे में खेलेंगे। क्या आप आएँगे? १२३",
}
CODE = [
    "def quicksort(items: list[int]) -> list[int]:", "    return [x for x in rest if x < pivot] + [pivot]",
    "\tif (ptr != NULL && *ptr == '\\0') { free(ptr); ptr = NULL; }", "SELECT id, name FROM users WHERE age >= 18 -- adults",
    "#include <stdio.h>", "const f = async (x) => await fetch(`https://x.y/${x}?q=1`);", "<p class=\"a b\">&copy; 2024</p>",
    "for i in $(seq 1 10); do echo \"$i\" >> out.txt; done", "{\"a\": [1, 2.50, -3e-7, null, true], \"b\": {\"c\": \"\\u00e9\"}}",
    "let mut v: Vec<Box<dyn Fn(i32) -> i32>> = vec![];", "x = 0x1F + 0b1010 - 1_000_000 ** 2  # odd", "| a | b |\t---\t|",
    "\\frac{\\partial L}{\\partial w_{ij}} = \\sum_k \\delta_k", "@@ -1,7 +1,9 @@ class Foo(Bar):", "C:\\Users\\x\\file.txt",
]  # fmt: skip
EMOJI = ["🙂", "👍🏽", "👩\u200d👩\u200d👧\u200d👦", "🇨🇳", "🏴\u200d☠️", "❤️", "1️⃣", "🫠", "🧑🏿\u200d🚀"]
SPACES = [" ", "  ", "   ", "\t", " \t ", "\u00a0", "\u3000", "\u200b", "\u2009", "\n", " \n", "\n\n", "\r\n", "\n   ", "\x0b", "\x0c", "\u2028"]  # fmt: skip
CONTROL = ["<|im_end|>", "<|im_start|>", "<|endoftext|>", "<|im_start|>system\n", "<|im_en", "|im_end|>", "<|extra_0|>"]
OTHER = ["\ufeff", "\u202e", "ﬁ", "½", "Ⅷ", "ǅ", "ß", "İ", "ı", "ſ", "K", "Å", "\u0301", "각", "\u1100\u1161\u11a8", "ᾳ", "‽", "𝔘𝔫𝔦", "𠮷", "\U000e0041", "'S", "'ll", "’re"]  # fmt: skip


def lines(count: int = 5200) -> list[str]:
    """Return the first `count` lines of the corpus, beginning with the plain sentences."""
    rng = random.Random(1500)
    corpus = [*SENTENCES.values(), *CODE]
    generators = [_words, _words, _letters, _odd_spaces, _decomposed, _code, _mixed, _digits, _control, _upper_case]
    while len(corpus) < count:
        corpus.append(generators[len(corpus) % len(generators)](rng))
    return corpus[:count]


def _pick(rng: random.Random, options: Sequence[T]) -> T:
    return options[int(rng.random() * len(options))]


def _sentence(rng: random.Random) -> str:
    return _pick(rng, list(SENTENCES.values()))


def _fragment(rng: random.Random) -> str:
    text = _sentence(rng)
    start = int(rng.random() * len(text))
    return text[start : start + 1 + int(rng.random() * 40)]


def _words(rng: random.Random) -> str:
    return " ".join(_fragment(rng).strip() for _ in range(2 + int(rng.random() * 3)))


def _letters(rng: random.Random) -> str:
    return "".join(_pick(rng, list(_sentence(rng))) for _ in range(30))


def _odd_spaces(rng: random.Random) -> str:
    return "".join(_fragment(rng)[:12] + _pick(rng, SPACES) for _ in range(6))


def _decomposed(rng: random.Random) -> str:
    form = _pick(rng, ["NFD", "NFKD", "NFC"])
    return unicodedata.normalize(form, _words(rng))  # type: ignore[arg-type]


def _code(rng: random.Random) -> str:
    return "\n".join(_pick(rng, CODE) for _ in range(1 + int(rng.random() * 3)))


def _mixed(rng: random.Random) -> str:
    kinds = [EMOJI, OTHER, CODE, SPACES]
    return "".join(_pick(rng, _pick(rng, kinds))[:20] + _fragment(rng)[:8] for _ in range(5))


def _digits(rng: random.Random) -> str:
    templates = ["{:d}", "{:,d}", "0x{:X}", "{:.3f}", "{:e}", "#{:05d}", "-{:d}", "{:d}%"]
    return " ".join(
        _number(_pick(rng, templates), int(rng.random() * 10 ** int(1 + rng.random() * 9))) for _ in range(6)
    )


def _number(template: str, value: int) -> str:
    return template.format(float(value) if template[-2] in "fe" else value)


def _control(rng: random.Random) -> str:
    return _fragment(rng) + _pick(rng, CONTROL) + _fragment(rng) + _pick(rng, CONTROL)


def _upper_case(rng: random.Random) -> str:
    return (_words(rng).upper() + _pick(rng, ["!!!", "???", "…", "---", "'S", "'ll"])).replace(
        " ", _pick(rng, [" ", "_", "-"])
    )
