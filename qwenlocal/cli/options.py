"""Options of the command line: parsed, checked, and grouped for the command that uses them."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from qwenlocal.errors import InvalidChoice, UsageError
from qwenlocal.i18n import tr
from qwenlocal.paths import parse_path
from qwenlocal.text_encoding import read_text

if TYPE_CHECKING:
    from qwenlocal.chat.conversation import GenerationConfig
    from qwenlocal.engine.gpu_offload import GpuRequest
    from qwenlocal.engine.load_plan import LoadRequest
    from qwenlocal.engine.sampling import Sampling
    from qwenlocal.library.adapters import AdapterRequest

_ON_OFF = {"auto": None, "on": True, "off": False}
_LOAD_OPTIONS = {"n_ctx": "-c", "threads": "-t", "n_ubatch": "--ubatch", "rope": "--rope"}
_SAMPLING_OPTIONS = {
    "temperature": "--temp",
    "top_k": "--top-k",
    "top_p": "--top-p",
    "min_p": "--min-p",
    "repeat_penalty": "--repeat-penalty",
    "seed": "--seed",
}
_MAX_RATE = 1e15  # bytes per second
_UNITS = {"": 1, "k": 1000, "m": 1000**2, "g": 1000**3}


class AnswerFormat(NamedTuple):
    """
    The grammar that answers must follow (None: there is none), and OpenAI's `response_format` for remote engines.

    The latter is None for a grammar that is not from a JSON schema.
    """

    grammar: str | None = None
    response_format: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class RunOptions:
    """The options of `qwenlocal run`."""

    positional: Sequence[str]
    model: str | None
    url: str | None
    api_key_env: str | None
    server: bool | None
    file: str | None
    interactive: bool
    system: str | None
    max_tokens: int | None
    load_request: LoadRequest
    gpu: GpuRequest
    lookup: bool
    draft: str | None
    keep_cache: bool
    answer_format: AnswerFormat
    overflow: str
    sampling: Mapping[str, float | int | None]
    stop: Sequence[str]
    raw: bool
    template: str | None
    variables: Mapping[str, str]
    batch: str | None
    output: str | None
    resume: str | None
    journal: bool
    markdown: bool
    stats: bool
    adapters: Sequence[AdapterRequest] = ()

    @property
    def model_name(self) -> str | None:
        """The model: -m or, without --url, the first positional argument; None for the default."""
        return self.model or (None if self._is_prompt_only else self.positional[0])

    @property
    def prompt_words(self) -> Sequence[str]:
        """The words of the prompt."""
        return self.positional if self.model or self._is_prompt_only else self.positional[1:]

    @property
    def _is_prompt_only(self) -> bool:
        """Tell whether there is no model: after --url; and a single argument that has a space in it is a prompt."""
        return self.url is not None or not self.positional or self._is_sentence

    @property
    def _is_sentence(self) -> bool:
        return (
            len(self.positional) == 1
            and " " in self.positional[0].strip()
            and not os.path.exists(self.positional[0])  # Path.exists raises for names that are too long
        )

    def merge_sampling(self, recommended: Sampling) -> Sampling:
        """
        Return the sampling that a model recommends, with the values that the user set.

        Raises
        ------
        UsageError: a value is out of range.
        """
        from qwenlocal.engine.sampling import check_parameter

        for name, option in _SAMPLING_OPTIONS.items():
            check_parameter(name, self.sampling.get(name), label=option)
        return replace(recommended.with_overrides(self.sampling), grammar=self.answer_format.grammar)

    def generation_config(self, recommended: Sampling) -> GenerationConfig:
        """Return the settings of all answers, for a model that recommends this sampling."""
        from qwenlocal.chat.conversation import GenerationConfig

        return GenerationConfig(self.merge_sampling(recommended), self.max_tokens, self.stop, self.overflow)


def parse_load_request(
    n_ctx: int | None = None,
    threads: int | None = None,
    kv_type: str | None = None,
    flash_attention: str = "auto",
    rope: str | None = None,
    ubatch: int | None = None,
    *,
    force: bool = False,
) -> LoadRequest:
    """
    Check the options that a load plan must respect.

    Raises
    ------
    UsageError: a value is out of range, or values contradict each other.
    """
    from qwenlocal.api.load_settings import create_load_request

    if flash_attention not in _ON_OFF:
        raise InvalidChoice("--flash-attention", tuple(_ON_OFF), flash_attention)
    return create_load_request(
        n_ctx, threads, kv_type, _ON_OFF[flash_attention], rope, ubatch, force=force, labels=_LOAD_OPTIONS
    )


def parse_gpu_request(layers: str, devices: str | None) -> GpuRequest:
    """
    Parse `-ngl` (auto, all or a number) and `--device` (none, or names separated by commas).

    Raises
    ------
    UsageError: `layers` is neither of these, or layers are to be put on no device.
    """
    from qwenlocal.engine.gpu_offload import ALL_LAYERS, GpuRequest

    listed = tuple(filter(None, (name.strip() for name in (devices or "").split(","))))
    names = () if [name.lower() for name in listed] == ["none"] else listed or None
    word = layers.strip().lower()
    if word in ("auto", ""):
        return GpuRequest(None, names)
    count = ALL_LAYERS if word == "all" else int(word) if word.isdecimal() else -1
    if not 0 <= count <= ALL_LAYERS:
        raise UsageError(tr("-ngl must be a number of layers, auto or all, not {text}.", text=layers))
    if count and names == ():
        raise UsageError(
            tr("--device none leaves no GPU for the layers of -ngl."), hint=tr("Leave out one of the two options.")
        )
    return GpuRequest(count, names)


def parse_answer_format(as_json: bool, schema: str | None, grammar: str | None) -> AnswerFormat:
    """
    Return the format that answers must follow, from `--json`, `--schema FILE` or `--grammar FILE`.

    Raises
    ------
    UsageError: more than one is given, or the file is not supported. ModelNotFound: it does not exist.
    """
    if sum((as_json, schema is not None, grammar is not None)) > 1:
        raise UsageError(tr("--json, --schema and --grammar cannot be combined."), hint=tr("Use one of them."))
    if grammar is not None:
        from qwenlocal.engine.gbnf import grammar_from_gbnf

        return AnswerFormat(grammar_from_gbnf(read_text(parse_path(grammar))))
    if schema is None and not as_json:
        return AnswerFormat()
    import json

    from qwenlocal.engine.json_schema import ANY_OBJECT, grammar_from_schema

    if schema is None:
        return AnswerFormat(grammar_from_schema(ANY_OBJECT), {"type": "json_object"})
    text = read_text(parse_path(schema))
    compiled = grammar_from_schema(text)
    json_schema = {"name": "answer", "schema": json.loads(text), "strict": True}
    return AnswerFormat(compiled, {"type": "json_schema", "json_schema": json_schema})


def parse_rate(text: str | None) -> int:
    """
    Parse bytes per second: `parse_rate("2M")` is 2,000,000; 0 for None.

    Raises
    ------
    UsageError: it is not a number with K, M or G.
    """
    if text is None:
        return 0
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmg]?)(?:b(?:/s)?|i?b)?", text.strip().lower())
    value = float(match[1]) * _UNITS[match[2]] if match else 0
    if not 1 <= value <= _MAX_RATE:
        raise UsageError(
            tr("“{text}” is not a rate.", text=text),
            hint=tr("Write bytes per second, for example 500K, 2M or 1.5M."),
        )
    return int(value)


def parse_variables(assignments: Sequence[str]) -> dict[str, str]:
    """
    Parse the values for a template: `parse_variables(["lang=French"])` is {"lang": "French"}.

    Raises
    ------
    UsageError: one is not of the form NAME=TEXT.
    """
    variables = {}
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        if not equals or not name.isidentifier():
            raise UsageError(
                tr("“{text}” is not of the form NAME=TEXT.", text=assignment),
                hint=tr("For example: --var lang=French"),
            )
        variables[name] = value
    return variables


def split_list(text: str) -> list[str]:
    """Split at commas: `split_list("q4_0, q8_0,")` is ["q4_0", "q8_0"]; text without any item stays one item."""
    return [part.strip() for part in text.split(",") if part.strip()] or [text]
