"""
Prompt lookup on and off, in turn, on texts that copy and on texts that do not: speed, and whether greedy text is the
same.

    .venv/bin/python benchmarks/lookup.py MODEL.gguf [--runs 3] [--json FILE]

What counts is the median of the ratios pair by pair. Time is that of the answer, from its first token to its last.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qwenlocal.chat.chat_model import ChatModel, load_chat_model
from qwenlocal.chat.chat_template import encode_messages
from qwenlocal.engine.load_plan import LoadRequest
from qwenlocal.engine.loader import LoadOptions
from qwenlocal.engine.sampling import Sampling
from qwenlocal.engine.sequence import TokenSequence
from qwenlocal.engine.speculation import CostCurve, Speculation
from qwenlocal.machine import this_machine

ROOT = Path(__file__).resolve().parent.parent
TEXTS = ROOT / "benchmarks" / "texts"  # fixed ones: what the model makes of them is part of the result
CODE = (TEXTS / "code.txt").read_text()
PROSE = (TEXTS / "prose.txt").read_text()
RECORDS = "\n".join(
    f"{name}, born {1900 + 7 * n} in {town}, works as {job}, phone 555-01{n:02d}"
    for n, (name, town, job) in enumerate(
        [("Ada Berger", "Graz", "teacher"), ("Li Wei", "Xi'an", "engineer"), ("Tom Okoro", "Lagos", "nurse"),
         ("Mia Rossi", "Turin", "baker"), ("Jan Novak", "Brno", "tailor"), ("Ines Silva", "Porto", "pilot")]
    )
)  # fmt: skip

COPYING = {
    "edit code": "Rename the class IncrementalDetokenizer to Utf8Decoder in this file and print the whole file, nothing else:\n\n"
    f"{CODE}",
    "quote text": f"Repeat the following text word for word, nothing else:\n\n{PROSE}",
    "fill JSON": "Write these people as a JSON array of objects with the keys name, born, town, job and phone, nothing "
    f"else:\n\n{RECORDS}",
}
WRITING = {
    "a story": "Tell a story about a lighthouse keeper who finds a message in a bottle.",
    "advice": "How should I prepare for a job interview? Answer in several paragraphs.",
    "an explanation": "Explain how a refrigerator works to a curious child.",
}


@dataclass(frozen=True)
class Answer:
    """Tokens, and seconds from the first to the last."""

    tokens: tuple[int, ...]
    seconds: float

    @property
    def speed(self) -> float:
        """Tokens a second."""
        return (len(self.tokens) - 1) / self.seconds if self.seconds else 0.0


def answer(sequence: TokenSequence, loaded: ChatModel, ids: Sequence[int], sampling: Sampling, limit: int) -> Answer:
    tokens: list[int] = []
    first = last = time.perf_counter()
    for step in sequence.generate(ids, sampling, limit=limit):
        if isinstance(step, int):
            last = time.perf_counter()
            first = first if tokens else last
            tokens.append(step)
            if loaded.model.tokenizer.is_end(step):
                break
    return Answer(tuple(tokens), last - first)


def pairs(
    loaded: ChatModel, prompt: str, costs: CostCurve, sampling: Sampling, runs: int, limit: int
) -> list[tuple[Answer, Answer]]:
    assert loaded.template
    ids = encode_messages(loaded.template, [{"role": "user", "content": prompt}], loaded.model.tokenizer)
    plain = TokenSequence(loaded.context, 0)
    found = []
    for _ in range(runs + 1):
        without = answer(plain, loaded, ids, sampling, limit)
        looking = TokenSequence(loaded.context, 0, speculation=Speculation(costs))
        looking.adopt(plain.cached_ids)
        with_it = answer(looking, loaded, ids, sampling, limit)
        plain.adopt(looking.cached_ids)
        found.append((with_it, without))
    return found[1:]


def common(one: Sequence[int], other: Sequence[int]) -> int:
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--limit", type=int, default=400)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", default="", help="for example: copying, greedy")
    asked = parser.parse_args()
    loaded = load_chat_model(
        asked.model, LoadOptions(LoadRequest(n_ctx=4096)), this_machine(), name=asked.model.name, size=1
    )
    costs, rows = CostCurve(), []
    print(
        "| task | with lookup | without | ratio (median of pairs) | greedy text | tokens |\n|---|---|---|---|---|---|"
    )
    for kind, tasks in (("copying", COPYING), ("writing", WRITING)):
        for sampling in (Sampling(temperature=0, repeat_penalty=1), Sampling(seed=1)):
            how = "greedy" if sampling.temperature == 0 else "sampled"
            if any(word.strip() not in (kind, how, "") for word in asked.only.split(",")):
                continue
            for name, prompt in tasks.items():
                found = pairs(loaded, prompt, costs, sampling, asked.runs, asked.limit)
                ratio = statistics.median(a.speed / b.speed for a, b in found)
                a, b = found[-1]
                same = common(a.tokens, b.tokens)
                greedy = sampling.temperature == 0
                text = "" if not greedy else "the same" if a.tokens == b.tokens else f"differs from token {same} on"
                speeds = [statistics.median(x.speed for x in side) for side in zip(*found, strict=True)]
                print(
                    f"| {kind}: {name}, {how} | {speeds[0]:.1f} | {speeds[1]:.1f} | {ratio:.2f} | {text} | "
                    f"{len(a.tokens)} |",
                    flush=True,
                )
                rows.append(
                    {"kind": kind, "task": name, "how": how, "ratio": ratio, "tokens": len(a.tokens), "text": text}
                )
    print("\nlearnt costs: " + ", ".join(f"{k}: {v:.2f}" for k, v in costs.known.items()), file=sys.stderr)
    for kind in dict.fromkeys(row["kind"] for row in rows):
        print(
            f"\n{kind}: median ratio {statistics.median(r['ratio'] for r in rows if r['kind'] == kind):.2f}, "
            f"least {min(r['ratio'] for r in rows if r['kind'] == kind):.2f}"
        )
    if asked.json:
        asked.json.write_text(json.dumps(rows, indent=1) + "\n")
    loaded.close()


if __name__ == "__main__":
    main()
