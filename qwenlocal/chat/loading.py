"""A model ready to answer: file, memory, engine, template and sampling brought together, once, for every face."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from qwenlocal.chat.chat_template import CHATML, ChatTemplate
from qwenlocal.chat.conversation import Conversation, GenerationConfig
from qwenlocal.chat.thread import Thread
from qwenlocal.engine.context import Context, ContextOptions
from qwenlocal.engine.draft_model import DraftModel, shares_vocabulary
from qwenlocal.engine.drafting import Trial
from qwenlocal.engine.llama import LoadCancelled, Model
from qwenlocal.engine.load_plan import (
    PREFERRED_CONTEXT,
    ChatTemplateMissing,
    FewerGpuLayers,
    FileRepaired,
    GpuOffload,
    LoadNote,
    LoadPlan,
    LoadRequest,
    SamplingIgnored,
    plan_gpu_offload,
    plan_load,
)
from qwenlocal.engine.memory import MemoryWatch, ModelDims, estimate_memory
from qwenlocal.engine.prefix_cache import PrefixCache
from qwenlocal.engine.prompt_cache import PromptCache, compute_cache_key
from qwenlocal.engine.sampling import Sampling
from qwenlocal.engine.sequence import TokenSequence
from qwenlocal.engine.speculation import CostCurve, Drafts, NoSpeculation, Speculation
from qwenlocal.engine.tuned_settings import TunedSettings
from qwenlocal.errors import BadWeights, ContextNotCreated, Interrupted, NotEnoughMemory, UsageError
from qwenlocal.ggml import Device, list_devices
from qwenlocal.i18n import tr
from qwenlocal.machine import Machine
from qwenlocal.weights.checkup import missing_rope_base
from qwenlocal.weights.header import Value, read_header, read_metadata

ALL_LAYERS = 1 << 16  # more than any model has

# GGUF's names for what a model's makers recommend (gguf-py, constants.py: Keys.General.SAMPLING_*).
_SAMPLING_KEYS = {
    "temperature": "general.sampling.temp",
    "top_k": "general.sampling.top_k",
    "top_p": "general.sampling.top_p",
    "min_p": "general.sampling.min_p",
    "repeat_penalty": "general.sampling.penalty_repeat",
}


@dataclass(frozen=True)
class Draft:
    """A small model that shall guess what the large one says: what it is called, its file, and bytes of weights."""

    name: str
    path: Path
    size: int


@dataclass(frozen=True)
class LoadOptions:
    """
    How to load: what the plan has to keep to, layers on a GPU (None: as many as fit), and whether the text is continued
    as it stands, without a chat template (None: only for models that have none). With `lookup`, tokens that came before
    are drafted where that pays; `draft` is tried beside it. `states` is the folder in which caches are kept, None for
    none. What was measured, `tuned`, holds where nothing else was asked for.
    """

    wanted: LoadRequest = field(default_factory=LoadRequest)
    gpu_layers: int | None = None
    raw: bool | None = None
    lookup: bool = True
    states: Path | None = None
    tuned: TunedSettings = field(default_factory=TunedSettings)
    draft: Draft | None = None


@dataclass(frozen=True)
class Loaded:
    """
    A model in memory with an empty context. `template` is None where text is continued as it stands.

    `costs` are what decoding several tokens at once takes, learnt as it answers; `trial` is what a draft model goes
    through, None without one.
    """

    name: str
    model: Model
    context: Context
    sequence: TokenSequence
    template: ChatTemplate | None
    sampling: Sampling
    plan: LoadPlan
    costs: CostCurve
    notes: tuple[LoadNote, ...] = ()
    trial: Trial | None = None

    def conversation(self, manner: GenerationConfig, thread: Thread | None = None) -> Conversation:
        """
        The conversation of `thread`, or a new one.

        Raises
        ------
        UsageError: the model has no chat template.
        """
        if self.template is None:
            raise UsageError(
                tr("This model has no chat template: it continues text, it does not answer."),
                hint=tr('Give it a beginning: qwenlocal run MODEL --raw "Once upon a time"'),
            )
        n_ctx, vocabulary = self.context.n_ctx, self.model.tokenizer
        return Conversation(self.sequence, vocabulary, self.template, manner, thread, n_ctx=n_ctx, model=self.name)

    def close(self) -> None:
        """Give the memory back."""
        if self.trial:
            self.trial.close()
        self.context.close()
        self.model.close()


class Loading:
    """Loads in the calling thread; `stop` from another one ends it."""

    def __init__(self) -> None:
        self._stopped = threading.Event()

    def stop(self) -> None:
        """End loading, soon."""
        self._stopped.set()

    def load(
        self,
        path: Path,
        options: LoadOptions,
        machine: Machine,
        *,
        name: str,
        size: int,
        is_base: bool = False,
        recommended: Mapping[str, float] = {},
        report: Callable[[float], None] = lambda _: None,
    ) -> Loaded:
        """
        Load the model in `path` of `size` bytes; `recommended` is the catalog's sampling for it.

        What the model's file itself recommends goes before the catalog.

        Raises
        ------
        BadWeights: the file cannot be used. NotEnoughMemory: it does not fit. Interrupted: `stop` was called.
        """
        metadata = read_metadata(path)
        repairs = _repairs(path, metadata)
        wanted = _with_tuned(options.wanted, options.tuned, machine.cores)
        dims = ModelDims.from_metadata(metadata)
        offload = _offload(dims, size, wanted, list_devices(), options.gpu_layers)
        available = machine.memory().available
        plan = _plan(name, dims, size, available, wanted, offload)
        if options.draft:
            plan = _plan_with_draft(options.draft, name, dims, size, available, wanted, offload)

        def progress(fraction: float) -> bool:
            report(fraction)
            return not self._stopped.is_set()

        warm = threading.Thread(target=_import_template_engine, daemon=True)
        warm.start()
        try:
            model, context, placed = _open(path, plan.options, offload, repairs, progress)
        except LoadCancelled as reason:
            raise Interrupted from reason
        try:
            warm.join()
            template, notes = _template(model, raw=options.raw, is_base=is_base)
            sampling, more = _sampling(metadata, recommended)
            notes = (*_repair_notes(repairs, model), *placed, *plan.notes, *notes)
            small = _open_draft(options.draft, context, offload) if options.draft else None
        except BaseException:
            context.close()
            model.close()
            raise
        saved = PromptCache(options.states, compute_cache_key(path, plan.options)) if options.states else None
        costs = CostCurve(options.tuned.costs)
        drafts: Drafts = Speculation(costs) if options.lookup and model.can_truncate else NoSpeculation()
        trial = Trial(small, drafts, costs) if small else None
        watch = MemoryWatch(machine.memory, machine.memory_pressure, trial.give_up if trial else lambda: False)
        drafts = trial or drafts
        sequence = TokenSequence(
            context, speculation=drafts, prefix_cache=PrefixCache(context), prompt_cache=saved, check_memory=watch
        )
        return Loaded(name, model, context, sequence, template, sampling, plan, costs, (*notes, *more), trial)


def _with_tuned(wanted: LoadRequest, tuned: TunedSettings, cores: int) -> LoadRequest:
    flash = wanted.flash_attention
    if flash is None and tuned.flash_attention:  # off is the plan's own choice, which it may have to concede
        flash = True
    return replace(
        wanted,
        threads=wanted.threads or tuned.threads or cores,
        flash_attention=flash,
        n_ubatch=wanted.n_ubatch or tuned.n_ubatch,
    )


def _offload(
    dims: ModelDims | None, size: int, wanted: LoadRequest, found: Sequence[Device], asked: int | None
) -> GpuOffload:
    """Layers for the graphics cards: as many as were asked for, or as fit."""
    cards = [device for device in found if device.is_gpu]
    if asked and not cards:
        raise UsageError(
            tr("Layers can only be put on a graphics card, and llama.cpp finds none here."),
            hint=tr("Leave -ngl away. What is there: qwenlocal doctor"),
        )
    units = dims.n_layers + 1 if dims else ALL_LAYERS
    if asked is not None:
        return GpuOffload(min(asked, units), units)
    if not cards or dims is None:
        roomy = [card for card in cards if card.free > size * 1.3]
        return GpuOffload(ALL_LAYERS if roomy else 0, ALL_LAYERS)
    options = ContextOptions(wanted.n_ctx or min(PREFERRED_CONTEXT, dims.n_ctx_train))
    return plan_gpu_offload(dims, size, options, cards)


def _plan(
    name: str, dims: ModelDims | None, size: int, available: int, wanted: LoadRequest, offload: GpuOffload
) -> LoadPlan:
    """What is on a graphics card needs no memory of the machine's; and it has kernels for flash attention."""
    if not offload.layers:
        return plan_load(name, dims, size, available, wanted)
    here = round(size * (1 - min(1.0, offload.layers / max(1, offload.total))))
    usual = min(PREFERRED_CONTEXT, dims.n_ctx_train) if dims else PREFERRED_CONTEXT
    plan = plan_load(name, dims, here, available, replace(wanted, n_ctx=wanted.n_ctx or usual))
    options = replace(plan.options, flash_attention=wanted.flash_attention, n_ubatch=wanted.n_ubatch or 512)
    return replace(plan, options=options)


def _plan_with_draft(
    draft: Draft, name: str, dims: ModelDims | None, size: int, available: int, wanted: LoadRequest, offload: GpuOffload
) -> LoadPlan:
    """
    A plan that leaves room for the draft model, with a context as long as the large one's.

    Raises
    ------
    NotEnoughMemory: both together do not fit. UsageError: the draft model is no smaller.
    """
    if draft.size >= size:
        raise UsageError(
            tr("{name} is no smaller than {large}: it cannot draft for it.", name=draft.name, large=name),
            hint=tr("A 0.5B drafts well for a 7B: --draft qwen1.5:0.5b"),
        )
    small, plan = ModelDims.from_metadata(read_metadata(draft.path)), None
    tokens = wanted.n_ctx or PREFERRED_CONTEXT
    for _ in range(2):  # first for the least context, then for the one that this left room for
        needed = estimate_memory(small, draft.size, ContextOptions(tokens)).total if small else draft.size
        try:
            plan = _plan(name, dims, size, available - needed, wanted, offload)
        except NotEnoughMemory as reason:
            together = f"{name} with {draft.name} as its draft model"
            hint = "Leave --draft away, or take a shorter context: -c 4096"
            raise NotEnoughMemory(together, reason.needed + needed, available, hint=hint) from reason
        tokens = max(tokens, plan.options.n_ctx)
    assert plan is not None
    return replace(plan, available=available, draft_bytes=needed)


def _open_draft(draft: Draft, beside: Context, offload: GpuOffload) -> DraftModel:
    """
    The draft model in a context like `beside`, on the graphics card where all of the large one is.

    Raises
    ------
    UsageError: it has another vocabulary.
    """
    repairs = _repairs(draft.path, read_metadata(draft.path))
    small = Model(draft.path, gpu_layers=ALL_LAYERS if offload.layers >= offload.total else 0, kv_overrides=repairs)
    try:
        if not small.can_truncate or not beside.model.can_truncate or not shares_vocabulary(beside.model, small):
            raise UsageError(
                tr("{name} cannot draft for this model: their vocabularies differ.", name=draft.name),
                hint=tr("A draft model is a small one of the same family."),
            )
        options = replace(beside.options, n_seq_max=1, key_type="f16", value_type="f16", rope=None)
        context = Context(small, options, beside.abort)
    except BaseException:
        small.close()
        raise
    return DraftModel(context, len(beside.model.tokenizer))


def _open(
    path: Path,
    options: ContextOptions,
    offload: GpuOffload,
    overrides: Mapping[str, float],
    progress: Callable[[float], bool],
) -> tuple[Model, Context, tuple[LoadNote, ...]]:
    """The model and its context; with fewer layers on the graphics cards where these have less room than they said."""
    first = offload.layers
    while True:
        model = None
        try:
            model = Model(path, gpu_layers=offload.layers, kv_overrides=overrides, on_progress=progress)
            context = Context(model, options)
        except (BadWeights, ContextNotCreated) as reason:
            if model:
                model.close()
            if not offload.layers or "alloc" not in str(reason) + getattr(reason, "reason", ""):
                raise
            offload = offload.reduced()
            continue
        fewer = FewerGpuLayers(offload.layers, first)
        return model, context, (fewer,) if offload.layers < first else ()


def _import_template_engine() -> None:
    """Done while llama.cpp reads the weights: it takes 40 ms that nobody needs to wait for."""
    import jinja2.sandbox  # noqa: F401


def _repairs(path: Path, metadata: Mapping[str, Value]) -> dict[str, float]:
    """What the file should say and does not; the whole header is read only where something seems to be missing."""
    if missing_rope_base(metadata) is None:
        return {}
    base = missing_rope_base(read_header(path).metadata)
    return {f"{metadata['general.architecture']}.rope.freq_base": base} if base is not None else {}


def _repair_notes(repairs: Mapping[str, float], model: Model) -> tuple[LoadNote, ...]:
    tokenizer = model.tokenizer
    false_end = None if tokenizer.false_end is None else tokenizer.text_of(tokenizer.false_end)
    note = FileRepaired(next(iter(repairs.values()), None), false_end, tokenizer.hides_padding)
    return (note,) if note != FileRepaired() else ()


def _template(model: Model, *, raw: bool | None, is_base: bool) -> tuple[ChatTemplate | None, tuple[LoadNote, ...]]:
    if raw or (raw is None and is_base):
        return None, ()
    source = model.metadata("tokenizer.chat_template")
    vocabulary = model.tokenizer
    if source:
        return ChatTemplate(source, bos=vocabulary.bos, eos=vocabulary.eos), ()
    ids = vocabulary.tokenize("<|im_start|>", special=True)
    if len(ids) == 1 and vocabulary.is_control(ids[0]):
        return ChatTemplate(CHATML), (ChatTemplateMissing(),)
    return None, ()


def _sampling(metadata: Mapping[str, Value], recommended: Mapping[str, float]) -> tuple[Sampling, tuple[LoadNote, ...]]:
    """What the file recommends, before what the catalog does; values out of range are left out, and that is said."""
    in_file = {name: metadata[key] for name, key in _SAMPLING_KEYS.items() if key in metadata}
    sampling, notes = Sampling(), list[LoadNote]()
    for name, value in {**recommended, **in_file}.items():
        try:
            sampling = sampling.with_overrides({name: int(value) if name == "top_k" else float(value)})  # type: ignore[arg-type]
        except (UsageError, TypeError, ValueError, OverflowError):
            notes.append(SamplingIgnored(name, value))
    return sampling, tuple(notes)
