"""Every mixing rule in plain NumPy, all workers in one array, written from the papers' equations.

The independent reference for `persyn_jax.gossip`: slow, in float64, and without a line in common
with it. A rule is `rule(x0_WD, updates_TWD, rounds, **hyper) -> {"params": [T, W, D], ...}`: what
the workers hold after each round, and what else the rule keeps. The updates are fixed in advance
and in the sense of optax (-lr * gradient, to be added).

In the equations x, y, u, theta, m and e are [W, D], a row a worker; alpha and w are [W]; A, J and
K are mixing matrices [W, W]. For all rules:

- A worker that is not present does nothing: it keeps what it has, and no edge of it counts.
- A worker without a step in this round (steps_W) has u = 0, and sends and receives as ever.
- A worker whose update is not finite, taken or not, has u = 0 and does not send: its outgoing edges
  are as if they were not there. It receives.
- `average`, the exact mean of those who may send, comes before the edges. The others keep what they
  have. All messages of a round leave before any arrives.
- `sync` is for rules with a centre and outer optimisers; the others go by `average` and the edges.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

Stacked = dict[str, np.ndarray]


@dataclass(frozen=True)
class OracleRound:
    """One round of a schedule; `edges` are (receiver, sender, weight), in the order of slots."""

    index: int
    sync: bool
    average: bool
    edges: list[tuple[int, int, float]]
    steps_W: np.ndarray
    present_W: np.ndarray


def stacked(rule: Callable[..., Iterator[Stacked]]) -> Callable[..., Stacked]:
    """Makes of a generator, one dict of arrays a round, a function that stacks them over T."""

    @functools.wraps(rule)
    def run(x0_WD, updates_TWD, rounds: list[OracleRound], **hyper: float) -> Stacked:
        rows = [
            {name: np.array(value) for name, value in row.items()}
            for row in rule(np.array(x0_WD, np.float64), updates_TWD, rounds, **hyper)
        ]
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

    return run


# --- Who steps, who sends, and the matrices of a round ---


def local_steps(updates_TWD, rounds: list[OracleRound]):
    """Yields (u_WD, sends_W, round): the local steps really taken, and who may send."""
    for update_WD, r in zip(updates_TWD, rounds, strict=True):
        sends_W = np.all(np.isfinite(update_WD), axis=1) & r.present_W
        yield np.where((sends_W & r.steps_W)[:, None], update_WD, 0.0), sends_W, r


def live_edges(r: OracleRound, sends_W) -> list[tuple[int, int, float]]:
    return [edge for edge in r.edges if r.present_W[edge[0]] and sends_W[edge[1]]]


def average_matrix(r: OracleRound, sends_W) -> np.ndarray:
    """J: those who may send get their mean; the identity for the others, and without `average`."""
    J_WW = np.eye(len(sends_W))
    if r.average and sends_W.any():
        J_WW[sends_W] = sends_W / sends_W.sum()
    return J_WW


def pull_edges(r: OracleRound, sends_W) -> np.ndarray:
    """A of x_i' = x_i + sum_j a_ij (x_j - x_i): rows sum to 1."""
    A_WW = np.eye(len(sends_W))
    for receiver, sender, weight in live_edges(r, sends_W):
        A_WW[receiver, sender] += weight
        A_WW[receiver, receiver] -= weight
    return A_WW


def push_edges(r: OracleRound, sends_W) -> np.ndarray:
    """K in which sender j gives i the share k_ij of all that it has: columns sum to 1."""
    K_WW = np.eye(len(sends_W))
    for receiver, sender, share in live_edges(r, sends_W):
        K_WW[receiver, sender] += share
        K_WW[sender, sender] -= share
    return K_WW


def pull_matrix(r: OracleRound, sends_W) -> np.ndarray:
    return pull_edges(r, sends_W) @ average_matrix(r, sends_W)


# --- Sum weights ---


@stacked
def gosgd(x, updates, rounds, unit=0.0):
    """Blot et al. 2016 (arXiv 1611.09726), Algorithms 1 and 2, where every share is 1/2.

    Local step, then push, then merge. "weights" holds alpha [T, W]. What is sent of it is rounded
    down to a multiple of `unit`, if there is one. `average` is the mean weighted by alpha, which
    stays as it is: so it conserves mass.
    """
    alpha = np.full(len(x), 1 / len(x))
    for u, sends, r in local_steps(updates, rounds):
        x = x + u
        if r.average and sends.any():
            x[sends] = alpha[sends] @ x[sends] / alpha[sends].sum()
        messages = [
            (i, j, rounded_down(share * alpha[j], unit), x[j].copy())
            for i, j, share in live_edges(r, sends)
        ]
        for _, j, alpha_j, _ in messages:
            alpha[j] = alpha[j] - alpha_j
        for i, _, alpha_j, x_j in messages:
            x[i] = alpha_j / (alpha[i] + alpha_j) * x_j + alpha[i] / (alpha[i] + alpha_j) * x[i]
            alpha[i] = alpha_j + alpha[i]
        yield {"params": x, "weights": alpha}


def rounded_down(weight: float, unit: float) -> float:
    return np.floor(weight / unit) * unit if unit else weight


@stacked
def push_sum(x, updates, rounds):
    """SGP, Assran et al. 2019 (arXiv 1811.10792), Algorithm 1.

    "params" are the numerators x, "weights" w [T, W]; gradients are taken at z = x / w.
    """
    w = np.ones(len(x))
    for u, sends, r in local_steps(updates, rounds):
        K = push_edges(r, sends) @ average_matrix(r, sends)
        x = K @ (x + u)
        w = K @ w
        yield {"params": x, "weights": w}


# --- Averaging ---


@stacked
def d_psgd(x, updates, rounds):
    """Lian et al. 2017 (arXiv 1705.09056), adapt then combine: x' = A (x + u)."""
    for u, sends, r in local_steps(updates, rounds):
        x = pull_matrix(r, sends) @ (x + u)
        yield {"params": x}


@stacked
def d_psgd_before(x, updates, rounds):
    """Lian et al. 2017, Algorithm 1, combine then adapt: x' = A x + u.

    The message was on its way before the update was known: it goes out even if that is not finite.
    """
    for u, _, r in local_steps(updates, rounds):
        x = pull_matrix(r, r.present_W) @ x + u
        yield {"params": x}


@stacked
def d_psgd_delayed(x, updates, rounds, k):
    """D-PSGD whose correction was computed k rounds ago: x' = x + u + (A x_{t-k} - x_{t-k}).

    x_s is what the workers held before round s, and x_s = x_0 for s < 0.
    """
    before = [x]
    for t, (u, _, r) in enumerate(local_steps(updates, rounds)):
        old = before[max(t - k, 0)]
        x = x + u + (pull_matrix(r, r.present_W) @ old - old)
        before.append(x)
        yield {"params": x}


@stacked
def d_psgd_int8(x, updates, rounds):
    """DeepSqueeze, Tang et al. 2019 (arXiv 1907.07346), with Q of int8: m = Q(x + u + e).

    An `average` is exact and comes first; in such a round m = Q(y), and e ("residual") waits. It
    moves only in rounds that have edges, and only for workers that are present.
    """
    e = np.zeros_like(x)
    for u, sends, r in local_steps(updates, rounds):
        y = average_matrix(r, sends) @ (x + u)
        m = quantised(y if r.average else y + e)
        x = y + (pull_edges(r, sends) @ m - m)
        if r.edges and not r.average:
            e = np.where(r.present_W[:, None], y + e - m, e)
        yield {"params": x, "residual": e}


def quantised(x_WD) -> np.ndarray:
    """What is left of each row after int8: float32 scale max|row| / 127, round half to even."""
    scale_W1 = np.float32(np.abs(x_WD).max(axis=1, keepdims=True) / 127).astype(np.float64)
    codes_WD = np.rint(x_WD / np.where(scale_W1 > 0, scale_W1, 1.0))
    return np.clip(codes_WD, -127, 127) * scale_W1


@stacked
def levanter_pull(x, updates, rounds, m):
    """levanter's peer averaging: x_i' = (1 - m) x_i + m mean(x_j that i got), after the step.

    A positive weight says who is read, not how much.
    """
    for u, sends, r in local_steps(updates, rounds):
        y = average_matrix(r, sends) @ (x + u)
        x = y.copy()
        for i in range(len(x)):
            got = [y[j] for receiver, j, weight in live_edges(r, sends) if receiver == i and weight]
            if got:
                x[i] = (1 - m) * y[i] + m * np.mean(got, axis=0)
        yield {"params": x}


@stacked
def d2(x, updates, rounds):
    """D2, Tang et al. 2018 (arXiv 1803.07068), Algorithm 1:

    x_1 = A (x_0 + u_0), x_{t+1} = A (2 x_t - x_{t-1} + u_t - u_{t-1}).

    For a worker that was not there, t - 1 is the last round in which it was.
    """
    x_before, u_before = x, np.zeros_like(x)
    for u, sends, r in local_steps(updates, rounds):
        present = r.present_W[:, None]
        moved = pull_matrix(r, sends) @ (2 * x - x_before + u - u_before)
        x_before, u_before = np.where(present, x, x_before), np.where(present, u, u_before)
        x = np.where(present, moved, x)
        yield {"params": x}


# --- Baselines without an exchange of their own, and those with a centre ---


@stacked
def all_reduce(x, updates, rounds):
    """Synchronous SGD: everyone present moves by the mean of the steps taken, in every round."""
    for u, sends, r in local_steps(updates, rounds):
        steps = sends & r.steps_W
        if steps.any():
            x = x + r.present_W[:, None] * u[steps].mean(axis=0)
        yield {"params": x}


@stacked
def no_mixing(x, updates, rounds):
    """Every worker alone."""
    for u, _, _ in local_steps(updates, rounds):
        x = x + u
        yield {"params": x}


@stacked
def easgd(x, updates, rounds, moving_rate):
    """Zhang, Choromanska and LeCun 2015 (arXiv 1412.6651), synchronous; elastic in `sync` rounds.

    The centre ("centre", [T, D]) starts at the mean of x0. Local step first, then centre and
    workers move by the same differences. Who may not send is not pulled either.
    """
    c = x.mean(axis=0)
    for u, sends, r in local_steps(updates, rounds):
        x = x + u
        if r.sync:
            d = moving_rate * sends[:, None] * (x - c)
            x = x - d
            c = c + d.sum(axis=0)
        yield {"params": x, "centre": c}


@stacked
def downpour(x, updates, rounds):
    """Dean et al. 2012, Downpour SGD in its synchronous form; push and fetch if `sync`.

    The centre ("centre", [T, D]) starts at the mean of x0. Who may not send neither pushes nor
    fetches, so its progress waits for the next push.
    """
    c, fetched = x.mean(axis=0), x
    for u, sends, r in local_steps(updates, rounds):
        x = x + u
        if r.sync:
            c = c + (x - fetched)[sends].sum(axis=0)
            x = np.where(sends[:, None], c, x)
            fetched = np.where(sends[:, None], c, fetched)
        yield {"params": x, "centre": c}


# --- Outer optimisers ---


def outer_rounds(x, updates, rounds, state, step):
    """Local steps in every round; in rounds with `sync` those present do an outer one.

    `step(A, y, theta, ...) -> theta', ...` with y the workers' parameters after their local steps,
    A the pull matrix, theta the parameters after the last outer step. x' = theta'.
    """
    for u, sends, r in local_steps(updates, rounds):
        x = x + u
        if r.sync:
            present = r.present_W[:, None]
            new = step(pull_matrix(r, sends), x, *state)
            state = [np.where(present, n, old) for n, old in zip(new, state, strict=True)]
            x = np.where(present, state[0], x)
        yield {"params": x}


@stacked
def slowmo(x, updates, rounds, beta, lr, inner_lr):
    """Wang et al. 2020 (arXiv 1910.00643), Algorithm 1."""

    def step(A, y, theta, m):
        m = beta * m + (theta - A @ y) / inner_lr
        return theta - lr * inner_lr * m, m

    return outer_rounds(x, updates, rounds, (x, np.zeros_like(x)), step)


@stacked
def diloco(x, updates, rounds, lr, momentum):
    """Douillard et al. 2023 (arXiv 2311.08105), Algorithm 1; Nesterov SGD of PyTorch and optax."""

    def step(A, y, theta, m):
        delta = theta - A @ y
        m = momentum * m + delta
        return theta - lr * (delta + momentum * m), m

    return outer_rounds(x, updates, rounds, (x, np.zeros_like(x)), step)


@stacked
def noloco(x, updates, rounds, beta, alpha_lr):
    """Kolehmainen et al. 2025 (arXiv 2506.10911), as in its code: one rate for both terms."""

    def step(A, y, theta, m):
        delta = y - theta
        m = beta * m + alpha_lr * (A @ delta) + alpha_lr * (A @ theta - theta)
        return theta + m, m

    return outer_rounds(x, updates, rounds, (x, np.zeros_like(x)), step)


@stacked
def gasloc(x, updates, rounds, gamma):
    """Cagnasso et al. 2026 (arXiv 2606.11081) with outer rate 1, y_before = theta_0 at first."""

    def step(A, y, theta, y_before):
        return A @ y + gamma * (y - y_before), y

    return outer_rounds(x, updates, rounds, (x, x), step)
