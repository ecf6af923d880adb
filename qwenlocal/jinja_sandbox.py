"""
Jinja with the settings of transformers, and with limits: templates come from untrusted files.

Jinja's sandbox protects the machine, but not its memory and time: `{{ 'a' * 10**10 }}` asks for 10 GB, and two nested
loops over `range(100000)` run for minutes. Here every operator, call, filter, loop, slice and literal of a template
goes through the `RenderMeter` of its rendering, which refuses results that are too large before they are computed.

Source of the settings: transformers, utils/chat_template_utils.py, `_cached_compile_jinja_template`.
"""

from __future__ import annotations

import json
import math
import re
import time
import types
from collections.abc import Callable, ItemsView, Iterator, KeysView, Mapping, ValuesView
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, TemplateRuntimeError, nodes, pass_context
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context, markup_join, str_join
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

MAX_SOURCE = 200_000  # characters; compiling them takes 1.5 s. The longest templates on the Hub have 30,000.
MAX_SECONDS = 2.0  # of processor time for one rendering
MAX_SIZE = 20_000_000  # of all values that one rendering makes, plus _INPUT_FACTOR times the size of the messages
_INPUT_FACTOR = 20
_MAX_DEPTH = 100  # of nested lists
_ITEM, _CONTAINER = 8, 100  # sizes of an item of a list and of a list; a character is 1
_SMALL = 256  # shorter texts are not remembered: they may be counted twice
_MAX_BITS = 15_000  # of an integer; Python prints no longer ones

_METER = "<meter>"  # the name of a variable that templates cannot spell
# The size of the result, or the time, grows with the product of the sizes of all arguments; a number is its own size.
_PRODUCTS = frozenset(
    ("join", "translate", "expandtabs", "indent", "tojson", "sum", "rfind", "rindex", "rsplit", "rpartition", "strip",
     "lstrip", "rstrip", "trim")
)  # fmt: skip
_PADDING = frozenset(("center", "ljust", "rjust", "zfill", "batch", "slice", "to_bytes"))
_SLOW = frozenset(("striptags", "urlize", "xmlattr", "pprint", "wordwrap", "encode", "decode"))  # quadratic or worse
_MAX_SLOW = 2000
_FORMATS = frozenset(("format", "format_map"))
_CONTAINERS = (list, tuple, set, frozenset, dict, KeysView, ValuesView, ItemsView)
_SEQUENCES = (str, bytes, list, tuple)


class LimitExceeded(TemplateRuntimeError):
    """A template takes too much time or memory."""


class InputRejected(TemplateError):
    """A template called `raise_exception`."""


class RenderMeter:
    """Counts the processor time of one rendering, and the sizes of the values that it makes."""

    def __init__(self, variables: Mapping[str, Any]) -> None:
        """`variables` are what the template is rendered with."""
        self._deadline = time.thread_time() + MAX_SECONDS
        self._known: dict[int, tuple[Any, int, int]] = {}  # by id: the value, its size and depth
        self._used, self._written, self._limit = 0, 0, math.inf
        size = sum(self.measure(value) for value in variables.values())
        self._used, self._limit = 0, MAX_SIZE + _INPUT_FACTOR * size

    def check_time(self) -> None:
        """
        Raises
        ------
        LimitExceeded: the rendering takes too long.
        """
        if time.thread_time() > self._deadline:
            raise LimitExceeded(f"it takes longer than {MAX_SECONDS:g} seconds")

    def reserve(self, size: float) -> None:
        """
        Check that a value of this size may be made.

        Raises
        ------
        LimitExceeded: it would be too large.
        """
        if self._used + size > self._limit:
            raise LimitExceeded("it needs too much memory")

    def measure(self, value: Any) -> int:
        """
        Return the size of a value, counting what it holds as often as it occurs; what is new is added to the total.

        Raises
        ------
        LimitExceeded: it is too large, or nested too deeply.
        """
        return self._measure(value)[0]

    def _measure(self, value: Any) -> tuple[int, int]:
        known = self._known.get(id(value))
        if known is not None:
            return known[1:]
        size, depth, own = 1, 0, 0
        if isinstance(value, (str, bytes)):
            size = own = len(value)
        elif isinstance(value, int):
            self._check_bits(value.bit_length())
        elif isinstance(value, Namespace):  # can change, so its size cannot be remembered
            raise LimitExceeded("it uses a namespace as a value")
        elif isinstance(value, _CONTAINERS):
            own = _CONTAINER + _ITEM * len(value)
            self.reserve(own)
            size, depth = self._measure_items(value)
        if own >= _CONTAINER and (depth or own >= _SMALL):
            self._known[id(value)] = value, size, depth
        self._used += own
        self.reserve(size)
        return size, depth

    def _measure_items(self, container: Any) -> tuple[int, int]:
        size, depth = _CONTAINER, 0
        for item in [*container.keys(), *container.values()] if isinstance(container, dict) else container:
            item_size, item_depth = self._measure(item)
            size, depth = size + item_size + _ITEM, max(depth, item_depth)
            if size > self._limit:
                break
        if depth >= _MAX_DEPTH:
            raise LimitExceeded("it is nested too deeply")
        return size, depth + 1

    def _check_bits(self, bits: int) -> None:
        if bits > _MAX_BITS:
            raise LimitExceeded("it uses numbers that are too large")

    def write(self, value: Any) -> None:
        """Count a value that becomes part of the output, which repeats values that exist."""
        self._written += self.measure(value)
        if self._written > self._limit:
            raise LimitExceeded("its output is too long")

    def collect(self, value: Any) -> Any:
        """Return a list of what a generator yields; any other value itself."""
        if not isinstance(value, types.GeneratorType):
            return value
        items, size = [], 0
        for item in value:
            size += self.measure(item) + _ITEM
            self.reserve(size)
            items.append(item)
        return items

    def reserve_operator(self, operator: str, left: Any, right: Any) -> None:
        """Check that an operator may be applied."""
        self.check_time()
        size: float = self.measure(left) + self.measure(right)
        if operator == "**" and isinstance(left, int) and isinstance(right, int):
            self._check_bits(left.bit_length() * right)
        elif operator == "*" and isinstance(right, int) and isinstance(left, _SEQUENCES):
            size = _shallow_size(left) * right
        elif operator == "*" and isinstance(left, int) and isinstance(right, _SEQUENCES):
            size = _shallow_size(right) * left
        elif operator == "%" and isinstance(left, (str, bytes)):
            values = right if isinstance(right, tuple) else (right,)
            size = _format_size(left, size + sum(abs(value) for value in values if isinstance(value, int)))
        self.reserve(size)

    def reserve_result(self, name: str, arguments: list[Any]) -> None:
        """Check that the filter or method `name` may be called with these arguments, the first one its receiver."""
        self.check_time()
        sizes = [0 if isinstance(value, Namespace) else self.measure(value) for value in arguments]
        numbers = [abs(value) for value in arguments if isinstance(value, int)]
        if name in _FORMATS:
            self.reserve(_format_size(arguments[0], sum(sizes[1:]) + sum(numbers)))
        elif name == "replace" and all(isinstance(value, str) for value in arguments[:3]):
            text, old, new = arguments[:3]
            self.reserve(text.count(old) * len(new))
        elif name in _PRODUCTS:
            self.reserve(math.prod(1 + size for size in sizes) * math.prod(1 + number for number in numbers))
        elif name in _PADDING:
            self.reserve(sum(numbers))
        elif name in _SLOW and sum(sizes) + sum(numbers) > _MAX_SLOW:
            raise LimitExceeded(f"it calls {name} with more than {_MAX_SLOW:,} characters")


def _format_size(template: Any, size: float) -> float:
    """Return the most characters that a format string makes of arguments of this size: `%s`, `{}`, `%1000d`."""
    text = str(template)
    widths = sum(int(digits[:20]) for digits in re.findall(r"\d{4,}", text))
    return len(text) + widths + size * len(re.findall("[%{*]", text))


def _shallow_size(value: Any) -> int:
    return len(value) * (1 if isinstance(value, (str, bytes)) else _ITEM)


class TemplateEnvironment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox with transformers' settings and a `RenderMeter`."""

    intercepted_binops = frozenset(ImmutableSandboxedEnvironment.default_binop_table)

    def __init__(self, now: Callable[[], datetime]) -> None:
        """`now` is the clock behind `strftime_now`."""
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, loopcontrols], optimized=False
        )
        self.filters["tojson"] = _tojson
        self.filters = {name: _limit_filter(name, function) for name, function in self.filters.items()}
        self.filters |= {_ITERATE: _iterate, _CONCATENATE: _concatenate, _CHECK: _check, _WRITE: _write}
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = lambda format: now().strftime(format)
        del self.globals["lipsum"]

    def compile_template(self, source: str) -> Template:
        """
        Compile a template; render it with `render_template`.

        Raises
        ------
        LimitExceeded: it is too long. Whatever Jinja and Python's compiler raise.
        """
        if len(source) > MAX_SOURCE:
            raise LimitExceeded(f"it is longer than {MAX_SOURCE:,} characters")
        tree = _AddChecks().visit(self.parse(source))
        return self.template_class.from_code(self, self.compile(tree), self.make_globals(None))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        _meter(context).reserve_operator(operator, left, right)
        return _check(context, super().call_binop(context, operator, left, right))

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        meter = _meter(__context)
        method = getattr(__obj, "__wrapped__", __obj)  # the sandbox wraps str.format
        args = tuple(map(meter.collect, args))
        receiver = getattr(method, "__self__", None)
        meter.reserve_result(getattr(method, "__name__", ""), [receiver, *args, *_ordered(kwargs)])
        result = super().call(__context, __obj, *args, **kwargs)
        return _check(__context, result)


def _ordered(keywords: Mapping[str, Any]) -> list[Any]:
    """Return the values of keyword arguments in the order that `replace` declares them: `old`, `new`, `count`."""
    return [keywords[name] for name in sorted(keywords, reverse=True)]


def render_template(template: Template, variables: Mapping[str, Any]) -> str:
    """
    Render a template of a `TemplateEnvironment`.

    Raises
    ------
    LimitExceeded: it takes too much time or memory. Whatever the template raises.
    """
    return template.render({**variables, _METER: RenderMeter(variables)})


def _meter(context: Context) -> RenderMeter:
    meter: RenderMeter = context.parent[_METER]
    return meter


class GenerationTag(Extension):
    """`{% generation %}…{% endgeneration %}`, which marks answers for training; it leaves them as they are."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        """Parse the block like transformers' `AssistantTracker`, as a scope of its own."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_render_body"), [], [], body).set_lineno(line)

    def _render_body(self, caller: Callable[[], str]) -> str:
        return caller()


# --- checks that are compiled into a template

# Names that templates cannot spell.
_ITERATE, _CONCATENATE, _CHECK, _WRITE = "<iterate>", "<concatenate>", "<check>", "<write>"


class _AddChecks(NodeTransformer):
    """Puts a filter around what Jinja's sandbox does not intercept: loops, `~`, output, literals and slices."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = _filter(node.iter, _ITERATE)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _filter(nodes.List(node.nodes, lineno=node.lineno), _CONCATENATE)

    def visit_Output(self, node: nodes.Output) -> nodes.Node:
        self.generic_visit(node)
        node.nodes = [_filter(child, _WRITE) for child in node.nodes]
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        return _filter(node, _CHECK) if isinstance(node.arg, nodes.Slice) else node

    def _visit_literal(self, node: nodes.Expr) -> nodes.Node:
        self.generic_visit(node)
        return _filter(node, _CHECK)

    visit_List = visit_Dict = _visit_literal

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        return self._visit_literal(node) if node.ctx == "load" else node


def _filter(node: nodes.Node, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


@pass_context
def _iterate(context: Context, iterable: Any) -> Iterator[Any]:
    meter = _meter(context)
    for item in iterable:
        meter.check_time()
        yield item


@pass_context
def _concatenate(context: Context, values: list[Any]) -> str:
    _meter(context).reserve(sum(map(_meter(context).measure, values)))
    text = (markup_join if context.eval_ctx.autoescape else str_join)(values)
    _meter(context).measure(text)
    return text


@pass_context
def _check(context: Context, value: Any) -> Any:
    if not isinstance(value, Namespace):
        _meter(context).measure(value)
    return value


@pass_context
def _write(context: Context, value: Any) -> Any:
    _meter(context).write(value)
    return value


def _limit_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the filter with a check of its arguments and of its result."""
    first_argument = getattr(function, "jinja_pass_arg", None)  # set by Jinja's pass_context and its like

    @pass_context
    def limited(context: Context, *args: Any, **kwargs: Any) -> Any:
        meter = _meter(context)
        args = tuple(map(meter.collect, args))
        meter.reserve_result(name, [*args, *_ordered(kwargs)])
        if first_argument is not None:
            passed = {"context": context, "eval_context": context.eval_ctx, "environment": context.environment}
            args = (passed[first_argument.name], *args)
        return _check(context, function(*args, **kwargs))

    return limited


def _raise_exception(message: str) -> NoReturn:
    raise InputRejected(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Convert to JSON like transformers; Jinja's own filter escapes HTML characters."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
