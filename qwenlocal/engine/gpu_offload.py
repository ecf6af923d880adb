"""
Plans for the layers of a model that GPUs hold.

llama.cpp puts the output matrix on GPUs first, then layers from the last one down; the embeddings always stay in the
machine's memory (llama-model.cpp: load_tensors). The KV cache of a layer is kept with its weights.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from qwenlocal.devices import Device, DeviceKind
from qwenlocal.engine.context import ContextOptions, pad_n_ctx
from qwenlocal.engine.memory import ModelDims, estimate_memory
from qwenlocal.engine.tuned_settings import GpuUse
from qwenlocal.errors import UsageError
from qwenlocal.ggml import read_tensor_sizes
from qwenlocal.i18n import tr

ALL_LAYERS = 1 << 16  # more than any model has
N_UBATCH = 512  # GPUs need larger batches than processors
_RESERVE = 256 << 20  # bytes left free on a GPU for other programs
_INPUT, _OUTPUT = "token_embd.weight", "output.weight"
_LAYER = re.compile(r"blk\.(\d+)\.")


@dataclass(frozen=True)
class GpuRequest:
    """GPU settings of the user: a number of layers (None: as many as fit), and names of devices (None: all)."""

    layers: int | None = None
    devices: tuple[str, ...] | None = None

    @property
    def is_off(self) -> bool:
        """True if no GPU may be used."""
        return self.layers == 0 or self.devices == ()

    @property
    def is_auto(self) -> bool:
        """True if nothing was asked for."""
        return self.layers is None and self.devices is None


@dataclass(frozen=True)
class LayerSizes:
    """
    Bytes of a model's embeddings, of each layer, and of the output matrix, which may be a copy of the embeddings.
    """

    input: int
    layers: tuple[int, ...]
    output: int

    @classmethod
    def from_tensors(cls, sizes: Mapping[str, int]) -> LayerSizes:
        """Add up the sizes of tensors by the names that GGUF files use."""
        layers = Counter[int]()
        for name, size in sizes.items():
            if match := _LAYER.match(name):
                layers[int(match[1])] += size
        embeddings = sizes.get(_INPUT, 0)
        return cls(embeddings, tuple(layers[number] for number in sorted(layers)), sizes.get(_OUTPUT, embeddings))


def read_layer_sizes(files: Sequence[Path]) -> LayerSizes:
    """Read the sizes from the headers of a model's files. Takes 20 ms."""
    return LayerSizes.from_tensors({name: size for file in files for name, size in read_tensor_sizes(file).items()})


@dataclass(frozen=True)
class DeviceShare:
    """The layers that a GPU holds, the output layer included, with the bytes of their weights and KV cache."""

    device: Device
    layers: int
    weights: int
    kv_cache: int


@dataclass(frozen=True)
class GpuOffload:
    """
    The number of layers on GPUs, of `total`; the output layer counts as one.

    `shares` is the plan by device, for a context of `n_ctx` tokens; it is empty if the model's dimensions are unknown,
    or after `reduced`. Without layers, `devices` only evaluate long prompts, for which llama.cpp copies weights to them
    (llama_context_params.op_offload).
    """

    layers: int
    total: int
    devices: tuple[Device, ...] = ()
    shares: tuple[DeviceShare, ...] = ()
    n_ctx: int = 0

    @property
    def repeating_layers(self) -> int:
        """The number of layers on GPUs without the output layer."""
        return max(0, self.layers - 1)

    @property
    def weights(self) -> int:
        """The bytes of weights on GPUs."""
        return sum(share.weights for share in self.shares)

    @property
    def shared_bytes(self) -> int:
        """The bytes on integrated GPUs, whose memory is the machine's."""
        shared = [share for share in self.shares if share.device.kind == DeviceKind.INTEGRATED_GPU]
        return sum(share.weights + share.kv_cache for share in shared)

    def limited_to(self, use: GpuUse) -> GpuOffload:
        """Restrict the offload to the measured `use` of its devices; a `use` of other devices changes nothing."""
        if use.use == "layers" or use.devices != tuple(device.name for device in self.devices):
            return self
        return GpuOffload(0, self.total, self.devices if use.use == "prompts" else ())

    def reduced(self) -> GpuOffload:
        """Return an offload with a quarter fewer layers, for a GPU with too little free memory."""
        layers = self.layers * 3 // 4
        return replace(self, layers=layers, devices=self.devices if layers else (), shares=())


def choose_gpus(devices: Sequence[Device], request: GpuRequest) -> tuple[Device, ...]:
    """
    Return the GPUs to use: those that the user named, or else the graphics cards, or else the integrated GPUs.

    Raises
    ------
    UsageError: a named device does not exist, or layers were requested and there is no GPU.
    """
    gpus = [device for device in devices if device.is_gpu]
    if request.is_off:
        return ()
    if request.devices is not None:
        return tuple(dict.fromkeys(_find_device(gpus, name) for name in request.devices))
    if request.layers and not gpus:
        raise UsageError(
            tr("-ngl needs a GPU, and llama.cpp finds none."),
            hint=tr("Leave out -ngl. To see the devices: qwenlocal doctor"),
        )
    return tuple(gpu for gpu in gpus if gpu.kind == DeviceKind.GPU) or tuple(gpus)


def _find_device(gpus: Sequence[Device], name: str) -> Device:
    for gpu in gpus:
        if gpu.name.lower() == name.lower():
            return gpu
    names = ", ".join(gpu.name for gpu in gpus)
    raise UsageError(
        tr("There is no GPU named {name}; there is: {names}.", name=name, names=names)
        if names
        else tr("There is no GPU named {name}; llama.cpp finds none.", name=name),
        hint=tr("To see the devices: qwenlocal doctor"),
    )


def plan_gpu_offload(
    dims: ModelDims, sizes: LayerSizes, options: ContextOptions, gpus: Sequence[Device], layers: int | None = None
) -> GpuOffload:
    """
    Fill the largest GPU with the output matrix and layers from the last one down, then the next one.

    llama.cpp gives the last layers to the last device, so the largest one is listed last. Each GPU keeps room for
    compute buffers and other programs. `layers` is the number to offload; those that do not fit go to the smallest GPU.

    A 7B (32 layers of 119 MiB, output of 487 MiB) with 4,096 tokens (64 MiB of KV cache per layer) on a GPU with 4 GiB
    free: the output and 17 layers.
    """
    total = len(sizes.layers) + 1
    options = replace(options, n_ubatch=N_UBATCH, flash_attention=True)
    reserve = _RESERVE + estimate_memory(dims, 0, options).compute
    kv_cache = dims.kv_cache_bytes(pad_n_ctx(options.n_ctx), options.key_type, options.value_type)
    per_layer = kv_cache // max(1, dims.n_layers)
    costs = [(sizes.output, 0), *((size, per_layer) for size in reversed(sizes.layers))][:layers]
    shares: list[DeviceShare] = []
    # Sorted by `free`, two equal GPUs would take turns, and each would be measured again.
    largest_first = sorted(gpus, key=lambda gpu: gpu.total, reverse=True)
    for gpu in largest_first:
        share, room = DeviceShare(gpu, 0, 0, 0), float(gpu.free - reserve)
        if layers is not None and gpu is largest_first[-1]:
            room = math.inf
        while costs and sum(costs[0]) <= room:
            weights, kv = costs.pop(0)
            share = DeviceShare(gpu, share.layers + 1, share.weights + weights, share.kv_cache + kv)
            room -= weights + kv
        if share.layers:
            shares.insert(0, share)
    used = tuple(share.device for share in shares)
    return GpuOffload(sum(share.layers for share in shares), total, used, tuple(shares), options.n_ctx)
