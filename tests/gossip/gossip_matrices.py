"""Mixing matrices that tests of schedules compare with."""

import numpy as np


def matrices(schedule):
    """float64[T, W, W]: the pull matrix of each round."""
    return np.array([schedule.pull_matrix(t) for t in range(schedule.rounds)])


def product(matrices_TWW):
    """W_T ... W_2 W_1."""
    return np.linalg.multi_dot([np.eye(len(matrices_TWW[0])), *matrices_TWW[::-1]])


def mean(workers):
    """The matrix after which all workers hold their mean."""
    return np.full((workers, workers), 1 / workers)


def shift_matrix(workers, shift):
    """P with (P x)_i = x_(i - shift): worker i hears from i - shift."""
    return np.roll(np.eye(workers), shift, axis=0)
