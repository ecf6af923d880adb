"""
LoRA adapters as PEFT saves them: a folder with adapter_config.json and adapter_model.safetensors.

An adapter adds s·B·A to a matrix W of (rows, columns): A has the shape (rank, columns), B (rows, rank), and s is
alpha / rank, or alpha / √rank with rsLoRA (peft, tuners/lora/layer.py: update_layer). PEFT ignores `fan_in_fan_out` for
the linear layers of Qwen1.5, and so does this reader. Whatever would compute something else is refused.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwenlocal.errors import BadCheckpoint, UnsupportedCheckpoint
from qwenlocal.formatting import brief_repr
from qwenlocal.weights.gguf_hyperparameters import MAX_LAYERS
from qwenlocal.weights.json_files import is_integer, read_json
from qwenlocal.weights.other_formats import ADAPTER_CONFIG, ADAPTER_WEIGHTS, adapter_only, base_hint
from qwenlocal.weights.safetensors import StoredTensor, read_tensors

_FACTOR = re.compile(r"(?P<module>.+)\.(?P<kind>lora|lora_embedding)_(?P<letter>[AB])(\.default)?(\.weight)?")
_LAYER = re.compile(r"(?:model\.)?layers\.(?P<layer>\d{1,9})\.(?P<part>.+)")
_EXPERT = re.compile(r"mlp\.experts\.(?P<expert>\d{1,9})\.(?P<part>\w+)")
_MLP = re.compile(r"\.mlp\.(?P<part>\w+)")
_MIXTURE_PARTS = {"experts", "shared_expert", "shared_expert_gate", "gate"}
_MIXTURE_NAME = re.compile(r"(?<![a-z])moe(?![a-z])|-A\d+(\.\d+)?B\b", re.IGNORECASE)  # Qwen2-57B-A14B is one, too
_SNAPSHOT = re.compile(r"/models--[^/]+?--(?P<name>[^/]+)/snapshots/")  # of the Hub's cache
_MAX_RANK = 1 << 16
_FLOATS = ("F32", "F16", "BF16")
_FULL_MATRICES = re.compile(r"\.base_layer\.weight$")  # copies of the base model's embeddings, which peft may add

# Options of LoraConfig that change what a layer computes, and what the adapter then has.
_VARIANTS = {
    "use_dora": "DoRA",
    "use_qalora": "QALoRA",
    "use_bdlora": "block-diagonal LoRA",
    "arrow_config": "Arrow",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
    "alora_invocation_tokens": "aLoRA",
    "layer_replication": "repeated layers (layer_replication)",
    "lora_bias": "biases (lora_bias)",
    "trainable_token_indices": "trained tokens (trainable_token_indices)",
    "target_parameters": "changes outside linear layers (target_parameters)",
    "modules_to_save": "layers that replace those of the model (modules_to_save)",
}
_PLAIN_INITIALIZATIONS = (None, True, False, "gaussian", "eva", "orthogonal")  # those that leave the base as it was
_PROMPT_TYPES = ("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "ADAPTION_PROMPT", "CPT")
_DAMAGED_HINT = "Download or save the adapter again."
_MERGE_HINT = (
    "Merge it into its base model with peft (merge_and_unload, save_pretrained), and convert the result: "
    "qwenlocal convert DIRECTORY"
)


@dataclass(frozen=True)
class LoraModule:
    """
    The change of one matrix, of the module `name` in transformers: W + `scale`·B·A.

    `target` is the matrix in a GGUF file, `expert` its number among the experts that the file stacks (0 for others).
    For embeddings, whose matrix has a row for each token, it is W + `scale`·(B·A)ᵀ.
    """

    name: str
    target: str
    expert: int
    a: StoredTensor
    b: StoredTensor
    scale: float
    is_embedding: bool = False

    @property
    def rank(self) -> int:
        """The rank of the change."""
        return self.a.shape[0]

    @property
    def rows(self) -> int:
        """Rows of the matrix."""
        return self.a.shape[1] if self.is_embedding else self.b.shape[0]

    @property
    def columns(self) -> int:
        """Columns of the matrix."""
        return self.b.shape[0] if self.is_embedding else self.a.shape[1]


@dataclass(frozen=True)
class LoraAdapter:
    """
    An adapter for a model of `architecture` (llama.cpp's name); `base` is the model it was trained for, "" if unknown.

    `alpha` is that of modules without a value of their own.
    """

    folder: Path
    architecture: str
    base: str
    alpha: float
    modules: Sequence[LoraModule]


def is_adapter(path: Path) -> bool:
    """
    Return True for the folder of an adapter with safetensors weights, or for one of its two files.

    A config.json, which Axolotl saves there as well, does not make it a model; weights of a model do.
    """
    folder = adapter_folder(path)
    if not all(os.path.isfile(folder / name) for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS)):
        return False
    return all(file.name.startswith(("adapter_", ".")) for file in folder.glob("*.safetensors"))


def adapter_folder(path: Path) -> Path:
    """Return the folder of an adapter, of which `path` may be one of the files."""
    return path.parent if path.name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS) else path


def read_adapter(folder: Path, architecture: str = "") -> LoraAdapter:
    """
    Read the adapter in `folder` for a model of `architecture`, "qwen2" or "qwen2moe".

    Without it, the architecture is that of the base model, as far as the adapter tells.

    Raises
    ------
    BadCheckpoint: a file is missing or damaged, or the two contradict each other.
    UnsupportedCheckpoint: it is not a LoRA adapter, or a kind that llama.cpp cannot compute.
    """
    config, tensors = _read_files(folder)
    pairs = _pair_factors(folder, tensors)
    base = config.get("base_model_name_or_path")
    base = base if isinstance(base, str) and base.isprintable() and len(base) < 200 else ""
    if not architecture:
        architecture = _find_architecture(folder, base, pairs)
    scales = _Scales(folder / ADAPTER_CONFIG, config)
    names = TargetNames(architecture)
    modules = [_make_module(names, base, name, kind, a, b, scales) for name, (kind, a, b) in pairs.items()]
    if config.get("ensure_weight_tying") and any(module.is_embedding for module in modules):
        raise UnsupportedCheckpoint(
            folder / ADAPTER_CONFIG,
            "the adapter changes embeddings and output together (ensure_weight_tying), which llama.cpp cannot do",
            hint=_MERGE_HINT,
        )
    return LoraAdapter(folder, architecture, base, scales.alpha, modules)


def _read_files(folder: Path) -> tuple[dict[str, Any], list[StoredTensor]]:
    """Read adapter_config.json and the header of the weights."""
    try:
        config = read_json(folder / ADAPTER_CONFIG, "the adapter's settings")
        _check_config(folder, config)
        if not os.path.isfile(folder / ADAPTER_WEIGHTS):
            raise UnsupportedCheckpoint(
                folder,
                f"it has no {ADAPTER_WEIGHTS}",
                hint="Save it again with a current version of peft (save_pretrained), which writes safetensors.",
            )
        return config, read_tensors(folder / ADAPTER_WEIGHTS)
    except BadCheckpoint as error:
        error.hint = _DAMAGED_HINT
        raise


def _check_config(folder: Path, config: Mapping[str, Any]) -> None:
    path, kind = folder / ADAPTER_CONFIG, config.get("peft_type")
    if "fine_tune_type" in config:
        hint = adapter_only(folder).hint
        raise UnsupportedCheckpoint(folder, "it is an adapter of MLX; only those of PEFT can be used", hint=hint)
    if kind != "LORA":
        is_prompt = kind in _PROMPT_TYPES
        raise UnsupportedCheckpoint(
            path,
            f"it describes an adapter of the type {brief_repr(kind)}, not LoRA",
            hint="Train a LoRA adapter; one that extends prompts cannot be merged." if is_prompt else _MERGE_HINT,
        )
    for key, description in _VARIANTS.items():
        if config.get(key) not in (None, False, [], {}):
            raise UnsupportedCheckpoint(
                path, f"the adapter uses {description}, which llama.cpp does not support", hint=_MERGE_HINT
            )
    if config.get("bias", "none") != "none":
        raise UnsupportedCheckpoint(
            path,
            f"the adapter trained biases (“bias” is {brief_repr(config['bias'])}), which llama.cpp does not support",
            hint=_MERGE_HINT,
        )
    if (start := config.get("init_lora_weights")) not in _PLAIN_INITIALIZATIONS:
        raise UnsupportedCheckpoint(
            path,
            f"the adapter was initialized with {brief_repr(start)}, which also changes the base model",
            hint="Save it for the original model: save_pretrained with path_initial_model_for_weight_conversion (peft)",
        )


# --- scales


class _Scales:
    """Ranks and scales of modules, by the patterns of adapter_config.json."""

    def __init__(self, path: Path, config: Mapping[str, Any]) -> None:
        self._path, self._is_rs = path, bool(config.get("use_rslora"))
        self._rank = self._number("r", config.get("r", 8))
        self.alpha = self._number("lora_alpha", config.get("lora_alpha", 8))
        self._ranks, self._alphas = (self._patterns(key, config.get(key)) for key in ("rank_pattern", "alpha_pattern"))

    def _number(self, key: str, value: Any) -> float:
        is_number = is_integer(value) or isinstance(value, float)
        if not is_number or not 0 < value < 1e9 or not math.isfinite(value):
            raise BadCheckpoint(
                self._path,
                f"“{key}” is {brief_repr(value)}, which is invalid: it must be a positive number",
                hint="Correct the value, or save the adapter again.",
            )
        return float(value)

    def _patterns(self, key: str, value: Any) -> list[tuple[re.Pattern[str], float]]:
        if not isinstance(value or {}, dict):
            reason = f"“{key}” is {brief_repr(value)}; it must be an object with numbers"
            raise BadCheckpoint(self._path, reason, hint=_DAMAGED_HINT)
        patterns = []
        for expression, number in (value or {}).items():
            try:  # as in peft (utils/other.py: get_pattern_key)
                pattern = re.compile(rf"(.*\.)?({expression})$")
            except re.error as error:
                reason = f"“{key}” has an invalid regular expression, {brief_repr(expression)}: {error}"
                raise BadCheckpoint(self._path, reason, hint=_DAMAGED_HINT) from error
            patterns.append((pattern, self._number(f"{key}” of “{expression}", number)))
        return patterns

    def scale(self, name: str, a: StoredTensor) -> float:
        """
        Return the scale of the module `name`, whose A is `a`.

        Raises
        ------
        BadCheckpoint: the tensor has another rank than the settings.
        """
        rank, alpha = _find(self._ranks, name, self._rank), _find(self._alphas, name, self.alpha)
        if rank != a.shape[0]:
            raise BadCheckpoint(
                a.file,
                f"“{a.name}” has the rank {a.shape[0]:,}, but {ADAPTER_CONFIG} says {rank:g}",
                hint=f"The two files do not belong together. {_DAMAGED_HINT}",
            )
        return alpha / (math.sqrt(rank) if self._is_rs else rank)


def _find(patterns: Sequence[tuple[re.Pattern[str], float]], name: str, default: float) -> float:
    return next((number for pattern, number in patterns if pattern.match(name)), default)


# --- tensors

_Pair = tuple[str, StoredTensor, StoredTensor]


def _pair_factors(folder: Path, tensors: Sequence[StoredTensor]) -> dict[str, _Pair]:
    """Return A and B of each module, and their kind: "lora" or "lora_embedding"."""
    factors: dict[tuple[str, str], dict[str, StoredTensor]] = {}
    for tensor in tensors:
        name = tensor.name.removeprefix("base_model.model.")
        if _FULL_MATRICES.search(name):
            continue
        match = _FACTOR.fullmatch(name)
        if match is None:
            raise _unexpected_tensor(tensor)
        _check_factor(tensor)
        pair = factors.setdefault((match["module"], match["kind"]), {})
        if match["letter"] in pair:
            raise BadCheckpoint(tensor.file, f"“{tensor.name}” is there twice", hint=_DAMAGED_HINT)
        pair[match["letter"]] = tensor
    if not factors:
        raise BadCheckpoint(folder, "its adapter has no tensors", hint=_DAMAGED_HINT)
    for (module, _), pair in factors.items():
        if len(pair) < 2 or pair["A"].shape[0] != pair["B"].shape[1]:
            shapes = " and ".join(f"{letter} {list(tensor.shape)}" for letter, tensor in sorted(pair.items()))
            raise BadCheckpoint(
                next(iter(pair.values())).file,
                f"the factors of “{module}” do not fit together: {shapes}",
                hint=_DAMAGED_HINT,
            )
    return {module: (kind, pair["A"], pair["B"]) for (module, kind), pair in factors.items()}


def _unexpected_tensor(tensor: StoredTensor) -> UnsupportedCheckpoint:
    if "lora_magnitude_vector" in tensor.name:
        reason = f"the adapter uses DoRA (“{tensor.name}”), which llama.cpp does not support"
    elif "lora_" in tensor.name:
        reason = f"“{tensor.name}” belongs to a variant of LoRA that llama.cpp does not support"
    else:
        reason = f"“{tensor.name}” replaces a part of the model, which llama.cpp does not support in adapters"
    return UnsupportedCheckpoint(tensor.file, reason, hint=_MERGE_HINT)


def _check_factor(tensor: StoredTensor) -> None:
    if len(tensor.shape) != 2 or not 0 < min(tensor.shape) <= _MAX_RANK:
        raise BadCheckpoint(
            tensor.file,
            f"“{tensor.name}” has the shape {list(tensor.shape)}; it must be a matrix",
            hint="If it was trained in shards (DeepSpeed ZeRO-3, FSDP), gather them before saving.",
        )
    if tensor.dtype not in _FLOATS:
        raise UnsupportedCheckpoint(
            tensor.file,
            f"“{tensor.name}” has the type {tensor.dtype}; only f32, f16 and bf16 can be converted",
            hint="Save the adapter as float32 or bfloat16.",
        )


def _find_architecture(folder: Path, base: str, modules: Iterable[str]) -> str:
    """Return the architecture of the base model: by the modules, a config.json, or its name."""
    parts = {match["part"] for module in modules if (match := _MLP.search(module))}
    configs = [
        Path(checkpoint, "config.json") for checkpoint in (folder, base) if checkpoint
    ]  # Axolotl saves the first
    if parts:
        is_mixture = bool(parts & _MIXTURE_PARTS)
    elif config := next(filter(os.path.isfile, configs), None):  # Path.is_file raises without permission
        is_mixture = read_json(config, "").get("model_type") == "qwen2_moe"
    else:
        is_mixture = _MIXTURE_NAME.search(base_name(base)) is not None
    return "qwen2moe" if is_mixture else "qwen2"


def base_name(base: str) -> str:
    """Return the name of a base model without its owner or folders."""
    in_cache = _SNAPSHOT.search(base)
    return in_cache["name"] if in_cache else base.rstrip("/").rpartition("/")[2]


def _make_module(
    names: TargetNames, base: str, name: str, kind: str, a: StoredTensor, b: StoredTensor, scales: _Scales
) -> LoraModule:
    target = names.find(name)
    is_embedding = kind == "lora_embedding"
    if target is None or is_embedding != (target[0] == "token_embd.weight"):
        raise UnsupportedCheckpoint(
            a.file,
            f"the adapter changes “{name}”, which the architecture {names.architecture} does not have",
            hint=base_hint(base),
        )
    return LoraModule(name, *target, a, b, scales.scale(name, a), is_embedding)


class TargetNames:
    """llama.cpp's names of the matrices of an architecture, from the table of its own converter."""

    def __init__(self, architecture: str) -> None:
        import gguf

        self.architecture = architecture
        number = next((key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture), None)
        self._names = gguf.get_tensor_name_map(number, 1) if number is not None else None

    def find(self, module: str) -> tuple[str, int] | None:
        """
        Return the matrix of a module of transformers, and the number of the expert; None if there is none.

        `find("model.layers.3.mlp.experts.2.up_proj")` is ("blk.3.ffn_up_exps.weight", 2).
        """
        layer, expert = _LAYER.fullmatch(module), None
        name, number = module, "0"
        if layer:
            part, number = layer["part"], layer["layer"]
            if expert := _EXPERT.fullmatch(part):
                part = f"mlp.experts.{expert['part']}"
            name = f"model.layers.0.{part}"
        elif module == "embed_tokens":
            name = "model.embed_tokens"
        if self._names is None or int(number) >= MAX_LAYERS or (layer and ".experts" in name and not expert):
            return None
        target = self._names.get_name(name)
        if target is None or "norm" in target:
            return None
        return f"{target.replace('blk.0.', f'blk.{int(number)}.')}.weight", int(expert["expert"]) if expert else 0
