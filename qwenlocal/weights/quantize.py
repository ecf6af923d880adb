"""From one GGUF file to another with other types: everything but the tensors is carried over untouched."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from qwenlocal import ggml
from qwenlocal.errors import BadWeights, UnsupportedCheckpoint, UsageError
from qwenlocal.weights.header import Header, Tensor, read_pairs
from qwenlocal.weights.importance import Importance
from qwenlocal.weights.mix import FileType, ModelFacts, Wishes, by_layer, file_type_numbered
from qwenlocal.weights.parts import OF_THE_FILE, read_parts
from qwenlocal.weights.plan import Plan, SourceTensor, Stretch, make_goals, make_plan

_MIXES_KNOWN = ("qwen2", "qwen2moe")


@dataclass(frozen=True)
class Options:
    """How to quantize. Without `again`, weights that are quantized already are not quantized once more."""

    wishes: Wishes = field(default_factory=Wishes)
    importance: Importance | None = None
    again: bool = False


def plan_quantization(source: Path, wanted: Sequence[tuple[Path, FileType]], options: Options = Options()) -> Plan:
    """
    The plan for writing `wanted` from the GGUF file `source` (of a split one, the first part).

    Raises
    ------
    BadWeights: the file is damaged.
    UsageError: it is quantized already (not with `again`).
    UnsupportedCheckpoint: the mixes of its architecture are not known here (with `pure` they are not needed).
    """
    parts = read_parts(source)
    first = parts.headers[0]
    facts = _facts(source, first, pure=options.wishes.pure)
    tensors = sorted(
        (source_tensor(*located) for located in parts.located),
        key=lambda tensor: by_layer(tensor.name),
    )
    strange = next((tensor for tensor in tensors if not ggml.can_dequantize(tensor.type)), None)
    if strange:
        raise BadWeights(source, f"“{strange.name}” has numbers of type {strange.type.name}, which are no weights")
    pairs = {key: value for key, value in read_pairs(parts.paths[0]).items() if key not in OF_THE_FILE}
    goals = make_goals(wanted, pairs, options.importance)
    plan = make_plan(tensors, goals, facts, options.wishes, options.importance)
    if not options.again:
        _refuse_again(source, first, plan)
    return plan


def _facts(source: Path, header: Header, *, pure: bool) -> ModelFacts:
    if header.architecture not in _MIXES_KNOWN and not pure:
        raise UnsupportedCheckpoint(
            source,
            f"which tensors of the architecture “{header.architecture}” llama.cpp gives other types is not known here",
            hint="The same type for all works: --pure. Or take llama.cpp's own llama-quantize.",
        )

    def number(key: str, default: int) -> int:
        value = header.hyperparameter(key)
        return value if isinstance(value, int) else default

    heads = number("attention.head_count", 1)
    return ModelFacts(
        header.architecture,
        number("block_count", 0),
        heads // max(1, number("attention.head_count_kv", heads)),
        number("expert_count", 0),
    )


def source_tensor(part: Path, header: Header, tensor: Tensor) -> SourceTensor:
    """
    A tensor of a GGUF file as something to be written.

    Raises
    ------
    BadWeights: its type is not known, or cannot have such rows.
    """
    kind = ggml.tensor_type_by_number(tensor.type)
    if kind is None or not tensor.shape or not tensor.elements:
        what = "is of the unknown type" if kind is None else "has no numbers of type"
        raise BadWeights(part, f"“{tensor.name}” {what} {tensor.type}")
    columns, *more = tensor.shape
    if columns % kind.block_size:
        raise BadWeights(part, f"“{tensor.name}” has rows of {columns:,}, which {kind.name} cannot have")
    rows = tensor.elements // columns if columns else 0
    at = header.data_offset + tensor.offset
    experts = more[1] if len(more) > 1 else 1
    each = rows // experts
    stretches = [Stretch(part, at + n * each * kind.row_bytes(columns), each, kind) for n in range(experts)]
    return SourceTensor(tensor.name, tensor.shape, stretches)


def _refuse_again(source: Path, header: Header, plan: Plan) -> None:
    for file in plan.files:
        for tensor in file.tensors:
            if tensor.source.is_quantized and tensor.choice.type != tensor.source:
                number = header.metadata.get("general.file_type")
                now = file_type_numbered(number) if isinstance(number, int) else ""
                raise UsageError(
                    f"{source} is quantized already ({now or tensor.source.name}); twice loses more than once.",
                    hint="Start from the checkpoint or an f16 or bf16 file. To do it all the same: --requantize",
                )
