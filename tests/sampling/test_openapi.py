"""The published OpenAPI document, and generated requests against it: no status 5xx, no death.

PERSYN_OPENAPI_CASES=10000 pytest -n 0 tests/sampling/test_openapi.py     the long run (here: 300)
"""

import os

import hypothesis
import pytest
import requests
import schemathesis
from schemathesis import GenerationMode
from service_cases import chat, service_config, serving

CASES = int(os.environ.get("PERSYN_OPENAPI_CASES", "300"))


@pytest.fixture(scope="module")
def service():
    with serving(service_config(slots=8, cache_length=64, max_waiting=10_000)) as http:
        yield http


@pytest.fixture(scope="module")
def document(service):
    return service.get("/openapi.json").json()


def test_every_route_is_published_with_its_reply(document):
    published = {
        (method, path): set(operation["responses"])
        for path, operations in document["paths"].items()
        for method, operation in operations.items()
    }
    gets = ("/health", "/metrics", "/version", "/v1/models", "/v1/models/{model}")
    posts = ("/v1/chat/completions", "/v1/completions", "/v1/score_tokens")
    assert set(published) == {
        *(("get", path) for path in (*gets, "/tokenizer_info")),
        *(("post", path) for path in (*posts, "/tokenize", "/detokenize")),
    }
    assert all(statuses == {"200", "4XX", "5XX"} for statuses in published.values())


@pytest.mark.timeout(20 + CASES)
@pytest.mark.filterwarnings("default")  # of the generator's own libraries
@pytest.mark.parametrize("mode", list(GenerationMode))
def test_generated_requests_never_break_it(service, document, mode):
    """positive: valid by the document. negative: not."""
    schema = schemathesis.openapi.from_dict(document)
    before = chat(service, seed=1)["choices"]
    operations = [result.ok() for result in schema.get_all_operations()]
    if mode.is_negative:  # the others have nothing that could be wrong
        operations = [op for op in operations if op.method == "post"]
    statuses: list[int] = []
    with requests.Session() as session:
        session.trust_env = False
        for operation in operations:

            @hypothesis.settings(
                max_examples=max(1, CASES // 2 // len(operations)),
                suppress_health_check=list(hypothesis.HealthCheck),
                derandomize=CASES == 300,
                phases=[hypothesis.Phase.generate],
            )
            @hypothesis.given(operation.as_strategy(generation_mode=mode))
            def run(case):
                reply = case.call(base_url=str(service.base_url), session=session, timeout=60)
                assert reply.status_code < 500, (reply.status_code, case.as_curl_command())
                statuses.append(reply.status_code)

            run()
    assert {200} < set(statuses) if mode.is_positive else 400 in statuses
    assert chat(service, seed=1)["choices"] == before
