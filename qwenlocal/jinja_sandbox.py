"""
Jinja with the settings of transformers, and with limits: templates come from untrusted files.

Jinja's sandbox protects the machine, but not its memory and time: `{{ 'a' * 10**10 }}` asks for 10 GB, and two nested
loops over `range(100000)` run for minutes.

Source of the settings: transformers, utils/chat_template_utils.py, `_cached_compile_jinja_template`.
"""

from __future__ import annotations

import functools
import json
import math
import re
import time
from collections.abc import Callable, ItemsView, Iterable, Iterator, KeysView, Mapping, ValuesView
from datetime import datetime
from types import CodeType
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, TemplateRuntimeError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context, LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer
from markupsafe import soft_str

MAX_SOURCE = 100_000  # characters; compiling them can take 3 s. The longest templates on the Hub have 30,000.
MAX_SECONDS = 2.0  # of processor time for one rendering
MAX_SIZE = 1_000_000  # characters of one value or of the output, plus 5 times the size of the messages
_MAX_TOTAL = 100  # times that: all values of one rendering together, including those that are free again
_MAX_BITS = 15_000  # of an integer; Python prints no longer ones

# The memory or the time of these filters and methods grows with the product of their arguments.
_PRODUCTS = frozenset(
    ("batch", "center", "expandtabs", "indent", "join", "ljust", "lstrip", "replace", "rfind", "rindex", "rjust",
     "rpartition", "rsplit", "rstrip", "slice", "strip", "sum", "to_bytes", "tojson", "translate", "trim", "zfill")
)  # fmt: skip
# The time of these may grow with the square of that product.
_SQUARES = frozenset(("decode", "encode", "pprint", "striptags", "urlize", "wordwrap", "xmlattr"))
_FORMATS = frozenset(("format", "format_map"))
_SEQUENCES = (str, bytes, list, tuple)
_CONTAINERS = (list, tuple, set, frozenset, dict, range, KeysView, ValuesView, ItemsView)
# Filters that are compiled into a template, under names that it cannot spell.
_ITERATE, _ADD, _TEXT = "<iterate>", "<add>", "<text>"


class LimitExceeded(TemplateRuntimeError):
    """A template takes too much time or memory."""


class InputRejected(TemplateError):
    """A template called `raise_exception`."""


def compile_source(source: str) -> CodeType:
    """
    Compile a template for `render_code`.

    Raises
    ------
    LimitExceeded: it is too long. Whatever Jinja and Python's compiler raise.
    """
    if len(source) > MAX_SOURCE:
        raise LimitExceeded(f"it is longer than {MAX_SOURCE:,} characters")
    sandbox = _Sandbox(datetime.now, {})
    return sandbox.compile(_AddChecks().visit(sandbox.parse(source)))


def render_code(code: CodeType, variables: Mapping[str, Any], now: Callable[[], datetime]) -> str:
    """
    Render a compiled template; `now` is the clock behind `strftime_now`.

    Raises
    ------
    LimitExceeded: it takes too much time or memory. Whatever the template raises.
    """
    sandbox = _Sandbox(now, variables)
    return Template.from_code(sandbox, code, sandbox.make_globals(None)).render(variables)


class _Sandbox(ImmutableSandboxedEnvironment):
    """
    Jinja's sandbox for one rendering.

    It checks the size of every value that a template makes: the result of an operator, call, filter, slice or literal.
    What Python would build in one step, such as `'a' * 10**10`, is estimated beforehand.
    """

    intercepted_binops = frozenset(ImmutableSandboxedEnvironment.default_binop_table)

    def __init__(self, now: Callable[[], datetime], variables: Mapping[str, Any]) -> None:
        extensions = [_GenerationTag, loopcontrols]
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=extensions, optimized=False, finalize=self._output
        )
        filters = {**self.filters, "tojson": _tojson}
        self.filters = {name: self._limit(name, function) for name, function in filters.items()}
        self.filters |= {_ITERATE: self._iterate, _ADD: self._add, _TEXT: soft_str}
        self.globals |= {
            "namespace": _OpaqueNamespace,
            "raise_exception": _raise_exception,
            "strftime_now": lambda format: now().strftime(format),
        }
        del self.globals["lipsum"]
        self._deadline = time.thread_time() + MAX_SECONDS
        self._sizes: dict[int, tuple[Any, int]] = {}  # of containers, by their id; the container keeps it taken
        self._limit_size, self._total = math.inf, 0.0
        self._limit_size = MAX_SIZE + 5 * self._measure(variables)

    # --- limits

    def _check_time(self) -> None:
        if time.thread_time() > self._deadline:
            raise LimitExceeded(f"it takes longer than {MAX_SECONDS:g} seconds")

    def _reserve(self, size: float) -> None:
        if self._total + size > self._limit_size * _MAX_TOTAL:
            raise LimitExceeded("it needs too much memory")

    def _measure(self, value: Any) -> int:
        """
        Return the size of a value in characters, counting a part as often as it occurs.

        Each container adds a tenth to its contents. So it cannot contain others more than about 100 levels deep, which
        Python might not survive.
        """
        if isinstance(value, (str, bytes)):
            return 1 + len(value)
        if isinstance(value, int) and value.bit_length() > _MAX_BITS:
            raise LimitExceeded("it uses numbers that are too large")
        if not isinstance(value, _CONTAINERS):
            return 1
        if id(value) not in self._sizes:
            items = [*value.keys(), *value.values()] if isinstance(value, dict) else value
            size = 100.0
            for item in items:
                size += 8 + self._measure(item) * 1.1
                if size > self._limit_size:
                    raise LimitExceeded("it needs too much memory")
            self._sizes[id(value)] = value, int(size)
        return self._sizes[id(value)][1]

    def _add(self, value: Any) -> Any:
        """Check a new value, and return it; instead of an iterator, a list of its items."""
        self._check_time()
        if isinstance(value, Iterator) and not isinstance(value, LoopContext):
            value = list(self._iterate(value))
        if self._measure(value) > self._limit_size:
            raise LimitExceeded("it needs too much memory")
        self._total += len(value) * (1 if isinstance(value, (str, bytes)) else 8) if hasattr(value, "__len__") else 1
        self._reserve(0)
        return value

    # --- what a template does

    def _iterate(self, iterable: Iterable[Any]) -> Iterator[Any]:
        for number, item in enumerate(iterable):
            if number % 64 == 0:  # reading the clock takes as long as an empty loop
                self._check_time()
            yield item

    def _output(self, value: Any) -> Any:
        return self._add(soft_str(value))

    def concat(self, texts: Iterable[str]) -> str:
        """Join the parts of the output, or of that of a macro or block."""
        texts = list(texts)
        self._reserve(sum(map(len, texts)))
        return str(self._add("".join(texts)))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Apply an operator."""
        if operator == "**" and isinstance(left, int) and isinstance(right, int):
            self._measure(1 << min(left.bit_length() * max(right, 0), _MAX_BITS + 1))
        elif operator == "*":
            for value, count in ((left, right), (right, left)):
                if isinstance(value, _SEQUENCES) and isinstance(count, int):
                    self._reserve(self._measure(value) * count)
        elif operator == "%" and isinstance(left, (str, bytes)):
            self._reserve(self._format_size(left, right if isinstance(right, tuple) else (right,)))
        return self._add(super().call_binop(context, operator, left, right))

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Call a function or method."""
        method = getattr(__obj, "__wrapped__", __obj)  # the sandbox wraps str.format
        receiver = getattr(method, "__self__", None)
        __self._check_call(getattr(method, "__name__", ""), [receiver, *args, *kwargs.values()])
        return __self._add(super().call(__context, __obj, *args, **kwargs))

    def _limit(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a filter with a check of its arguments and of its result."""

        @functools.wraps(function)
        def limited(*args: Any, **kwargs: Any) -> Any:
            self._check_call(name, [*args, *kwargs.values()])
            return self._add(function(*args, **kwargs))

        return limited

    def _check_call(self, name: str, arguments: list[Any]) -> None:
        texts = [value for value in arguments if isinstance(value, str)]
        if name in _FORMATS:
            self._reserve(self._format_size(arguments[0], arguments[1:]))
        elif name == "replace" and len(texts) == 3:
            text, *words = texts  # the old and the new one, in any order if they are keywords
            self._reserve(max(text.count(word) for word in words) * max(map(len, words)))
        elif name in _PRODUCTS or name in _SQUARES:
            size = math.prod(abs(value) + 1 if isinstance(value, int) else self._measure(value) for value in arguments)
            self._reserve(size**2 if name in _SQUARES else size)

    def _format_size(self, template: Any, values: Iterable[Any]) -> float:
        """Return the most characters that `%s`, `%1000d`, `%*d`, `{}`, `{:1000}` or `{:{}}` make of the values."""
        text = str(template)
        size, fields = sum(map(self._measure, values)), len(re.findall("[%{]", text))
        widths = [int(digits[:20]) for digits in re.findall(r"\d{4,}", text)]
        if re.search(r"%[^a-zA-Z%]*\*|\{[^}]*\{", text):  # a value is a width
            widths += [abs(value) * fields for value in values if isinstance(value, int)]
        return len(text) + sum(widths) + size * fields


class _OpaqueNamespace(Namespace):
    """A namespace that does not print what it holds, which can change after it was measured."""

    def __repr__(self) -> str:
        return "<Namespace>"


class _GenerationTag(Extension):
    """`{% generation %}…{% endgeneration %}`, which marks answers for training; as in transformers, it is a scope."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class _AddChecks(NodeTransformer):
    """Puts filters around what Jinja's sandbox does not intercept: loops, literals and slices; makes `~` a `+`."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = _filter(node.iter, _ITERATE)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        texts: list[nodes.Expr] = [_filter(child, _TEXT) for child in node.nodes]
        return functools.reduce(lambda left, right: nodes.Add(left, right, lineno=node.lineno), texts)

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        return _filter(node, _ADD) if isinstance(node.arg, nodes.Slice) else node

    def visit_List(self, node: nodes.Expr) -> nodes.Node:
        self.generic_visit(node)
        return node if getattr(node, "ctx", "load") == "store" else _filter(node, _ADD)

    visit_Dict = visit_Tuple = visit_List


def _filter(node: nodes.Node, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


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
