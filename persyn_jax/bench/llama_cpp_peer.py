"""The other stock peer of `sampling_speed`: llama.cpp, weights in float32, the rest as it comes.

    python llama_cpp_peer.py FILE.gguf        # of a Python that has llama-cpp-python

Speaks as `transformers_peer` does of the same tasks, and needs nothing of persyn_jax. It goes
through the binding's low-level functions, because the high-level class answers one sequence at a
time: all sequences of a batch decode together, and one that has all its tokens leaves the batch.
(Its cache is in float16 by default; with one in float32 it makes 0.6 times the tokens.)
"""

import contextlib
import ctypes
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

THREADS = 2


def main() -> None:
    import llama_cpp as llama  # pyrefly: ignore[missing-import]

    quiet = llama.llama_log_callback(lambda level, text, data: None)
    llama.llama_log_set(quiet, ctypes.c_void_p(0))
    llama.llama_backend_init()
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "float32.gguf")
        _write_float32(llama, sys.argv[1], path)
        settings = llama.llama_model_default_params()
        settings.n_gpu_layers, settings.use_mmap = 0, False  # the file is gone when this is killed
        model = llama.llama_model_load_from_file(path.encode(), settings)
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        task = json.loads(line)
        with _batch(llama, model, task) as batch:
            started = time.perf_counter()
            tokens = (score if task["kind"] == "score" else generate)(batch, task)
            seconds = time.perf_counter() - started
        print(json.dumps({"seconds": seconds, "tokens": tokens}), flush=True)


def generate(batch, task) -> int:
    """Static batches, greedy, in the order of the requests."""
    for first in range(0, len(task["prompts"]), task["batch"]):
        prompts = task["prompts"][first : first + task["batch"]]
        left = task["new_tokens"][first : first + task["batch"]]
        batch.clear()
        lengths = [len(prompt) for prompt in prompts]
        heads = batch.read(
            [
                (sequence, position, token, position == lengths[sequence] - 1)
                for sequence, prompt in enumerate(prompts)
                for position, token in enumerate(prompt)
            ]
        )
        running = range(len(prompts))
        for step in range(1, max(left)):
            chosen = dict(zip(running, heads.argmax(axis=1).tolist(), strict=True))
            running = [sequence for sequence in running if left[sequence] > step]
            heads = batch.read([(s, lengths[s] + step - 1, chosen[s], True) for s in running])
        heads.argmax(axis=1)
    return sum(task["new_tokens"])


def score(batch, task) -> int:
    """Log-probability of the second half of each row; logits for that half only."""
    rows = np.array(task["prompts"])
    B, T = rows.shape
    half = T // 2
    batch.clear()
    entries = [(b, t, int(rows[b, t]), t >= half - 1) for b in range(B) for t in range(T)]
    logits = batch.read(entries).reshape(B, T - half + 1, -1)
    for own, row in zip(logits[:, :-1], rows, strict=True):  # row by row: cache is what counts
        highest = own.max(axis=1)
        total = np.exp(own - highest[:, None]).sum(axis=1)
        own[np.arange(T - half), row[half:]] - highest - np.log(total)
    return rows.size


class Batch:
    """A context with room for a task, and the batch that feeds it."""

    def __init__(self, llama, context, batch, vocab):
        self._llama, self._context, self._batch, self._vocab = llama, context, batch, vocab

    def clear(self) -> None:
        llama = self._llama
        llama.llama_memory_clear(llama.llama_get_memory(self._context), True)

    def read(self, entries) -> np.ndarray:
        """Decodes (sequence, position, token, whether its logits count); those logits [n, V]."""
        llama, batch = self._llama, self._batch
        for i, (sequence, position, token, wanted) in enumerate(entries):
            batch.token[i], batch.pos[i], batch.logits[i] = token, position, wanted
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
        batch.n_tokens = len(entries)
        if status := llama.llama_decode(self._context, batch):
            raise RuntimeError(f"llama_decode: status {status}")
        counts = [i for i, entry in enumerate(entries) if entry[3]]
        pointers = [llama.llama_get_logits_ith(self._context, i) for i in counts]
        return np.stack([np.ctypeslib.as_array(one, shape=(self._vocab,)) for one in pointers])


@contextlib.contextmanager
def _batch(llama, model, task):
    together = min(task["batch"], len(task["prompts"]))
    new = task["new_tokens"] or [0] * len(task["prompts"])
    longest = max(len(prompt) for prompt in task["prompts"]) + max(new)
    settings = llama.llama_context_default_params()
    settings.n_seq_max = together
    settings.n_ctx = max(256, together * longest)
    settings.n_batch = max(512, together * longest)
    settings.n_threads = settings.n_threads_batch = THREADS
    settings.kv_unified = together == 1  # else each sequence has its own part of the cache
    context = llama.llama_init_from_model(model, settings)
    batch = llama.llama_batch_init(settings.n_batch, 0, 1)
    try:
        vocab = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
        yield Batch(llama, context, batch, vocab)
    finally:
        llama.llama_batch_free(batch)
        llama.llama_free(context)


def _write_float32(llama, source: str, target: str) -> None:
    """The same weights, each block expanded to the numbers that it stands for."""
    settings = llama.llama_model_quantize_default_params()
    settings.ftype = llama.LLAMA_FTYPE_ALL_F32
    settings.allow_requantize = True
    if llama.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(settings)):
        raise RuntimeError(f"llama.cpp does not read {source}")


if __name__ == "__main__":
    main()
