import networkx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from persyn_jax.gossip.graphs import from_matrices, from_networkx, from_permutations


@st.composite
def stochastic_matrices(draw, exact=True):
    """[W, W] with rows that sum to 1, sparse: a few shares of each row fall on random columns.

    exact: entries are multiples of 1/8, so that sums of them are exact.
    """
    workers = draw(st.integers(1, 9))
    rows = []
    for _ in range(workers):
        columns = draw(st.lists(st.integers(0, workers - 1), min_size=8, max_size=8))
        if exact:
            rows.append(np.bincount(columns, minlength=workers) / 8)
        else:
            shares = np.array(draw(st.lists(st.floats(0.01, 1), min_size=8, max_size=8)))
            rows.append(np.bincount(columns, shares / shares.sum(), minlength=workers))
    return np.array(rows)


def most_messages(matrix_WW):
    """The most messages that one worker gets or sends."""
    off_WW = (matrix_WW > 0) & ~np.eye(len(matrix_WW), dtype=bool)
    return max(off_WW.sum(axis=0).max(), off_WW.sum(axis=1).max())


@given(stochastic_matrices())
def test_matrices_come_back_exactly(matrix_WW):
    schedule = from_matrices([matrix_WW], 1)
    np.testing.assert_array_equal(schedule.pull_matrix(0), matrix_WW)


@given(stochastic_matrices(exact=False))
def test_any_weights_come_back_to_rounding(matrix_WW):
    given_back_WW = from_matrices([matrix_WW], 1).pull_matrix(0)
    np.testing.assert_allclose(given_back_WW, matrix_WW, rtol=1e-15, atol=1e-15)
    off = ~np.eye(len(matrix_WW), dtype=bool)
    others_W = (matrix_WW * off).sum(axis=1)
    exact = off & (others_W <= 1)[:, None]  # only the weight for oneself is made to fit
    np.testing.assert_array_equal(given_back_WW[exact], matrix_WW[exact])


@given(stochastic_matrices())
def test_a_matrix_takes_as_many_slots_as_the_busiest_worker_has_messages(matrix_WW):
    schedule = from_matrices([matrix_WW], 1)
    assert schedule.slots == max(most_messages(matrix_WW), 1)
    assert (schedule.branches_TK[0] > 0).sum() == most_messages(matrix_WW)


@given(stochastic_matrices())
def test_each_message_goes_once_and_who_takes_no_part_in_a_slot_stands_still(matrix_WW):
    schedule = from_matrices([matrix_WW], 1)
    off_WW = (matrix_WW > 0) & ~np.eye(len(matrix_WW), dtype=bool)
    assert schedule.messages() == [off_WW.sum()]
    for branch, weights_W in zip(schedule.branches_TK[0], schedule.weights_TKW[0], strict=True):
        receivers_W = schedule.bank.receivers_BW[branch]
        takes = set(np.flatnonzero(weights_W)) | set(
            schedule.bank.senders_BW[branch][weights_W > 0]
        )
        moves = set(np.flatnonzero(receivers_W != np.arange(len(receivers_W))))
        assert moves <= takes


@given(st.lists(stochastic_matrices(), min_size=1, max_size=4), st.integers(0, 9))
def test_matrices_follow_one_another_over_and_over(matrices, rounds):
    workers = len(matrices[0])
    matrices = [matrix_WW for matrix_WW in matrices if len(matrix_WW) == workers]
    schedule = from_matrices(matrices, rounds)
    assert schedule.rounds == rounds
    assert schedule.period == len(matrices)
    for t in range(rounds):
        np.testing.assert_array_equal(schedule.pull_matrix(t), matrices[t % len(matrices)])


def test_symmetric_matrices_are_cut_into_exchanges_of_pairs():
    # Of matchings nothing is sent in vain: each slot is its own inverse.
    matrix_WW = np.zeros((6, 6))
    for i, j in [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5), (1, 4)]:
        matrix_WW[i, j] = matrix_WW[j, i] = 0.25
    matrix_WW += np.diag(1 - matrix_WW.sum(axis=1))
    schedule = from_matrices([matrix_WW], 1)
    assert schedule.slots == 3
    np.testing.assert_array_equal(schedule.bank.receivers_BW, schedule.bank.senders_BW)


def test_rows_that_float32_has_rounded_are_made_to_fit():
    matrix_WW = np.float32([[0, 1 / 3, 1 / 3, 1 / 3]] * 4)
    matrix_WW[1:] = np.eye(4)[1:]
    assert matrix_WW[0].astype(float).sum() > 1 + 1e-9
    pulled_WW = from_matrices([matrix_WW], 1).pull_matrix(0)
    np.testing.assert_allclose(pulled_WW, matrix_WW, atol=1e-7)
    np.testing.assert_allclose(pulled_WW.sum(axis=1), 1, rtol=1e-15)


# Permutations.


@given(st.data(), st.integers(1, 7), st.integers(0, 8), st.sampled_from([0.25, 0.5, 1.0]))
def test_permutations_follow_one_another_over_and_over(data, workers, rounds, weight):
    permutations = data.draw(st.lists(st.permutations(range(workers)), min_size=1, max_size=4))
    schedule = from_permutations(permutations, rounds, weight)
    x_W = np.arange(workers) ** 2
    for t in range(rounds):
        expected_W = x_W.astype(float)
        for sender, receiver in enumerate(permutations[t % len(permutations)]):
            if sender != receiver:
                expected_W[receiver] = (1 - weight) * x_W[receiver] + weight * x_W[sender]
        np.testing.assert_allclose(schedule.pull_matrix(t) @ x_W, expected_W, rtol=1e-14)


def test_equal_permutations_are_one_branch():
    schedule = from_permutations([[1, 0, 2], [0, 1, 2], [1, 0, 2], [1, 2, 0]], 4)
    assert schedule.bank.branches == 3
    assert schedule.branches_TK.tolist() == [[1], [0], [1], [2]]


# Graphs.


@pytest.mark.parametrize(
    "graph",
    [
        networkx.path_graph(5),
        networkx.star_graph(6),
        networkx.complete_graph(4),
        networkx.petersen_graph(),
        networkx.erdos_renyi_graph(9, 0.4, seed=1),
        networkx.empty_graph(3),
        networkx.Graph([(2, 0), (0, 1), (1, 1)]),  # another order of nodes, a self-loop
    ],
)
def test_undirected_graphs_get_metropolis_weights(graph):
    plain = networkx.Graph((u, v) for u, v in graph.edges if u != v)
    plain.add_nodes_from(graph)
    workers = len(graph)
    expected_WW = np.zeros((workers, workers))
    for u, v in plain.edges:
        expected_WW[u, v] = expected_WW[v, u] = 1 / (1 + max(plain.degree[u], plain.degree[v]))
    expected_WW += np.diag(1 - expected_WW.sum(axis=1))
    schedule = from_networkx(graph, 3)
    for t in range(3):
        np.testing.assert_allclose(schedule.pull_matrix(t), expected_WW, atol=1e-15)
        np.testing.assert_allclose(schedule.pull_matrix(t).sum(axis=0), 1, rtol=1e-14)
    assert schedule.slots == max(1, *(degree for _, degree in plain.degree))


def test_a_directed_edge_sends_from_its_first_node_to_its_second():
    schedule = from_networkx(networkx.DiGraph([(0, 1), (1, 2)]), 1)
    np.testing.assert_array_equal(
        schedule.pull_matrix(0), [[1, 0, 0], [0.5, 0.5, 0], [0, 0.5, 0.5]]
    )


@given(st.integers(2, 9), st.floats(0, 1), st.integers(0, 1000))
def test_metropolis_weights_of_directed_graphs_suit_both_kinds_of_rules(workers, density, seed):
    graph = networkx.gnp_random_graph(workers, density, seed=seed, directed=True)
    schedule = from_networkx(graph, 1)
    for matrix_WW in (schedule.pull_matrix(0), schedule.push_matrix(0)):
        off_WW = matrix_WW * ~np.eye(workers, dtype=bool)
        assert {(v, u) for u, v in graph.edges} == set(zip(*np.nonzero(off_WW), strict=True))
        assert (np.diag(matrix_WW) > 0).all()
        for v, u in zip(*np.nonzero(off_WW), strict=True):
            degree = max(graph.in_degree[v], graph.out_degree[u])
            assert off_WW[v, u] == pytest.approx(1 / (1 + degree))


def test_weights_can_be_an_attribute_of_the_edges():
    graph = networkx.DiGraph()
    graph.add_weighted_edges_from([(0, 1, 0.25), (2, 1, 0.5), (1, 0, 1.0), (2, 2, 0.9)])
    schedule = from_networkx(graph, 1, weights="weight")
    np.testing.assert_array_equal(
        schedule.pull_matrix(0), [[0, 1, 0], [0.25, 0.25, 0.5], [0, 0, 1]]
    )
    both_ways = networkx.Graph()
    both_ways.add_edge(0, 1, share=0.25)
    np.testing.assert_array_equal(
        from_networkx(both_ways, 1, weights="share").pull_matrix(0), [[0.75, 0.25], [0.25, 0.75]]
    )


def weighted(*edges):
    graph = networkx.DiGraph()
    graph.add_weighted_edges_from(edges)
    return graph


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: from_matrices([], 1), "at least one is needed"),
        (lambda: from_matrices([np.zeros((0, 0))], 1), r"number 0 must be .* got \[0, 0\]"),
        (lambda: from_matrices([np.eye(2), np.ones((2, 3))], 1), r"number 1 .* got \[2, 3\]"),
        (lambda: from_matrices([np.eye(2), np.eye(3)], 1), r"number 1 .* got \[3, 3\]"),
        (lambda: from_matrices([[1.0, 0.0]], 1), r"number 0 must be .* got \[2\]"),
        (
            lambda: from_matrices([np.eye(2), [[1, 0], [1.5, -0.5]]], 1),
            r"number 1 must not be negative, got -0.5 at \[1, 1\]",
        ),
        (lambda: from_matrices([[[np.nan, 1], [0, 1]]], 1), r"number 0 .* got nan at \[0, 0\]"),
        (
            lambda: from_matrices([np.eye(3), np.diag([1, 1, 0.9])], 1),
            "rows of number 1 must sum to 1, got 0.9 in row 2",
        ),
        (lambda: from_matrices([[[1, 1], [0, 1]]], 1), "number 0 must sum to 1, got 2 in row 0"),
        (lambda: from_matrices([np.eye(2)], -1), "must not be negative, got -1"),
        (lambda: from_permutations([], 1), "at least one is needed"),
        (lambda: from_permutations([[]], 1), "number 0 must permute 0 workers"),
        (lambda: from_permutations([[1, 0], [1, 1]], 1), r"number 1 .* 2 workers, got \[1, 1\]"),
        (lambda: from_permutations([[1, 0], [1, 0, 2]], 1), "number 1 must permute 2 workers"),
        (lambda: from_permutations([[1, 2]], 1), r"number 0 must permute 2 workers, got \[1, 2\]"),
        (lambda: from_permutations([[1, 0]], 1, weight=1.5), r"in \[0, 1\], got 1.5"),
        (lambda: from_permutations([[1, 0]], 1, weight=float("nan")), r"in \[0, 1\], got nan"),
        (lambda: from_networkx(networkx.Graph([("a", "b")]), 1), "numbers 0 to 1, got .'a', 'b'"),
        (lambda: from_networkx(networkx.path_graph([1, 2, 3]), 1), "the numbers 0 to 2, got"),
        (lambda: from_networkx(networkx.MultiGraph([(0, 1)]), 1), "got a multigraph"),
        (
            lambda: from_networkx(networkx.Graph([(0, 1)]), 1, weights="share"),
            r"edge \(0, 1\) has no attribute 'share'",
        ),
        (
            lambda: from_networkx(weighted((0, 2, 0.75), (1, 2, 0.5)), 1, weights="weight"),
            "at most 1, got 1.25 for worker 2",
        ),
        (
            lambda: from_networkx(weighted((0, 1, -0.5)), 1, weights="weight"),
            "must not be negative, got -0.5",
        ),
    ],
)
def test_bad_input_is_refused_in_one_line(make, message):
    with pytest.raises(ValueError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)
