"""The stock peer of `sampling_speed` and `train_speed`: torch and transformers, as they come.

    python transformers_peer.py FOLDER        # of a Python that has torch and transformers

Reads one task a line on standard input (JSON, as `sampling_speed.Task`), answers each with one JSON
line `{"seconds": ..., "tokens": ...}`. Needs nothing of persyn_jax. A task of the kind `train` is a
step of full fine-tuning, and its answer holds the loss and the process's peak memory too.
"""

import json
import resource
import sys
import time


def main() -> None:
    import torch  # pyrefly: ignore[missing-import]
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(2)
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None  # everybody generates what was asked for
    model.generation_config.pad_token_id = 0
    print(json.dumps({"ready": True}), flush=True)
    trainer = None
    for line in sys.stdin:
        task = json.loads(line)
        if task["kind"] == "train":
            trainer = trainer or Trainer(model)
            print(json.dumps(trainer.step(task["rows"])), flush=True)
            continue
        started = time.perf_counter()
        with torch.inference_mode():
            tokens = score(model, task) if task["kind"] == "score" else generate(model, task)
        print(json.dumps({"seconds": time.perf_counter() - started, "tokens": tokens}), flush=True)


def generate(model, task) -> int:
    """Padded static batches, in the order of the requests. Counts the tokens asked for."""
    import torch  # pyrefly: ignore[missing-import]

    for first in range(0, len(task["prompts"]), task["batch"]):
        prompts = task["prompts"][first : first + task["batch"]]
        longest = max(len(prompt) for prompt in prompts)
        ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor(
            [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        )
        most = max(task["new_tokens"][first : first + task["batch"]])
        out = model.generate(
            input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=most
        )
        assert out.shape == (len(prompts), longest + most)
    return sum(task["new_tokens"])


def score(model, task) -> int:
    """Log-probability of the second half of each row; logits for that half only."""
    import torch  # pyrefly: ignore[missing-import]

    ids = torch.tensor(task["prompts"])
    half = ids.shape[1] // 2
    logits = model(input_ids=ids, use_cache=False, logits_to_keep=half + 1).logits[:, :-1]
    torch.log_softmax(logits.float(), -1).gather(-1, ids[:, half:, None])
    return ids.numel()


class Trainer:
    """Full fine-tuning with AdamW; every token but the first of a row is a target."""

    def __init__(self, model):
        import torch  # pyrefly: ignore[missing-import]

        self._model = model.train()
        self._optimiser = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.0)

    def step(self, rows) -> dict:
        import torch  # pyrefly: ignore[missing-import]

        started = time.perf_counter()
        ids = torch.tensor(rows)
        loss = self._model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        self._optimiser.step()
        self._optimiser.zero_grad(set_to_none=True)
        seconds = time.perf_counter() - started
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        value = float(loss.detach())
        return {"seconds": seconds, "tokens": ids.numel(), "loss": value, "peak_memory_gb": peak}


if __name__ == "__main__":
    main()
