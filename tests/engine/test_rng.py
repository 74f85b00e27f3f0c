import contextvars
import itertools
import math
import tracemalloc
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch.utils._python_dispatch import TorchDispatchMode

from guardians.engine import rng
from guardians.engine.rng import SampleRng, bits, given_keys, hashed, keys_on, row_keys, with_normal

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


CPU = torch.device("cpu")
KEYS = keys_on(CPU, hashed(5, np.arange(40)))


def noise(keys, stream, shape, dtype=torch.float32):
    return with_normal(torch.zeros(len(keys), *shape, dtype=dtype), keys, stream, 1)


def literal_bits(key, stream, count, first=0):
    """SplitMix64 whose seed is a number of SplitMix64, in integers of any length."""
    seed = literal_hash((int(key) + stream * 0x9E3779B97F4A7C15) % 2**64)
    return [literal_hash((seed + i * 0x9E3779B97F4A7C15) % 2**64) for i in range(first, first + count)]


def literal_normal(key, stream, length, first=0):
    """Box and Muller in float64, of uniforms in float32: high bits for the radius, low ones for the angle."""
    drawn = literal_bits(key, stream, (length + 1) // 2, first)
    uniform = np.array([number >> 32 for number in drawn]).astype(np.float32) + np.float32(0.5)
    radius = np.sqrt(-2 * np.log(uniform.astype(np.float64) / 2**32))
    angle = np.array([2 * math.pi * (number % 2**32) / 2**32 for number in drawn])
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:length]


def test_the_stream_of_a_seed_is_the_published_one():
    """The numbers of SplitMix64 for the seed 1234567, as implementations in other languages are tested with them."""
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    gamma = 0x9E3779B97F4A7C15
    states = torch.tensor([[(1234567 + i * gamma + 2**63) % 2**64 - 2**63 for i in range(1, 5)]])
    assert (rng._mixed_tensor(states)[0].numpy().view(np.uint64) == np.array(published, dtype=np.uint64)).all()
    assert [literal_hash((1234567 + i * gamma) % 2**64) for i in range(4)] == published


@pytest.mark.parametrize("stream", [0, 1, 7, 10**6])
def test_bits_are_those_of_splitmix64(stream):
    keys = np.array([0, 1, 2**63, 2**64 - 1, 0x0123456789ABCDEF], dtype=np.uint64)
    found = bits(keys_on(CPU, keys), stream, 0, 9)
    assert torch.equal(bits(keys_on(CPU, keys), stream, 4, 9), found[:, 4:])
    assert found.dtype == torch.int64
    assert found.numpy().view(np.uint64).tolist() == [literal_bits(key, stream, 9) for key in keys]


@pytest.mark.parametrize("length", [1, 2, 7, 300])
def test_noise_is_that_of_box_and_muller(length):
    expected = np.stack([literal_normal(key, 3, length) for key in KEYS.numpy().view(np.uint64)])
    np.testing.assert_allclose(noise(KEYS, 3, (1, length)).view(40, length), expected, rtol=0, atol=3e-6)


def test_noise_is_added_in_proportion_and_lies_as_in_channels_last():
    x = torch.rand(40, 3, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = x + 0.3 * noise(KEYS, 2, (1, 60), torch.float64).view(40, 4, 5, 3).permute(0, 3, 1, 2)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        images = x.clone(memory_format=memory_format)
        values = with_normal(images, KEYS, 2, 0.3)
        assert torch.equal(images, x)
        assert values.is_contiguous(memory_format=memory_format)
        torch.testing.assert_close(values, expected, rtol=0, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_gradient_of_noisy_values_is_that_of_a_sum(dtype):
    x = torch.rand(40, 3, 4, 5, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    values = with_normal(x, KEYS, 2, 0.3)
    assert torch.equal(values, with_normal(x.detach(), KEYS, 2, 0.3))
    assert values.dtype == dtype
    weights = torch.rand_like(values)
    (gradient,) = torch.autograd.grad((values * weights).sum(), x)
    assert torch.equal(gradient, weights)


@pytest.mark.parametrize("shape", [(3, 5), (4, 32, 32), (64, 50, 49)], ids=str)
@pytest.mark.parametrize("threads", [1, 3])
def test_the_noise_of_a_row_is_the_same_in_any_batch_order_and_number_of_threads(shape, threads):
    together, before = noise(KEYS, 1, shape), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for rows in ([7], [39, 0, 21], list(range(39, -1, -1))):
            assert torch.equal(noise(KEYS[rows], 1, shape), together[rows])
        with torch.inference_mode():
            assert torch.equal(noise(KEYS, 1, shape), together)
    finally:
        torch.set_num_threads(before)
    assert noise(KEYS[:0], 1, shape).shape == (0, *shape)
    assert noise(KEYS, 1, (*shape, 0)).shape == (40, *shape, 0)


def test_noise_is_normal_to_its_tails():
    values = noise(KEYS, 0, (1, 50_000)).view(40, -1)  # two million
    assert stats.kstest(values.flatten().numpy(), "norm").pvalue > 0.01
    for part in (values[:, :25_000], values[:, 25_000:], values[0], values[:, 0]):  # cosines, sines, a row, a column
        assert stats.kstest(part.flatten().numpy(), "norm").pvalue > 0.001
    for threshold in (2.0, 3.0, 4.0, 4.5):
        beyond, share = int((values.abs() > threshold).sum()), 2 * stats.norm.sf(threshold)
        assert abs(beyond - share * values.numel()) < 4.5 * math.sqrt(share * values.numel())
    assert values.abs().max() < 6.8


def test_neighbours_in_rows_streams_and_counters_are_uncorrelated():
    keys = keys_on(CPU, np.arange(30, dtype=np.uint64))  # not even hashed
    values = torch.stack([noise(keys, stream, (1, 4096)) for stream in range(4)]).double()
    for statistic in (values, values.square() - 1, values.abs() > 1):  # of normals, radii, and signs of both
        correlation = np.corrcoef(statistic.reshape(120, -1).numpy())
        assert np.abs(correlation - np.eye(120)).max() < 5.5 / math.sqrt(4096)
    flat = values.reshape(120, -1)
    for lag in (1, 2, 3, 64, 2048):  # 2048: cosine and sine of one angle
        for one, other in ((flat[:, lag:], flat[:, :-lag]), (flat[:, lag:] ** 2, flat[:, :-lag] ** 2)):
            assert abs(np.corrcoef(one.flatten(), other.flatten())[0, 1]) < 4.5 / math.sqrt(one.numel())


def test_each_of_the_64_bits_is_fair():
    drawn = bits(KEYS, 4, 0, 5000)
    ones = torch.stack([((drawn >> position) & 1).sum() for position in range(64)])
    assert (ones - drawn.numel() / 2).abs().max() < 4.5 * math.sqrt(drawn.numel()) / 2


def test_the_slabs_of_a_large_image_have_numbers_of_their_own():
    shape, lines = (64, 50, 49), 2**17 // (64 * 49)  # of a slab
    values = noise(KEYS[:3], 6, shape).movedim(1, -1)
    for row, key in enumerate(KEYS[:3].numpy().view(np.uint64)):
        slabs, counter = [], 0
        for lines_here in (lines, 50 - lines):
            length = lines_here * 49 * 64
            slabs.append(literal_normal(key, 6, length, counter))
            counter += length // 2
        np.testing.assert_allclose(values[row].reshape(-1), np.concatenate(slabs), rtol=0, atol=3e-6)


@pytest.mark.parametrize("shape", [(64, 112, 112), (3, 224, 224), (3, 2000, 2000)], ids=str)
def test_noise_for_large_images_takes_the_memory_that_is_stated(shape):
    x = torch.zeros(2, *shape)
    tracemalloc.start()  # which counts what numpy allocates
    try:
        values = with_normal(x, KEYS[:2], 0, 1)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4e6 * torch.get_num_threads()
    assert abs(float(values.std()) - 1) < 4.5 / math.sqrt(x.numel())


class LiveBytes(TorchDispatchMode):
    """Of the tensors that operations inside have made, now and at most."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        given = (*args, *(kwargs or {}).values())
        known = {one.untyped_storage().data_ptr() for one in given if isinstance(one, torch.Tensor)}
        if found.untyped_storage().data_ptr() not in known:
            self.count(found.nbytes)
            weakref.finalize(found, self.count, -found.nbytes)
        return found

    def count(self, size):
        self.now += size
        self.peak = max(self.peak, self.now)


def test_a_block_on_a_gpu_takes_the_memory_that_is_stated():
    with LiveBytes() as live:  # the same operations on a CPU
        noise = rng._normal(KEYS[:16], 0, 0, rng._ON_A_GPU // 16)
    assert noise.numel() == rng._ON_A_GPU
    assert 3 * noise.nbytes < live.peak < 64e6


def test_on_a_cpu_it_takes_the_memory_that_is_stated():
    x = torch.rand(40, 16, 32, 32).repeat(1, 2, 2, 2)
    with LiveBytes() as live:
        noisy = with_normal(x, KEYS, 0, 1)
    assert noisy.nbytes < live.peak < noisy.nbytes + 8e6 * torch.get_num_threads()


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
