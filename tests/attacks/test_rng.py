import itertools

import numpy as np
import pytest
import torch
from scipy import stats

from guardians.attacks.rng import SampleRng

DRAW = {
    "uniform": lambda rng: rng.uniform((3, 4)),
    "gamma": lambda rng: rng.gamma(0.5, (3, 4)),
}


def draw(kind, seed, index, restart=0):
    return DRAW[kind](SampleRng(seed, np.array(index), restart))


@pytest.mark.parametrize("kind", DRAW)
def test_a_sample_draws_the_same_in_any_batch_and_order(kind):
    together = draw(kind, 3, [0, 1, 2, 3, 4])
    assert together.shape == (5, 3, 4)
    assert together.dtype == torch.float64
    assert torch.equal(draw(kind, 3, [4, 2]), together[[4, 2]])
    assert torch.equal(draw(kind, 3, [1]), together[[1]])


@pytest.mark.parametrize("kind", DRAW)
def test_streams_differ_in_seed_index_and_restart(kind):
    keys = itertools.product([0, 1, 2, 2**32, 2**62], [0, 1, 2, 2**32], [0, 1, 2])
    streams = np.array([draw(kind, seed, [index], restart).numpy().ravel() for seed, index, restart in keys])
    assert len(np.unique(streams)) == streams.size
    correlation = np.corrcoef(np.log(streams)) - np.eye(len(streams))
    assert np.abs(correlation).mean() < 0.3  # of independent streams of 12 numbers: 0.24


def test_successive_draws_go_on_along_the_stream():
    rng = SampleRng(0, np.arange(2))
    assert not torch.equal(rng.uniform((4,)), rng.uniform((4,)))


def test_draws_follow_their_law():
    rng = SampleRng(0, np.arange(2000))
    assert stats.kstest(rng.uniform(()), "uniform").pvalue > 0.01
    assert stats.kstest(rng.gamma(0.5, ()), stats.gamma(0.5).cdf).pvalue > 0.01


def test_the_global_generators_are_left_alone():
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    SampleRng(0, np.arange(3)).uniform((2,))
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert (np.random.get_state()[1] == numpy_state).all()  # noqa: NPY002
