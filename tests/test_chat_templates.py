"""Chat templates of checkpoints: their source files, their exact bytes, and invalid ones."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
from checkpoint_files import load_vocabulary, plan_metadata, set_json, write_minimal
from commands import expect_exit, list_models
from conftest import Run
from hub import HubServer
from hub_checkpoints import CHECKPOINT, HF_NAME, WeightRequests, publish, read_tree

from qwenlocal.chat.chat_template import CHATML
from qwenlocal.errors import BadCheckpoint
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
        self, checkpoint_copy: Path, hub: HubServer, invoke: Run, environment: dict[str, str], tmp_path: Path
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
        assert read_tree(Path(environment["HF_HUB_CACHE"])) == {}

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
