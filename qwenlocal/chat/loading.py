"""A model ready to answer: file, memory, engine, template and sampling brought together, once, for every face."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from qwenlocal.chat.conversation import Conversation, Manner
from qwenlocal.chat.template import CHATML, ChatTemplate
from qwenlocal.chat.thread import Thread
from qwenlocal.engine.context import Context, ContextOptions
from qwenlocal.engine.draft_model import DraftModel, shares_vocabulary
from qwenlocal.engine.drafting import Trial
from qwenlocal.engine.llama import LoadStopped, Model
from qwenlocal.engine.memory import memory_needed
from qwenlocal.engine.load_plan import ENOUGH, Offload, Plan, choose_offload, choose_plan
from qwenlocal.engine.prefix_cache import Parking
from qwenlocal.engine.prompt_cache import SavedStates, key_of
from qwenlocal.engine.sampling import Sampling
from qwenlocal.engine.sequence import TokenSequence
from qwenlocal.engine.shape import Shape
from qwenlocal.engine.speculation import CostCurve, Drafts, NoSpeculation, Speculation
from qwenlocal.engine.tuned_settings import Tuned
from qwenlocal.engine.wanted import Wanted
from qwenlocal.engine.watch import MemoryWatch
from qwenlocal.errors import BadWeights, Interrupted, NoContext, NotEnoughMemory, UsageProblem
from qwenlocal.ggml import Device, devices
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

    wanted: Wanted = field(default_factory=Wanted)
    gpu_layers: int | None = None
    raw: bool | None = None
    lookup: bool = True
    states: Path | None = None
    tuned: Tuned = field(default_factory=Tuned)
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
    plan: Plan
    costs: CostCurve
    notes: tuple[str, ...] = ()
    trial: Trial | None = None

    def conversation(self, manner: Manner, thread: Thread | None = None) -> Conversation:
        """
        The conversation of `thread`, or a new one.

        Raises
        ------
        UsageProblem: the model has no chat template.
        """
        if self.template is None:
            raise UsageProblem(
                tr("This model has no chat template: it continues text, it does not answer."),
                hint=tr('Give it a beginning: qwenlocal run MODEL --raw "Once upon a time"'),
            )
        n_ctx, vocabulary = self.context.n_ctx, self.model.vocabulary
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
        shape = Shape.of(metadata)
        offload = _offload(shape, size, wanted, devices(), options.gpu_layers)
        available = machine.memory().available
        plan = _plan(name, shape, size, available, wanted, offload)
        if options.draft:
            plan = _plan_with_draft(options.draft, name, shape, size, available, wanted, offload)

        def progress(fraction: float) -> bool:
            report(fraction)
            return not self._stopped.is_set()

        warm = threading.Thread(target=_import_template_engine, daemon=True)
        warm.start()
        try:
            model, context, placed = _open(path, plan.options, offload, repairs, progress)
        except LoadStopped as reason:
            raise Interrupted from reason
        try:
            warm.join()
            template, notes = _template(model, raw=options.raw, is_base=is_base)
            sampling, more = _sampling(metadata, recommended)
            notes = (*_repairs_in_words(repairs, model), *placed, *plan.notes, *notes)
            small = _open_draft(options.draft, context, offload) if options.draft else None
        except BaseException:
            context.close()
            model.close()
            raise
        saved = SavedStates(options.states, key_of(path, plan.options)) if options.states else None
        costs = CostCurve(options.tuned.costs)
        drafts: Drafts = Speculation(costs) if options.lookup and model.can_be_cut else NoSpeculation()
        trial = Trial(small, drafts, costs) if small else None
        watch = MemoryWatch(machine.memory, machine.stalled, trial.give_up if trial else lambda: False)
        drafts = trial or drafts
        sequence = TokenSequence(context, speculation=drafts, parking=Parking(context), saved=saved, watch=watch)
        return Loaded(name, model, context, sequence, template, sampling, plan, costs, (*notes, *more), trial)


def _with_tuned(wanted: Wanted, tuned: Tuned, cores: int) -> Wanted:
    flash = wanted.flash_attention
    if flash is None and tuned.flash_attention:  # off is the plan's own choice, which it may have to concede
        flash = True
    return replace(
        wanted,
        threads=wanted.threads or tuned.threads or cores,
        flash_attention=flash,
        together=wanted.together or tuned.together,
    )


def _offload(shape: Shape | None, size: int, wanted: Wanted, found: Sequence[Device], asked: int | None) -> Offload:
    """Layers for the graphics cards: as many as were asked for, or as fit."""
    cards = [device for device in found if device.is_gpu]
    if asked and not cards:
        raise UsageProblem(
            tr("Layers can only be put on a graphics card, and llama.cpp finds none here."),
            hint=tr("Leave -ngl away. What is there: qwenlocal doctor"),
        )
    units = shape.layers + 1 if shape else ALL_LAYERS
    if asked is not None:
        return Offload(min(asked, units), units)
    if not cards or shape is None:
        roomy = [card for card in cards if card.free > size * 1.3]
        return Offload(ALL_LAYERS if roomy else 0, ALL_LAYERS)
    options = ContextOptions(wanted.n_ctx or min(ENOUGH, shape.n_ctx_train))
    return choose_offload(shape, size, options, cards)


def _plan(name: str, shape: Shape | None, size: int, available: int, wanted: Wanted, offload: Offload) -> Plan:
    """What is on a graphics card needs no memory of the machine's; and it has kernels for flash attention."""
    if not offload.layers:
        return choose_plan(name, shape, size, available, wanted)
    here = round(size * (1 - min(1.0, offload.layers / max(1, offload.of))))
    usual = min(ENOUGH, shape.n_ctx_train) if shape else ENOUGH
    plan = choose_plan(name, shape, here, available, replace(wanted, n_ctx=wanted.n_ctx or usual))
    options = replace(plan.options, flash_attention=wanted.flash_attention, n_ubatch=wanted.together or 512)
    return replace(plan, options=options)


def _plan_with_draft(
    draft: Draft, name: str, shape: Shape | None, size: int, available: int, wanted: Wanted, offload: Offload
) -> Plan:
    """
    A plan that leaves room for the draft model, with a context as long as the large one's.

    Raises
    ------
    NotEnoughMemory: both together do not fit. UsageProblem: the draft model is no smaller.
    """
    if draft.size >= size:
        raise UsageProblem(
            tr("{name} is no smaller than {large}: it cannot draft for it.", name=draft.name, large=name),
            hint=tr("A 0.5B drafts well for a 7B: --draft qwen1.5:0.5b"),
        )
    small, plan = Shape.of(read_metadata(draft.path)), None
    tokens = wanted.n_ctx or ENOUGH
    for _ in range(2):  # first for the least context, then for the one that this left room for
        needed = memory_needed(small, draft.size, ContextOptions(tokens)).total if small else draft.size
        try:
            plan = _plan(name, shape, size, available - needed, wanted, offload)
        except NotEnoughMemory as reason:
            together = f"{name} with {draft.name} as its draft model"
            hint = "Leave --draft away, or take a shorter context: -c 4096"
            raise NotEnoughMemory(together, reason.needed + needed, available, hint=hint) from reason
        tokens = max(tokens, plan.options.n_ctx)
    assert plan is not None
    return replace(plan, available=available, draft=needed)


def _open_draft(draft: Draft, beside: Context, offload: Offload) -> DraftModel:
    """
    The draft model in a context like `beside`, on the graphics card where all of the large one is.

    Raises
    ------
    UsageProblem: it has another vocabulary.
    """
    repairs = _repairs(draft.path, read_metadata(draft.path))
    small = Model(draft.path, gpu_layers=ALL_LAYERS if offload.layers >= offload.of else 0, overrides=repairs)
    try:
        if not small.can_be_cut or not beside.model.can_be_cut or not shares_vocabulary(beside.model, small):
            raise UsageProblem(
                tr("{name} cannot draft for this model: their vocabularies differ.", name=draft.name),
                hint=tr("A draft model is a small one of the same family."),
            )
        options = replace(beside.options, sequences=1, key_type="f16", value_type="f16", rope=None)
        context = Context(small, options, beside.abort)
    except BaseException:
        small.close()
        raise
    return DraftModel(context, len(beside.model.vocabulary))


def _open(
    path: Path,
    options: ContextOptions,
    offload: Offload,
    overrides: Mapping[str, float],
    progress: Callable[[float], bool],
) -> tuple[Model, Context, tuple[str, ...]]:
    """The model and its context; with fewer layers on the graphics cards where these have less room than they said."""
    first = offload.layers
    while True:
        model = None
        try:
            model = Model(path, gpu_layers=offload.layers, overrides=overrides, on_progress=progress)
            context = Context(model, options)
        except (BadWeights, NoContext) as reason:
            if model:
                model.close()
            if not offload.layers or "alloc" not in str(reason) + getattr(reason, "reason", ""):
                raise
            offload = offload.fewer()
            continue
        fewer = tr(
            "The graphics card had less room than it said: {layers} layers are there, not {first}.",
            layers=offload.layers,
            first=first,
        )
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


def _repairs_in_words(repairs: Mapping[str, float], model: Model) -> tuple[str, ...]:
    found = [tr("rope base {value:,.0f}, which the file does not state", value=value) for value in repairs.values()]
    if model.vocabulary.false_end is not None:
        found.append(f"“{model.vocabulary.text_of(model.vocabulary.false_end)}” is no end of an answer")
    if model.vocabulary.hides_padding:
        found.append(tr("padding tokens that could be typed are text"))
    return (tr("Put right on loading: {what}. (qwenlocal inspect --fix)", what="; ".join(found)),) if found else ()


def _template(model: Model, *, raw: bool | None, is_base: bool) -> tuple[ChatTemplate | None, tuple[str, ...]]:
    if raw or (raw is None and is_base):
        return None, ()
    source = model.metadata("tokenizer.chat_template")
    vocabulary = model.vocabulary
    if source:
        return ChatTemplate(source, bos=vocabulary.bos, eos=vocabulary.eos), ()
    ids = vocabulary.tokenize("<|im_start|>", special=True)
    if len(ids) == 1 and vocabulary.is_control(ids[0]):
        return ChatTemplate(CHATML), (tr("The file has no chat template; Qwen1.5's own is used."),)
    return None, ()


def _sampling(metadata: Mapping[str, Value], recommended: Mapping[str, float]) -> tuple[Sampling, tuple[str, ...]]:
    """What the file recommends, before what the catalog does; values out of range are left out, and that is said."""
    in_file = {name: metadata[key] for name, key in _SAMPLING_KEYS.items() if key in metadata}
    sampling, notes = Sampling(), list[str]()
    for name, value in {**recommended, **in_file}.items():
        try:
            sampling = sampling.with_known({name: int(value) if name == "top_k" else float(value)})  # type: ignore[arg-type]
        except (UsageProblem, TypeError, ValueError, OverflowError):
            notes.append(f"The file recommends {name} = {value!r}, which cannot be used; it is left out.")
    return sampling, tuple(notes)
