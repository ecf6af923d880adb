"""Unusual requests, generated from the OpenAPI schema."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.generation import GenerationMode
from server_process import DEADLINE, Server, serving

pytestmark = pytest.mark.slow
# The same requests at every run, so that no change fails because of an earlier fault.
REQUESTS = settings(
    max_examples=25, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)

# Paths at which some of the requests have to be answered: otherwise they test nothing but the first checks.
ANSWERING = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages", "/api/chat", "/v1/embeddings")


@pytest.fixture(scope="module")
def server(speaking_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("home"), speaking_model) as server:
        yield server


def read_operations(server: Server) -> list[schemathesis.APIOperation]:
    description = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    return [result.ok() for result in description.get_all_operations()]


def send_requests(operation: schemathesis.APIOperation, mode: GenerationMode, model: Path) -> set[int]:
    """Return the statuses of the responses."""
    statuses = set()

    @REQUESTS
    @given(operation.as_strategy(generation_mode=mode))
    def send(case: schemathesis.Case) -> None:
        if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
            case.body["model"] = str(model)  # an unknown model would end most requests early
        response = case.call(timeout=DEADLINE)
        assert response.status_code < 500, f"{case.as_curl_command()}\n{response.text}"
        statuses.add(response.status_code)

    send()
    return statuses


def test_no_request_that_follows_the_schema_makes_the_server_fail(server: Server, speaking_model: Path) -> None:
    operations = read_operations(server)
    statuses = {
        operation.label: send_requests(operation, GenerationMode.POSITIVE, speaking_model) for operation in operations
    }
    answered = {label for label, seen in statuses.items() if 200 in seen}
    assert {f"POST {path}" for path in ANSWERING} <= answered


def test_no_request_that_violates_the_schema_makes_the_server_fail(server: Server, speaking_model: Path) -> None:
    operations = [operation for operation in read_operations(server) if operation.body]
    statuses = {
        operation.label: send_requests(operation, GenerationMode.NEGATIVE, speaking_model) for operation in operations
    }
    assert all(400 in seen for seen in statuses.values()), statuses
