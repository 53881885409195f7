"""What a training run did with its time: tokens a second, the parts of a step, utilisation.

Plain functions over plain numbers; whoever takes the steps holds the clock's readings.
"""

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import jax

from persyn_jax.models import decoder
from persyn_jax.models.decoder import DecoderConfig

Part = Literal["input", "compute", "checkpoint"]
"""Of a step, as the host sees it. The exchange is inside `compute`: it is in the same program.
`checkpoint` is of the one since the step before."""

PEAK_FLOPS: dict[str, float] = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,  # v5e
    "TPU v5e": 197e12,
    "TPU v5": 459e12,  # v5p
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,  # v6e
    "TPU v6e": 918e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA H100 80GB HBM3": 989.4e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H200": 989.4e12,
    "NVIDIA L4": 121e12,
}
"""Published dense bfloat16 peak, FLOP/s, of what JAX calls `device_kind`."""


@contextlib.contextmanager
def timed(seconds: dict[Part, float], part: Part) -> Iterator[None]:
    """Adds the time that its body takes to `seconds[part]`.

    JAX returns before a device is done: the body must wait for what it measures.
    """
    started = time.perf_counter()
    try:
        yield
    finally:
        seconds[part] = seconds.get(part, 0.0) + time.perf_counter() - started


def training_flops(
    model: DecoderConfig,
    tokens: int,
    response_tokens: int,
    row_tokens: int,
    adapters: int | None = None,
) -> float:
    """Model FLOPs of fine-tuning on these tokens, forward and back.

    A token takes 6 N + 12 H E T a layer (PaLM, arXiv 2204.02311, appendix B): N is the parameters
    of the layers' matrices, T the tokens of a row, or of the window where it is shorter, with
    nothing off for causality. The head's 6 V D count for response tokens alone, as logits exist for
    these. Embedding, norms, recomputation and padding count nothing. adapters: parameters of LoRA
    adapters where these alone are trained: what is frozen takes 4 instead of 6, having no gradient.
    """
    shapes = jax.eval_shape(lambda: decoder.init(model, jax.random.key(0)))["layers"]
    matrices = sum(
        math.prod(leaf.shape)
        for path, leaf in jax.tree.leaves_with_path(shapes)
        if getattr(path[-1], "key", None) == "kernel"
    )
    local = model.local_layers or (model.window is not None,) * model.layers
    window = row_tokens if model.window is None else min(model.window, row_tokens)
    seen = sum(window if is_local else row_tokens for is_local in local)
    attention = 12 * model.heads * model.head_dim * seen
    each = 6 if adapters is None else 4
    head = each * model.vocab_size * model.d_model
    layers = each * matrices + 6 * (adapters or 0) + attention
    return float(tokens * layers + response_tokens * head)


def utilisation(flops: float, seconds: float, device_kind: str, devices: int) -> float | None:
    """Model FLOP utilisation: part of the devices' bfloat16 peak; None for an unknown device.

    The peak is bfloat16's also where a run computes in float32.
    """
    peak = PEAK_FLOPS.get(device_kind)
    return None if peak is None else flops / (seconds * devices * peak)


def speed_row(
    seconds: Mapping[Part, float],
    tokens: int,
    flops: float,
    device_kind: str,
    devices: int,
    exchange_seconds: float | None,
) -> dict[str, Any]:
    """The columns of a line of metrics.jsonl that tell how a step's time was spent.

    exchange_seconds: of an exchange on its own (`time_exchange`), or None. A compiler that overlaps
    the exchange with other work hides some of it, so its share is at most that; `compute_seconds`
    is what is left of the program, never below 0.
    """
    step = sum(seconds.values())
    program = seconds.get("compute", 0.0)
    exchange = None if exchange_seconds is None else min(exchange_seconds, program)
    return {
        "step_seconds": step,
        "input_seconds": seconds.get("input", 0.0),
        "compute_seconds": program - (exchange or 0.0),
        "exchange_seconds": exchange,
        "checkpoint_seconds": seconds.get("checkpoint", 0.0),
        "tokens_per_second": tokens / step if step else None,
        "utilisation": utilisation(flops, step, device_kind, devices) if step else None,
    }


def time_exchange(compiled: Callable[..., Any], *arguments: Any, repeats: int = 5) -> float:
    """Median seconds of `compiled(*arguments)`, after one call that is not counted.

    compiled: an exchange without donation, so that nothing is lost; it needs room for a second copy
    of the parameters for a moment.
    """
    jax.block_until_ready(compiled(*arguments))
    taken = []
    for _ in range(repeats):
        started = time.perf_counter()
        jax.block_until_ready(compiled(*arguments))
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)
