"""The defences as ART classifiers: they predict as the modules, ART and native attacks run on them, `fit` trains."""

import numpy as np
import pytest
import torch
from art.attacks import evasion as art_attacks
from models_for_tests import (
    CLASSES,
    SHAPE,
    art_classifier,
    linear_model,
    small_net,
    some_images,
    some_labels,
    traceable_net,
)
from torch import nn

from guardians.attacks import FGSM, PGD
from guardians.defences import AdversarialTrainer, MixupInference, RandomSelfEnsemble
from guardians.engine.victim import Victim
from guardians.estimators import MixupInferenceClassifier, RandomSelfEnsembleClassifier

N = 10
X, Y = some_images(N).numpy(), some_labels(N).numpy()
ONE_HOT = np.eye(CLASSES, dtype=np.float32)[Y]
POOL = some_images(20, seed=5), torch.arange(20) % CLASSES
EPS = 0.1
NAN = float("nan")

RSE = {"sigma_init": 0.3, "sigma_inner": 0.05, "n": 7, "chunk_size": 9, "seed": 3}
MI = {"method": "MI-Combined", "lam": 0.6, "num_samples": 4, "chunk_size": 9, "seed": 3}
MI |= {"detection_lam": 0.7, "detection_samples": 3, "threshold": 0.005}
CASES = {"RSE": RSE, "MI-PL": {**MI, "method": "MI-PL"}, "MI-OL": {**MI, "method": "MI-OL"}, "MI-Combined": MI}
every_defence = pytest.mark.parametrize("case", CASES)


def module_of(case, net=None, **changes):
    """The defence by itself."""
    net, options = small_net() if net is None else net, {**CASES[case], **changes}
    return RandomSelfEnsemble(net, **options) if case == "RSE" else MixupInference(net, POOL, **options)


def classifier_of(case, net=None, **changes):
    """The defence as an ART classifier."""
    net = small_net() if net is None else net
    options = {"loss": nn.CrossEntropyLoss(), "input_shape": SHAPE, "nb_classes": CLASSES, "device_type": "cpu"}
    options |= {"clip_values": (0.0, 1.0), **CASES[case], **changes}
    if case == "RSE":
        return RandomSelfEnsembleClassifier(net, **options)
    return MixupInferenceClassifier(net, POOL, **options)


def answers_of(module, x=X):
    with torch.no_grad():
        return module(torch.from_numpy(x)).numpy()


class TestPredict:
    @every_defence
    @pytest.mark.parametrize("batch_size", [3, 8, 128])
    def test_is_the_module_in_batches_of_any_size(self, case, batch_size):
        found = classifier_of(case).predict(X, batch_size=batch_size)
        np.testing.assert_allclose(found, answers_of(module_of(case)), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(np.exp(found).sum(1), 1, rtol=1e-5)

    @pytest.mark.parametrize(("case", "name"), [(case, name) for case, options in CASES.items() for name in options])
    def test_arguments_reach_the_module(self, case, name):
        """Each changes the answer, but the size of chunks and those that a method has no use for."""
        others = {"sigma_init": 0.1, "sigma_inner": 0.2, "n": 3, "chunk_size": 2, "seed": 4, "lam": 0.3}
        others |= {"num_samples": 2, "detection_lam": 0.2, "detection_samples": 1, "threshold": -0.2, "method": "MI-PL"}
        change = {name: others[name]}
        found = classifier_of(case, **change).predict(X)
        np.testing.assert_allclose(found, answers_of(module_of(case, **change)), rtol=1e-4, atol=1e-5)
        unused = {"chunk_size"} | ({"method"} if case == "MI-PL" else set())
        if case != "MI-Combined":
            unused |= {"detection_lam", "detection_samples", "threshold"}
        assert np.allclose(found, classifier_of(case).predict(X), atol=1e-4) == (name in unused)

    @every_defence
    def test_model_is_the_defence(self, case):
        classifier = classifier_of(case)
        assert type(classifier.model) is type(module_of(case))
        assert (classifier.input_shape, classifier.nb_classes) == (SHAPE, CLASSES)

    def test_preprocessing_comes_before_the_noise(self):
        """Images are standardised as ART does it, then given to the ensemble."""
        mean, std = np.full((3, 1, 1), 0.4, np.float32), np.array([0.2, 0.3, 0.4], np.float32).reshape(3, 1, 1)
        found = classifier_of("RSE", preprocessing=(mean, std)).predict(X)
        np.testing.assert_allclose(found, answers_of(module_of("RSE"), (X - mean) / std), rtol=1e-4, atol=1e-4)


class TestGradients:
    @every_defence
    def test_loss_gradient_is_that_of_the_module(self, case):
        found = classifier_of(case).loss_gradient(X, ONE_HOT)
        x = torch.from_numpy(X).requires_grad_()
        loss = nn.functional.cross_entropy(module_of(case)(x), torch.from_numpy(Y))
        (expected,) = torch.autograd.grad(loss, x)
        assert found.shape == X.shape
        assert np.isfinite(found).all()
        assert np.abs(found).max() > 0
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))

    @every_defence
    def test_class_gradient(self, case):
        """Of each class's log-probability; one at a time they are the same."""
        found = classifier_of(case).class_gradient(X)
        x = torch.from_numpy(X).requires_grad_()
        answers = module_of(case)(x)
        expected = [torch.autograd.grad(answers[:, k].sum(), x, retain_graph=True)[0] for k in range(CLASSES)]
        expected = torch.stack(expected, dim=1).numpy()
        assert found.shape == (N, CLASSES, *SHAPE)
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())
        single = classifier_of(case).class_gradient(X, label=2)
        assert single.shape == (N, 1, *SHAPE)
        np.testing.assert_allclose(single[:, 0], expected[:, 2], rtol=1e-3, atol=1e-4 * np.abs(expected).max())


ATTACKS = {
    "native FGSM": lambda c: FGSM(c, eps=EPS, seed=0),
    "native PGD": lambda c: PGD(c, eps=EPS, eps_step=0.03, max_iter=4, seed=0, verbose=False),
    "ART FGSM": lambda c: art_attacks.FastGradientMethod(c, eps=EPS),
    "ART PGD": lambda c: art_attacks.ProjectedGradientDescent(c, eps=EPS, eps_step=0.03, max_iter=4, verbose=False),
}


class TestAttacks:
    @every_defence
    @pytest.mark.parametrize("name", ATTACKS)
    def test_raises_the_loss_within_the_ball(self, case, name):
        classifier = classifier_of(case)
        x_adv = ATTACKS[name](classifier).generate(X, Y)
        assert x_adv.shape == X.shape
        assert x_adv.dtype == np.float32
        assert (np.abs(x_adv - X) <= EPS + 1e-6).all()
        assert ((x_adv >= 0) & (x_adv <= 1)).all()
        rows = np.arange(N)
        before, after = (answers_of(module_of(case), x)[rows, Y].mean() for x in (X, x_adv))
        assert after < before - 0.05

    @every_defence
    def test_native_attacks_take_it_as_an_estimator(self, case):
        classifier = classifier_of(case, clip_values=(-1.0, 2.0))
        victim = Victim(classifier)
        assert victim.module is classifier.model
        assert (victim.nb_classes, victim.input_shape) == (CLASSES, SHAPE)
        assert tuple(map(float, victim.clip_values)) == (-1.0, 2.0)

    def test_native_attack_is_clipped_to_clip_values(self):
        classifier = classifier_of("RSE", clip_values=(0.2, 0.8))
        x = X.clip(0.2, 0.8)
        x_adv = FGSM(classifier, eps=EPS, seed=0).generate(x, Y)
        assert (x_adv.min(), x_adv.max()) == (np.float32(0.2), np.float32(0.8))

    def test_native_attack_honours_preprocessing(self):
        """The model that divides by itself is attacked in the same way."""

        class Standardised(nn.Module):
            def __init__(self):
                super().__init__()
                self.ensemble = module_of("RSE")

            def forward(self, x):
                return self.ensemble((x - 0.4) / 0.25)

        settings = {"eps": EPS, "eps_step": 0.03, "max_iter": 3, "seed": 0, "verbose": False, "precision": "float32"}
        found = PGD(classifier_of("RSE", preprocessing=(0.4, 0.25)), **settings).generate(X, Y)
        expected = PGD(Standardised().eval(), **settings).generate(X, Y)
        plain = PGD(classifier_of("RSE"), **settings).generate(X, Y)
        assert (np.abs(found - expected) > 1e-5).mean() < 0.02  # steps where a gradient's sign is rounding
        assert (np.abs(found - plain) > 1e-5).mean() > 0.1

    @every_defence
    def test_native_attack_does_not_depend_on_the_batch_size(self, case):
        settings = {"eps": EPS, "eps_step": 0.03, "max_iter": 2, "seed": 0, "verbose": False, "precision": "float32"}
        found = [PGD(classifier_of(case), **settings, batch_size=size).generate(X, Y) for size in (3, 10)]
        assert (np.abs(found[0] - found[1]) > 1e-5).mean() < 0.02


def with_optimizer(make, net, *args, **options):
    return make(*args, net, optimizer=torch.optim.SGD(net.parameters(), lr=0.05), **options)


class TestFit:
    @staticmethod
    def fitted(case, net, **changes):
        classifier = with_optimizer(classifier_of, net, case, **changes)
        torch.manual_seed(0)  # ART shuffles by it
        classifier.fit(X, ONE_HOT, batch_size=4, nb_epochs=3)
        return classifier

    @staticmethod
    def plain(net):
        """What training without a defence makes of it."""
        classifier = art_classifier(net, optimizer=torch.optim.SGD(net.parameters(), lr=0.05))
        torch.manual_seed(0)
        classifier.fit(X, ONE_HOT, batch_size=4, nb_epochs=3)
        return net

    @staticmethod
    def largest_difference(net, other):
        pairs = zip(net.state_dict().values(), other.state_dict().values(), strict=True)
        return max(float((a.double() - b.double()).abs().max()) for a, b in pairs)

    @every_defence
    @pytest.mark.parametrize("make_net", [small_net, traceable_net], ids=["not traceable", "folded"])
    def test_trains_the_parameters_of_the_model_and_leaves_its_structure(self, case, make_net):
        net = make_net()
        modules, keys = dict(net.named_modules()), list(net.state_dict())
        parameters = {name: id(parameter) for name, parameter in net.named_parameters()}
        before = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
        classifier = self.fitted(case, net)
        assert dict(net.named_modules()) == modules
        assert list(net.state_dict()) == keys
        assert {name: id(parameter) for name, parameter in net.named_parameters()} == parameters
        for name, parameter in net.named_parameters():
            if "bias" not in name or "head" in name:  # batch norm takes away the biases before it
                assert not torch.equal(parameter, before[name]), name
        assert self.largest_difference(net, make_net()) > 0.01
        fresh = module_of(case, net.eval())
        fresh.images_seen = classifier.model.images_seen
        np.testing.assert_allclose(classifier.predict(X), answers_of(fresh), rtol=1e-4, atol=1e-5)

    def test_noise_is_on_in_training(self):
        """And without noise it is plain training."""
        plain, silent, noisy = self.plain(small_net()), small_net(), small_net()
        self.fitted("RSE", silent, sigma_init=0, sigma_inner=0)
        self.fitted("RSE", noisy)
        assert self.largest_difference(silent, plain) < 1e-4
        assert self.largest_difference(noisy, plain) > 0.01

    @pytest.mark.parametrize("case", ["MI-PL", "MI-OL", "MI-Combined"])
    def test_mixup_inference_trains_the_plain_model(self, case):
        plain, defended = self.plain(small_net()), small_net()
        self.fitted(case, defended)
        assert self.largest_difference(defended, plain) < 1e-4

    def test_trained_with_noise_it_answers_better_with_noise(self):
        """On images whose strongest channel is their label, under noise that hides it from the untrained."""
        rng = np.random.default_rng(0)
        y = np.arange(60) % 3
        x = rng.uniform(0.2, 0.6, size=(60, *SHAPE)).astype(np.float32)
        x[np.arange(60), y] += 0.3
        classifier = with_optimizer(classifier_of, small_net(), "RSE", n=5)
        torch.manual_seed(0)
        before = (classifier.predict(x).argmax(1) == y).mean()
        classifier.fit(x, np.eye(CLASSES, dtype=np.float32)[y], batch_size=20, nb_epochs=8)
        after = (classifier.predict(x).argmax(1) == y).mean()
        assert before < 0.6
        assert after > 0.9

    @every_defence
    def test_adversarial_training(self, case):
        """A defence is a classifier as any other to the trainer, and both runs of a seed are the same."""
        states = []
        for _ in range(2):
            net = small_net()
            classifier = with_optimizer(classifier_of, net, case)
            trainer = AdversarialTrainer(classifier, FGSM(classifier, eps=EPS), holdout=0, seed=0, verbose=False)
            trainer.fit(X, Y, batch_size=4, nb_epochs=1)
            states.append(net)
        assert self.largest_difference(*states) == 0
        assert self.largest_difference(states[0], small_net()) > 1e-3

    @every_defence
    def test_without_an_optimizer(self, case):
        with pytest.raises(ValueError, match="optimizer"):
            classifier_of(case).fit(X, ONE_HOT)


class TestBadArguments:
    @pytest.mark.parametrize(
        ("case", "change"),
        [
            ("RSE", {"sigma_init": -0.1}),
            ("RSE", {"sigma_init": "0.1"}),
            ("RSE", {"sigma_inner": NAN}),
            ("RSE", {"n": 0}),
            ("RSE", {"n": 2.5}),
            ("RSE", {"chunk_size": 0}),
            ("RSE", {"seed": -1}),
            ("RSE", {"net": linear_model()}),
            ("MI-OL", {"method": "MI"}),
            ("MI-OL", {"lam": 0}),
            ("MI-OL", {"lam": 1.1}),
            ("MI-OL", {"num_samples": 0}),
            ("MI-OL", {"detection_lam": NAN}),
            ("MI-OL", {"detection_samples": 1.5}),
            ("MI-OL", {"threshold": None}),
            ("MI-OL", {"chunk_size": "all"}),
            ("MI-OL", {"seed": 0.5}),
        ],
    )
    def test_as_of_the_module(self, case, change):
        (name,) = change
        with pytest.raises((TypeError, ValueError)) as expected:
            module_of(case, **change)
        with pytest.raises(type(expected.value)) as found:
            classifier_of(case, **change)
        assert str(found.value) == str(expected.value)
        assert name.replace("net", "model") in str(found.value)

    @pytest.mark.parametrize(
        "pool", [None, POOL[0], (POOL[0], POOL[1][:-1]), (POOL[0] + 1, POOL[1]), (POOL[0], 0 * POOL[1])]
    )
    def test_pool(self, pool):
        with pytest.raises((TypeError, ValueError)) as expected:
            MixupInference(small_net(), pool)
        with pytest.raises(type(expected.value)) as found:
            MixupInferenceClassifier(small_net(), pool, nn.CrossEntropyLoss(), SHAPE, CLASSES)
        assert str(found.value) == str(expected.value)
        assert "pool" in str(found.value)

    @every_defence
    def test_unknown(self, case):
        with pytest.raises(TypeError, match="colour"):
            classifier_of(case, colour="red")
