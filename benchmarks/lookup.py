"""
Measure prompt lookup: decode speed with and without it, for answers that copy from the prompt and for free writing.

    .venv/bin/python benchmarks/lookup.py MODEL.gguf [--runs 3] [--json FILE]

Runs are interleaved; the result is the median of the ratios pair by pair. The time of an answer is measured from its
first token to its last. Greedy answers are compared as well.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from comparison import ROOT, interleave, median_ratio, table_header, table_row

from qwenlocal.chat.chat_model import ChatModel, load_chat_model
from qwenlocal.chat.chat_template import encode_messages
from qwenlocal.engine.load_plan import LoadRequest
from qwenlocal.engine.loader import LoadOptions
from qwenlocal.engine.prefix_cache import common_prefix
from qwenlocal.engine.sampling import Sampling
from qwenlocal.engine.sequence import TokenSequence
from qwenlocal.engine.speculation import CostCurve, Speculation
from qwenlocal.engine.tokenizer import Tokenizer
from qwenlocal.machine import this_machine

TEXTS = ROOT / "benchmarks" / "texts"  # fixed, since the speed depends on what the model answers
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
    "edit code": "Rename the class TextStream to Utf8Stream in this file and print the whole file, nothing else:\n\n"
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
SAMPLING = {"greedy": Sampling(temperature=0, repeat_penalty=1), "sampled": Sampling(seed=1)}


@dataclass(frozen=True)
class Answer:
    """Token ids, and the seconds from the first to the last."""

    tokens: tuple[int, ...]
    seconds: float

    @property
    def speed(self) -> float:
        """Tokens per second."""
        return (len(self.tokens) - 1) / self.seconds if self.seconds else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--limit", type=int, default=400, help="tokens per answer")
    parser.add_argument("--json", type=Path, help="save the results to this file")
    parser.add_argument("--only", default="", help="run a part of the tasks, for example: copying, greedy")
    options = parser.parse_args()
    chat_model = load_chat_model(
        options.model, LoadOptions(LoadRequest(n_ctx=4096)), this_machine(), name=options.model.name, size=1
    )
    costs, results = CostCurve(), []
    print(table_header("task", "with lookup", "without", "ratio (median of pairs)", "greedy text", "tokens"))
    for kind, how, name, prompt in select_tasks(options.only):
        pairs = compare(chat_model, prompt, costs, SAMPLING[how], options.runs, options.limit)
        ratio = median_ratio((a.speed, b.speed) for a, b in pairs)
        with_lookup, without = (statistics.median(answer.speed for answer in side) for side in zip(*pairs, strict=True))
        tokens, text = len(pairs[-1][0].tokens), describe_difference(*pairs[-1]) if how == "greedy" else ""
        speeds = f"{with_lookup:.1f}", f"{without:.1f}", f"{ratio:.2f}"
        print(table_row(f"{kind}: {name}, {how}", *speeds, text, tokens), flush=True)
        results.append({"kind": kind, "task": name, "how": how, "ratio": ratio, "tokens": tokens, "text": text})
    learned = ", ".join(f"{count}: {cost:.2f}" for count, cost in costs.known.items())
    print(f"\nlearned costs: {learned}", file=sys.stderr)
    for kind in dict.fromkeys(result["kind"] for result in results):
        ratios = [result["ratio"] for result in results if result["kind"] == kind]
        print(f"\n{kind}: median ratio {statistics.median(ratios):.2f}, minimum {min(ratios):.2f}")
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    chat_model.close()


def select_tasks(only: str) -> Iterator[tuple[str, str, str, str]]:
    """Yield kind, sampling, name and prompt of each task that has all words of `only`."""
    words = {word.strip() for word in only.split(",")} - {""}
    for kind, tasks in (("copying", COPYING), ("writing", WRITING)):
        for how in SAMPLING:
            if words <= {kind, how}:
                yield from ((kind, how, name, prompt) for name, prompt in tasks.items())


def compare(
    chat_model: ChatModel, prompt: str, costs: CostCurve, sampling: Sampling, runs: int, limit: int
) -> list[tuple[Answer, Answer]]:
    """Return pairs of answers, with and without lookup; both share the cached prompt."""
    assert chat_model.template
    tokenizer = chat_model.model.tokenizer
    ids = encode_messages(chat_model.template, [{"role": "user", "content": prompt}], tokenizer)
    plain = TokenSequence(chat_model.context)

    def answer_without() -> Answer:
        return generate_answer(plain, tokenizer, ids, sampling, limit)

    def answer_with() -> Answer:
        speculative = TokenSequence(chat_model.context, speculation=Speculation(costs))
        speculative.adopt(plain.cached_ids)
        answer = generate_answer(speculative, tokenizer, ids, sampling, limit)
        plain.adopt(speculative.cached_ids)
        return answer

    return [(with_lookup, without) for without, with_lookup in interleave(answer_without, answer_with, runs)]


def generate_answer(
    sequence: TokenSequence, tokenizer: Tokenizer, ids: Sequence[int], sampling: Sampling, limit: int
) -> Answer:
    tokens: list[int] = []
    first = last = time.perf_counter()
    for step in sequence.generate(ids, sampling, limit=limit):
        if isinstance(step, int):
            last = time.perf_counter()
            first = first if tokens else last
            tokens.append(step)
            if tokenizer.is_end(step):
                break
    return Answer(tuple(tokens), last - first)


def describe_difference(one: Answer, other: Answer) -> str:
    if one.tokens == other.tokens:
        return "the same"
    return f"differs from token {common_prefix(one.tokens, other.tokens)} on"


if __name__ == "__main__":
    main()
