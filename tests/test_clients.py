"""Libraries that people build programs with, connected to `qwenlocal serve`; `make test-clients` installs them."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pydantic
import pytest
from server_process import DEADLINE, serving

ROOT = Path(__file__).resolve().parent.parent
NODE_FOLDER = ROOT / "build" / "clients" / "node"
HELLO = [{"role": "user", "content": "Hello"}]
ANSWER = "Paris, fun"
TOO_LONG = [{"role": "user", "content": "x" * 5000}]

pytestmark = [
    pytest.mark.clients,
    # The libraries leave connections open, and some of their dependencies are deprecated.
    pytest.mark.filterwarnings("ignore"),
]


class City(pydantic.BaseModel):
    is_large: bool
    country: str = pydantic.Field(max_length=3)


class Served:
    """A server: its address, a model that answers `ANSWER`, and one that answers anything."""

    def __init__(self, url: str, speaking: Path, random: Path) -> None:
        self.url, self.speaking, self.random = url, str(speaking), str(random)


@pytest.fixture(scope="module")
def served(speaking_model: Path, random_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("home"), speaking_model, random_model) as server:
        yield Served(server.url, speaking_model, random_model)


def load(name: str) -> Any:
    """Import a library; skip the test if it is not installed."""
    return pytest.importorskip(name, reason=f"{name} is not installed: make test-clients installs it")


# --- LangChain


@pytest.fixture
def langchain() -> ModuleType:
    return load("langchain_openai")  # type: ignore[no-any-return]


def langchain_options(served: Served) -> dict[str, Any]:
    return {"base_url": f"{served.url}/v1", "api_key": "none", "max_retries": 0}


def test_langchain_chats_and_streams(langchain: Any, served: Served) -> None:
    chat = langchain.ChatOpenAI(model=served.speaking, stream_usage=True, **langchain_options(served))
    assert chat.invoke("Hello").content == ANSWER
    chunks = list(chat.stream("Hello"))
    assert "".join(chunk.content for chunk in chunks) == ANSWER
    assert [chunk.usage_metadata["output_tokens"] for chunk in chunks if chunk.usage_metadata] == [len(ANSWER) + 1]
    assert langchain.OpenAI(model=served.speaking, **langchain_options(served)).invoke("Hello") == ANSWER


def test_langchain_uses_responses(langchain: Any, served: Served) -> None:
    chat = langchain.ChatOpenAI(model=served.speaking, use_responses_api=True, **langchain_options(served))
    assert chat.invoke("Hello").text == ANSWER
    assert "".join(chunk.text for chunk in chat.stream("Hello")) == ANSWER


def test_langchain_gets_structured_output(langchain: Any, served: Served) -> None:
    chat = langchain.ChatOpenAI(model=served.random, max_tokens=200, **langchain_options(served))
    assert isinstance(chat.with_structured_output(City).invoke("Hello"), City)


def test_langchain_embeds(langchain: Any, served: Served) -> None:
    # Otherwise it counts tokens with OpenAI's vocabulary, which it downloads, and sends its ids.
    embeddings = langchain.OpenAIEmbeddings(
        model=served.random, check_embedding_ctx_length=False, **langchain_options(served)
    )
    first, second = embeddings.embed_documents(["a", "b c"])
    assert len(first) == len(second) > 100 and first != second
    assert embeddings.embed_query("a") == pytest.approx(first, abs=1e-6)


def test_langchain_reports_errors(langchain: Any, served: Served) -> None:
    import openai

    with pytest.raises(openai.NotFoundError, match="Installed: "):
        langchain.ChatOpenAI(model="nope", **langchain_options(served)).invoke("Hello")
    chat = langchain.ChatOpenAI(model=served.speaking, **langchain_options(served))
    with pytest.raises(openai.BadRequestError, match="“tools” is not supported"):
        chat.bind_tools([City]).invoke("Hello")
    with pytest.raises(openai.BadRequestError, match="the context holds 512"):
        chat.invoke(TOO_LONG)


# --- LlamaIndex


@pytest.fixture
def llama_index() -> ModuleType:
    load("llama_index.llms.openai_like")
    from llama_index.llms import openai_like

    return openai_like  # type: ignore[no-any-return]


def llama_index_options(served: Served) -> dict[str, Any]:
    return {"api_base": f"{served.url}/v1", "api_key": "none", "is_chat_model": True, "max_retries": 0}


def llama_index_message() -> list[Any]:
    from llama_index.core.llms import ChatMessage

    return [ChatMessage(role="user", content="Hello")]


def test_llama_index_chats_and_streams(llama_index: Any, served: Served) -> None:
    model = llama_index.OpenAILike(model=served.speaking, **llama_index_options(served))
    assert model.chat(llama_index_message()).message.content == ANSWER
    assert "".join(part.delta for part in model.stream_chat(llama_index_message())) == ANSWER
    options = {**llama_index_options(served), "is_chat_model": False}
    model = llama_index.OpenAILike(model=served.speaking, **options)
    assert model.complete("Hello").text == ANSWER
    assert "".join(part.delta for part in model.stream_complete("Hello")) == ANSWER


def test_llama_index_gets_structured_output(llama_index: Any, served: Served) -> None:
    model = llama_index.OpenAILike(
        model=served.random, max_tokens=200, should_use_structured_outputs=True, **llama_index_options(served)
    )
    assert isinstance(model.as_structured_llm(City).chat(llama_index_message()).raw, City)


def test_llama_index_embeds(llama_index: Any, served: Served) -> None:
    from llama_index.embeddings.openai_like import OpenAILikeEmbedding

    embedding = OpenAILikeEmbedding(model_name=served.random, api_base=f"{served.url}/v1", api_key="none")
    first, second = embedding.get_text_embedding_batch(["a", "b c"])
    assert len(first) == len(second) > 100 and first != second


def test_llama_index_reports_errors(llama_index: Any, served: Served) -> None:
    import openai

    with pytest.raises(openai.NotFoundError, match="Installed: "):
        llama_index.OpenAILike(model="nope", **llama_index_options(served)).chat(llama_index_message())


# --- LiteLLM, which CrewAI uses


@pytest.fixture
def litellm(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # instead of a download
    return load("litellm")  # type: ignore[no-any-return]


PROVIDERS = {"openai": "/v1", "hosted_vllm": "/v1", "anthropic": "", "ollama_chat": ""}


@pytest.mark.parametrize("provider", PROVIDERS)
def test_litellm_chats_and_streams(litellm: Any, served: Served, provider: str) -> None:
    arguments = {
        "model": f"{provider}/{served.speaking}",
        "messages": HELLO,
        "api_base": served.url + PROVIDERS[provider],
        "api_key": "none",
        "max_tokens": 50,
    }
    completion = litellm.completion(**arguments)
    assert completion.choices[0].message.content == ANSWER
    assert completion.usage.completion_tokens == len(ANSWER) + 1
    chunks = list(litellm.completion(**arguments, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == ANSWER
    assert chunks[-1].choices[0].finish_reason == "stop"


def litellm_options(served: Served) -> dict[str, Any]:
    return {"api_base": f"{served.url}/v1", "api_key": "none", "max_retries": 0}


def test_litellm_completes_text_and_uses_responses(litellm: Any, served: Served) -> None:
    completion = litellm.text_completion(
        model=f"text-completion-openai/{served.speaking}", prompt="Hello", **litellm_options(served)
    )
    assert completion.choices[0].text == ANSWER
    response = litellm.responses(model=f"openai/{served.speaking}", input="Hello", **litellm_options(served))
    assert response.output[0].content[0].text == ANSWER


def test_litellm_gets_structured_output(litellm: Any, served: Served) -> None:
    completion = litellm.completion(
        model=f"openai/{served.random}",
        messages=HELLO,
        response_format=City,
        max_tokens=200,
        **litellm_options(served),
    )
    City.model_validate_json(completion.choices[0].message.content)


def test_litellm_embeds(litellm: Any, served: Served) -> None:
    embedding = litellm.embedding(model=f"openai/{served.random}", input=["a", "b c"], **litellm_options(served))
    first, second = (one["embedding"] for one in embedding.data)
    assert len(first) == len(second) > 100 and first != second


def test_litellm_reports_errors(litellm: Any, served: Served) -> None:
    with pytest.raises(litellm.NotFoundError, match="Installed: "):
        litellm.completion(model="openai/nope", messages=HELLO, **litellm_options(served))
    with pytest.raises(litellm.BadRequestError, match="the context holds 512"):
        litellm.completion(model=f"openai/{served.speaking}", messages=TOO_LONG, **litellm_options(served))


# --- OpenAI's package for Node

SCRIPT = """
import OpenAI from "openai";

const [baseURL, speaking, random, schema] = process.argv.slice(1);
const client = new OpenAI({ baseURL, apiKey: "none", maxRetries: 0 });
const messages = [{ role: "user", content: "Hello" }];
const results = {};

const completion = await client.chat.completions.create({ model: speaking, messages });
results.chat = completion.choices[0].message.content;

results.stream = "";
const options = { stream: true, stream_options: { include_usage: true } };
for await (const chunk of await client.chat.completions.create({ model: speaking, messages, ...options })) {
  results.stream += chunk.choices[0]?.delta.content ?? "";
  results.tokens = chunk.usage?.completion_tokens;
}
results.helper = await client.chat.completions.stream({ model: speaking, messages }).finalContent();

const json_schema = { name: "city", schema: JSON.parse(schema), strict: true };
const response_format = { type: "json_schema", json_schema };
const parsed = await client.chat.completions.parse({ model: random, messages, max_tokens: 200, response_format });
results.structured = parsed.choices[0].message.content;

const embeddings = await client.embeddings.create({ model: random, input: ["a", "b c"] });
results.dimensions = embeddings.data.map((one) => one.embedding.length);

results.models = [];
for await (const model of client.models.list()) results.models.push(model.id);

results.response = (await client.responses.create({ model: speaking, input: "Hello" })).output_text;

results.errors = [];
for (const request of [{ model: "nope", messages }, { model: speaking, messages: [] }]) {
  try {
    await client.chat.completions.create(request);
  } catch (error) {
    results.errors.push([error.constructor.name, error.status, error.code, error.param]);
  }
}
console.log(JSON.stringify(results));
"""


def test_the_package_for_node_works(served: Served) -> None:
    node = shutil.which("node")
    if node is None:
        pytest.skip("Node is not installed")
    if not (NODE_FOLDER / "node_modules" / "openai").exists():
        pytest.skip("the Node package openai is not installed: make test-clients installs it with npm")
    schema = json.dumps({**City.model_json_schema(), "additionalProperties": False})
    done = subprocess.run(
        [node, "--input-type=module", "-e", SCRIPT, f"{served.url}/v1", served.speaking, served.random, schema],
        cwd=NODE_FOLDER,
        capture_output=True,
        text=True,
        timeout=DEADLINE,
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    assert {results[name] for name in ("chat", "stream", "helper", "response")} == {ANSWER}
    assert results["tokens"] == len(ANSWER) + 1
    City.model_validate_json(results["structured"])
    assert results["dimensions"][0] == results["dimensions"][1] > 100
    assert results["models"] == [served.speaking, served.random]
    assert results["errors"] == [
        ["NotFoundError", 404, "model_not_found", "model"],
        ["BadRequestError", 400, "invalid_value", "messages"],
    ]
