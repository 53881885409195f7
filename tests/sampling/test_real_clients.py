"""Clients as people use them, unmodified: the openai SDK and curl."""

import asyncio
import json
import socket
import subprocess

import openai
import pytest
from service_cases import QUESTION, chat, complete, service_config, serving

LONG = {"messages": QUESTION, "temperature": 0}


@pytest.fixture(scope="module")
def service():
    config = service_config(slots=1, cache_length=1024, max_waiting=0, max_body_bytes=100_000)
    with serving(config) as http:
        yield http


@pytest.fixture
def base_url(service) -> str:
    return str(service.base_url).rstrip("/") + "/v1"


@pytest.fixture
def sdk(base_url):
    with openai.OpenAI(base_url=base_url, api_key="none", max_retries=0) as client:
        yield client


def test_a_chat_completion(service, sdk):
    expected = chat(service, seed=3)
    found = sdk.chat.completions.create(model="tiny", messages=QUESTION, max_tokens=8, seed=3)
    assert found.choices[0].message.content == expected["choices"][0]["message"]["content"]
    assert found.choices[0].finish_reason == "length"
    assert found.usage.model_dump(exclude_none=True) == expected["usage"]
    assert found._request_id


def test_a_stream_with_usage(service, sdk):
    expected = chat(service, seed=3, max_tokens=30)
    chunks = list(
        sdk.chat.completions.create(
            model="tiny",
            messages=QUESTION,
            max_tokens=30,
            seed=3,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == expected["choices"][0]["message"]["content"]
    assert chunks[-1].usage.completion_tokens == expected["usage"]["completion_tokens"]
    assert len(chunks) > 4


def test_the_sdk_s_own_accumulating_stream(sdk):
    """It wants answers that end by themselves, or with a stop text."""
    asked = {"model": "tiny", "messages": QUESTION, "max_tokens": 12, "seed": 4}
    text = sdk.chat.completions.create(**asked).choices[0].message.content
    asked |= {"stop": text[6], "logprobs": True, "top_logprobs": 2}
    with sdk.chat.completions.stream(**asked) as stream:
        final = stream.get_final_completion().choices[0]
    whole = sdk.chat.completions.create(**asked).choices[0]
    assert final.message.content == whole.message.content == text.split(text[6])[0]
    assert final.logprobs.content == whole.logprobs.content
    assert final.finish_reason == "stop"


def test_logprobs_and_echo_of_completions(service, sdk):
    (choice,) = sdk.completions.create(
        model="tiny", prompt="abc", max_tokens=2, echo=True, logprobs=2, temperature=0
    ).choices
    (expected,) = complete(service, "abc", max_tokens=2, echo=True, logprobs=2, temperature=0)[
        "choices"
    ]
    assert choice.logprobs.model_dump() == expected["logprobs"]
    assert choice.logprobs.token_logprobs[0] is None
    streamed = sdk.completions.create(
        model="tiny", prompt="abc", max_tokens=2, echo=True, temperature=0, stream=True
    )
    assert "".join(chunk.choices[0].text for chunk in streamed) == choice.text


def test_models(sdk):
    assert [model.id for model in sdk.models.list()] == ["tiny"]
    assert sdk.models.retrieve("tiny").id == "tiny"


def test_many_at_once_and_a_stream_that_is_left(base_url, sdk):
    async def run() -> list[str]:
        async with openai.AsyncOpenAI(base_url=base_url, api_key="none", max_retries=20) as client:
            stream = await client.chat.completions.create(model="tiny", stream=True, **LONG)
            async for _ in stream:
                break
            await stream.close()
            replies = await asyncio.gather(
                *(
                    client.chat.completions.create(
                        model="tiny", messages=QUESTION, max_tokens=2, seed=seed
                    )
                    for seed in range(4)
                )
            )
            return [reply.choices[0].message.content for reply in replies]

    alone = [
        sdk.chat.completions.create(model="tiny", messages=QUESTION, max_tokens=2, seed=seed)
        for seed in range(4)
    ]
    assert asyncio.run(run()) == [reply.choices[0].message.content for reply in alone]


@pytest.mark.parametrize(
    ("body", "kind", "param"),
    [
        ({"temperature": -1}, openai.BadRequestError, "temperature"),
        ({"presence_penalty": 1}, openai.BadRequestError, "presence_penalty"),
        (
            {"messages": [{"role": "user", "content": "x" * 2000}]},
            openai.BadRequestError,
            "messages",
        ),
        ({"model": "other"}, openai.NotFoundError, "model"),
        ({"messages": [{"role": "user", "content": "x" * 200_000}]}, openai.APIStatusError, None),
    ],
)
def test_errors_have_their_classes(sdk, body, kind, param):
    with pytest.raises(kind) as caught:
        sdk.chat.completions.create(**({"model": "tiny", "messages": QUESTION} | body))
    assert caught.value.param == param
    assert caught.value.body["message"]


def test_a_full_service_is_a_rate_limit(sdk):
    stream = sdk.chat.completions.create(model="tiny", stream=True, n=1, **LONG)
    next(iter(stream))
    with pytest.raises(openai.RateLimitError) as caught:
        sdk.chat.completions.create(model="tiny", messages=QUESTION)
    assert caught.value.response.headers["retry-after"] == "1"
    stream.close()


def test_nobody_there_is_a_connection_error():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/v1"
        client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
        with client, pytest.raises(openai.APIConnectionError):
            client.models.list()


def curl(*arguments: str) -> str:
    """What it prints. The program has to be there."""
    ended = subprocess.run(
        ["curl", "-sS", "--noproxy", "*", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return ended.stdout


def test_curl(service, base_url):
    json_header = ("-H", "Content-Type: application/json")
    body = {"model": "tiny", "messages": QUESTION, "max_tokens": 8, "seed": 3}
    url = f"{base_url}/chat/completions"
    found = json.loads(curl(url, *json_header, "-d", json.dumps(body)))
    assert found["choices"] == chat(service, seed=3)["choices"]
    streamed = curl("-N", url, *json_header, "-d", json.dumps(body | {"stream": True}))
    assert streamed.endswith("data: [DONE]\n\n")
    refused = json.loads(curl(url, "-d", json.dumps(body)))  # no JSON, says its header
    assert "Content-Type: application/json" in refused["error"]["message"]


def test_curl_is_told_of_a_body_that_is_too_long_before_it_sends_it(base_url, tmp_path):
    (tmp_path / "body").write_bytes(b"x" * 3_000_000)
    arguments = ("-w", "%{http_code} %{size_upload}", "-o", "/dev/null")
    said = curl(*arguments, f"{base_url}/completions", "--data-binary", f"@{tmp_path / 'body'}")
    status, sent = said.split()
    assert status == "413"
    assert int(sent) < 3_000_000
