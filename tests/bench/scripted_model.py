"""A language model of a few lines, whose probabilities are exact, behind an OpenAI-compatible
server that can be told to make one mistake.

Its tokens are bytes and pieces of up to three bytes. What comes next depends on the four bytes
before: pieces that followed them in a little text are likely, and the rest is noise.
"""

import contextlib
import functools
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np

from persyn_jax.bench.endpoint_logprobs import PAIRS

END = "</s>"
TEXTS = [
    *(prompt + sensible for prompt, sensible, _ in PAIRS),
    "Question: What is two plus two?\nAnswer: It is exactly four." + END,
    "user: x\nassistant: Hello there, how are you today?" + END,
    "The capital of France is the big old city of Paris." + END,
    "Repeat: äöü ß é ñ — 日本語 한국어 🙂🚀\nÄÖ 日本語 🙂🚀 é." + END,
    "Emoji: 😀😃😄😁😆🙂🚀日本語" + END,
    "日本の首都は東京です🙂" + END,
]
CONTEXT = 4
FOLLOWS = 6.0
"""Added to the logit of what followed in the texts; the noise has standard deviation 1."""


def _pieces() -> list[bytes]:
    words = {word for text in TEXTS for word in text.removesuffix(END).split(" ")}
    pieces = {
        part
        for word in words
        if word.isascii()
        for n in range(0, len(word) + 1, 3)
        if len(part := f" {word}"[n : n + 3].encode()) > 1
    }
    return [bytes([n]) for n in range(256)] + sorted(pieces)


PIECES = _pieces()
IDS = {piece: number for number, piece in enumerate(PIECES)}
EOS = len(PIECES)


def encode(text: str) -> list[int]:
    """Longest pieces first."""
    data, ids = text.encode(), []
    while data:
        piece = next(data[:n] for n in (3, 2, 1) if data[:n] in IDS)
        ids.append(IDS[piece])
        data = data[len(piece) :]
    return ids


def to_bytes(ids: list[int]) -> bytes:
    return b"".join(PIECES[i] for i in ids if i != EOS)


def decode(ids: list[int]) -> str:
    return to_bytes(ids).decode(errors="replace")


def _followers() -> dict[bytes, set[int]]:
    followers: dict[bytes, set[int]] = {}
    for text in TEXTS:
        ids = encode(text.removesuffix(END)) + [EOS] * text.endswith(END)
        for place in range(1, len(ids)):
            followers.setdefault(to_bytes(ids[:place])[-CONTEXT:], set()).add(ids[place])
    return followers


FOLLOWERS = _followers()


@functools.cache
def log_probabilities(context: bytes) -> np.ndarray:
    """float64[V] of the next token after these last bytes."""
    logits = np.random.default_rng([len(context), *context]).normal(size=EOS + 1)
    logits[list(FOLLOWERS.get(context, ()))] += FOLLOWS
    return logits - np.log(np.exp(logits).sum())


class BadRequestError(Exception):
    """400, or another status."""

    def __init__(self, message: str, status: int = 400):
        super().__init__(message)
        self.status = status


class Model:
    """The answers. `fault` is the one mistake that is made; `without` what is not offered."""

    def __init__(self, fault: str | None, without: tuple[str, ...]):
        self.fault = fault
        self.without = without
        self.lock = threading.Lock()
        self.under_way = 0
        self.read: list[bytes] = []
        """Long prompts, which a prefix cache keeps."""

    def next_row(self, ids: list[int], salt: bytes) -> np.ndarray:
        context = to_bytes(ids[-CONTEXT - 1 :])[-CONTEXT:]  # one of them may be the end
        return log_probabilities(context + salt if salt else context)

    def salt(self, ids: list[int]) -> bytes:
        """What a faulty server's answers depend on besides the prompt: empty for a sound one."""
        prompt = to_bytes(ids)
        with self.lock:
            under_way, read = self.under_way, list(self.read)
            if len(prompt) > 500:
                self.read.append(prompt)
        if self.fault == "prefix cache" and any(
            other[:500] == prompt[:500] and other[-20:] != prompt[-20:] for other in read
        ):
            return b"stale"
        if self.fault == "random weights":
            return b"random"
        return b"crowd" if self.fault == "batch" and under_way > 1 else b""

    def answer(self, ids: list[int], body: dict, salt: bytes) -> tuple[list[int], str, str]:
        """(generated ids, text, finish reason)."""
        new: list[int] = []
        stops = [body["stop"]] if isinstance(body.get("stop"), str) else body.get("stop") or []
        seed = {"seed": time.time_ns(), "one seed": 0}.get(self.fault, body.get("seed", 0))
        bias = {} if self.fault == "logit_bias ignored" else body.get("logit_bias") or {}
        for place in range(body.get("max_tokens", 16)):
            row = self.next_row(ids + new, salt)
            if bias:
                row = row.copy()
                row[[int(token) for token in bias]] += list(bias.values())
            if body.get("temperature", 1):
                row = row + np.random.default_rng([seed, place]).gumbel(size=len(row))
            new.append(int(row.argmax()))
            text = decode(new)
            if new[-1] == EOS:
                return new, text + (END if self.fault == "end shown" else ""), "stop"
            for stop in stops:
                found = text.find(stop)
                if self.fault == "stop at tokens" and text[: max(found, 0)] not in [
                    decode(new[:n]) for n in range(len(new))
                ]:
                    continue
                if found >= 0:
                    return new, text[:found], "stop"
        return new, decode(new), "length"

    def logprobs(self, ids: list[int], start: int, salt: bytes) -> dict[str, Any]:
        """The `logprobs` of the tokens from `start` on; the first of all has none."""
        places = range(max(start, 1), len(ids))
        rows = [self.next_row(ids[:place], salt) for place in places]
        values = [float(row[ids[place]]) for row, place in zip(rows, places, strict=True)]
        tops = [{self.name(int(row.argmax())): float(row.max())} for row in rows]
        for top, value, place in zip(tops, values, places, strict=True):
            name = self.name(ids[place])
            top[name] = max(value, top.get(name, value))
        if self.fault == "constant":
            values, tops = [-1.0] * len(values), [dict.fromkeys(top, -1.0) for top in tops]
        if self.fault == "rounded top":
            tops = [{name: round(value, 3) for name, value in top.items()} for top in tops]
        if start == 0:
            if self.fault == "early":
                values, tops = values[1:] + values[-1:], tops[1:] + tops[-1:]
            if self.fault == "late":
                values, tops = values[:1] + values[:-1], tops[:1] + tops[:-1]
            if self.fault == "permuted":
                order = np.random.default_rng(len(ids)).permutation(len(values) - 1)
                values[:-1], tops[:-1] = [values[n] for n in order], [tops[n] for n in order]
            values, tops = [None, *values], [None, *tops]
        return {
            "tokens": [self.name(i) for i in ids[start:]],
            "token_logprobs": values,
            "top_logprobs": tops,
        }

    def name(self, token: int) -> str:
        return END if token == EOS else PIECES[token].decode(errors="replace")

    def check(self, body: dict, chat: bool) -> None:
        if body.get("model") != "tiny" and self.fault != "any model":
            raise BadRequestError("no such model", 404)
        prompt = body.get("messages" if chat else "prompt")
        if not isinstance(prompt, list if chat else (str, list)):
            raise BadRequestError("the prompt is of the wrong kind")
        if not isinstance(body.get("temperature", 1), int | float):
            raise BadRequestError("temperature must be a number", self.fault_status())
        if body.get("max_tokens", 16) < (0 if body.get("echo") else 1):
            raise BadRequestError("max_tokens must be at least 1")
        for name in self.without:
            if body.get(name):
                raise BadRequestError(f"{name} is not offered")

    def fault_status(self) -> int:
        return 500 if self.fault == "crash" else 400

    def complete(self, body: dict, chat: bool) -> tuple[dict, list[int]]:
        """(response body, generated ids)."""
        self.check(body, chat)
        if chat:
            prompt = encode(f"user: {body['messages'][-1]['content']}\nassistant:")
        else:
            prompt = body["prompt"] if isinstance(body["prompt"], list) else encode(body["prompt"])
        salt = self.salt(prompt)
        new, text, finish = self.answer(prompt, body, salt)
        choice: dict[str, Any] = {"index": 0, "finish_reason": finish}
        echo = body.get("echo") and self.fault != "echo ignored"
        if body.get("logprobs") and not (echo and self.fault == "no logprobs"):
            scored = prompt + new
            if echo and self.fault == "end not counted" and new[-1:] == [EOS]:
                scored = scored[:-1]
            choice["logprobs"] = self.logprobs(scored, 0 if echo else len(prompt), salt)
        if body.get("return_token_ids"):
            choice["token_ids"] = new
        if chat:
            choice["message"] = {"role": "assistant", "content": text}
        else:
            choice["text"] = (decode(prompt) if echo else "") + text
        count = len(new) + 5 * (self.fault == "usage")
        usage = {
            "prompt_tokens": len(prompt),
            "completion_tokens": count,
            "total_tokens": len(prompt) + count,
        }
        choices = [choice] * (1 if self.fault == "n ignored" else body.get("n", 1))
        return {"choices": choices, "usage": usage}, new

    def chunks(self, body: dict, chat: bool) -> Iterator[str]:
        """The payloads of a streamed answer: a chunk for each token that completes a character."""
        whole, new = self.complete(body, chat)
        choice = whole["choices"][0]
        text = choice["message"]["content"] if chat else choice["text"]
        shown = ""
        for n in range(1, len(new) + 1):
            piece = decode(new[n - 1 : n])
            if self.fault != "characters split":
                now = decode(new[:n])
                if now.endswith("\ufffd") and n < len(new):
                    continue
                piece, shown = now[len(shown) :], now
            yield self.chunk(piece, chat)
        if self.fault == "end shown" and text.endswith(END):
            yield self.chunk(END, chat)
        assert self.fault or shown == text
        if body.get("stream_options", {}).get("include_usage") and self.fault != "no usage":
            yield json.dumps({"choices": [], "usage": whole["usage"]})
        if self.fault != "no done":
            yield "[DONE]"

    def chunk(self, piece: str, chat: bool) -> str:
        delta = {"delta": {"content": piece}} if chat else {"text": piece}
        return json.dumps({"choices": [{"index": 0, **delta}]})


@contextlib.contextmanager
def serving(fault: str | bytes | None = None, without: tuple[str, ...] = ()) -> Iterator[str]:
    """Serves on a free port until the end of the block; yields the base URL.

    fault: as of `Model`, or a body to answer everything with.
    """
    model = Model(None if isinstance(fault, bytes) else fault, without)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = -1  # headers and body in one packet

        def do_GET(self):
            self.send(200, json.dumps({"data": [{"id": "tiny"}]}).encode())

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with model.lock:
                model.under_way += 1
            if fault == "batch":
                time.sleep(0.01)  # so that the others are seen
            try:
                self.reply(body)
            except BadRequestError as error:
                self.send(error.status, json.dumps({"error": {"message": str(error)}}).encode())
            finally:
                with model.lock:
                    model.under_way -= 1

        def reply(self, body):
            if self.path == "/tokenize" and "token ids" not in without:
                self.send(200, json.dumps({"tokens": encode(body["prompt"])}).encode())
            elif self.path.removeprefix("/v1/") not in {"chat/completions", "completions"} - {
                *without
            }:
                raise BadRequestError("not found", 404)
            elif body.get("stream"):
                lines = model.chunks(body, "chat" in self.path)
                self.send(200, "".join(f"data: {line}\n\n" for line in lines).encode())
            else:
                self.send(200, json.dumps(model.complete(body, "chat" in self.path)[0]).encode())

        def send(self, status: int, data: bytes):
            data = fault if isinstance(fault, bytes) else data
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_):
            pass

    class Http(ThreadingHTTPServer):
        daemon_threads = True

    with Http(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}/v1"
        finally:
            server.shutdown()
            thread.join()
