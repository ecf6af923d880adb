"""Conversion of checkpoints to GGUF files, compared with llama-quantize byte for byte."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy
import pytest
from checkpoint_files import convert_checkpoint, read_tensor
from oracle import data_of, dry_run_types, llama_quantize

from qwenlocal.model_files import FILE_TYPES
from qwenlocal.testing import CONFIG, MOE_CONFIG, checkpoint_shapes, write_checkpoint
from qwenlocal.weights import CONVERTER_VERSION
from qwenlocal.weights.checkpoint import Checkpoint
from qwenlocal.weights.conversion import ConversionOptions, plan_conversion
from qwenlocal.weights.conversion_plan import ConversionPlan
from qwenlocal.weights.file_types import QuantOverrides, file_type, parse_tensor_types
from qwenlocal.weights.gguf_reader import read_header
from qwenlocal.weights.imatrix import ImportanceMatrix
from qwenlocal.weights.write_workers import run_job

IMATRIX_TYPES = ("iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq2_m", "iq3_xxs", "iq3_xs", "q2_k_s")
SLOW_TYPES = ("iq1_s", "iq1_m", "iq2_xs", "iq2_s", "iq2_m", "iq3_xxs")  # ggml computes tables for them for seconds


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight layers, so that mixes give them different types, and rows of 288 values, which some types cannot divide."""
    config = {"num_hidden_layers": 8, "intermediate_size": 288}
    return write_checkpoint(tmp_path_factory.mktemp("dense") / "Qwen1.5-0.5B-Chat", config=config)


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("moe") / "Qwen1.5-MoE-A2.7B", config=MOE_CONFIG, shards=3)


# Of the files converted from the two checkpoints above. If they change on purpose, bump CONVERTER_VERSION and add the
# new digests here.
DIGESTS = {1: {"dense": "56f090b0bc26bf7c", "moe": "6917cacfa99778b5"}}


@pytest.fixture(scope="module")
def sources(dense: Path, moe: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return these two, and one of each kind with a single layer."""
    folder = tmp_path_factory.mktemp("short")
    small = {"num_hidden_layers": 1, "intermediate_size": 288}
    experts = {"num_experts": 2, "num_experts_per_tok": 1, "shared_expert_intermediate_size": 256}
    short = write_checkpoint(folder / "Qwen1.5-0.5B", config=small)
    mixed = write_checkpoint(folder / "Qwen1.5-MoE", config={**MOE_CONFIG, **small, **experts})
    return {"dense": dense, "moe": moe, "short": short, "short moe": mixed}


@pytest.fixture(scope="module")
def plain(sources: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Convert all of them to BF16 GGUF files, from which llama-quantize starts."""
    folder = tmp_path_factory.mktemp("plain")
    return {name: convert_checkpoint(source, folder / f"{name}.gguf", "bf16") for name, source in sources.items()}


def random_imatrix(path: Path) -> dict[str, numpy.ndarray]:
    """Return column weights for every matrix of a file, with one row per expert."""
    random = numpy.random.default_rng(1)
    return {
        tensor.name: random.random((tensor.shape[2] if len(tensor.shape) > 2 else 1, tensor.shape[0]), numpy.float32)
        + 0.1
        for tensor in read_header(path).tensors
        if len(tensor.shape) > 1 and tensor.name.startswith("blk.")
    }


class TestBytes:
    @pytest.mark.parametrize(
        ("model", "kind"),
        [
            (model, kind)
            for model in ("dense", "moe")
            for kind in FILE_TYPES
            # llama-quantize has no fallback for rows of 288 values and Q1_0, whose blocks have 128
            if kind not in ("bf16", *IMATRIX_TYPES) and (model, kind) != ("dense", "q1_0")
        ],
    )
    def test_tensors_equal_those_of_llama_quantize_from_the_bf16_file(
        self, kind: str, model: str, sources: dict[str, Path], plain: dict[str, Path], tmp_path: Path
    ) -> None:
        ours = convert_checkpoint(sources[model], tmp_path / "ours.gguf", kind)
        llama_quantize(plain[model], tmp_path / "theirs.gguf", file_type(kind))
        assert data_of(ours) == data_of(tmp_path / "theirs.gguf")

    @pytest.mark.parametrize(
        ("model", "kind"),
        [  # the small types take seconds per million weights; the imatrix changes only the mix of iq3_xxs
            *(
                pytest.param(model, kind, marks=[pytest.mark.slow] if kind in SLOW_TYPES else [])
                for model in ("short", "short moe")
                for kind in IMATRIX_TYPES
            ),
            pytest.param("dense", "iq3_xxs", marks=pytest.mark.slow),
            *((model, kind) for model in ("dense", "moe") for kind in ("q4_0", "q4_k_m", "iq4_xs")),
        ],
    )
    def test_tensors_with_an_imatrix_equal_those_of_llama_quantize(
        self, kind: str, model: str, sources: dict[str, Path], plain: dict[str, Path], tmp_path: Path
    ) -> None:
        weights = random_imatrix(plain[model])
        imatrix, overrides = ImportanceMatrix(weights, {}), QuantOverrides(has_imatrix=True)
        ours = convert_checkpoint(sources[model], tmp_path / "ours.gguf", kind, imatrix=imatrix, overrides=overrides)
        llama_quantize(plain[model], tmp_path / "theirs.gguf", file_type(kind), imatrix=weights)
        assert data_of(ours) == data_of(tmp_path / "theirs.gguf")

    @pytest.mark.parametrize("dtype", ["F32", "F16"])
    def test_tensors_from_an_f32_or_f16_checkpoint_equal_those_of_llama_quantize(
        self, dtype: str, tmp_path: Path
    ) -> None:
        source = write_checkpoint(tmp_path / "model", dtype=dtype)
        same = convert_checkpoint(source, tmp_path / "same.gguf", dtype.lower())
        ours = convert_checkpoint(source, tmp_path / "ours.gguf", "q4_k_m")
        llama_quantize(same, tmp_path / "theirs.gguf", file_type("q4_k_m"))
        assert data_of(ours) == data_of(tmp_path / "theirs.gguf")

    def test_weights_are_copied_byte_for_byte_without_quantizing(self, dense: Path, plain: dict[str, Path]) -> None:
        stored = read_tensor(dense, "model.layers.3.mlp.down_proj.weight")
        assert data_of(plain["dense"])["blk.3.ffn_down.weight"][1] == stored

    def test_the_file_does_not_depend_on_the_number_of_threads(self, dense: Path, tmp_path: Path) -> None:
        files = [convert_checkpoint(dense, tmp_path / f"{n}.gguf", "q4_k_m", threads=n) for n in (1, 2, 5)]
        assert len({file.read_bytes() for file in files}) == 1

    def test_several_types_in_one_pass_equal_separate_conversions(self, dense: Path, tmp_path: Path) -> None:
        targets = [(tmp_path / f"{kind}.gguf", file_type(kind)) for kind in ("q8_0", "q4_k_m", "f16")]
        plan = plan_conversion(Checkpoint.open(dense), targets)
        run_job(plan.job, threads=2)
        assert plan.job.read_bytes <= sum(tensor.size for tensor in Checkpoint.open(dense).tensors.values())
        for path, kind in targets:
            separate = convert_checkpoint(dense, tmp_path / f"separate-{kind.name}.gguf", kind.name)
            assert path.read_bytes() == separate.read_bytes()

    def test_separate_and_fused_experts_give_the_same_file(self, tmp_path: Path) -> None:
        """transformers 4 stores matrices per expert, transformers 5 per layer."""
        separate = write_checkpoint(tmp_path / "one" / "model", config=MOE_CONFIG)
        stored = {name: read_tensor(separate, name) for name in Checkpoint.open(separate).tensors}
        together = write_checkpoint(tmp_path / "two" / "model", config=MOE_CONFIG, fused_experts=True)
        overwrite(together, {name: fuse(name, stored) for name in Checkpoint.open(together).tensors})
        one, two = (convert_checkpoint(source, source / "out.gguf", "q4_k_m") for source in (separate, together))
        assert one.read_bytes() == two.read_bytes()


def overwrite(folder: Path, data: dict[str, bytes]) -> None:
    for name, stored in Checkpoint.open(folder).tensors.items():
        if name in data:
            with stored.file.open("r+b") as file:
                file.seek(stored.offset)
                file.write(data[name])


def fuse(name: str, stored: dict[str, bytes]) -> bytes:
    prefix, _, matrix = name.partition("experts.")
    if matrix not in ("gate_up_proj", "down_proj"):
        return stored[name]
    kinds = ("gate_proj", "up_proj") if matrix == "gate_up_proj" else ("down_proj",)
    numbers = range(MOE_CONFIG["num_experts"])
    return b"".join(stored[f"{prefix}experts.{number}.{kind}.weight"] for number in numbers for kind in kinds)


def test_the_output_changes_only_with_the_converter_version(sources: dict[str, Path], tmp_path: Path) -> None:
    digests = {}
    for name in ("dense", "moe"):
        files = [
            convert_checkpoint(sources[name], tmp_path / f"{name}-{kind}.gguf", kind)
            for kind in ("bf16", "q4_k_m", "q8_0")
        ]
        digests[name] = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]
    assert digests == DIGESTS[CONVERTER_VERSION]


class TestTypes:
    """The type of each tensor for the shapes of all published models; the files are sparse, nothing is quantized."""

    SHAPES = {  # noqa: RUF012
        "0.5b": (24, 1024, 2816, 16, 16), "1.8b": (24, 2048, 5504, 16, 16), "4b": (40, 2560, 6912, 20, 20),
        "7b": (32, 4096, 11008, 32, 32), "14b": (40, 5120, 13696, 40, 40), "32b": (64, 5120, 27392, 40, 8),
        "72b": (80, 8192, 24576, 64, 64), "110b": (80, 8192, 49152, 64, 8),
    }  # fmt: skip

    @pytest.mark.parametrize("size", [*SHAPES, "moe", "moe of 8 experts"])
    def test_types_are_those_of_llama_quantize(self, size: str, tmp_path: Path) -> None:
        source = sparse_checkpoint(tmp_path / "model", self.config(size))
        checkpoint = Checkpoint.open(source)
        plain = plan_conversion(checkpoint, [(tmp_path / "bf16.gguf", file_type("bf16"))])
        write_sparse(plain)
        kinds = [kind for kind in FILE_TYPES if kind not in ("f32", "f16", "bf16")]
        for kind in kinds:
            options = ConversionOptions(overrides=QuantOverrides(has_imatrix=False))
            if kind in IMATRIX_TYPES:
                options = dataclasses.replace(options, imatrix=_EmptyImatrix())
            planned = plan_conversion(checkpoint, [(tmp_path / "x.gguf", file_type(kind))], options).files[0]
            log = llama_quantize(tmp_path / "bf16.gguf", tmp_path / "no.gguf", file_type(kind), dry_run=True)
            ours = {tensor.name: tensor.choice.type.name for tensor in planned.tensors}
            assert ours == dry_run_types(log, file_type(kind)), kind

    def config(self, size: str) -> dict[str, Any]:
        if size.startswith("moe"):
            wide = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 24, "num_attention_heads": 16,
                    "num_key_value_heads": 16, "num_experts": 60, "num_experts_per_tok": 4,
                    "moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632}  # fmt: skip
            return {**MOE_CONFIG, **wide, **({"num_experts": 8} if size == "moe of 8 experts" else {})}
        layers, width, inner, heads, keys = self.SHAPES[size]
        sizes = {"num_hidden_layers": layers, "hidden_size": width, "intermediate_size": inner,
                 "num_attention_heads": heads, "num_key_value_heads": keys}  # fmt: skip
        return {**CONFIG, **sizes, "tie_word_embeddings": size == "0.5b"}

    def test_tensor_types_take_precedence_over_the_mix(self, dense: Path, tmp_path: Path) -> None:
        overrides = QuantOverrides(parse_tensor_types([r"ffn_down=q6_k", r"blk\.[01]\.attn_q=q8_0"]))
        path = convert_checkpoint(dense, tmp_path / "x.gguf", "q4_0", overrides=overrides)
        types = {tensor.name: tensor.type.number for tensor in read_header(path).tensors}
        number = {name: file_type(name).default.number for name in ("q6_k", "q8_0", "q4_0")}
        assert types["blk.0.attn_q.weight"] == types["blk.1.attn_q.weight"] == number["q8_0"]
        assert types["blk.2.attn_q.weight"] == number["q4_0"]
        assert types["blk.5.ffn_down.weight"] == number["q8_0"], "288 is not a multiple of 256, so Q6_K becomes Q8_0"


class _EmptyImatrix(ImportanceMatrix):
    """An importance matrix that claims to have every tensor, for plans that are never executed."""

    def __init__(self) -> None:
        super().__init__(_ContainsAll(), {})

    def column_weights(self, name: str, expert: int, experts: int, columns: int) -> None:
        return None


class _ContainsAll(dict[str, Any]):
    def __contains__(self, name: object) -> bool:
        return True


def sparse_checkpoint(folder: Path, config: dict[str, Any]) -> Path:
    """Write a checkpoint of any size that takes no space on the disk."""
    write_checkpoint(folder)
    (folder / "config.json").write_text(json.dumps(config))
    entries, at = {}, 0
    for name, shape in checkpoint_shapes(config).items():
        size = 2 * int(numpy.prod(shape, dtype=object))
        entries[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    header = json.dumps(entries).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + at)
    return folder


def write_sparse(plan: ConversionPlan) -> None:
    for output in plan.job.outputs:
        with output.path.open("wb") as file:
            file.write(output.header)
            file.truncate(output.size)
