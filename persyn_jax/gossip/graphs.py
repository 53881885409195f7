"""Schedules from what a user has: permutations, a networkx graph, mixing matrices.

A slot carries one permutation of the workers, so a matrix is cut into slots as a bipartite graph of
senders and receivers is coloured: as many slots as the most messages that one worker sends or gets.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from persyn_jax.gossip.banks import Bank, bank_of
from persyn_jax.gossip.schedules import Rows, Schedule, cycle

if TYPE_CHECKING:
    import networkx

SUM_TOLERANCE = 1e-6
"""How far from 1 the sum of a given row may be. A worker's weight for itself is made to fit."""


def from_permutations(
    permutations: Sequence[Sequence[int] | np.ndarray] | np.ndarray,
    rounds: int,
    weight: float = 0.5,
) -> Schedule:
    """One permutation after the other, over and over; worker w sends to `permutations[t][w]`.

    Every message has the same weight. Doubly stochastic; symmetric if each permutation is its own
    inverse. A fixed point neither sends nor receives.
    Raises ValueError: no permutation, one that is none, a weight outside [0, 1].
    """
    if not len(permutations):
        raise ValueError("permutations: at least one is needed, got none")
    workers = len(permutations[0])
    for index, receivers_W in enumerate(permutations):
        if not workers or sorted(receivers_W) != list(range(workers)):
            raise ValueError(
                f"permutations: number {index} must permute {workers} workers, got {receivers_W}"
            )
    return cycle(*permutation_rows(np.array(permutations)[:, None, :], weight), rounds)


def from_networkx(graph: "networkx.Graph", rounds: int, weights: str = "metropolis") -> Schedule:
    """All edges of a graph in every round. Its nodes are the workers, 0 to W - 1.

    An edge (u, v) of a directed graph is a message from u to v, one of an undirected graph is a
    message each way. Self-loops mean nothing: what the messages leave is a worker's own weight.

    weights: the edge attribute that holds the weights; or "metropolis", 1 / (1 + the greater of the
    receiver's in-degree and the sender's out-degree), which suits averaging and sum-weight rules
    alike, and is symmetric and doubly stochastic if the graph is undirected.

    Raises ValueError: other nodes, a multigraph, an edge without the attribute, weights that
    `from_matrices` refuses.
    """
    workers = graph.number_of_nodes()
    if set(graph) != set(range(workers)):
        raise ValueError(
            f"graph: nodes must be the numbers 0 to {workers - 1}, got {list(graph)[:5]}..."
            " (networkx.convert_node_labels_to_integers makes them so)"
        )
    if graph.is_multigraph():
        raise ValueError("graph: parallel edges are not allowed, got a multigraph")
    directed = graph.to_directed()
    flow_WW = np.zeros((workers, workers))
    if weights == "metropolis":
        for sender, receiver in directed.edges:
            flow_WW[receiver, sender] = sender != receiver
        flow_WW /= 1 + np.maximum.outer(flow_WW.sum(axis=1), flow_WW.sum(axis=0))
    else:
        for sender, receiver, weight in directed.edges(data=weights):
            if weight is None:
                raise ValueError(f"graph: edge ({sender}, {receiver}) has no attribute {weights!r}")
            flow_WW[receiver, sender] = weight if sender != receiver else 0
    total_W = flow_WW.sum(axis=1)
    if (total_W > 1 + SUM_TOLERANCE).any():
        worker = int(total_W.argmax())
        raise ValueError(
            f"graph: the weights that a worker gets must total at most 1, got {total_W[worker]:.6g}"
            f" for worker {worker}"
        )
    return from_matrices([flow_WW + np.diag(np.maximum(1 - total_W, 0))], rounds)


def from_matrices(matrices: Sequence[np.ndarray], rounds: int) -> Schedule:
    """One mixing matrix [W, W] after the other, over and over: x <- W x, rows sum to 1.

    Entry [i, j] is the weight of the message from j to i, and `Schedule.pull_matrix` gives the
    matrix back. A round takes as many slots as the most messages that one worker sends or gets in
    it, which is the least possible (König); a slot's chains of messages are closed to whole
    permutations by messages of weight 0. Doubly stochastic or symmetric as the matrices are.

    Raises ValueError: no matrix; one that is not [W, W], or has a negative entry, or a row that
    does not sum to 1. It says which.
    """
    if not len(matrices):
        raise ValueError("matrices: at least one is needed, got none")
    workers = len(matrices[0])
    colourings = [
        _colour(_checked(index, matrix_WW, workers)) for index, matrix_WW in enumerate(matrices)
    ]
    slots = max(1, *(len(permutations_KW) for permutations_KW, _ in colourings))
    permutations_SKW = np.tile(np.arange(workers), (len(matrices), slots, 1))
    weights_SKW = np.zeros(permutations_SKW.shape)
    for row, (permutations_KW, weights_KW) in enumerate(colourings):
        permutations_SKW[row, : len(permutations_KW)] = permutations_KW
        weights_SKW[row, : len(weights_KW)] = weights_KW
    return cycle(*permutation_rows(permutations_SKW, weights_SKW), rounds)


def permutation_rows(
    permutations_SKW: np.ndarray, weights: np.ndarray | float
) -> tuple[Bank, Rows]:
    """Rows whose slots send along the permutations (the receiver of each worker), and their bank.

    weights: of the messages, by receiver, anything that broadcasts to [S, K, W]. A fixed point gets
    no message, whatever its weight.
    Raises ValueError: a weight outside [0, 1].
    """
    weights_SKW = np.broadcast_to(weights, permutations_SKW.shape)
    if not ((weights_SKW >= 0) & (weights_SKW <= 1)).all():
        raise ValueError(f"schedule: weights must lie in [0, 1], got {weights}")
    bank, branches_SK = bank_of(permutations_SKW)
    moves_SKW = permutations_SKW != np.arange(bank.workers)
    no_mean_S = np.zeros(len(branches_SK), bool)
    return bank, Rows(branches_SK, np.where(moves_SKW, weights_SKW, 0.0), no_mean_S)


def _checked(index: int, matrix: np.ndarray, workers: int) -> np.ndarray:
    """The matrix in float64, with no row above 1 off its diagonal."""
    matrix_WW = np.asarray(matrix, np.float64)
    if not workers or matrix_WW.shape != (workers, workers):
        raise ValueError(
            f"matrices: number {index} must be [W, W], for W = {workers}, the rows of the first,"
            f" got {list(matrix_WW.shape)}"
        )
    if not (matrix_WW >= 0).all():
        i, j = np.argwhere(~(matrix_WW >= 0))[0]
        raise ValueError(
            f"matrices: number {index} must not be negative,"
            f" got {matrix_WW[i, j]:.6g} at [{i}, {j}]"
        )
    sum_W = matrix_WW.sum(axis=1)
    is_one_W = np.abs(sum_W - 1) <= SUM_TOLERANCE
    if not is_one_W.all():
        row = int(is_one_W.argmin())
        raise ValueError(
            f"matrices: rows of number {index} must sum to 1, got {sum_W[row]:.6g} in row {row}"
        )
    others_W = sum_W - matrix_WW.diagonal()
    return matrix_WW / np.maximum(others_W, 1)[:, None]


def _colour(matrix_WW: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Permutations [K, W] that cover each entry off the diagonal once, and the weights [K, W]."""
    is_edge_WW = (matrix_WW > 0) & ~np.eye(len(matrix_WW), dtype=bool)
    degree = max(is_edge_WW.sum(axis=0).max(), is_edge_WW.sum(axis=1).max())
    receivers_KW = np.full((degree, len(matrix_WW)), -1)
    senders_KW = receivers_KW.copy()
    for receiver, sender in np.argwhere(is_edge_WW):
        slot = _free_slot(sender, receiver, receivers_KW, senders_KW)
        receivers_KW[slot, sender], senders_KW[slot, receiver] = receiver, sender
    weights_KW = np.where(senders_KW >= 0, matrix_WW[np.arange(len(matrix_WW)), senders_KW], 0.0)
    return _completed(receivers_KW, senders_KW), weights_KW


def _free_slot(sender: int, receiver: int, receivers_KW: np.ndarray, senders_KW: np.ndarray) -> int:
    """A slot in which neither takes part yet, having made one if there was none.

    Each has one free slot at least. If they share none, exchanging the two slots along the chain of
    messages that starts at the receiver frees the sender's there. The chain never comes to the
    sender: it reaches senders by messages of the very slot that is free there.
    """
    free_at_sender_K = receivers_KW[:, sender] < 0
    free_at_receiver_K = senders_KW[:, receiver] < 0
    if (free_at_sender_K & free_at_receiver_K).any():
        return int((free_at_sender_K & free_at_receiver_K).argmax())
    wanted, other = int(free_at_sender_K.argmax()), int(free_at_receiver_K.argmax())
    chain, end = [], receiver
    while senders_KW[wanted, end] >= 0:
        middle = senders_KW[wanted, end]
        chain.append((wanted, middle, end))
        end = receivers_KW[other, middle]
        if end < 0:
            break
        chain.append((other, middle, end))
    for slot, source, target in chain:
        receivers_KW[slot, source] = senders_KW[slot, target] = -1
    for slot, source, target in chain:
        swapped = other if slot == wanted else wanted
        receivers_KW[swapped, source], senders_KW[swapped, target] = target, source
    return wanted


def _completed(receivers_KW: np.ndarray, senders_KW: np.ndarray) -> np.ndarray:
    """The partial permutations (-1: sends to nobody) closed: each chain's end sends to its start.

    Who takes no part is a chain of one, and stays a fixed point.
    """
    closed_KW = receivers_KW.copy()
    for slot, end in np.argwhere(receivers_KW < 0):
        start = end
        while senders_KW[slot, start] >= 0:
            start = senders_KW[slot, start]
        closed_KW[slot, end] = start
    return closed_KW
