"""
Makes corpus_ids.json with Hugging Face's tokenizers: a CRC-32 of the ids of every line of tests/corpus.py.

    python tests/goldens/make_corpus_ids.py tokenizer.json      of any Qwen1.5 checkpoint
"""

import base64
import hashlib
import json
import struct
import sys
import zlib
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from corpus import lines
from tokenizers import Tokenizer

data = Path(sys.argv[1]).read_text(encoding="utf-8")
tokenizer = Tokenizer.from_str(data)
text = lines()
model = json.loads(data)["model"]
ids = [encoding.ids for encoding in tokenizer.encode_batch(text, add_special_tokens=False)]
golden = {
    "lines": len(text),
    "tokens": sum(map(len, ids)),
    "corpus": hashlib.sha256("\0".join(text).encode()).hexdigest(),
    "vocabulary": hashlib.sha256("\n".join(sorted(model["vocab"], key=model["vocab"].get)).encode()).hexdigest(),
    "merges": hashlib.sha256("\n".join(model["merges"]).encode()).hexdigest(),
    "crc32": base64.b64encode(
        b"".join(struct.pack("<I", zlib.crc32(struct.pack(f"<{len(i)}i", *i))) for i in ids)
    ).decode(),
}
(Path(__file__).parent / "corpus_ids.json").write_text(json.dumps(golden, indent=1) + "\n", encoding="utf-8")
print(golden["lines"], golden["tokens"])
