"""Attacks on defences: native ones, whose draws belong to an image, and those of the toolkits, which run unchanged."""

import art.attacks.evasion as art
import foolbox
import numpy as np
import pytest
import torch
import torchattacks
from models_for_tests import art_classifier, small_net, snapshot, some_images, some_labels, traceable_net
from torch import nn

from guardians.attacks import PGD, CarliniWagnerL2
from guardians.defences import MixupInference, RandomSelfEnsemble

N, EPS = 12, 0.05


def pool():
    return some_images(20, seed=77), torch.arange(20) % 5


def rse(net=None, sigma_init=0.05, sigma_inner=0.05, n=3, **options):
    return RandomSelfEnsemble(small_net() if net is None else net, sigma_init, sigma_inner, n, **{"seed": 1, **options})


def mi(net=None, method="MI-OL", num_samples=3, **options):
    net = traceable_net() if net is None else net
    return MixupInference(net, pool(), method, num_samples=num_samples, **{"seed": 1, **options})


DEFENCES = {
    "RSE": rse,
    "RSE, folded": lambda: rse(traceable_net()),
    "RSE in chunks": lambda: rse(traceable_net(), chunk_size=4),
    "MI-OL": mi,
    "MI-PL": lambda: mi(small_net(), "MI-PL"),
    "MI-Combined": lambda: mi(method="MI-Combined", threshold=0.005, detection_samples=2),
}
defences = pytest.mark.parametrize("make_defence", DEFENCES.values(), ids=DEFENCES)
two_defences = pytest.mark.parametrize("make_defence", [rse, mi], ids=["RSE", "MI"])


def pgd(model, **options):
    settings = {"eps": EPS, "eps_step": 0.02, "max_iter": 4, "verbose": False, "seed": 0, "precision": "float32"}
    return PGD(model, **{**settings, **options})


def carlini_wagner(model, **options):
    settings = {"max_iter": 8, "binary_search_steps": 3, "verbose": False, "seed": 0, "precision": "float32"}
    return CarliniWagnerL2(model, **{**settings, **options})


ATTACKS = {
    "PGD": pgd,
    "PGD, EOT": lambda model, **options: pgd(model, eot_samples=3, **options),
    "PGD that stops early": lambda model, **options: pgd(model, early_stop=True, num_random_init=2, **options),
    "PGD that stops early, EOT": lambda model, **options: pgd(model, early_stop=True, eot_samples=3, **options),
    "C&W": carlini_wagner,
    "C&W, EOT": lambda model, **options: carlini_wagner(model, eot_samples=2, max_iter=4, **options),
    "C&W as in the paper": lambda model, **options: carlini_wagner(model, adaptive=False, **options),
}
native = pytest.mark.parametrize("make_attack", ATTACKS.values(), ids=ATTACKS)


def labels_of(model, x, draws=9):
    """Those that a random model gives most often."""
    with torch.no_grad():
        return torch.stack([model(x).argmax(1) for _ in range(draws)]).mode(0).values


def plain_labels(x):
    """Those that the models give without a defence."""
    with torch.no_grad():
        return small_net()(x).argmax(1)


def fooled_by(attack):
    return None if attack.report.fooled is None else attack.report.fooled.tolist()


# Native attacks


@defences
@native
def test_images_are_the_same_in_batches_of_any_size_and_given_the_seed(make_defence, make_attack):
    x, found = some_images(N), []
    y = plain_labels(x)
    for batch_size, seed in ((100, 0), (1, 0), (5, 0), (100, 1)):
        model = make_defence()
        before = snapshot(model)
        attack = make_attack(model, batch_size=batch_size, seed=seed)
        found.append((attack(x, y), fooled_by(attack)))
        assert snapshot(model) == before
        assert attack.report.search == "model"  # a copy of a random model might repeat its draws
    expected, fooled = found[0]
    # Adam divides by the root of a second moment, which magnifies the rounding of another batch size.
    atol = 1e-6 if isinstance(attack, PGD) else 1e-5
    for x_adv, its in found[1:3]:
        torch.testing.assert_close(x_adv, expected, rtol=0, atol=atol)
        assert its == fooled
    assert not torch.allclose(found[3][0], expected, rtol=0, atol=1e-4)
    assert ((expected >= 0) & (expected <= 1)).all()
    if isinstance(attack, PGD):
        assert ((expected.double() - x.double()).abs() <= EPS).all()
    assert not torch.equal(expected, x)


@two_defences
@pytest.mark.parametrize("kind", [pgd, carlini_wagner])
def test_the_same_twice_by_one_attack_whatever_the_model_was_asked_in_between(make_defence, kind):
    x, y, model = some_images(N), some_labels(N), make_defence()
    attack = kind(model)
    first = attack(x, y)
    model(x[:5])
    assert torch.equal(attack(x, y), first)
    assert torch.equal(kind(make_defence())(x, y), first)
    assert not torch.equal(kind(make_defence(seed=2))(x, y), first)  # the defence has a seed too


@two_defences
@pytest.mark.parametrize("kind", [pgd, carlini_wagner])
def test_an_image_has_its_draws_whatever_comes_after_it(make_defence, kind):
    x, y = some_images(N), some_labels(N)
    part = kind(make_defence())(x[:9], y[:9])
    torch.testing.assert_close(kind(make_defence())(x, y)[:9], part, rtol=0, atol=1e-6)


@two_defences
@pytest.mark.parametrize("kind", [pgd, carlini_wagner])
def test_an_attack_does_not_move_the_draws_of_later_images(make_defence, kind):
    x, y, model = some_images(N), some_labels(N), make_defence()
    kind(model)(x, y)
    with torch.no_grad():
        assert torch.equal(model(x), make_defence()(x))


@two_defences
@pytest.mark.parametrize("kind", [pgd, carlini_wagner])
def test_a_defence_in_training_is_attacked_in_evaluation_and_comes_back(make_defence, kind):
    x, y, model = some_images(N), some_labels(N), make_defence()
    expected = kind(make_defence())(x, y)
    model.train()
    list(model.parameters())[1].requires_grad_(False)
    before = snapshot(model)
    assert torch.equal(kind(model)(x, y), expected)
    assert snapshot(model) == before


@two_defences
@pytest.mark.parametrize("kind", [pgd, carlini_wagner])
def test_an_estimator_of_a_defence_is_attacked_as_the_defence(make_defence, kind):
    x, y = some_images(N), some_labels(N)
    expected = kind(make_defence())(x, y).numpy()
    np.testing.assert_array_equal(kind(art_classifier(make_defence())).generate(x.numpy(), y.numpy()), expected)


@two_defences
def test_gradients_of_further_draws_are_averaged(make_defence):
    """More draws lead where their mean does: to a larger loss on draws that the attack has not seen."""
    x, model = some_images(60), make_defence(sigma_init=0.3) if make_defence is rse else make_defence(lam=0.5)
    y, losses = labels_of(model, x), []
    for eot_samples in (1, 16):
        x_adv = pgd(model, eps=0.02, eps_step=0.02, max_iter=1, eot_samples=eot_samples, batch_size=1000)(x, y)
        with torch.no_grad():
            losses.append(float(torch.stack([nn.functional.nll_loss(model(x_adv), y) for _ in range(20)]).mean()))
    assert losses[1] > losses[0]


# C&W judges by most of the draws


def share_wrong(model, x_adv, y, draws):
    """Of fresh draws, for each image."""
    with torch.no_grad():
        return torch.stack([model(x_adv).argmax(1) != y for _ in range(draws)]).double().mean(0)


def steadily_right(model, n):
    """Images, and labels that nearly all draws give them."""
    x = some_images(8 * n)
    y = labels_of(model, x, draws=25)
    steady = share_wrong(model, x, y, 25) <= 0.04
    assert steady.sum() >= n
    return x[steady][:n], y[steady][:n]


RANDOM = {
    "RSE": lambda: rse(n=2),
    "MI": lambda: mi(method="MI-PL", lam=0.7, num_samples=5),
}
MILD = {
    "RSE": lambda: rse(sigma_init=0.01, sigma_inner=0.01),
    "MI": lambda: mi(method="MI-PL", lam=0.9, num_samples=20),
}


@pytest.mark.parametrize("make_defence", RANDOM.values(), ids=RANDOM)
def test_what_is_fooled_in_the_report_is_fooled_in_most_of_fresh_draws(make_defence):
    model = make_defence()
    x, y = steadily_right(model, 40)
    attack = carlini_wagner(model, max_iter=20, binary_search_steps=3, batch_size=40)
    x_adv = attack(x, y)
    fooled = torch.from_numpy(attack.report.fooled)
    assert fooled.double().mean() > 0.8
    assert (share_wrong(model, x_adv, y, 25)[fooled] > 0.5).double().mean() >= 0.9
    assert torch.equal(x_adv[~fooled], x[~fooled])


@pytest.mark.parametrize("make_defence", MILD.values(), ids=MILD)
def test_a_mildly_noisy_model_is_fooled_by_all_images(make_defence):
    model = make_defence()
    x, y = steadily_right(model, 30)
    attack = carlini_wagner(model, max_iter=20, binary_search_steps=5, batch_size=30)
    x_adv = attack(x, y)
    assert attack.report.fooled.all()
    assert (share_wrong(model, x_adv, y, 25) > 0.5).double().mean() >= 0.9


# EOT-PGD against torchattacks


class NoiseFromAList(nn.Module):
    """A model whose noise, a row of a list for each image, comes in the order in which it is asked."""

    def __init__(self):
        super().__init__()
        self.net = small_net(dtype=torch.float64)
        self.noise = torch.randn(1000, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        self.used = 0

    def forward(self, x):
        first, self.used = self.used, self.used + len(x)
        return self.net(x + 0.3 * self.noise[first : self.used])


@pytest.mark.parametrize("eot_samples", [1, 2, 5])
def test_pgd_with_eot_is_torchattacks_eotpgd(eot_samples):
    x, y = some_images(N, dtype=torch.float64), some_labels(N)
    ours, theirs = (NoiseFromAList().eval() for _ in range(2))
    reference = torchattacks.EOTPGD(theirs, eps=EPS, alpha=0.02, steps=4, eot_iter=eot_samples, random_start=False)
    # An estimator says how many classes there are, so the model is asked for nothing but gradients.
    attack = pgd(art_classifier(ours), eot_samples=eot_samples, batch_size=N * eot_samples)
    torch.testing.assert_close(attack(x, y), reference(x, y), rtol=0, atol=1e-12)
    assert ours.used == theirs.used == 4 * N * eot_samples


# Attacks of the toolkits

TOOLKITS = {
    "ART FGSM": lambda model, x, y: torch.from_numpy(
        art.FastGradientMethod(art_classifier(model), eps=EPS).generate(x.numpy(), y.numpy())
    ),
    "ART PGD": lambda model, x, y: torch.from_numpy(
        art.ProjectedGradientDescent(art_classifier(model), eps=EPS, eps_step=0.02, max_iter=3, verbose=False).generate(
            x.numpy(), y.numpy()
        )
    ),
    "torchattacks PGD": lambda model, x, y: torchattacks.PGD(model, eps=EPS, alpha=0.02, steps=3)(x, y),
    "torchattacks APGD": lambda model, x, y: torchattacks.APGD(model, eps=EPS, steps=10, n_restarts=3)(x, y),
    "torchattacks EOTPGD": lambda model, x, y: torchattacks.EOTPGD(model, eps=EPS, alpha=0.02, steps=3)(x, y),
    "foolbox PGD": lambda model, x, y: foolbox.attacks.LinfPGD(steps=3)(
        foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu"), x, y, epsilons=EPS
    )[1],
    "torchattacks C&W": lambda model, x, y: torchattacks.CW(model, c=10, steps=5, lr=0.05)(x, y),
    "foolbox C&W": lambda model, x, y: foolbox.attacks.L2CarliniWagnerAttack(binary_search_steps=2, steps=5)(
        foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu"), x, y, epsilons=None
    )[1],
}


@pytest.mark.parametrize("make_defence", [rse, mi, DEFENCES["MI-Combined"]], ids=["RSE", "MI-OL", "MI-Combined"])
@pytest.mark.parametrize("toolkit", TOOLKITS)
def test_any_toolkits_attack_runs_on_any_defence(make_defence, toolkit):
    x, model = some_images(6), make_defence()
    y = labels_of(model, x)
    torch.manual_seed(0)
    x_adv = TOOLKITS[toolkit](model, x, y)
    assert x_adv.shape == x.shape
    assert x_adv.isfinite().all()
    assert ((x_adv >= 0) & (x_adv <= 1)).all()
    if "APGD" in toolkit:  # to which an image that one draw gets wrong is done
        return
    assert (x_adv != x).any()
    if "C&W" not in toolkit:
        assert (x_adv - x).abs().max() <= EPS + 1e-6
        # The gradient of the defence leads where its loss is larger.
        with torch.no_grad():
            losses = [
                torch.stack([nn.functional.nll_loss(model(images), y) for _ in range(9)]).mean()
                for images in (x, x_adv)
            ]
        assert losses[1] > losses[0]
