"""Drives the sampling service with lm-eval, unmodified, and compares what it logs.

python .ci/check_lm_eval.py --lm-eval PATH    PATH is the `lm_eval` command of an environment that
                                              has `lm-eval[api]`; exits with 1 if anything differs

The service serves the tiny random model. Log-likelihoods through `local-completions` must equal
in-process scoring, and answers through `local-chat-completions` those that a plain request gets.
The task files of this project are run on rows of its own, against an endpoint that says what a
question tells it to: the scores are known.
"""

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from persyn_jax import mesh as meshes
from persyn_jax.models import weights
from persyn_jax.models.rows import Conversation
from persyn_jax.models.spec import ModelConfig
from persyn_jax.sampling.config import EngineConfig, ServiceConfig
from persyn_jax.sampling.process import running_service
from persyn_jax.sampling.scoring import mean_log_likelihoods

ROOT = Path(__file__).parents[1]
TASKS = ROOT / "tests" / "sampling" / "lm_eval_client"
OWN_TASKS = ROOT / "persyn_jax" / "evaluation" / "tasks"
MODEL = ModelConfig(weights="random:tiny")
CACHE_LENGTH = 256
TOLERANCE = 1e-4  # nats, of a whole answer
SERVICE = ServiceConfig(
    model=MODEL,
    name="tiny",
    engine=EngineConfig(slots=4, cache_length=CACHE_LENGTH, prefill_rows=4, prefix_blocks=32),
)
# task -> (what an answer says, the reference, the column of the score, the score)
SCORED = {
    "svamp_local": [
        ("3 and 2 make 5.", "5.0", "exact_match", 1.0),
        ("It is $1,200", "1200", "exact_match", 1.0),
        ("12, or rather 13", "12", "exact_match", 0.0),
        ("none", "0", "exact_match", 0.0),
    ],
    "livebench_local": [
        ("So: **yes, no, yes**", "yes, no, yes", "score", 1.0),
        ("**yes, yes, yes**", "yes, no, yes", "score", 0.0),
    ],
}


def run_lm_eval(
    command: Path, task: str, model: str, arguments: str, *more: str, tasks: Path = TASKS
) -> list[dict]:
    """The logged samples of one of the `tasks`; lm-eval sees no model hub and keeps nothing."""
    with tempfile.TemporaryDirectory() as folder:
        found = subprocess.run(
            [
                *(command, "--model", model, "--model_args", arguments, "--tasks", task),
                *("--include_path", tasks, "--log_samples", "--output_path", folder, *more),
            ],
            cwd=tasks,
            env=os.environ
            | {"HF_HUB_OFFLINE": "1", "HF_HOME": f"{folder}/home", "NO_PROXY": "127.0.0.1"},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert found.returncode == 0, f"lm_eval ended with {found.returncode}:\n{found.stderr}"
        (samples,) = Path(folder).rglob(f"samples_{task}_*.jsonl")
        return [json.loads(line) for line in samples.read_text("utf-8").splitlines()]


def questions_and_answers(samples: list[dict]) -> Iterator[tuple[Any, Any, Any]]:
    """(first argument, second argument, the model's reply) of every request of every sample."""
    for sample in samples:
        requests = sample["arguments"].values()
        for request, (reply,) in zip(requests, sample["resps"], strict=True):
            yield request["arg_0"], request["arg_1"], reply


def check_log_likelihoods(command: Path, base_url: str) -> str:
    """One line on what was compared. Raises AssertionError."""
    samples = run_lm_eval(
        command,
        "persyn_choice",
        "local-completions",
        f"model=tiny,base_url={base_url}/completions,tokenizer_backend=remote,"
        f"tokenized_requests=True,max_length={CACHE_LENGTH - 1},num_concurrent=4",
        "--batch_size=4",
    )
    documents = (TASKS / "choice.jsonl").read_text("utf-8").splitlines()
    expected_pairs = sorted(
        (document["question"], f" {choice}")
        for document in map(json.loads, documents)
        for choice in document["choices"]
    )
    asked = list(questions_and_answers(samples))
    assert sorted((context, answer) for context, answer, _ in asked) == expected_pairs

    model = weights.load(MODEL)
    conversations = []
    for context, answer, _ in asked:
        prompt, whole = model.tokenizer([context, context + answer])["input_ids"]
        assert whole[: len(prompt)] == prompt
        conversations.append(Conversation(tuple(prompt), tuple(whole[len(prompt) :])))
    means = mean_log_likelihoods(model, conversations, meshes.make_mesh(1))
    worst = 0.0
    for mean, conversation, (context, answer, (found, _)) in zip(
        means, conversations, asked, strict=True
    ):
        expected = mean * len(conversation.response)
        difference = abs(float(found) - expected)
        assert difference <= TOLERANCE, f"{context!r}, {answer!r}: {found} for {expected:.6f}"
        worst = max(worst, difference)
    return f"{len(asked)} log-likelihoods, worst difference {worst:.1e} nats"


def check_chat(command: Path, base_url: str) -> str:
    """One line on what was compared. Raises AssertionError."""
    url = f"{base_url}/chat/completions"
    samples = run_lm_eval(
        command,
        "persyn_chat",
        "local-chat-completions",
        f"model=tiny,base_url={url},num_concurrent=4",
        "--apply_chat_template",
    )
    questions = [
        json.loads(line)["question"]
        for line in (TASKS / "chat.jsonl").read_text("utf-8").splitlines()
    ]
    asked, texts, stopped = [], set(), 0
    for rendered, generation, reply in questions_and_answers(samples):
        (turn,) = json.loads(rendered[0])
        asked.append(turn["content"])
        plain = {
            "model": "tiny",
            "messages": [{"role": "user", "content": turn["content"]}],
            "max_tokens": generation["max_gen_toks"],
            "stop": generation["until"],
            "temperature": 0,
        }
        choice = post(url, plain)["choices"][0]
        expected = choice["message"]["content"]
        assert reply == expected, f"{turn}: lm-eval got {reply!r}, a plain request {expected!r}"
        texts.add(reply)
        stopped += choice["finish_reason"] == "stop"
    assert sorted(asked) == sorted(questions), f"asked were {asked}"
    assert len(texts) > 1, "all answers are the same, which shows nothing"
    assert stopped, "no answer met a stop text, which shows nothing about them"
    return f"{len(samples)} chat answers, {len(texts)} different, {stopped} ended by a stop text"


class Echo(BaseHTTPRequestHandler):
    """A chat completion of what stands between << and >> in the last message."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        said = body["messages"][-1]["content"].partition("<<")[2].partition(">>")[0]
        choice = {"index": 0, "message": {"role": "assistant", "content": said}}
        reply = json.dumps({"choices": [choice | {"finish_reason": "stop"}]}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)

    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def echo() -> Iterator[str]:
    """The base URL of an `Echo`."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Echo) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/v1"
        server.shutdown()


def check_own_tasks(command: Path) -> str:
    """One line on what was scored. Raises AssertionError."""
    with tempfile.TemporaryDirectory() as place, echo() as base_url:
        tasks = Path(place) / "tasks"
        shutil.copytree(OWN_TASKS, tasks)
        for task, rows in SCORED.items():
            lines = [
                {
                    **{"Body": f"Say <<{said}>>.", "Question": "What?", "Answer": reference},
                    **{"task": "web_of_lies_v2", "turns": [f"Say <<{said}>>."]},
                    "ground_truth": reference,
                }
                for said, reference, _, _ in rows
            ]
            text = "".join(json.dumps(line) + "\n" for line in lines)
            (tasks / f"{task}.jsonl").write_text(text, "utf-8")
            samples = run_lm_eval(
                command,
                task,
                "local-chat-completions",
                f"model=echo,base_url={base_url}/chat/completions",
                "--apply_chat_template",
                tasks=tasks,
            )
            found = {sample["doc_id"]: sample for sample in samples}
            for number, (said, reference, column, score) in enumerate(rows):
                got = found[number][column]
                assert got == score, f"{task}: {said!r} for {reference!r} scored {got}, not {score}"
    return f"tasks of its own: {', '.join(SCORED)}, scored as they say"


def post(url: str, body: dict[str, Any]) -> dict[str, Any]:
    request = urllib.request.Request(
        url, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request) as reply:
        return json.loads(reply.read())


def main() -> int:
    parser = argparse.ArgumentParser(description="lm-eval as a client of the sampling service.")
    parser.add_argument("--lm-eval", type=Path, required=True, help="the lm_eval command")
    command = parser.parse_args().lm_eval.absolute()
    meshes.start_platform("cpu", host_devices=1)
    with running_service(SERVICE, "cpu") as base_url:
        checks = {
            "check_log_likelihoods": lambda: check_log_likelihoods(command, base_url),
            "check_chat": lambda: check_chat(command, base_url),
            "check_own_tasks": lambda: check_own_tasks(command),
        }
        for name, check in checks.items():
            try:
                print(check())
            except AssertionError as error:
                print(f"{name}: {error}", file=sys.stderr)
                return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
