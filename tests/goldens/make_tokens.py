"""
Makes qwenlocal/measure/qwen1.5-tokens.json with Hugging Face's tokenizers: texts, and the ids of the real tokenizer.

    python tests/goldens/make_tokens.py tokenizer.json      of any Qwen1.5 checkpoint
"""

import hashlib
import json
import sys
from pathlib import Path

from tokenizers import Tokenizer

TEXTS = [
    "Hello, world!", " leading space", "trailing space ", "two  spaces", "tab\tand\nline\r\nends\n\n\n",
    "I'm you're HE'S we'll they'd I'VE", "1 12 123 1234567 3.14159 0x1F 1e-5", "CamelCase snake_case kebab-case",
    "def f(x):\n    return x ** 2  # square\n", '{"key": [1, 2.5, null, true]}', "<div class='a'>&amp;</div>",
    "你好，世界！今天天气怎么样？", "東京の天気は晴れです。カタカナ", "오늘은 날씨가 좋아요.", "Привет, как дела?",
    "Les élèves étudient l'après-midi.", "Die Straße führt über die Brücke.", "¿Cómo estás? ¡Muy bien!",
    "Olá, tudo bem? Ação.", "Ciao, perché no?", "Xin chào, tôi không hiểu tiếng Việt.", "สวัสดีครับ วันนี้อากาศดี",
    "Selamat pagi, apa kabar?", "مرحبا، كيف حالك؟", "e\u0301 cafe\u0301 a\u030a n\u0303 — decomposed",
    "ﬁ ligature ½ ² Ⅷ",
    "🙂👍🏽👩‍👩‍👧‍👦🇨🇳", "zero\u200bwidth\u00a0nbsp\u3000ideographic", "\u202eright-to-left override", "x" * 70,
    "!!!???...---===", "https://example.com/a?b=c&d=%20e#f", "$E = mc^2$ \\frac{1}{2}", "日本語とEnglishのmix 混在",
    "  \n  \n indented", "\u1100\u1161\u11a8 jamo", "a\u0308\u0323 b\u0323\u0308", "", "\n", " ",
]  # fmt: skip

data = Path(sys.argv[1]).read_bytes()
tokenizer = Tokenizer.from_str(data.decode())
model = json.loads(data)["model"]
tokens = sorted(model["vocab"], key=model["vocab"].get)
digest = hashlib.sha256("\n".join(tokens).encode()).hexdigest()
cases = [[text, tokenizer.encode(text, add_special_tokens=False).ids] for text in TEXTS]
target = Path(__file__).resolve().parents[2] / "qwenlocal" / "measure" / "qwen1.5-tokens.json"
lines = ",\n  ".join(json.dumps(case, ensure_ascii=True) for case in cases)
target.write_text(f'{{"vocabulary": "{digest}",\n "texts": [\n  {lines}\n ]}}\n', encoding="utf-8")
