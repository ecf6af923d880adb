"""The LoRA adapters of a loaded model, whose scales can be changed between answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from qwenlocal.engine.llama import Model
from qwenlocal.weights.adapter_spec import AdapterSpec


class LoadedAdapters:
    """
    The adapters of a model, by name.

    `on_change` is called after scales have changed: contexts must apply them, and what they computed before is invalid.
    """

    def __init__(self, model: Model, specs: Sequence[AdapterSpec]) -> None:
        """
        Load adapters into the model, which has no context yet.

        Raises
        ------
        BadWeights: llama.cpp rejects one of them.
        """
        self._model, self._specs = model, tuple(specs)
        self._handles = [model.load_adapter(spec.path) for spec in specs]
        self._initial = self.scales
        self.on_change: Callable[[], object] = lambda: None
        self._use()

    @property
    def specs(self) -> Sequence[AdapterSpec]:
        """The adapters with their current scales."""
        return self._specs

    @property
    def scales(self) -> Mapping[str, float]:
        """The current scales by name; 0 is off."""
        return {spec.name: spec.scale for spec in self._specs}

    @property
    def initial_scales(self) -> Mapping[str, float]:
        """The scales that the adapters were loaded with; 1 for those that were off."""
        return {name: scale or 1.0 for name, scale in self._initial.items()}

    def set_scales(self, scales: Mapping[str, float]) -> None:
        """Set the scales of some adapters by name; the next answer uses them."""
        specs = tuple(replace(spec, scale=scales.get(spec.name, spec.scale)) for spec in self._specs)
        if specs != self._specs:
            self._specs = specs
            self._use()
            self.on_change()

    def _use(self) -> None:
        scales = [spec.scale for spec in self._specs]
        self._model.adapters = list(zip(self._handles, scales, strict=True))
