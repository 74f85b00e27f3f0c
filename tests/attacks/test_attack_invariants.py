"""What holds for any model, any images and any options."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models_for_tests import CLASSES, Constant, NanGradient, art_classifier, small_net, some_images, some_labels

from guardians.attacks import FGSM, PGD

INF = float("inf")
NET = small_net()
MODELS = {"net": NET, "zero gradient": Constant(), "NaN gradient": NanGradient()}
N = 4


def norms_in_float64(x_adv, x, p):
    return torch.linalg.vector_norm((x_adv.double() - x.double()).flatten(1), p, dim=1)


def assert_in_ball_and_range(x_adv, x, p, eps, low=0.0, high=1.0):
    assert (x_adv.shape, x_adv.dtype, x_adv.device) == (x.shape, x.dtype, x.device)
    assert x_adv.isfinite().all()
    assert ((low <= x_adv) & (x_adv <= high)).all()
    assert (
        norms_in_float64(x_adv, x, p) <= torch.as_tensor(eps, dtype=torch.float64) * (1 if p == INF else 1 + 1e-12)
    ).all()


options = st.fixed_dictionaries(
    {
        "norm": st.sampled_from([1, 1.5, 2, 3, INF]),
        "eps": st.sampled_from([0, 8 / 255, 0.3]) | st.floats(1e-4, 20),
        "eps_step": st.sampled_from([2 / 255, 1.0]) | st.floats(1e-4, 20),
        "targeted": st.booleans(),
        "num_random_init": st.integers(0, 2),
        "batch_size": st.integers(1, N + 1),
        "seed": st.integers(0, 2**63),
    }
)
pgd_only = st.fixed_dictionaries(
    {"max_iter": st.integers(1, 4), "decay": st.sampled_from([None, 0.0, 0.9]), "random_eps": st.booleans()}
)
inputs = st.builds(some_images, st.just(N), st.integers(0, 2**31)) | st.sampled_from(
    [torch.zeros(N, 3, 8, 8), torch.ones(N, 3, 8, 8)]
)


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
@given(x=inputs, options=options, more=pgd_only)
@settings(max_examples=60)
def test_pgd_stays_in_the_ball_and_the_range(model, x, options, more):
    x_adv = PGD(model, **options, **more, verbose=False)(x, some_labels(N))
    assert_in_ball_and_range(x_adv, x, options["norm"], options["eps"])


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
@given(x=inputs, options=options, minimal=st.booleans())
@settings(max_examples=40)
def test_fgsm_stays_in_the_ball_and_the_range(model, x, options, minimal):
    # No more than some hundred sizes to try.
    options["eps_step"] = max(options["eps_step"], options["eps"] / 100)
    x_adv = FGSM(model, **options, minimal=minimal)(x, some_labels(N))
    assert_in_ball_and_range(x_adv, x, options["norm"], options["eps"])


@pytest.mark.parametrize("norm", [1, 2, INF])
@pytest.mark.parametrize(
    "size", [0.1, 20.0]
)  # in the large ball only the range bounds, to which x + (bound - x) rounds
@pytest.mark.parametrize(("low", "high"), [(-1.0, 1.0), (0.0, 255.0), (-3.0, 0.5)])
def test_the_range_is_that_of_the_estimator(norm, size, low, high):
    width = high - low
    estimator = art_classifier(NET, clip_values=(low, high), preprocessing=(low, width))
    x, eps = (some_images(64) * width + low).clamp(low, high), size * width
    attack = PGD(estimator, norm, eps, eps / 3, max_iter=4, num_random_init=1, verbose=False)
    x_adv = attack(x, some_labels(64))
    assert_in_ball_and_range(x_adv, x, norm, eps, low, high)
    assert x_adv.min() < low + 0.05 * width
    assert x_adv.max() > high - 0.05 * width


@pytest.mark.parametrize("norm", [2, INF])
def test_without_clip_values_images_leave_the_unit_range(norm, x, y):
    x_adv = PGD(art_classifier(NET, clip_values=None), norm, 0.5, 0.1, max_iter=7, verbose=False)(x, y)
    assert_in_ball_and_range(x_adv, x, norm, 0.5, -INF, INF)
    assert x_adv.min() < 0
    assert x_adv.max() > 1


@pytest.mark.parametrize("norm", [1, 2, INF])
def test_radii_hold_for_each_sample_where_they_differ(norm, y):
    x, eps = some_images(12), np.linspace(0, 0.5, 12).reshape(12, 1, 1, 1)
    x_adv = PGD(NET, norm, eps, np.full(1, 0.1), max_iter=8, num_random_init=1, batch_size=5, verbose=False)(x, y)
    assert_in_ball_and_range(x_adv, x, norm, eps.ravel())
    assert (norms_in_float64(x_adv, x, norm)[1:] > 0.5 * torch.from_numpy(eps.ravel()[1:])).all()


@pytest.mark.parametrize("attack", [PGD, FGSM])
def test_radii_hold_for_each_pixel_where_they_differ(attack, x, y):
    eps = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 0.2
    eps[0] = 0
    x_adv = attack(NET, eps=eps, eps_step=np.full(1, 0.1), num_random_init=1)(x, y)
    assert ((x_adv.double() - x.double()).abs() <= eps).all()
    assert torch.equal(x_adv[:, 0], x[:, 0])
    assert not torch.equal(x_adv, x)


@pytest.mark.parametrize("attack", [PGD, FGSM])
@pytest.mark.parametrize("norm", [1, 2, INF])
@pytest.mark.parametrize("model", [MODELS["zero gradient"], MODELS["NaN gradient"]])
def test_without_a_gradient_and_a_random_start_images_stay(attack, norm, model, x, y):
    assert torch.equal(attack(model, norm, eps=0.2, eps_step=0.1)(x, y), x)


@pytest.mark.parametrize("attack", [PGD, FGSM])
@pytest.mark.parametrize("norm", [1, 2, INF])
def test_a_ball_of_radius_zero_holds_the_image_alone(attack, norm, x, y):
    assert torch.equal(attack(NET, norm, eps=0, eps_step=0.1, num_random_init=2)(x, y), x)


@pytest.mark.parametrize("attack", [PGD, FGSM])
@pytest.mark.parametrize("norm", [1, 2, INF])
def test_masked_pixels_keep_their_bits(attack, norm, x, y):
    mask = some_images(12, seed=9) > 0.5
    options = {"num_random_init": 2, "seed": 0, "batch_size": 5}
    x_adv = attack(NET, norm, eps=1.0, eps_step=0.2, **options)(x, y, mask=mask)
    assert torch.equal(x_adv[~mask], x[~mask])
    assert not torch.equal(x_adv[mask], x[mask])


# Randomness


RANDOM = {
    "PGD": lambda model, **options: PGD(
        model, eps=0.05, eps_step=0.02, max_iter=3, num_random_init=3, random_eps=True, verbose=False, **options
    ),
    "PGD, 2-norm": lambda model, **options: PGD(
        model, 2, eps=0.4, eps_step=0.2, max_iter=3, num_random_init=3, verbose=False, **options
    ),
    "FGSM": lambda model, **options: FGSM(model, eps=0.05, num_random_init=3, **options),
}
random_attacks = pytest.mark.parametrize("attack", RANDOM.values(), ids=RANDOM)


@random_attacks
@pytest.mark.parametrize("labelled", [True, False])
def test_the_batch_size_does_not_change_the_images(attack, labelled, net64):
    x = some_images(70, dtype=torch.float64)
    y = some_labels(70) if labelled else None
    one, *others = (attack(net64, seed=4, batch_size=size)(x, y) for size in (1, 7, 64, 256))
    for other in others:
        torch.testing.assert_close(other, one, rtol=0, atol=1e-10)


@random_attacks
def test_the_first_images_do_not_depend_on_those_that_follow(attack, net64, x64, y):
    attacked = attack(net64, seed=4)(x64, y)
    torch.testing.assert_close(attack(net64, seed=4)(x64[:5], y[:5]), attacked[:5], rtol=0, atol=1e-10)


@random_attacks
def test_a_seed_repeats_and_another_one_differs(attack, net, x, y):
    seeded = attack(net, seed=4)
    state = torch.get_rng_state()
    first = seeded(x, y)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(seeded(x, y), first)
    assert torch.equal(torch.from_numpy(seeded.generate(x.numpy(), y.numpy())), first)
    assert not torch.equal(attack(net, seed=5)(x, y), first)


@random_attacks
def test_without_a_seed_calls_differ_and_follow_torchs_generator(attack, net, x, y):
    unseeded = attack(net)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        first, second = unseeded(x, y), unseeded(x, y)
        torch.manual_seed(0)
        assert torch.equal(unseeded(x, y), first)
    assert not torch.equal(second, first)


@pytest.mark.parametrize("seed", [0, 2**64, 2**200])
def test_seeds_of_any_size_are_taken_or_refused_by_name(seed, net, x, y):
    try:
        attack = PGD(net, num_random_init=1, max_iter=1, seed=seed, verbose=False)
    except ValueError as error:
        assert "seed" in str(error)  # noqa: PT017
    else:
        attack(x, y)


# Restarts


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("batch_size", [5, 64])
def test_restarts_only_add_fooled_images(targeted, batch_size, net):
    x = some_images(60)
    y = net(x).argmax(1) if not targeted else some_labels(60)
    options = {"eps": 0.03, "eps_step": 0.015, "max_iter": 2, "targeted": targeted, "seed": 1, "verbose": False}
    once, often = (PGD(net, num_random_init=n, batch_size=batch_size, **options)(x, y) for n in (1, 8))
    fooled_once, fooled_often = ((net(x_adv).argmax(1) == y) == targeted for x_adv in (once, often))
    assert torch.equal(often[fooled_once], once[fooled_once])
    assert 0 < fooled_once.sum() < fooled_often.sum() < 60


def test_restarts_ask_the_model_only_about_images_that_stand(net):
    x = some_images(20)
    fooled_already = (net(x).argmax(1) + 1) % CLASSES
    counts = []
    for restarts in (1, 9):
        net.images_seen = 0
        attack = PGD(net, eps=1e-4, eps_step=1e-4, max_iter=2, num_random_init=restarts, verbose=False)
        attack(x, fooled_already)
        counts.append(net.images_seen)
    assert counts[1] <= counts[0] + 20 + 3 * 8 + 2  # to see what the model is, and that all are fooled


# Starting points


def test_the_search_starts_where_it_is_told(x, y):
    start = (x + 0.05).clamp(0, 1)
    attack = PGD(Constant(), eps=0.1, eps_step=0.1, max_iter=3, num_random_init=1, verbose=False)
    assert torch.equal(attack(x, y, x_adv_init=start), start)
    generated = attack.generate(x.numpy(), y.numpy(), x_adv_init=start.numpy())
    assert np.array_equal(generated, start.numpy())


@pytest.mark.parametrize(("norm", "shrink"), [(INF, 0.5), (2, 0.5), (1, 0.5)])
def test_a_start_outside_the_ball_is_projected(norm, shrink, y):
    x, start = torch.full((12, 3, 8, 8), 0.25), torch.full((12, 3, 8, 8), 0.75)
    eps = shrink * norms_in_float64(start, x, norm)[0].item()
    x_adv = PGD(Constant(), norm, eps, 0.1, max_iter=1, verbose=False)(x, y, x_adv_init=start)
    torch.testing.assert_close(x_adv, torch.full_like(x, 0.5))
    assert_in_ball_and_range(x_adv, x, norm, eps)


def test_later_restarts_leave_the_given_start(x):
    model = NanGradient()  # so that only random starts move
    y = model(x).argmax(1)
    options = {"eps": 0.3, "max_iter": 1, "seed": 0, "verbose": False}
    assert torch.equal(PGD(model, num_random_init=1, **options)(x, y, x_adv_init=x), x)
    x_adv = PGD(model, num_random_init=8, **options)(x, y, x_adv_init=x)
    assert (model(x_adv).argmax(1) != y).sum() > 6
