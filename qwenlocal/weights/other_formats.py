"""
Checkpoints that cannot be converted as they are: adapters, pickled, quantized and rearranged weights.

Each is recognized by its files, its config.json or the names of its tensors, and refused with what to do.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterable
from pathlib import Path

from qwenlocal.errors import BadCheckpoint, UnsupportedCheckpoint
from qwenlocal.weights.json_files import read_optional_json
from qwenlocal.weights.packing import quantized_weights

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # peft
_PEFT_KEYS, _MLX_KEYS = ("peft_type", "base_model_name_or_path"), ("fine_tune_type", "model")
PICKLED = (".bin", ".pt", ".pth", ".ckpt")
PICKLED_MODELS = ("pytorch_model.bin", "pytorch_model.bin.index.json")  # transformers: WEIGHTS_NAME, WEIGHTS_INDEX_NAME

_TRAINER_STATE = re.compile(r"(optimizer|scheduler|scaler|rng_state|random_states|training_args)\b.*")
_PEFT = re.compile(r"^base_model\.model\.|\.(lora_\w+|base_layer|modules_to_save|ia3_l|oft_\w+|vera_\w+)(\.|$)")
_PACKED = re.compile(r"\.(qweight|qzeros)$")
_QUANTIZED = {
    "MLX": re.compile(r"\.(scales|biases)$"),
    "": re.compile(
        r"\.(weight_packed|weight_scale|weight_scale_inv|absmax|quant_state\..+|quant_map|W_q|weight\._data)$"
    ),
}


def training_step(folder: str) -> int:
    """Return the step of a folder that a trainer saved: `training_step("checkpoint-500")` is 500; 0 for other names."""
    match = re.search(r"-(\d{1,9})$", folder)
    return int(match[1]) if match else 0


def find_inner_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints and adapters in a folder, which a trainer may have saved there, the last one first."""
    try:
        children = sorted(folder.iterdir())
    except OSError:
        return []
    files = [(child, child / name) for child in children for name in ("config.json", ADAPTER_CONFIG)]
    inner = [child for child, file in files if os.path.isfile(file)]  # Path.is_file raises without permission
    return sorted(inner, key=lambda path: training_step(path.name), reverse=True)


def find_pickled_model(files: Iterable[str]) -> str | None:
    """Return the file that PyTorch pickled and that has the weights, if there is one; a trainer's state has none."""
    names = sorted(files)
    others = (name for name in names if name.endswith(PICKLED) and not _TRAINER_STATE.fullmatch(name))
    return next((name for name in PICKLED_MODELS if name in names), None) or next(others, None)


def pickled_weights(folder: Path, file: str) -> BadCheckpoint:
    """Return the error for weights that PyTorch pickled, which are never read."""
    return BadCheckpoint(
        folder,
        f"its weights are pickled ({file}), and unpickling a file can execute code hidden in it",
        hint=pickled_hint(str(folder)),
    )


def pickled_hint(model: str) -> str:
    """Return how to convert pickled weights to safetensors."""
    safe = f"{model.rstrip('/').rpartition('/')[2]}-safe"
    calls = (
        f"{kind}.from_pretrained({model!r}).save_pretrained({safe!r})"
        for kind in ("AutoModelForCausalLM", "AutoTokenizer")
    )
    return f"If you trust it, convert it to safetensors with transformers: {'; '.join(calls)}"


def no_weights(folder: Path, files: Iterable[str]) -> BadCheckpoint:
    """Return the error for a folder that has `files`, and no safetensors file with a model."""
    files = set(files)
    if any(name.startswith("adapter_") for name in files):
        return adapter_only(folder)
    if pickled := find_pickled_model(files):
        return pickled_weights(folder, pickled)
    if "zero_to_fp32.py" in files:
        join = f"cd {shlex.quote(str(folder))} && python zero_to_fp32.py . . --safe_serialization"
        return BadCheckpoint(folder, "its weights are in the shards of DeepSpeed", hint=f"Join them: {join}")
    if error := distributed_weights(folder):
        return error
    inner = find_inner_checkpoints(folder)
    hint = f"Did you mean {inner[0]}?" if inner else ""
    return BadCheckpoint(folder, "it contains no safetensors files", hint=hint)


def distributed_weights(folder: Path) -> BadCheckpoint | None:
    """Return the error for a folder with the shards of PyTorch's FSDP, in itself or a folder below; None without."""
    shards = next(
        (shard for pattern in ("*.distcp", "*model*/*.distcp") for shard in sorted(folder.glob(pattern))), None
    )
    if shards is None:
        return None
    merged = f"{folder.resolve().name}-merged"
    join = f"accelerate merge-weights {shlex.quote(str(shards.parent))} {shlex.quote(merged)}"
    hint = f"Join them: {join}. Then copy config.json and the tokenizer's files there, and convert {merged}."
    return BadCheckpoint(folder, "its weights are in the shards of PyTorch's FSDP (.distcp)", hint=hint)


def adapter_only(folder: Path) -> BadCheckpoint:
    """Return the error for the folder of an adapter; its adapter_config.json may name the base model."""
    try:
        config = read_optional_json(folder / ADAPTER_CONFIG)
    except BadCheckpoint:
        config = {}
    is_mlx = "fine_tune_type" in config
    kind, base = (config.get(key) for key in (_MLX_KEYS if is_mlx else _PEFT_KEYS))
    name = kind if isinstance(kind, str) and kind.isidentifier() and kind.upper() != "LORA" else "LoRA"
    model = base if isinstance(base, str) and base.isprintable() and 0 < len(base) < 200 else ""
    return BadCheckpoint(
        folder,
        f"it is {'an' if name[0] in 'AEIO' else 'a'} {name} adapter{' of MLX' if is_mlx else ''}"
        f"{f' for {model}' if model else ''}, not a model",
        hint=_mlx_hint(folder.resolve(), model) if is_mlx else adapter_hint(str(folder.resolve()), model),
    )


def _base_argument(base: str) -> str:
    """Return the base model as commands take it: "hf:Qwen/Qwen1.5-0.5B"; "BASE" if it is not on this disk or a hub."""
    if os.path.exists(base):
        return shlex.quote(base)
    return f"hf:{base}" if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", base) else "BASE"


def _mlx_hint(adapter: Path, base: str) -> str:
    merged = shlex.quote(f"{adapter.name}-merged")
    command = f"mlx_lm.fuse --model {shlex.quote(base or 'MODEL')} --adapter-path {shlex.quote(str(adapter))}"
    return (
        f"Merge it into its base model: {command} --save-path {merged} --dequantize; then: qwenlocal convert {merged}"
    )


def adapter_hint(adapter: str, base: str = "") -> str:
    """Return how to use an adapter with its base model, or to merge it if it is a folder."""
    use = f"Use it with its base model: qwenlocal run {_base_argument(base)} --adapter {shlex.quote(adapter)}"
    return use if adapter.lower().endswith(".gguf") else f"{use}; or merge it: {merge_command(adapter, base)}"


def merge_command(adapter: str = "ADAPTER", base: str = "") -> str:
    """Return the command that merges an adapter into its base model, and converts the result."""
    return f"qwenlocal convert {_base_argument(base)} --merge {shlex.quote(adapter)}"


def base_hint(base: str) -> str:
    """Return what to do with an adapter that does not fit a model; `base` is the one it was trained for, or ""."""
    return f"Use the model that it was trained for{f': {base}' if base else '.'}"


def remote_adapter_hint(repo: str) -> str:
    """Return how to use the adapter in a repository."""
    folder = repo.rpartition("/")[2]
    return f"Download it (hf download {repo} --local-dir {folder}). {adapter_hint(f'./{folder}')}"


def check_tensor_names(folder: Path, names: Iterable[str], *, is_packed: bool) -> None:
    """
    Check that no tensor is one that only other formats have; config.json does not always state them.

    `is_packed`: the checkpoint says how GPTQ or AWQ packed its weights.

    Raises
    ------
    BadCheckpoint: an adapter is not merged. UnsupportedCheckpoint: the weights are quantized or rearranged.
    """
    names = list(names)
    if peft := next(filter(_PEFT.search, names), None):
        raise BadCheckpoint(
            folder,
            f"it has an adapter that is not merged (“{peft}”)",
            hint="Load it as in training, merge it (merge_and_unload of peft), save the result with save_pretrained, "
            "and convert that.",
        )
    if not is_packed and (packed := next(filter(_PACKED.search, names), None)):
        raise BadCheckpoint(
            folder,
            f"its weights are packed (“{packed}”), but no file says how",
            hint="Copy “quantization_config” from the config.json of the original repository, or its "
            "quantize_config.json (GPTQ) or quant_config.json (AWQ).",
        )
    for method, pattern in _QUANTIZED.items():
        if not is_packed and (quantized := next(filter(pattern.search, names), None)):
            raise quantized_weights(folder, method or f"“{quantized}”")
    if any(".switch_mlp." in name for name in names):
        raise UnsupportedCheckpoint(
            folder,
            "its experts are stored as MLX stacks them (switch_mlp)",
            hint="Convert the checkpoint that the MLX model was made from.",
        )
    if score := next((name for name in names if name.startswith("score.")), None):
        raise UnsupportedCheckpoint(
            folder, f"it is a classifier (“{score}”), which writes no text", hint="Convert the model it was made from."
        )
