"""Chat templates of checkpoints: their source files, their exact bytes, and invalid ones."""

from __future__ import annotations

import json
import struct
import subprocess
import time
import tracemalloc
from pathlib import Path

import pytest
from checkpoint_files import load_vocabulary, plan_metadata, set_json, write_minimal
from commands import expect_exit, list_models
from conftest import Run
from gguf_files import copy_with_metadata
from hub import HubServer
from hub_checkpoints import CHECKPOINT, HF_NAME, WeightRequests, publish, read_tree

from qwenlocal.chat.chat_template import CHATML, ChatTemplate
from qwenlocal.errors import BadCheckpoint, BadWeights
from qwenlocal.paths import Folders
from qwenlocal.testing import write_model
from qwenlocal.weights import gguf_writer
from qwenlocal.weights.gguf_reader import decode_value, read_raw_metadata


class TestSources:
    def test_the_template_of_tokenizer_config_is_used(self, tmp_path: Path) -> None:
        assert dict(load_vocabulary(write_minimal(tmp_path)).templates) == {"": CHATML}

    def test_chat_template_jinja_takes_precedence_over_tokenizer_config(self, tmp_path: Path) -> None:
        folder = write_minimal(tmp_path)
        (folder / "chat_template.jinja").write_bytes("{{ 'é' }}\r\n".encode())
        assert dict(load_vocabulary(folder).templates) == {"": "{{ 'é' }}\r\n"}

    def test_tokenizer_config_takes_precedence_over_chat_template_json(self, tmp_path: Path) -> None:
        folder = set_json(write_minimal(tmp_path, template=None), "chat_template.json", chat_template="from json")
        assert dict(load_vocabulary(folder).templates) == {"": "from json"}
        set_json(folder, "tokenizer_config.json", chat_template="first")
        assert dict(load_vocabulary(folder).templates) == {"": "first"}

    def test_a_checkpoint_without_a_template_writes_no_key(self, tmp_path: Path) -> None:
        folder = write_minimal(tmp_path, template=None)
        assert dict(load_vocabulary(folder).templates) == {}
        assert not [key for key in plan_metadata(folder) if "template" in key]

    def test_a_list_of_named_templates_is_written_under_their_names(self, tmp_path: Path) -> None:
        templates = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
        folder = set_json(write_minimal(tmp_path), "tokenizer_config.json", chat_template=templates)
        assert dict(load_vocabulary(folder).templates) == {"": "d", "tool_use": "t"}
        metadata = plan_metadata(folder)
        assert metadata["tokenizer.chat_template"] == "d"
        assert metadata["tokenizer.chat_template.tool_use"] == "t"
        assert metadata["tokenizer.chat_templates"] == ["tool_use"]

    def test_the_first_template_of_a_list_without_a_default_is_the_default(self, tmp_path: Path) -> None:
        folder = set_json(
            write_minimal(tmp_path), "tokenizer_config.json", chat_template=[{"name": "rag", "template": "r"}]
        )
        assert load_vocabulary(folder).templates[""] == "r"

    def test_additional_chat_templates_are_read(self, tmp_path: Path) -> None:
        folder = write_minimal(tmp_path)
        (folder / "additional_chat_templates").mkdir()
        (folder / "additional_chat_templates" / "tool-use.jinja").write_text("t")
        assert dict(load_vocabulary(folder).templates) == {"": CHATML, "tool_use": "t"}

    @pytest.mark.parametrize("wrong", [5, True, {}, [], ["text"], [{"name": "x"}], [{"name": 5, "template": "t"}]])
    def test_a_malformed_template_is_refused(self, wrong: object, tmp_path: Path) -> None:
        with pytest.raises(BadCheckpoint, match="“chat_template” is malformed"):
            load_vocabulary(set_json(write_minimal(tmp_path), "tokenizer_config.json", chat_template=wrong))

    def test_a_template_file_that_is_not_text_is_refused(self, tmp_path: Path) -> None:
        folder = write_minimal(tmp_path)
        (folder / "chat_template.jinja").write_bytes(b"\xff\xfe")
        with pytest.raises(BadCheckpoint, match=r"Cannot read .*chat_template\.jinja: .* can't decode"):
            load_vocabulary(folder)


class TestConversion:
    CRLF = b"{% if x %}\r\na\r\n{% endif %}\r\nb\rc\n"

    @pytest.mark.parametrize("file", ["chat_template.jinja", "additional_chat_templates/tool-use.jinja"])
    def test_template_files_are_kept_byte_for_byte(
        self, file: str, checkpoint_copy: Path, invoke: Run, tmp_path: Path
    ) -> None:
        (checkpoint_copy / file).parent.mkdir(exist_ok=True)
        (checkpoint_copy / file).write_bytes(self.CRLF)
        expect_exit(invoke("convert", str(checkpoint_copy), "-o", "x.gguf", "--type", "q8_0"), 0)
        key = "tokenizer.chat_template" + (".tool_use" if "/" in file else "")
        kind, length = struct.unpack_from("<IQ", read_raw_metadata(tmp_path / "x.gguf")[key])
        assert (kind, length) == (8, len(self.CRLF))
        assert read_raw_metadata(tmp_path / "x.gguf")[key][12:] == self.CRLF

    def test_template_files_of_a_hub_are_kept_byte_for_byte_and_removed_with_the_checkpoint(
        self, checkpoint_copy: Path, hub: HubServer, invoke: Run, folders: Folders, tmp_path: Path
    ) -> None:
        (checkpoint_copy / "additional_chat_templates").mkdir()
        (checkpoint_copy / "additional_chat_templates" / "tool_use.jinja").write_bytes(self.CRLF)
        (checkpoint_copy / "additional_chat_templates" / "rag.jinja").write_bytes(self.CRLF)
        publish(hub, checkpoint_copy)
        expect_exit(invoke("convert", HF_NAME, "-o", "x.gguf", "--type", "q8_0"), 0)
        pairs = read_raw_metadata(tmp_path / "x.gguf")
        assert decode_value(pairs["tokenizer.chat_templates"]) == ["rag", "tool_use"]
        for name in ("rag", "tool_use"):
            assert pairs[f"tokenizer.chat_template.{name}"][12:] == self.CRLF
        assert "freed" in expect_exit(invoke("rm", HF_NAME + CHECKPOINT), 0)
        assert read_tree(folders.hub_cache) == {}

    @pytest.mark.parametrize("file", ["chat_template.jinja", "additional_chat_templates/x.jinja"])
    def test_a_template_file_that_is_not_text_fails_convert_and_pull(
        self, file: str, checkpoint_copy: Path, invoke: Run, tmp_path: Path
    ) -> None:
        (checkpoint_copy / file).parent.mkdir(exist_ok=True)
        (checkpoint_copy / file).write_bytes(b"a\xff\xfe")
        for command in (("convert", str(checkpoint_copy), "-o", "x.gguf"), ("pull", str(checkpoint_copy))):
            assert f"{Path(file).name}: 'utf-8' codec" in expect_exit(invoke(*command), 5)
        assert not (tmp_path / "x.gguf").exists()
        assert list_models(invoke) == {}

    def test_a_template_file_that_is_not_text_is_refused_before_the_weights_are_downloaded(
        self, checkpoint_copy: Path, hub: HubServer, weight_requests: WeightRequests, invoke: Run
    ) -> None:
        (checkpoint_copy / "additional_chat_templates").mkdir()
        (checkpoint_copy / "additional_chat_templates" / "x.jinja").write_bytes(b"\xff")
        publish(hub, checkpoint_copy)
        assert "x.jinja: 'utf-8' codec" in expect_exit(invoke("pull", HF_NAME), 5)
        assert weight_requests.saw_headers_only

    def test_a_syntax_error_is_reported_by_convert_inspect_and_run(self, checkpoint_copy: Path, invoke: Run) -> None:
        file = checkpoint_copy / "tokenizer_config.json"
        broken = "{% for message in messages %}\n{{ message.content "
        file.write_text(json.dumps({**json.loads(file.read_text()), "chat_template": broken}))
        assert "The chat template is invalid (line 2: " in expect_exit(
            invoke("convert", str(checkpoint_copy), "-o", "x.gguf", "--type", "f32"), 0
        )
        assert "error  The chat template is invalid (line 2" in invoke("inspect", "./x.gguf").stdout
        assert "chat template: it is not valid Jinja" in expect_exit(invoke("run", "./x.gguf", "Hi"), 5)


CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


def render(source: str, count: int = 1) -> str:
    return ChatTemplate(source).render(CHAT * count, add_generation_prompt=False)


class TestRendering:
    """As in transformers: utils/chat_template_utils.py, `_cached_compile_jinja_template`."""

    @pytest.mark.parametrize(
        ("source", "text"),
        [
            ("{% for m in messages %}{{ m.role }}:\n{% generation %}{{ m.content }}{% endgeneration %}\n{% endfor %}",
             "user:\nHiassistant:\nHello"),
            ("{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}", "21"),
            ("{% for m in messages %}{% if loop.last %}{% continue %}{% endif %}{{ m.content }}{% endfor %}", "Hi"),
            ("  {% if true %}\n  a\n  {% endif %}\nb", "  a\nb"),
            ("{{ {'b': '<é>', 'a': [1]}|tojson }}", '{"b": "<é>", "a": [1]}'),
            ("{{ {'b': 'é', 'a': 1}|tojson(ensure_ascii=true, separators=(',', ':'), sort_keys=true) }}",
             '{"a":1,"b":"\\u00e9"}'),
            ("{{ {'a': 1}|tojson(indent=2) }}", '{\n  "a": 1\n}'),
            ("{% if tools is not none or documents is not none %}x{% endif %}-", "-"),
            ("{% autoescape true %}{{ '<' ~ '<b>'|safe }}{% endautoescape %}{{ '<' ~ 1 ~ none }}", "&lt;<b><1None"),
            ("{% set ns = namespace(x=[]) %}{% for m in messages[::-1] %}{% set ns.x = ns.x + [m.role] %}{% endfor %}"
             "{{ ns.x|join('-') }}", "assistant-user"),
            ("{% macro m(a, b=2) %}{{ a }}{{ b }}{{ caller() if caller }}{% endmacro %}{{ m(1) }}"
             "{% call m(3, b=4) %}!{% endcall %}", "1234!"),
            ("{{ '%5d|%s' % (1, 'a') }}{{ '{:>3}{x}'.format('b', x=1) }}{{ 'a'|center(3) }}"
             "{{ 'aXbX'.replace('X', '-', 1) }}", "    1|a  b1 a a-bX"),
            ("{% for key, value in {'a': 1}.items() %}{{ key }}{{ value }}{{ loop.length }}{% endfor %}", "a11"),
            ("{% for x in [1, [2, [3]]] recursive %}{{ loop(x) if x is iterable else x }}{% endfor %}", "123"),
            ("{{ messages|selectattr('role', 'equalto', 'user')|map(attribute='content')|first }}", "Hi"),
            ("{{ '%d|' % 1700000000 }}{{ '{:,}|'.format(10**12) }}{{ '%s'|format(1700000000) }}",
             "1700000000|1,000,000,000,000|1700000000"),
        ],
    )  # fmt: skip
    def test_templates_render_as_in_transformers(self, source: str, text: str) -> None:
        assert render(source) == text

    def test_a_long_conversation_renders_quickly(self) -> None:
        started = time.process_time()
        assert len(render(CHATML, 1000)) > 60_000
        assert time.process_time() - started < 1

    def test_a_text_can_be_collected_message_by_message(self) -> None:
        add = "{% for m in messages %}{% set ns.x = ns.x ~ m.content %}{% endfor %}"
        long = [{"role": "user", "content": "words " * 50}] * 1000
        source = "{% set ns = namespace(x='') %}" + add + "{{ ns.x }}"
        assert len(ChatTemplate(source).render(long)) == 300_000

    def test_namespaces_in_namespaces_do_not_multiply(self) -> None:
        source = (
            "{% set ns = namespace() %}{% for i in range(60) %}{% set ns.x = namespace(a=ns.x, b=ns.x) %}{% endfor %}"
        )
        assert len(render(source + "{{ ns.x|string }}")) < 100

    def test_a_long_message_fits_into_the_limits(self) -> None:
        long = [{"role": "user", "content": "word " * 780_000}]
        source = "{% set text = messages[0].content|trim ~ '.' %}{{ '<' + text.replace('word', 'words') }}"
        assert len(ChatTemplate(source).render(long)) == 6 * 780_000 + 1


TIME, DEPTH, MEMORY = "it takes longer than 0.5 seconds", "it is nested too deeply", "it needs too much memory"
DOUBLING = (
    "{% set ns = namespace(x=START) %}{% for i in range(60) %}{% set ns.x = NEXT %}{% endfor %}{{ ns.x == ns.x }}"
)


class TestLimits:
    @pytest.mark.parametrize(
        "source",
        [
            "{{ 'a' * 10**10 }}", "{{ [1] * 10**10 }}", "{{ 'a'|center(10**10) }}", "{{ 'a'.rjust(width=10**10) }}",
            "{{ '%10000000000d' % 1 }}", "{{ '%*d' % (10**10, 1) }}", "{{ '{:10000000000}'.format(1) }}",
            "{{ '{:{}}'.format(1, 10**10) }}", "{{ 'x{:10000000000}'['format'](1) }}",
            "{{ '%10000000000d'|format(1) }}",
            "{{ (1).to_bytes(10**10, 'big') }}", "{{ [1]|batch(10**10, 0)|list }}", "{{ [[1]]|tojson(indent=10**10) }}",
            "{{ ('a' * 10000)|replace('a', 'b' * 100000) }}", "{{ ('a' * 10000)|replace(new='b' * 100000, old='a') }}",
            "{{ (['x' * 100000] * 100000)|join }}", "{{ ['x' * 100000] * 100000 }}",
            "{{ ('\\n' * 100000)|indent(100000) }}",
            "{{ ('\\t' * 100000).expandtabs(100000) }}", "{{ ('x' * 100000).translate({120: 'y' * 100000}) }}",
            "{{ range(100000)|map(attribute='x', default='y' * 1000000)|join }}",
            "{{ range(100000)|reverse|join('x' * 100000) }}", "{{ ('abb' * 6000000).split('a')|length }}",
            "{% for i in range(9999) %}{% set x %}{{ 'x' * 900000 }}{% endset %}{% endfor %}",
            "{{ ([[1] * 10000] * 10000)|sum(start=[]) }}",
            "{% filter center(10**9) %}x{% endfilter %}", "{% macro m(a='x' * 10**9) %}{% endmacro %}{{ m() }}",
            DOUBLING.replace("START", "'aaaa'").replace("NEXT", "ns.x + ns.x"),
            DOUBLING.replace("START", "'aaaa'").replace("NEXT", "ns.x ~ ns.x"),
            DOUBLING.replace("START", "'aaaa'").replace("NEXT", "'%s%s' % (ns.x, ns.x)"),
            DOUBLING.replace("START", "[1]").replace("NEXT", "[ns.x, ns.x]"),
            DOUBLING.replace("START", "1").replace("NEXT", "{'a': ns.x, 'b': ns.x}"),
            DOUBLING.replace("START", "{'a': 1}").replace("NEXT", "dict(a=ns.x.items(), b=ns.x.items())"),
        ],
    )  # fmt: skip
    def test_a_template_that_needs_much_memory_fails_before_it_gets_it(self, source: str) -> None:
        tracemalloc.start()
        with pytest.raises(BadWeights, match="chat template: it fails: it needs too much memory"):
            render(source)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 100e6

    @pytest.mark.parametrize(
        ("source", "reason"),
        [
            ("{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}", TIME),
            ("{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}", TIME),
            ("{% for i in range(99999) recursive %}{{ loop(range(99999)) if loop.depth < 5 }}{% endfor %}", TIME),
            ("{% for i in range(100000) %}" + "y" * 90_000 + "{% endfor %}", MEMORY),
            ("{% for i in range(99999) %}{{ messages }}{{ messages }}{{ messages }}{% endfor %}", MEMORY),
            ("{% for i in range(10**10) %}{% endfor %}", "Range too big"),
            ("{{ 2 ** (10 ** 9) }}", "numbers that are too large"),
            (DOUBLING.replace("START", "7").replace("NEXT", "ns.x * ns.x"), "numbers that are too large"),
            ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", DEPTH),
            ("{% block a %}{{ self.a() }}{% endblock %}", DEPTH),
            (DOUBLING.replace("60", "99999").replace("START", "()").replace("NEXT", "(ns.x,)"), MEMORY),
            ("{{ ('<!--a-->' * 100000)|striptags }}", MEMORY),
            ("{{ ('é' * 100000).encode('punycode') }}", MEMORY),
            ("{% include 'x' %}", "no loader"),
        ],
    )  # fmt: skip
    def test_a_template_that_runs_long_or_nests_deeply_fails(
        self, source: str, reason: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        if reason == TIME:
            monkeypatch.setattr("qwenlocal.jinja_sandbox.MAX_SECONDS", 0.5)
        started = time.process_time()
        with pytest.raises(BadWeights, match=f"chat template: it fails: .*{reason}"):
            render(source)
        assert time.process_time() - started < 4

    @pytest.mark.parametrize(
        ("source", "reason"),
        [
            ("{{ " + "[" * 5000 + "]" * 5000 + " }}", DEPTH),
            ("{{ " + "+".join("1" * 5000) + " }}", DEPTH),
            ("{% for a in [1] %}" * 25 + "{% endfor %}" * 25, DEPTH),
            ("{% if 1 %}" * 120 + "{% endif %}" * 120, DEPTH),
            ("{% if 0 %}" + "{% elif 0 %}" * 5000 + "{% endif %}", DEPTH),
            ("x" * 100_001, "it is longer than 100,000 characters"),
            ("{{ " + "1" * 5000 + " }}", "4300 digits"),
            ("{{ messages|nonsense }}", "line 1: No filter named 'nonsense'."),
        ],
    )
    def test_a_template_that_cannot_be_compiled_is_invalid(self, source: str, reason: str) -> None:
        with pytest.raises(BadWeights, match=f"chat template: it is not valid Jinja: .*{reason}"):
            ChatTemplate(source)

    @pytest.mark.parametrize("source", ["{{ 'a' * 10**10 }}{{ messages }}", "{{ messages" + "[0]" * 5000 + " }}"])
    def test_run_and_inspect_say_the_same(self, source: str, invoke: Run, tmp_path: Path) -> None:
        good = write_model(tmp_path / "good.gguf", reply="Hi")
        copy_with_metadata(good, tmp_path / "bad.gguf", {"tokenizer.chat_template": gguf_writer.string(source)})
        for options in ((), ("--system", "Be brief."), ("--json",)):
            assert "chat template: it " in expect_exit(invoke("run", "./bad.gguf", "Hi", *options), 5)
        assert "runs with --raw only" in expect_inspection(invoke("inspect", "./bad.gguf"))
        expect_exit(invoke("run", "./bad.gguf", "--raw", "Hi"), 0)

    @pytest.mark.parametrize("source", ["{# no text #}", "{% if tools %}{{ messages }}{% endif %}"])
    def test_a_template_that_renders_nothing_is_an_error(self, source: str, invoke: Run, tmp_path: Path) -> None:
        write_model(tmp_path / "mute.gguf", template=source)
        (tmp_path / "in.txt").write_text("one\ntwo\n")
        for prompt in (("Hi",), ("--batch", "in.txt")):
            message = expect_exit(invoke("run", "-m", "./mute.gguf", *prompt), 5)
            assert "chat template: it turns the conversation into an empty text" in message
        expect_exit(invoke("run", "./mute.gguf", "--raw", "Hi", "-n", "2"), 0)

    def test_convert_copies_such_a_template_with_a_note(self, checkpoint_copy: Path, invoke: Run) -> None:
        (checkpoint_copy / "chat_template.jinja").write_text("{{ " + "[" * 5000 + "]" * 5000 + " }}")
        result = invoke("convert", str(checkpoint_copy), "-o", "x.gguf", "--type", "q8_0")
        assert "is invalid (it is nested too deeply); it is copied unchanged" in expect_exit(result, 0)


def expect_inspection(result: subprocess.CompletedProcess[str]) -> str:
    expect_exit(result, 5)
    return result.stdout
