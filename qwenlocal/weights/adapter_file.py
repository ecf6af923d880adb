"""
Adapters as GGUF files, as llama.cpp reads them (src/llama-adapter.cpp; written like convert_lora_to_gguf.py).

For the matrix `blk.0.attn_q.weight` there are `blk.0.attn_q.weight.lora_a` and `.lora_b`. llama.cpp adds
alpha / rank · B·A, with one alpha for the whole file. If a module has another scale s, its B is stored multiplied by
s · rank / alpha. Usually that is 1, and the tensors are those of llama.cpp's converter. Factors of experts are stacked.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from qwenlocal.errors import BadWeights, InvalidChoice, UnsupportedCheckpoint
from qwenlocal.ggml import tensor_type
from qwenlocal.weights import gguf_writer
from qwenlocal.weights.adapter import LoraAdapter, LoraModule
from qwenlocal.weights.adapter_rows import FactorRows
from qwenlocal.weights.conversion_plan import ConversionPlan, PlannedFile, PlannedTensor, row_ranges
from qwenlocal.weights.file_types import FileType, file_type
from qwenlocal.weights.gguf_reader import read_header
from qwenlocal.weights.gguf_writer import TensorSpec
from qwenlocal.weights.other_formats import base_hint, merge_command
from qwenlocal.weights.quant_mix import TypeChoice, layer_order
from qwenlocal.weights.row_source import SourceTensor
from qwenlocal.weights.split_model import SplitModel
from qwenlocal.weights.write_job import OutputFile, WriteJob

ADAPTER_TYPES = ("f32", "f16", "bf16", "q8_0")
_ENDINGS = (".lora_a", ".lora_b")
_EMBEDDINGS, _OUTPUT = "token_embd.weight", "output.weight"


# --- writing


def plan_adapter(adapter: LoraAdapter, targets: Sequence[tuple[Path, FileType]]) -> ConversionPlan:
    """
    Plan to write an adapter to `targets` (paths and types).

    Raises
    ------
    InvalidChoice: a type is not one of `ADAPTER_TYPES`. UnsupportedCheckpoint: experts have no or different changes.
    """
    tensors = sorted(_stack_modules(adapter), key=lambda tensor: layer_order(tensor.name))
    files, outputs, destinations = [], [], []
    for path, kind in targets:
        if kind.name not in ADAPTER_TYPES:
            raise InvalidChoice("The type of an adapter", ADAPTER_TYPES, kind.name)
        choices = [_choose_type(tensor, kind) for tensor in tensors]
        specs = [TensorSpec(t.name, t.shape, choice.type) for t, choice in zip(tensors, choices, strict=True)]
        layout = gguf_writer.make_layout(_metadata(adapter), specs)
        planned = [PlannedTensor(t.name, t.shape, t.type, choice) for t, choice in zip(tensors, choices, strict=True)]
        files.append(PlannedFile(path, kind, planned, layout.size))
        outputs.append(OutputFile(path, layout.header, layout.size))
        destinations.append([(spec.type, layout.offsets[spec.name]) for spec in specs])
    ranges = []
    for tensor, tensor_destinations in zip(tensors, zip(*destinations, strict=True), strict=True):
        ranges += row_ranges(tensor, tensor_destinations)
    note = f"The adapter is for models of the architecture {adapter.architecture}."
    return ConversionPlan(files, WriteJob(outputs, ranges), [note])


def default_adapter_type() -> FileType:
    """Return f32, which loses nothing; llama.cpp's converter writes it, too."""
    return file_type("f32")


def _metadata(adapter: LoraAdapter) -> dict[str, bytes]:
    base = {
        "general.base_model.count": gguf_writer.u32(1),
        "general.base_model.0.name": gguf_writer.string(adapter.base),
    }
    return {
        "general.architecture": gguf_writer.string(adapter.architecture),
        "general.type": gguf_writer.string("adapter"),
        "adapter.type": gguf_writer.string("lora"),
        "general.name": gguf_writer.string(adapter.folder.resolve().name),
        **(base if adapter.base else {}),
        "general.quantization_version": gguf_writer.u32(2),  # ggml.h: GGML_QNT_VERSION
        "adapter.lora.alpha": gguf_writer.f32(adapter.alpha),
    }


def _choose_type(tensor: SourceTensor, kind: FileType) -> TypeChoice:
    if tensor.shape[0] % kind.default.block_size:  # a rank of 16 cannot be divided into blocks of 32
        return TypeChoice(tensor_type("f16"), f"rows of {tensor.shape[0]} values")
    return TypeChoice(kind.default, "")


def _stack_modules(adapter: LoraAdapter) -> Iterator[SourceTensor]:
    by_target: dict[str, list[LoraModule]] = {}
    for module in adapter.modules:
        by_target.setdefault(module.target, []).append(module)
    for target, modules in by_target.items():
        if "_exps." in target:
            modules = _check_experts(adapter, modules)
        rank, rows, columns, count = modules[0].rank, modules[0].rows, modules[0].columns, len(modules)
        more = (count,) if "_exps." in target else ()
        scales = [_stored_scale(module, adapter.alpha) for module in modules]
        pairs = list(zip(modules, scales, strict=True))
        a = [FactorRows(module.a, is_transposed=module.is_embedding) for module in modules]
        b = [FactorRows(module.b, scale) for module, scale in pairs]
        if target == _EMBEDDINGS:  # llama.cpp looks up rows of the transposed A (llama-graph.cpp: build_inp_embd)
            yield SourceTensor(f"{target}.lora_a", (rank, rows), a)
            yield SourceTensor(f"{target}.lora_b", (rank, columns), b)
        else:
            yield SourceTensor(f"{target}.lora_a", (columns, rank, *more), a)
            yield SourceTensor(f"{target}.lora_b", (rank, rows, *more), b)


def _stored_scale(module: LoraModule, alpha: float) -> float:
    """Return what B is multiplied by: exactly 1 for a module with the usual scale, alpha / rank."""
    return 1.0 if module.scale == alpha / module.rank else module.scale * module.rank / alpha


def _check_experts(adapter: LoraAdapter, modules: Sequence[LoraModule]) -> list[LoraModule]:
    """Return the modules of all experts in order; llama.cpp needs one for each, all of the same shape."""
    modules = sorted(modules, key=lambda module: module.expert)
    missing = next((n for n, module in enumerate(modules) if module.expert != n), None)
    if missing is not None:
        raise UnsupportedCheckpoint(
            modules[0].a.file,
            f"the adapter changes “{modules[0].name}”, but not expert {missing}; llama.cpp needs all experts",
            hint=f"Merge it instead: {merge_command(str(adapter.folder), adapter.base)}",
        )
    if odd := next((m for m in modules if (m.a.shape, m.b.shape) != (modules[0].a.shape, modules[0].b.shape)), None):
        raise UnsupportedCheckpoint(
            odd.a.file,
            f"“{odd.name}” has another shape than “{modules[0].name}”; llama.cpp needs the same for all experts",
            hint=f"Merge it instead: {merge_command(str(adapter.folder), adapter.base)}",
        )
    return modules


# --- checking


def check_adapter_fits(adapter: Path, model: SplitModel, source: Path | None = None) -> str:
    """
    Check that the adapter in a GGUF file can be used with a model; return the name of its base model, "" if unknown.

    `source` is what the file was converted from, for errors.

    Raises
    ------
    BadWeights: it is damaged, not a LoRA adapter, or for a model with other matrices.
    """
    header, source, architecture = read_header(adapter), source or adapter, model.header.architecture
    if header.metadata.get("general.type") != "adapter" or header.metadata.get("adapter.type") != "lora":
        raise BadWeights(source, "it is not a LoRA adapter", hint="Name the directory or the GGUF file of an adapter.")
    base = str(header.metadata.get("general.base_model.0.name", ""))
    if header.architecture != architecture:
        raise BadWeights(
            source,
            f"it is for models of the architecture {header.architecture}, not {architecture}",
            hint=base_hint(base),
        )
    if "adapter.alora.invocation_tokens" in header.metadata:
        raise BadWeights(
            source,
            "it is an aLoRA, which only changes the text after certain tokens; that is not supported",
            hint="Use a LoRA adapter.",
        )
    factors = {tensor.name: tensor.shape for tensor in header.tensors}
    for target in dict.fromkeys(name[: -len(_ENDINGS[0])] for name in factors if name.endswith(_ENDINGS)):
        a, b = (factors.get(f"{target}{ending}", ()) for ending in _ENDINGS)
        if len(a) < 2 or len(b) < 2 or b[0] != a[0 if target == _EMBEDDINGS else 1]:
            raise BadWeights(
                source, f"“{target}” does not have two factors of the same rank", hint="Convert or download it again."
            )
        _check_target(target, a, b, model, source, base)
    return base


def _check_target(
    target: str, a: tuple[int, ...], b: tuple[int, ...], model: SplitModel, source: Path, base: str
) -> None:
    """Check that the model has the matrix `target`, and that it has the shape of the product of `a` and `b`."""
    name = model.paths[0].name
    if target in (_EMBEDDINGS, _OUTPUT) and _OUTPUT not in model.tensors:
        raise BadWeights(
            source,
            f"it changes “{target}”, but {name} uses the same matrix for embeddings and output",
            hint=f"Merge it into the checkpoint: {merge_command(_mergeable(source), base)}",
        )
    if target not in model.tensors:
        raise BadWeights(source, f"it changes “{target}”, which {name} does not have", hint=base_hint(base))
    rows, columns = (a[1], b[1]) if target == _EMBEDDINGS else (b[1], a[0])
    shape = model.tensors[target].shape
    expected = (shape[1] if len(shape) > 1 else 1, shape[0])
    if (rows, columns) != expected or a[2:] != shape[2:] or b[2:] != shape[2:]:
        changed, own = (f"{size[0]:,} x {size[1]:,}" for size in ((rows, columns), expected))
        raise BadWeights(
            source, f"it changes a “{target}” of {changed}, but that of {name} has {own}", hint=base_hint(base)
        )


def _mergeable(source: Path) -> str:
    """Return the argument of --merge: a directory, or a word for the one that a GGUF file was converted from."""
    return "ADAPTER" if source.suffix.lower() == ".gguf" else str(source)
