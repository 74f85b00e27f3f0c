import contextvars
import itertools
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from guardians.engine.rng import SampleRng, given_keys, hashed, row_keys

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


def literal_hash(*parts):
    """SplitMix64 in integers modulo 2**64, whose state takes in one part after the other."""
    state = 0
    for part in parts:
        state = (state + part + 0x9E3779B97F4A7C15) % 2**64
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB % 2**64
        state ^= state >> 31
    return state


integers = st.integers(-(2**63), 2**64 - 1)


@given(st.lists(integers, min_size=1, max_size=4))
def test_hashes_are_those_of_splitmix64(parts):
    found = hashed(*parts)
    assert found.dtype == np.uint64
    assert found.shape == ()
    assert int(found) == literal_hash(*parts)
    arrays = [np.array([part], dtype=np.uint64 if part >= 0 else np.int64) for part in parts]
    assert hashed(*arrays).tolist() == [literal_hash(*parts)]


def test_the_first_number_of_splitmix64_is_the_published_one():
    assert int(hashed(0)) == 0xE220A8397B1DCDAF


def test_parts_of_a_hash_broadcast():
    rows, columns = np.array([5, -1, 2**40]), np.arange(4)
    found = hashed(7, rows[:, None], columns)
    assert found.shape == (3, 4)
    assert found.tolist() == [[literal_hash(7, int(row), int(column)) for column in columns] for row in rows]
    assert hashed(rows, 3).tolist() == [literal_hash(int(row), 3) for row in rows]
    assert hashed(np.zeros(0, dtype=np.int64), 3).shape == (0,)


def test_hashes_differ_in_order_and_number_of_parts():
    combinations = [parts for length in (1, 2, 3) for parts in itertools.product([-1, 0, 1, 2], repeat=length)]
    assert len({int(hashed(*parts)) for parts in combinations}) == len(combinations)


def test_row_keys_are_those_of_the_innermost_batch_of_that_length():
    outer, inner = np.arange(3, dtype=np.uint64), np.arange(2, dtype=np.uint64) + 10
    assert given_keys(3) is None
    with row_keys(outer):
        assert given_keys(3) is outer
        assert given_keys(2) is None
        with row_keys(inner):
            assert given_keys(2) is inner
            assert given_keys(3) is None  # not those of another batch
        assert given_keys(3) is outer
    assert given_keys(3) is None


def test_row_keys_end_with_an_exception():
    outer, inner = np.arange(3, dtype=np.uint64), np.arange(3, dtype=np.uint64) + 10
    with row_keys(outer):
        with pytest.raises(KeyError), row_keys(inner):
            raise KeyError
        assert given_keys(3) is outer
    with pytest.raises(KeyError), row_keys(inner):
        raise KeyError
    assert given_keys(3) is None


def test_row_keys_belong_to_a_thread_and_a_context():
    keys, others = np.arange(3, dtype=np.uint64), np.arange(3, dtype=np.uint64) + 10

    def nested():
        with row_keys(others):
            return given_keys(3)

    before = contextvars.copy_context()
    with row_keys(keys), ThreadPoolExecutor(1) as pool:
        assert pool.submit(given_keys, 3).result() is None
        assert pool.submit(nested).result() is others
        assert before.run(given_keys, 3) is None
        assert contextvars.copy_context().run(given_keys, 3) is keys
        assert given_keys(3) is keys
