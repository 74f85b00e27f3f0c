"""The defences as ART classifiers: they predict as the modules, ART and native attacks run on them, `fit` trains."""

import pickle

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

    @every_defence
    def test_recurrent_model_is_defended_too(self, case):
        """As ART takes gradients of recurrent models in training mode, in which a defence is the model itself."""

        class Recurrent(nn.Module):
            def __init__(self):
                super().__init__()
                self.conv, self.rnn = nn.Conv2d(3, 4, 3, padding=1), nn.GRU(32, 16, batch_first=True)
                self.head = nn.Linear(16, CLASSES)

            def forward(self, x):
                return self.head(self.rnn(self.conv(x).movedim(2, 1).flatten(2))[1][0])

        torch.manual_seed(0)
        net = Recurrent().eval()
        found = classifier_of(case, net).loss_gradient(X, ONE_HOT)
        x = torch.from_numpy(X).requires_grad_()
        loss = nn.functional.cross_entropy(module_of(case, net.eval())(x), torch.from_numpy(Y))
        (expected,) = torch.autograd.grad(loss, x)
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


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


def trainable(case, net=None, **changes):
    """A classifier with an optimizer whose every setting is unusual; "undefended" is ART's."""
    net = small_net() if net is None else net
    optimizer = torch.optim.SGD(net.parameters(), lr=0.03, momentum=0.8, weight_decay=0.01)
    if case == "undefended":
        return art_classifier(net, optimizer=optimizer, **changes)
    return classifier_of(case, net, optimizer=optimizer, **changes)


every_net = pytest.mark.parametrize("make_net", [small_net, traceable_net], ids=["nested", "flat"])


class TestRefitting:
    @staticmethod
    def clone_of(classifier):
        torch.manual_seed(1)
        return classifier.clone_for_refitting()

    @every_defence
    @every_net
    def test_weights_are_those_of_arts_clone(self, case, make_net):
        """Which draws them anew, layer by layer, from the global generator."""
        expected = self.clone_of(trainable("undefended", make_net())).model.state_dict()
        found = self.clone_of(trainable(case, make_net())).model.undefended()
        assert [type(layer) for layer in found.modules()] == [type(layer) for layer in make_net().modules()]
        assert list(found.state_dict()) == list(expected)
        for name, weights in found.state_dict().items():
            assert torch.equal(weights, expected[name]), name

    @every_defence
    def test_defence_is_the_same(self, case):
        """As one that is made anew around the fresh weights, with the same draws."""
        classifier = trainable(case)
        classifier.predict(X)  # the draws of a clone begin at the first image
        clone = self.clone_of(classifier)
        assert type(clone) is type(classifier)
        assert type(clone.model) is type(classifier.model)
        expected = answers_of(module_of(case, clone.model.undefended().eval()))
        np.testing.assert_allclose(clone.predict(X), expected, rtol=1e-4, atol=1e-5)

    @every_defence
    def test_settings_are_the_same(self, case):
        loss = nn.CrossEntropyLoss(label_smoothing=0.1)
        classifier = trainable(case, loss=loss, clip_values=(-1.0, 2.0))
        clone = self.clone_of(classifier)
        assert clone.loss is loss
        assert (clone.input_shape, clone.nb_classes, clone.device_type) == (SHAPE, CLASSES, "cpu")
        assert clone.clip_values.tolist() == [-1, 2]
        assert type(clone.optimizer) is type(classifier.optimizer)
        assert clone.optimizer.defaults == classifier.optimizer.defaults

    def test_preprocessing_is_the_same(self):
        clone = self.clone_of(trainable("RSE", preprocessing=(0.4, 0.25)))
        expected = answers_of(module_of("RSE", clone.model.undefended().eval()), ((X - 0.4) / 0.25).astype(np.float32))
        np.testing.assert_allclose(clone.predict(X), expected, rtol=1e-4, atol=1e-4)

    @every_defence
    def test_clone_is_fitted_and_the_original_stays(self, case):
        net = small_net()
        before = {name: value.clone() for name, value in net.state_dict().items()}
        clone = self.clone_of(trainable(case, net))
        fresh = clone.model.undefended().state_dict()
        clone.fit(X, ONE_HOT, batch_size=5, nb_epochs=1)
        trained = clone.model.undefended().state_dict()
        assert not torch.equal(trained["head.weight"], fresh["head.weight"])
        assert not torch.equal(trained["features.1.running_mean"], fresh["features.1.running_mean"])
        for name, value in net.state_dict().items():
            assert torch.equal(value, before[name]), name

    @every_defence
    def test_clone_of_a_clone(self, case):
        classifier = trainable(case)
        found, expected = self.clone_of(self.clone_of(classifier)), self.clone_of(classifier)
        np.testing.assert_array_equal(found.predict(X), expected.predict(X))

    @every_defence
    def test_reset_draws_as_arts(self, case):
        plain, classifier = trainable("undefended"), trainable(case)
        for estimator in (plain, classifier):
            torch.manual_seed(1)
            estimator.reset()
        found = classifier.model.undefended().state_dict()
        for name, weights in plain.model.state_dict().items():
            assert torch.equal(weights, found[name]), name

    @every_defence
    def test_without_an_optimizer(self, case):
        for estimator in (art_classifier(small_net()), classifier_of(case)):
            with pytest.raises(ValueError, match="optimizer"):
                estimator.clone_for_refitting()

    def test_undefended_model_has_every_convolution_in_its_place(self):
        """Also one with two names, and one that is the model."""

        class Twice(nn.Module):
            def __init__(self):
                super().__init__()
                self.first = nn.Conv2d(3, 3, 3, padding=1)
                self.second = self.first
                self.rest = small_net()

            def forward(self, x):
                return self.rest(self.second(self.first(x)))

        for net in (Twice().eval(), nn.Sequential(nn.Conv2d(3, CLASSES, 8), nn.Flatten())[0]):
            found = RandomSelfEnsemble(net).undefended()
            names = [(name, type(part)) for name, part in net.named_modules(remove_duplicate=False)]
            assert [(name, type(part)) for name, part in found.named_modules(remove_duplicate=False)] == names
            np.testing.assert_allclose(answers_of(found), answers_of(net), rtol=1e-5, atol=1e-6)


FEATURE_ATTACKS = {
    "PyTorch": lambda c: art_attacks.FeatureAdversariesPyTorch(
        c, delta=EPS, layer="features", max_iter=8, step_size=0.03, verbose=False
    ),
    "NumPy": lambda c: art_attacks.FeatureAdversariesNumpy(c, delta=EPS, layer=0, batch_size=1),
}


class TestLayers:
    """They are those of the model without the defence, as ART has them."""

    @every_defence
    @every_net
    def test_activations_are_arts_of_the_undefended_model(self, case, make_net):
        plain, classifier = trainable("undefended", make_net()), trainable(case, make_net())
        assert classifier.layer_names == plain.layer_names
        for layer in (*plain.layer_names, *range(-1, len(plain.layer_names))):
            found, expected = (estimator.get_activations(X, layer, batch_size=4) for estimator in (classifier, plain))
            assert found.dtype == np.float32
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)

    def test_names_of_a_model_that_is_a_convolution(self):
        conv = nn.Conv2d(3, CLASSES, 8)
        assert classifier_of("RSE", nn.Sequential(conv, nn.Flatten())).layer_names == ["0", "1"]
        assert classifier_of("RSE", conv).layer_names == art_classifier(conv).layer_names == []

    def test_preprocessing(self):
        classifiers = trainable("RSE", preprocessing=(0.4, 0.25)), trainable("undefended", preprocessing=(0.4, 0.25))
        found, expected = (classifier.get_activations(X, 0) for classifier in classifiers)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)

    @every_defence
    def test_gradients_flow_to_the_images(self, case):
        guide, gradients = X[::-1].copy(), []
        for estimator in (trainable(case), trainable("undefended")):
            x = torch.from_numpy(X).requires_grad_()
            estimator.get_activations(x, "features", framework=True).square().sum().backward()
            gradients += [x.grad.numpy()]
            gradients += [estimator.custom_loss_gradient(lambda d, p: d.norm(p=p), X, guide, "features")]
        np.testing.assert_allclose(gradients[0], gradients[2], rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(gradients[1], gradients[3], rtol=1e-4, atol=1e-4)

    @every_defence
    def test_predictions_are_the_same_afterwards(self, case):
        """No draw was used, and no hook stays behind."""
        classifier = classifier_of(case)
        classifier.get_activations(X, 0)
        np.testing.assert_array_equal(classifier.predict(X), classifier_of(case).predict(X))
        assert not any(layer._forward_hooks for layer in classifier.model.modules())

    @every_defence
    @pytest.mark.parametrize("name", FEATURE_ATTACKS)
    def test_feature_adversaries(self, case, name):
        """Which come nearer to the guide in the layer, within the ball."""
        classifier = trainable(case)
        x, guide = X[:2], X[4:6]
        options = {"maxiter": 3} if name == "NumPy" else {}
        x_adv = FEATURE_ATTACKS[name](classifier).generate(x, guide, **options)
        before, after, goal = (classifier.get_activations(images, 0) for images in (x, x_adv, guide))
        assert np.square(after - goal).sum() < 0.98 * np.square(before - goal).sum()
        assert np.abs(x_adv - x).max() <= EPS + 1e-6

    @every_defence
    @pytest.mark.parametrize(
        ("layer", "error"), [("nose", ValueError), (2, IndexError), (None, TypeError), (0.5, TypeError)]
    )
    def test_bad_layer(self, case, layer, error):
        for estimator in (trainable("undefended"), classifier_of(case)):
            with pytest.raises(error):
                estimator.get_activations(X, layer)

    def test_layer_that_is_not_called(self):
        class WithSpare(nn.Module):
            def __init__(self):
                super().__init__()
                self.net, self.spare = small_net(), nn.Linear(2, 2)

            def forward(self, x):
                return self.net(x)

        for estimator in (art_classifier(WithSpare()), classifier_of("RSE", WithSpare())):
            with pytest.raises(KeyError, match="spare"):
                estimator.get_activations(X, "spare")


class TestFiles:
    @pytest.fixture(autouse=True)
    def folder(self, tmp_path, monkeypatch):
        monkeypatch.setattr("art.config.ART_DATA_PATH", str(tmp_path))
        return tmp_path

    @every_defence
    @every_net
    def test_pickle_goes_on_with_the_same_draws(self, case, make_net):
        classifier = trainable(case, make_net())
        classifier.predict(X)
        classifier.get_activations(X, 0)
        other = pickle.loads(pickle.dumps(classifier))
        np.testing.assert_array_equal(other.predict(X), classifier.predict(X))
        assert other.layer_names == classifier.layer_names
        for estimator in (classifier, other):
            torch.manual_seed(0)
            estimator.fit(X, ONE_HOT, batch_size=4, nb_epochs=1)
        np.testing.assert_array_equal(other.predict(X), classifier.predict(X))

    def test_pickle_has_no_memory_for_noise(self):
        """It would be many times the model."""
        sizes = []
        for images in (1, 60):
            classifier = classifier_of("RSE", chunk_size=512)
            classifier.predict(some_images(images).numpy())
            sizes.append(len(pickle.dumps(classifier)))
        assert abs(sizes[1] - sizes[0]) < 1000

    @every_defence
    def test_saved_state_is_loaded(self, case, folder):
        classifier, other = trainable(case), trainable(case, small_net(seed=1))
        classifier.save("saved", str(folder))
        other.model.load_state_dict(torch.load(folder / "saved.model"))
        np.testing.assert_allclose(other.predict(X), classifier.predict(X), rtol=1e-4, atol=1e-5)
        assert (folder / "saved.optimizer").exists()


DECISION_ATTACKS = {
    "HopSkipJump": lambda c: art_attacks.HopSkipJump(c, max_iter=2, max_eval=20, init_eval=5, verbose=False),
    "Boundary": lambda c: art_attacks.BoundaryAttack(
        c, targeted=False, max_iter=2, num_trial=3, sample_size=3, init_size=20, verbose=False
    ),
    "Square": lambda c: art_attacks.SquareAttack(c, eps=EPS, max_iter=20, verbose=False),
}


class TestEstimator:
    """What else ART's estimators do."""

    @every_defence
    @pytest.mark.parametrize("name", DECISION_ATTACKS)
    def test_decision_and_score_attacks(self, case, name):
        """With NumPy 2, ART's decision attacks ask about images in float64."""
        classifier = classifier_of(case)
        np.random.seed(0)  # noqa: NPY002 - ART draws from it
        x_adv = DECISION_ATTACKS[name](classifier).generate(X[:6])
        assert x_adv.shape == X[:6].shape
        assert ((x_adv >= 0) & (x_adv <= 1)).all()
        assert (x_adv != X[:6]).any()

    @every_defence
    def test_float64_images(self, case):
        doubles = X.astype(np.float64)
        np.testing.assert_array_equal(classifier_of(case).predict(doubles), classifier_of(case).predict(X))
        found, expected = (classifier_of(case).loss_gradient(x, ONE_HOT) for x in (doubles, X))
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)

    def test_float64_model(self):
        """It gets every digit."""
        doubles = X.astype(np.float64) + 1e-9
        net = small_net(dtype=torch.float64)
        found = classifier_of("RSE", net).get_activations(doubles, 0)
        assert found.dtype == np.float64
        np.testing.assert_allclose(found, net.features(torch.from_numpy(doubles)).detach(), rtol=1e-12, atol=1e-13)

    @every_defence
    def test_training_mode(self, case):
        """One noisy pass, or the model itself, in training mode; then all is as before but for batch norm."""
        plain, classifier = trainable("undefended"), trainable(case)
        found, expected = (estimator.predict(X, training_mode=True) for estimator in (classifier, plain))
        assert found.shape == (N, CLASSES)
        if case != "RSE":
            np.testing.assert_allclose(found, torch.from_numpy(expected).log_softmax(1), rtol=1e-4, atol=1e-4)
        classifier.predict(X)
        assert not any(layer.training for layer in classifier.model.modules())

    @every_defence
    def test_set_params(self, case):
        classifier = classifier_of(case)
        classifier.set_params(clip_values=(0.2, 0.8))
        assert classifier.clip_values.tolist() == pytest.approx([0.2, 0.8])
        x_adv = FGSM(classifier, eps=EPS, seed=0).generate(X.clip(0.2, 0.8), Y)
        assert (x_adv.min(), x_adv.max()) == (np.float32(0.2), np.float32(0.8))

    @every_defence
    @pytest.mark.parametrize("change", [{"clip_values": (1.0, 0.0)}, {"colour": "red"}])
    def test_set_bad_params(self, case, change):
        for estimator in (art_classifier(small_net()), classifier_of(case)):
            with pytest.raises(ValueError, match=next(iter(change))):
                estimator.set_params(**change)

    @pytest.mark.parametrize(
        "preprocessing", [(0.5, 1.0), (0.0, 2.0), (np.zeros((3, 1, 1)), np.full((3, 1, 1), 0.5)), "standard"]
    )
    def test_mixup_inference_takes_no_preprocessing(self, preprocessing):
        """Neither at first nor later, also of arrays."""
        with pytest.raises(ValueError, match=r"(?s)preprocessing=.*must be left out"):
            classifier_of("MI-OL", preprocessing=preprocessing)
        with pytest.raises(ValueError, match=r"(?s)preprocessing=.*must be left out"):
            classifier_of("MI-OL").set_params(preprocessing=preprocessing)

    @pytest.mark.parametrize("preprocessing", [None, (0, 1), (np.zeros((3, 1, 1)), np.ones((3, 1, 1)))])
    def test_mixup_inference_takes_preprocessing_that_does_nothing(self, preprocessing):
        found = classifier_of("MI-OL", preprocessing=preprocessing).predict(X)
        np.testing.assert_allclose(found, classifier_of("MI-OL").predict(X), rtol=1e-5, atol=1e-6)

    @every_defence
    @pytest.mark.parametrize("label", [CLASSES, -1, [CLASSES] * N])
    def test_bad_labels(self, case, label):
        for estimator in (art_classifier(small_net()), classifier_of(case)):
            with pytest.raises(ValueError, match="out of range"):
                estimator.class_gradient(X, label=label)

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
    def test_fit_on_a_gpu_trains_the_buffers_of_the_model(self):
        net = small_net()
        trainable("RSE", net, device_type="gpu").fit(X, ONE_HOT, batch_size=5, nb_epochs=1)
        assert (net.features[1].running_mean.cpu() - small_net().features[1].running_mean).abs().max() > 1e-3


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
