"""`AdversarialTrainer` against ART's trainers, and what its users rely on: draws, seeds, the watch on robustness."""

import logging
import math
import signal
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from art.attacks import evasion as art_attacks
from art.data_generators import NumpyDataGenerator, PyTorchDataGenerator
from art.defences.trainer import AdversarialTrainer as ArtTrainer
from art.defences.trainer import AdversarialTrainerMadryPGD
from models_for_tests import (
    CLASSES,
    SmallNet,
    Uncastable,
    Viewing,
    art_classifier,
    small_net,
    some_images,
    traceable_net,
)
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from guardians import attacks as native_attacks
from guardians.attacks import FGSM, PGD, CarliniWagnerL2
from guardians.defences import AdversarialTrainer, adversarial_training, training_loop

N, BATCH = 22, 8  # the last batch is of 6
X = some_images(N).numpy()
Y = np.arange(N) % CLASSES
ONE_HOT = np.eye(CLASSES, dtype=np.float32)[Y]
EPS = 0.05
LOOP = "guardians.defences.training_loop"


def trainable(net=None, lr=0.01, **options):
    """A classifier of `small_net`, the same each time."""
    net = small_net() if net is None else net
    return art_classifier(net, optimizer=torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9), **options)


def weights(classifier):
    """All parameters and statistics in one vector."""
    state = classifier.model.state_dict().values()
    return torch.cat([value.double().flatten() for value in state if value.is_floating_point()])


def seed_all(seed):
    """The global generators, of which ART draws."""
    np.random.seed(seed)  # noqa: NPY002
    torch.manual_seed(seed)


def fitted(trainer, x=X, y=ONE_HOT, epochs=1, seed=0, **options):
    """The classifier's weights after training; all global generators are seeded."""
    seed_all(seed)
    trainer.fit(x, y, batch_size=BATCH, nb_epochs=epochs, **options)
    return weights(trainer.get_classifier())


def ours(classifier, attacks, ratio=0.5, **options):
    return AdversarialTrainer(classifier, attacks, ratio, **{"verbose": False, **options})


def assert_same(found, expected, before):
    """Up to rounding, which here is less than a millionth of what training changed."""
    change = float((expected - before).abs().max())
    assert change > 1e-2
    assert float((found - expected).abs().max()) < 1e-5 * change


class Recorded(PGD):
    """PGD that notes what it is given and what it returns, in a list that its copies share."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, verbose=False, **kwargs)
        self.calls = []

    def __call__(self, x, y=None, *args, **kwargs):
        x_adv = super().__call__(x, y, *args, **kwargs)
        self.calls.append((x.clone(), y.clone(), x_adv.clone()))
        return x_adv


def trained_on(classifier):
    """A list to which the batches come on which the model is trained."""
    batches = []
    classifier.model.register_forward_pre_hook(
        lambda model, args: batches.append(args[0].clone()) if model.training else None
    )
    return batches


def rows_of(batches, x=X):
    """The row of `x` next to each image of the batches: random images are far apart."""
    seen = torch.cat(batches).flatten(1).double()
    return torch.cdist(seen, torch.from_numpy(x).flatten(1).double(), p=math.inf).min(1)


def two_features(n, seed):
    """The channel of the label is faintly brighter; a chequered channel is that of the label in most images."""
    rng = np.random.default_rng(seed)
    labels, other = rng.integers(3, size=(2, n))
    chequered = np.where(rng.random(n) < 0.7, labels, other)
    images = rng.uniform(90, 110, size=(n, 3, 6, 6))
    images[np.arange(n), labels] += 10
    images[np.arange(n), chequered] += 60 * (-1) ** (np.arange(6)[:, None] + np.arange(6))
    return (images / 255).astype(np.float32), labels


RADIUS = 12 / 255
"""More than the faint feature survives."""


def of_two_features(seed=0):
    """A small classifier for `two_features`."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 3),
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return art_classifier(model, optimizer=optimizer, input_shape=(3, 6, 6), nb_classes=3)


def robust_accuracy(classifier):
    """Under PGD-10 on test images of `two_features`."""
    x, y = two_features(200, seed=3)
    attack = PGD(classifier, eps=RADIUS, eps_step=RADIUS / 4, max_iter=10, precision="float32", verbose=False)
    return float((classifier.predict(attack.generate(x, y)).argmax(1) == y).mean())


ATTACKS = {
    "FGSM": ("FastGradientMethod", {"eps": EPS}),
    "FGSM L2": ("FastGradientMethod", {"eps": 0.5, "norm": 2}),
    "PGD": ("ProjectedGradientDescent", {"eps": EPS, "eps_step": 0.02, "max_iter": 3, "verbose": False}),
}


class TestAgainstArt:
    """The same np.random seed gives the same weights."""

    @staticmethod
    def made(name, classifier, module):
        kind, options = ATTACKS[name]
        return getattr(module, kind)(classifier, batch_size=BATCH, **options)

    @classmethod
    def both(cls, names, ratio, make=trainable, native=True, **options):
        """Weights after our and after ART's trainer, and before."""
        classifier, reference = make(), make()
        before = weights(classifier)
        mine = [cls.made(name, classifier, native_attacks if native else art_attacks) for name in names]
        theirs = [cls.made(name, reference, art_attacks) for name in names]
        found = fitted(ours(classifier, mine if len(mine) > 1 else mine[0], ratio), **options)
        return found, fitted(ArtTrainer(reference, theirs, ratio), **options), before

    @pytest.mark.parametrize("ratio", [0.3, 0.5, 1.0])
    @pytest.mark.parametrize("names", [["FGSM"], ["FGSM L2"], ["PGD"], ["PGD", "FGSM"]], ids="+".join)
    def test_native_attacks(self, names, ratio):
        assert_same(*self.both(names, ratio, epochs=2))

    @pytest.mark.parametrize("names", [["FGSM"], ["PGD", "FGSM"]], ids="+".join)
    def test_attacks_of_art_in_our_trainer(self, names):
        assert_same(*self.both(names, 0.5, native=False, epochs=2))

    @pytest.mark.parametrize("native", [True, False])
    def test_preprocessing_is_honoured(self, native):
        mean, std = np.full((3, 1, 1), 0.4, np.float32), np.array([0.2, 0.3, 0.4], np.float32).reshape(3, 1, 1)
        found, expected, before = self.both(
            ["FGSM"], 0.5, lambda: trainable(preprocessing=(mean, std)), native, epochs=2
        )
        assert_same(found, expected, before)
        without, _, _ = self.both(["FGSM"], 0.5, epochs=2)
        assert (without - expected).abs().max() > 0.01

    @pytest.mark.parametrize(
        "make",
        [
            lambda: trainable(loss=nn.MultiMarginLoss()),
            lambda: trainable(nn.Sequential(small_net(), nn.LogSoftmax(1)), loss=nn.NLLLoss()),
            lambda: trainable(loss=nn.CrossEntropyLoss(label_smoothing=0.3)),
        ],
        ids=["multi-margin", "negative log-likelihood", "label smoothing"],
    )
    def test_loss_is_honoured(self, make):
        assert_same(*self.both(["FGSM"], 0.5, make, epochs=2))

    @pytest.mark.parametrize("native", [True, False])
    def test_attack_on_another_estimator_runs_once_before_training(self, native, monkeypatch):
        calls = []
        kind = FGSM if native else art_attacks.FastGradientMethod
        generate = kind.generate
        monkeypatch.setattr(
            kind,
            "generate",
            lambda self, x, *args, **options: calls.append(len(x)) or generate(self, x, *args, **options),
        )
        source = art_classifier(small_net(seed=1))
        classifier, reference = trainable(), trainable()
        before = weights(classifier)
        mine = [kind(source, eps=0.2), PGD(classifier, eps=EPS, eps_step=0.02, max_iter=2, verbose=False)]
        found = fitted(ours(classifier, mine), epochs=2)
        assert calls == [N]
        theirs = [
            art_attacks.FastGradientMethod(source, eps=0.2),
            art_attacks.ProjectedGradientDescent(reference, eps=EPS, eps_step=0.02, max_iter=2, verbose=False),
        ]
        assert_same(found, fitted(ArtTrainer(reference, theirs, 0.5), epochs=2), before)

    def test_madry_from_the_image(self):
        classifier, reference = trainable(), trainable()
        before = weights(classifier)
        options = {"eps": EPS, "eps_step": 0.02, "max_iter": 3, "num_random_init": 0}
        found = fitted(ours(classifier, PGD(classifier, **options, verbose=False), 1.0), epochs=2)
        madry = AdversarialTrainerMadryPGD(reference, **options)
        assert_same(found, fitted(madry, epochs=2), before)

    def test_madry_from_random_starts(self):
        """Other draws, but a model that is as robust."""
        x, y = two_features(400, seed=2)
        robust, options = [], {"eps": RADIUS, "eps_step": RADIUS / 2, "max_iter": 3, "num_random_init": 1}
        for kind in (ours, None):
            classifier = of_two_features()
            seed_all(0)
            if kind is None:
                trainer = AdversarialTrainerMadryPGD(classifier, **options)
            else:
                trainer = ours(classifier, PGD(classifier, **options, seed=0, verbose=False), 1.0, seed=0)
            trainer.fit(x, np.eye(3, dtype=np.float32)[y], batch_size=50, nb_epochs=8)
            robust.append(robust_accuracy(classifier))
        assert min(robust) > 0.45
        assert abs(robust[0] - robust[1]) < 0.1

    def test_scheduler_steps_after_each_batch(self):
        rates, results = [], []
        for kind in (ours, ArtTrainer):
            classifier = trainable()
            before = weights(classifier)
            scheduler = torch.optim.lr_scheduler.ExponentialLR(classifier.optimizer, 0.8)
            attack = art_attacks.FastGradientMethod(classifier, eps=EPS)
            results.append(fitted(kind(classifier, attack), epochs=2, scheduler=scheduler))
            rates.append(scheduler.get_last_lr()[0])
        assert rates == pytest.approx([0.01 * 0.8**6] * 2)
        assert_same(*results, before)

    def test_defaults_compute_as_art_does(self, monkeypatch):
        """In the model's own precision and on all images, though there are enough to hold some out."""
        monkeypatch.setattr(adversarial_training, "_WATCHABLE", 1)
        monkeypatch.setattr(f"{LOOP}.bfloat16_is_native", lambda device: True)
        x, y = some_images(100).numpy(), np.arange(100) % CLASSES
        found = []
        for kind, attack in ((AdversarialTrainer, FGSM), (ArtTrainer, art_attacks.FastGradientMethod)):
            classifier = trainable()
            seen = trained_on(classifier)
            seed_all(0)
            trainer = kind(classifier, attack(classifier, eps=EPS))
            trainer.fit(x, np.eye(CLASSES, dtype=np.float32)[y], batch_size=50, nb_epochs=1)
            assert sum(map(len, seen)) == 100
            found.append(weights(classifier))
        assert (found[0] - found[1]).abs().max() < 1e-6

    @pytest.mark.parametrize("fit", ["fit", "fit_generator"])
    @pytest.mark.parametrize(
        "options",
        [
            {"validation_data": None},
            {"validation_data": (X, ONE_HOT), "training_mode": True},
            {"drop_last": True},
            {"training_mode": False},
            {"training_mode": False, "drop_last": True, "scheduler": None},
            {"unheard_of": 1},
        ],
        ids=str,
    )
    def test_options_of_fit(self, options, fit):
        """The last batch is smaller than the others, and in training mode batch norm tells."""
        results, modes = [], []
        for kind, attack in ((ours, FGSM), (ArtTrainer, art_attacks.FastGradientMethod)):
            classifier = trainable()
            before = weights(classifier)
            trainer = kind(classifier, attack(classifier, eps=EPS))
            seed_all(0)
            if fit == "fit":
                trainer.fit(X, ONE_HOT, BATCH, 2, **options)
            else:
                generator = NumpyDataGenerator(X, ONE_HOT, BATCH, drop_remainder=False, shuffle=True)
                trainer.fit_generator(generator, 2, **options)
            results.append(weights(classifier))
            modes.append(classifier.model.training)
        assert modes == [options.get("training_mode", True)] * 2
        assert_same(*results, before)

    def test_options_without_effect_are_named_in_the_log(self, caplog):
        classifier = trainable()
        trainer = ours(classifier, FGSM(classifier, eps=EPS))
        fitted(trainer, validation_data=None, drop_last=True)
        assert not caplog.records
        fitted(trainer, shedule=1)
        assert "without effect, as in PyTorchClassifier.fit: shedule" in caplog.text

    def test_no_epochs(self):
        for kind in (ours, ArtTrainer):
            classifier = trainable()
            before = weights(classifier)
            assert torch.equal(fitted(kind(classifier, FGSM(classifier, eps=EPS)), epochs=0), before)

    def test_attacks_of_art_are_silenced_as_art_does(self, capfd):
        for kind in (ours, ArtTrainer):
            classifier = trainable()
            attack = art_attacks.ProjectedGradientDescent(classifier, eps=EPS, eps_step=0.02, max_iter=2, verbose=True)
            fitted(kind(classifier, attack))
            assert not attack.verbose
            assert "PGD" not in "".join(capfd.readouterr())

    @pytest.mark.parametrize("ratio", [0.5, 1.0])
    def test_generator(self, ratio):
        results = []
        for kind, attacks in ((ours, FGSM), (ArtTrainer, art_attacks.FastGradientMethod)):
            classifier = trainable()
            before = weights(classifier)
            generator = NumpyDataGenerator(X, ONE_HOT, batch_size=BATCH, drop_remainder=False, shuffle=False)
            seed_all(0)
            kind(classifier, attacks(classifier, eps=EPS), ratio).fit_generator(generator, nb_epochs=2)
            results.append(weights(classifier))
        assert_same(*results, before)

    @pytest.mark.parametrize("drop_remainder", [True, False])
    @pytest.mark.parametrize("ratio", [0.3, 1.0])
    def test_generator_with_an_attack_on_another_estimator(self, ratio, drop_remainder):
        """The same images as ART's trainer trains on, but with their labels: ART takes those of others."""
        source, images, right = art_classifier(small_net(seed=1)), [], []
        for kind in (ours, ArtTrainer):
            labels = []

            class Noting(nn.CrossEntropyLoss):
                def forward(self, logits, target, noted=labels):
                    noted.append(target.clone())
                    return super().forward(logits, target)

            classifier = trainable(loss=Noting())
            seen = trained_on(classifier)
            generator = NumpyDataGenerator(X, ONE_HOT, BATCH, drop_remainder=drop_remainder, shuffle=True)
            seed_all(0)
            attack = art_attacks.FastGradientMethod(source, eps=EPS)
            kind(classifier, attack, ratio).fit_generator(generator, nb_epochs=2)
            images.append([{image.numpy().tobytes() for image in batch} for batch in seen])  # ART shuffles a batch
            distances, rows = rows_of(seen)
            assert (distances <= EPS + 1e-6).all()
            assert (distances > 0).float().mean() > 0.9 * ratio
            right.append(torch.from_numpy(Y)[rows] == torch.cat(labels))
        assert images[0] == images[1]
        assert right[0].all()
        assert not right[1].all()


class TestBatches:
    @pytest.mark.parametrize("ratio", [0, 0.1, 0.5, 0.8, 1])
    def test_share_of_images_that_is_replaced(self, ratio):
        """Of each batch ceil(ratio n) images, within the ball and with their labels; the others stay as they are."""
        classifier = trainable()
        attack, seen = Recorded(classifier, eps=EPS, eps_step=EPS, max_iter=1), trained_on(classifier)
        fitted(ours(classifier, attack, ratio), epochs=2)
        sizes = [BATCH, BATCH, N - 2 * BATCH] * 2
        assert [len(batch) for batch in seen] == sizes
        assert [len(x) for x, _, _ in attack.calls] == [math.ceil(ratio * n) for n in sizes if ratio]
        for number, batch in enumerate(seen):
            distances, _ = rows_of([batch])
            assert (distances <= EPS + 1e-6).all()
            assert int((distances > 0).sum()) == math.ceil(ratio * len(batch))
            assert ((batch >= 0) & (batch <= 1)).all()
            if ratio:
                x, y, x_adv = attack.calls[number]
                _, attacked = rows_of([x])
                assert torch.equal(y.argmax(1), torch.from_numpy(Y)[attacked])
                assert {image.numpy().tobytes() for image in x_adv} <= {image.numpy().tobytes() for image in batch}
        for epoch in (seen[:3], seen[3:]):
            assert sorted(rows_of(epoch)[1].tolist()) == list(range(N))
        assert rows_of(seen[:3])[1].tolist() != rows_of(seen[3:])[1].tolist()

    def test_ratio_0_is_plain_training(self, monkeypatch):
        classifier = trainable()
        attack = Recorded(classifier, eps=EPS, eps_step=EPS, max_iter=1)
        found = fitted(ours(classifier, attack, 0, seed=0), epochs=2)
        plain = small_net()
        optimizer = torch.optim.SGD(plain.parameters(), lr=0.01, momentum=0.9)
        before, order, draw = weights(trainable()), np.arange(N), np.random.RandomState(0)
        plain.train()
        for _ in range(2):
            draw.shuffle(order)
            for first in range(0, N, BATCH):
                rows = order[first : first + BATCH]
                draw.choice(len(rows), size=0, replace=False)
                optimizer.zero_grad()
                nn.functional.cross_entropy(plain(torch.from_numpy(X[rows])), torch.from_numpy(Y[rows])).backward()
                optimizer.step()
        assert not attack.calls
        assert_same(found, weights(art_classifier(plain)), before)

    def test_attacks_take_turns(self):
        classifier = trainable()
        first, second = (Recorded(classifier, eps=eps, eps_step=eps, max_iter=1) for eps in (0.01, EPS))
        seen = trained_on(classifier)
        fitted(ours(classifier, [first, second], 1.0), epochs=2)
        radii = [float(rows_of([batch])[0].max()) for batch in seen]
        assert radii == pytest.approx([0.01, EPS] * 3, rel=1e-4)
        assert (len(first.calls), len(second.calls)) == (3, 3)

    def test_data_stay_as_they_are(self):
        x, y = X.copy(), ONE_HOT.copy()
        classifier = trainable()
        trainer = ours(classifier, FGSM(classifier, eps=EPS), 1.0)
        fitted(trainer, x, y)
        trainer.fit_generator(NumpyDataGenerator(x, y, BATCH, drop_remainder=False, shuffle=False), nb_epochs=1)
        assert np.array_equal(x, X)
        assert np.array_equal(y, ONE_HOT)

    @pytest.mark.parametrize("kind", [FGSM, art_attacks.FastGradientMethod])
    @pytest.mark.parametrize("labels", [Y, Y[:, None], Y.tolist(), Y.astype(np.float32)])
    def test_labels_may_be_indices(self, kind, labels):
        results = []
        for y in (ONE_HOT, labels):
            classifier = trainable()
            results.append(fitted(ours(classifier, kind(classifier, eps=EPS)), y=y))
        assert torch.equal(*results)

    def test_two_classes(self):
        """Which ART takes for a single output where labels are indices."""
        results = []
        for kind in (ours, ArtTrainer):
            torch.manual_seed(0)
            net = nn.Sequential(nn.Flatten(), nn.Linear(192, 2))
            classifier = trainable(net, lr=0.1, nb_classes=2)
            before = weights(classifier)
            attack = art_attacks.FastGradientMethod(classifier, eps=EPS)
            results.append(fitted(kind(classifier, attack), y=np.eye(2, dtype=np.float32)[Y % 2]))
        assert_same(*results, before)

    @pytest.mark.parametrize("make", ["numpy", "pytorch"])
    def test_generators_of_art(self, make):
        x, y = two_features(200, seed=2)
        y = np.eye(3, dtype=np.float32)[y]
        if make == "numpy":
            generator = NumpyDataGenerator(x, y, batch_size=32, drop_remainder=False, shuffle=True)
        else:
            loader = DataLoader(TensorDataset(torch.from_numpy(x), torch.from_numpy(y)), batch_size=32, shuffle=True)
            generator = PyTorchDataGenerator(loader, size=200, batch_size=32)
        classifier = of_two_features()
        before, seen = robust_accuracy(classifier), trained_on(classifier)
        seed_all(0)
        trainer = ours(classifier, FGSM(classifier, eps=RADIUS), 1.0, seed=0)
        trainer.fit_generator(generator, nb_epochs=10)
        assert [len(batch) for batch in seen] == [32, 32, 32, 32, 32, 32, 8] * 10
        assert trainer.robust_accuracies == []
        assert robust_accuracy(classifier) > max(before, 0.5)


class TestSeed:
    @staticmethod
    def run(seed, attack_seed=None, global_seed=0):
        classifier = trainable()
        attack = FGSM(classifier, eps=EPS, num_random_init=1, seed=attack_seed)
        return fitted(ours(classifier, attack, seed=seed), epochs=2, seed=global_seed)

    def test_determines_the_run(self):
        assert torch.equal(self.run(3, global_seed=1), self.run(3, global_seed=2))

    @pytest.mark.parametrize("other", [(4, None), (3, 0)])
    def test_other_seed_other_run(self, other):
        assert not torch.equal(self.run(3), self.run(*other))

    def test_none_draws_from_the_global_generators(self):
        assert torch.equal(self.run(None), self.run(None))
        assert not torch.equal(self.run(None), self.run(None, global_seed=1))

    def test_global_numpy_stream_is_left_alone(self):
        seed_all(0)
        expected = np.random.random()  # noqa: NPY002
        seed_all(0)
        classifier = trainable()
        ours(classifier, FGSM(classifier, eps=EPS, num_random_init=1), seed=3).fit(X, Y, BATCH, 1)
        assert np.random.random() == expected  # noqa: NPY002

    @pytest.mark.parametrize(("attack_seed", "seed"), [(5, None), (5, 1), (None, 1), (None, None)])
    def test_random_starts_are_others_in_each_batch(self, attack_seed, seed):
        """A step of next to nothing shows the start."""
        classifier = trainable()
        attack = Recorded(classifier, eps=EPS, eps_step=1e-6, max_iter=1, num_random_init=1, seed=attack_seed)
        fitted(ours(classifier, attack, 1.0, seed=seed), 0.4 + 0.2 * X, epochs=2)
        starts = [(x_adv - x)[: N - 2 * BATCH] for x, _, x_adv in attack.calls]
        assert len(starts) == 6
        for i, start in enumerate(starts):
            assert start.abs().max() > 0.9 * EPS
            assert all((start - other).abs().max() > 0.5 * EPS for other in starts[:i])


class TestAttacksStayAsTheyAre:
    def test_arguments(self):
        classifier = trainable()
        attack = PGD(classifier, eps=EPS, eps_step=0.02, max_iter=2, batch_size=3, num_random_init=1, seed=7)
        before = dict(vars(attack))
        trainer = ours(classifier, attack, seed=1)
        fitted(trainer)
        assert vars(attack) == before
        assert (attack.batch_size, attack.verbose, attack.precision, attack.seed) == (3, True, "auto", 7)
        assert trainer.attacks == [attack]

    def test_attacks_in_batches_of_the_training(self):
        classifier, asked = trainable(), []
        classifier.model.register_forward_hook(lambda m, args, _: None if m.training else asked.append(len(args[0])))
        fitted(ours(classifier, FGSM(classifier, eps=EPS, batch_size=1), 1.0))
        assert max(asked) == BATCH

    def test_speaks_only_when_asked(self, capfd):
        for verbose in (False, True):
            classifier = trainable()
            attack = PGD(classifier, eps=EPS, eps_step=0.02, max_iter=2, verbose=True)
            fitted(ours(classifier, attack, verbose=verbose))
            output = "".join(capfd.readouterr())
            assert ("adversarial training" in output) == verbose
            assert "PGD" not in output

    def test_predicts_as_the_classifier(self):
        classifier = trainable()
        trainer = ours(classifier, FGSM(classifier, eps=EPS))
        fitted(trainer)
        assert np.array_equal(trainer.predict(X), classifier.predict(X))
        sizes = []
        classifier.model.register_forward_hook(lambda _, args, __: sizes.append(len(args[0])))
        trainer.predict(X, batch_size=5)
        assert sizes == [5, 5, 5, 5, 2]
        assert trainer.get_classifier() is classifier


def wavering():
    """A net that draws from torch's global generator in training."""
    net = traceable_net()
    return nn.Sequential(*net[:-1], nn.Dropout(0.3), net[-1])


class Stopped(Exception):
    """A kill, which nothing catches."""


class TestCheckpoint:
    """Of three epochs of two steps, with dropout and random starts, of native attacks and of ART's."""

    @staticmethod
    def fit(file, at=None, action=None, global_seed=0, epochs=3, **options):
        """What a fit comes to; `action` is taken in step `at`, from 1 on, or in each."""
        classifier = trainable(wavering())
        forwards = iter(range(1, 10**6))
        if action is not None:
            classifier.model[-1].register_forward_pre_hook(
                lambda module, _: action() if module.training and at in (None, next(forwards)) else None
            )
        scheduler = torch.optim.lr_scheduler.ExponentialLR(classifier.optimizer, 0.8)
        attacks = [
            FGSM(classifier, eps=EPS, num_random_init=1),
            art_attacks.ProjectedGradientDescent(classifier, eps=EPS, eps_step=0.02, max_iter=2, num_random_init=1),
            FGSM(art_classifier(small_net(seed=1)), eps=EPS, num_random_init=1),
        ]
        trainer = ours(classifier, attacks, **{"ratio": 0.5, "holdout": 6, **options})
        seed_all(global_seed)
        trainer.fit(X, ONE_HOT, BATCH, epochs, scheduler=scheduler, checkpoint=file)
        state = [np.random.random(), float(torch.rand(()))]  # noqa: NPY002
        return weights(classifier).tolist(), trainer.robust_accuracies, scheduler.get_last_lr(), state

    @staticmethod
    def control_c():
        signal.raise_signal(signal.SIGINT)

    @staticmethod
    def kill():
        raise Stopped

    @pytest.mark.parametrize("seed", [None, 4])
    @pytest.mark.parametrize(
        ("at", "action", "left"),
        [
            *[(1, "control_c", 5), (2, "control_c", 4), (3, "control_c", 3), (5, "control_c", 1)],
            *[(1, "kill", 6), (3, "kill", 4), (6, "kill", 2)],
        ],
    )
    def test_interrupted_and_resumed_is_uninterrupted(self, tmp_path, seed, at, action, left):
        """In another process, whose global generators stand elsewhere: a resumed fit goes on from the last step that
        Ctrl-C let it finish, or after a kill from the last epoch."""
        whole = self.fit(tmp_path / "whole", seed=seed)
        file = tmp_path / "new" / "checkpoint.pt"
        with pytest.raises((KeyboardInterrupt, Stopped)):
            self.fit(file, at, getattr(self, action), seed=seed)
        seen = []
        resumed = self.fit(file, None, lambda: seen.append(1), global_seed=5 if file.exists() else 0, seed=seed)
        assert len(seen) == left
        assert resumed == whole
        assert self.fit(file, 1, self.kill, global_seed=6, seed=seed)[:3] == whole[:3]  # there is nothing left to do

    def test_is_no_other_training(self, tmp_path):
        assert self.fit(tmp_path / "file")[:3] == self.fit(None)[:3]

    def test_collapse_is_remembered(self, tmp_path, monkeypatch):
        standings = iter((0.5, 0.1))
        monkeypatch.setattr(adversarial_training, "share_standing", lambda *_: next(standings))
        first = self.fit(tmp_path / "file", seed=0)
        assert first[1] == [0.5, 0.1]
        assert self.fit(tmp_path / "file", 1, self.kill, seed=0)[:3] == first[:3]

    @pytest.mark.parametrize(
        ("options", "match"),
        [
            ({"seed": 1}, r"'seed': \(0, 1\)"),
            ({"ratio": 0.25}, r"'ratio': \(0.5, 0.25\)"),
            ({"epochs": 4}, r"'nb_epochs': \(3, 4\)"),
            ({"holdout": 5}, r"'images': \(16, 17\)"),
        ],
    )
    def test_of_another_fit_is_refused(self, tmp_path, options, match):
        self.fit(tmp_path / "file", seed=0)
        before = (tmp_path / "file").read_bytes()
        with pytest.raises(ValueError, match=f"file' cannot be resumed.*{match}.*delete it to start over"):
            self.fit(tmp_path / "file", **{"seed": 0, **options})
        assert (tmp_path / "file").read_bytes() == before

    def test_numbers_of_numpy_are_as_good(self, tmp_path):
        first = self.fit(tmp_path / "file", seed=4)
        options = {"seed": np.int64(4), "holdout": np.int32(6), "epochs": np.int64(3), "ratio": np.float64(0.5)}
        assert self.fit(tmp_path / "file", 1, self.kill, **options)[:3] == first[:3]
        self.fit(tmp_path / "other", **options)
        assert self.fit(tmp_path / "other", 1, self.kill, seed=4)[:3] == first[:3]

    def test_attacks_are_part_of_it(self, tmp_path):
        for eps, error in ((EPS, nullcontext()), (0.1, pytest.raises(ValueError, match=r"eps=0\.1"))):
            classifier = trainable()
            with error:
                fitted(ours(classifier, FGSM(classifier, eps=eps)), checkpoint=tmp_path / "file")

    def test_in_use(self, tmp_path):
        """By a fit that is in the middle of a step."""
        file, refused = tmp_path / "file", []

        def another():
            with pytest.raises(ValueError, match=f"checkpoint='{file}': is in use by another training"):
                self.fit(file)
            refused.append(True)

        self.fit(file, 2, another)
        assert refused == [True]

    def test_that_cannot_be_made(self, tmp_path):
        (tmp_path / "file").touch()
        with pytest.raises(ValueError, match="file/checkpoint': cannot be made"):
            self.fit(tmp_path / "file" / "checkpoint")


class TestRobustness:
    @pytest.mark.parametrize(("steps", "ratio"), [(1, 1.0), (2, 1.0), (1, 0.5)])
    def test_training_makes_robust(self, steps, ratio):
        """Where a feature within the ball says more than one beyond it (Tsipras et al. 2019, section 2)."""
        x, y = two_features(600, seed=2)
        robust = []
        for share in (0, ratio):
            classifier = of_two_features()
            attack = PGD(
                classifier, eps=RADIUS, eps_step=RADIUS, max_iter=steps, num_random_init=1, precision="float32"
            )
            ours(classifier, attack, share, seed=0).fit(x, y, batch_size=50, nb_epochs=8)
            robust.append(robust_accuracy(classifier))
        assert robust[0] + 0.2 < robust[1]

    def test_bfloat16(self):
        """Ends with about the same loss, by other arithmetic."""
        x, y = two_features(300, seed=2)
        losses, vectors = {}, {}
        for precision in ("float32", "bfloat16"):
            classifier = of_two_features()
            trainer = ours(classifier, FGSM(classifier, eps=RADIUS), precision=precision, seed=0)
            before = classifier.compute_loss(x, y).mean()
            trainer.fit(x, y, batch_size=50, nb_epochs=5)
            losses[precision], vectors[precision] = classifier.compute_loss(x, y).mean(), weights(classifier)
            assert all(parameter.dtype == torch.float32 for parameter in classifier.model.parameters())
        assert losses["bfloat16"] < before - 0.1
        assert losses["bfloat16"] == pytest.approx(losses["float32"], abs=0.05)
        assert not torch.equal(vectors["float32"], vectors["bfloat16"])

    @pytest.mark.parametrize("kind", ["images of the model's dtype", "images in float32"])
    def test_a_float64_model_is_trained_in_float64(self, kind):
        found = {}
        for dtype in (torch.float32, torch.float64):
            classifier = trainable(small_net(dtype=dtype))
            before, seen = weights(classifier), trained_on(classifier)
            x = X.astype(np.float64) if kind.startswith("images of") and dtype == torch.float64 else X
            found[dtype] = fitted(ours(classifier, FGSM(classifier, eps=EPS)), x)
            assert {batch.dtype for batch in seen} == {dtype}
            assert (found[dtype] - before).abs().max() > 1e-2
        assert (found[torch.float32] - found[torch.float64]).abs().max() < 1e-5

    def test_in_bfloat16_the_attack_follows_the_model(self, monkeypatch):
        """Batch norm is folded into the convolutions for it, which is to change nothing but rounding."""
        views, view_of = [], training_loop.folded_view

        def note(module, x):
            views.append(view_of(module, x))
            return views[-1]

        monkeypatch.setattr(f"{LOOP}.folded_view", note)
        classifier = trainable(traceable_net(), lr=0.1)
        before = weights(classifier)
        after = fitted(ours(classifier, FGSM(classifier, eps=EPS), precision="bfloat16"))
        assert (after - before).norm() > 0.1
        (view,), model = views, classifier.model.eval()
        assert view is not model
        torch.testing.assert_close(view(torch.from_numpy(X)), model(torch.from_numpy(X)), rtol=1e-5, atol=1e-5)

    def test_says_which_speed_options_were_on(self, monkeypatch):
        found = {}
        for is_native in (True, False):
            monkeypatch.setattr(f"{LOOP}.bfloat16_is_native", lambda device, is_native=is_native: is_native)
            for precision in ("float32", "bfloat16", "auto"):
                classifier = trainable(traceable_net())
                trainer = ours(classifier, FGSM(classifier, eps=EPS), precision=precision)
                assert trainer.speed_options == []
                fitted(trainer)
                found[precision, is_native] = trainer.speed_options
        everything = ["bfloat16", "channels_last", "folded batch norm"]
        assert found["float32", True] == found["float32", False] == []
        assert found["bfloat16", True] == found["bfloat16", False] == found["auto", True] == everything
        assert found["auto", False] == everything[1:]

    def test_a_model_that_channels_last_breaks(self):
        classifier = trainable(Viewing(traceable_net()))
        before = weights(classifier)
        attack = FGSM(classifier, eps=EPS)
        assert not torch.equal(fitted(ours(classifier, attack, precision="bfloat16")), before)

    @pytest.mark.parametrize(("make", "is_native"), [(Uncastable, True), (Viewing, False), (lambda net: net, False)])
    def test_auto_is_float32_where_the_device_or_the_model_knows_nothing_else(self, monkeypatch, make, is_native):
        monkeypatch.setattr(f"{LOOP}.bfloat16_is_native", lambda device: is_native)
        found = []
        for precision in ("auto", "float32"):
            classifier = trainable(make(traceable_net()))
            before = weights(classifier)
            found.append(fitted(ours(classifier, FGSM(classifier, eps=EPS), precision=precision)))
        assert (found[0] - found[1]).norm() < 1e-3 * (found[1] - before).norm()

    @pytest.mark.parametrize("precision", ["float32", "bfloat16"])
    def test_precision_is_that_of_attack_and_training(self, monkeypatch, precision):
        """Whatever the device would rather compute in; an attack's own wish comes first."""
        monkeypatch.setattr("guardians.engine.search.bfloat16_is_native", lambda device: True)
        monkeypatch.setattr(f"{LOOP}.works_in", lambda *_, **__: True)  # which would ask in either
        dtypes = {}

        class Noting(SmallNet):
            def forward(self, x):
                logits = super().forward(x)
                dtypes[wish][self.training].add(logits.dtype)
                return logits

        for wish in ("auto", "float32"):
            dtypes[wish] = {True: set(), False: set()}
            classifier = trainable(Noting())
            attack = PGD(classifier, eps=EPS, eps_step=EPS, max_iter=1, precision=wish, verbose=False)
            fitted(ours(classifier, attack, 1.0, precision=precision))
        wanted = getattr(torch, precision)
        assert dtypes["auto"][True] == dtypes["float32"][True] == {wanted}
        assert wanted in dtypes["auto"][False] <= {torch.float32, wanted}  # checks and probes are in float32
        assert dtypes["float32"][False] == {torch.float32}


class TestWatch:
    """On robustness, to stop at catastrophic overfitting (Wong et al. 2020, section 5.3)."""

    @staticmethod
    def run(monkeypatch, standings, epochs, **options):
        """Trainer after training, and at the end of each epoch the weights, as well as what was asked."""
        classifier, after, asked, script = trainable(), [], [], iter(standings)
        attack = FGSM(classifier, eps=EPS, num_random_init=1)

        def standing(attack, batches):
            after.append(weights(classifier))
            asked.append((attack, list(batches)))
            return next(script)

        monkeypatch.setattr(adversarial_training, "share_standing", standing)
        trainer = ours(classifier, attack, 1.0, **{"holdout": 5, "seed": 0, **options})
        fitted(trainer, epochs=epochs)
        return trainer, after, asked

    @pytest.mark.parametrize(
        ("standings", "best"),
        [
            ((0.5, 0.6, 0.1), 2),
            ((0.6, 0.5, 0.29), 1),
            ((0.5, 0.5, 0.24), 2),
            ((0.01, 0.0), 1),
            ((0.0, 0.0, 0.2, 0.05), 3),
        ],
    )
    def test_collapse_ends_training_with_the_best_epoch(self, monkeypatch, caplog, standings, best):
        with caplog.at_level(logging.INFO, LOOP):
            trainer, after, _ = self.run(monkeypatch, standings, epochs=6)
        assert trainer.robust_accuracies == list(standings)
        assert torch.equal(weights(trainer.get_classifier()), after[best - 1])
        assert not torch.equal(after[best - 1], after[-1])
        (record,) = caplog.records
        assert (record.name, record.levelname) == (LOOP, "WARNING")
        message = record.getMessage()
        assert "catastrophic overfitting" in message
        assert f"from {max(standings):.1%} to {standings[-1]:.1%} in epoch {len(standings)}" in message
        assert f"model of epoch {best}" in message

    @pytest.mark.parametrize(
        "standings", [(0.6, 0.5, 0.4, 0.31), (0.6, 0.3, 0.3, 0.3), (0, 0, 0, 0), (0.1, 0.5, 0.3, 0.6)]
    )
    def test_slow_decline_does_not(self, monkeypatch, caplog, standings):
        trainer, after, _ = self.run(monkeypatch, standings, epochs=4)
        assert trainer.robust_accuracies == list(standings)
        assert torch.equal(weights(trainer.get_classifier()), after[-1])
        assert not caplog.records

    def test_next_fit_starts_anew(self, monkeypatch):
        trainer, _, _ = self.run(monkeypatch, (0.5, 0.6, 0.1, 0.2, 0.2), epochs=6, verbose=False)
        fitted(trainer, epochs=2)
        assert trainer.robust_accuracies == [0.2, 0.2]

    def test_attack_is_pgd_10_in_the_ball_of_the_training(self, monkeypatch):
        trainer, _, asked = self.run(monkeypatch, (0.5, 0.5), epochs=2)
        for attack, _ in asked:
            assert type(attack) is PGD
            assert (attack.max_iter, attack.norm, attack.eps, attack.num_random_init) == (10, np.inf, EPS, 0)
            assert float(attack.eps_step) == pytest.approx(EPS / 4)
            assert attack.estimator is trainer.get_classifier()

    def test_held_out_images_are_class_balanced_and_never_trained_on(self, monkeypatch):
        """Not by chance: labels come in blocks, of which some are twice as long."""
        y = np.repeat(np.arange(CLASSES), [8, 3, 3, 4, 4])
        classifier, asked = trainable(), []
        monkeypatch.setattr(
            adversarial_training, "share_standing", lambda _, batches: asked.append(list(batches)) or 0.5
        )
        seen = trained_on(classifier)
        fitted(ours(classifier, FGSM(classifier, eps=EPS), 0.5, holdout=10), y=y, epochs=3)
        (held, labels), *more = [batch for batches in asked for batch in batches]
        distances, rows = rows_of([held])
        assert (distances == 0).all()
        assert np.array_equal(y[rows], labels)
        assert np.bincount(labels).tolist() == [2] * CLASSES
        assert all(torch.equal(images, held) for images, _ in more)
        assert sorted({*rows_of(seen)[1].tolist()} | {*rows.tolist()}) == list(range(N))
        assert not {*rows_of(seen)[1].tolist()} & {*rows.tolist()}
        assert sum(map(len, seen)) == 3 * (N - 10)

    def test_measured_is_the_robust_accuracy(self):
        x, y = two_features(300, seed=2)
        classifier = of_two_features()
        trainer = ours(classifier, FGSM(classifier, eps=RADIUS, num_random_init=1), 1.0, holdout=60, seed=0)
        trainer.fit(x, y, batch_size=50, nb_epochs=8)
        assert len(trainer.robust_accuracies) == 8
        assert trainer.robust_accuracies[-1] == pytest.approx(robust_accuracy(classifier), abs=0.15)
        assert all((60 * value) == pytest.approx(round(60 * value)) for value in trainer.robust_accuracies)

    def test_default_is_for_native_single_steps(self, monkeypatch):
        """A fiftieth of the images, of which here are 100, where that is enough to tell."""
        monkeypatch.setattr(adversarial_training, "_WATCHABLE", 100)
        x, y = some_images(100).numpy(), np.arange(100) % CLASSES
        makers = {
            "FGSM": (lambda c: FGSM(c, eps=EPS), 98),
            "FGSM twice": (lambda c: [FGSM(c, eps=EPS), PGD(c, eps=EPS, max_iter=1, verbose=False)], 98),
            "PGD": (lambda c: PGD(c, eps=EPS, eps_step=0.02, max_iter=2, verbose=False), 100),
            "both": (lambda c: [FGSM(c, eps=EPS), PGD(c, eps=EPS, eps_step=0.02, max_iter=2, verbose=False)], 100),
            "ART": (lambda c: art_attacks.FastGradientMethod(c, eps=EPS), 100),
        }
        for name, (make, images) in makers.items():
            classifier = trainable()
            seen = trained_on(classifier)
            trainer = ours(classifier, make(classifier), holdout=None)
            trainer.fit(x, y, batch_size=50, nb_epochs=1)
            assert sum(map(len, seen)) == images, name
            assert len(trainer.robust_accuracies) == (images < 100), name

    def test_plain_training_holds_nothing_out(self):
        classifier = trainable()
        seen = trained_on(classifier)
        fitted(ours(classifier, FGSM(classifier, eps=EPS), 0, holdout=5))
        assert sum(map(len, seen)) == N


class TestBadArguments:
    @pytest.fixture
    def classifier(self):
        return trainable()

    @pytest.mark.parametrize(
        ("options", "error", "match"),
        [
            ({"ratio": -0.1}, ValueError, "ratio=-0.1"),
            ({"ratio": 1.1}, ValueError, r"ratio=1.1: must be in \[0, 1\]"),
            ({"ratio": math.nan}, ValueError, "ratio=nan"),
            ({"ratio": math.inf}, ValueError, "ratio=inf"),
            ({"ratio": "half"}, TypeError, "ratio='half'"),
            ({"ratio": None}, TypeError, "ratio=None"),
            ({"ratio": [0.5]}, TypeError, "ratio"),
            ({"precision": "float16"}, ValueError, "precision='float16': must be one of auto, float32, bfloat16"),
            ({"holdout": -1}, ValueError, "holdout=-1: must be at least 0"),
            ({"holdout": 2.5}, TypeError, "holdout=2.5: must be an integer"),
            ({"seed": -1}, ValueError, "seed=-1: must be at least 0"),
            ({"seed": "0"}, TypeError, "seed='0': must be an integer"),
            ({"verbose": 1}, TypeError, "verbose=1: must be True or False"),
        ],
    )
    def test_of_the_trainer(self, classifier, options, error, match):
        with pytest.raises(error, match=match):
            AdversarialTrainer(classifier, FGSM(classifier, eps=EPS), **options)

    def test_classifier(self, classifier):
        attack = FGSM(classifier, eps=EPS)
        with pytest.raises(TypeError, match="classifier of type SmallNet: must be an ART PyTorchClassifier"):
            AdversarialTrainer(small_net(), attack)

    @pytest.mark.parametrize("attacks", [[], (), None, "FGSM", [None], [FGSM]])
    def test_attacks(self, classifier, attacks):
        with pytest.raises(ValueError, match=r"attacks=.*must be an art\.attacks.EvasionAttack or a list of them"):
            AdversarialTrainer(classifier, attacks)

    @pytest.mark.parametrize("fit", ["fit", "fit_generator"])
    @pytest.mark.parametrize("kind", [FGSM, art_attacks.FastGradientMethod])
    def test_targeted_attacks(self, classifier, kind, fit):
        """Refused where ART's trainer refuses them, and as it does, but before any image is attacked."""
        attacks = [FGSM(classifier, eps=EPS), kind(classifier, eps=EPS, targeted=True)]
        generator = NumpyDataGenerator(X, ONE_HOT, batch_size=BATCH)
        for trainer in (ours(classifier, attacks), ArtTrainer(classifier, attacks)):
            with pytest.raises(NotImplementedError, match="targeted"):
                trainer.fit(X, ONE_HOT) if fit == "fit" else trainer.fit_generator(generator)

    def test_optimizer_is_needed_by_fit_alone(self):
        classifier = art_classifier(small_net())
        attack = FGSM(classifier, eps=EPS)
        generator = NumpyDataGenerator(X, ONE_HOT, batch_size=BATCH)
        for trainer in (AdversarialTrainer(classifier, attack), ArtTrainer(classifier, attack)):
            assert trainer.predict(X).shape == (N, CLASSES)
            with pytest.raises(ValueError, match="optimizer"):
                trainer.fit(X, ONE_HOT)
            with pytest.raises(ValueError, match="optimizer"):
                trainer.fit_generator(generator)

    @pytest.mark.parametrize(
        ("arguments", "error", "match"),
        [
            ({"batch_size": 0}, ValueError, "batch_size=0: must be at least 1"),
            ({"batch_size": 2.0}, TypeError, "batch_size=2.0: must be an integer"),
            ({"nb_epochs": -1}, ValueError, "nb_epochs=-1: must be at least 0"),
            ({"nb_epochs": None}, TypeError, "nb_epochs=None: must be an integer"),
            ({"y": Y + 1}, ValueError, r"y has labels from 1 to 5: must be in \[0, 5\)"),
            ({"y": Y - 1}, ValueError, "y has labels from -1 to 3"),
            ({"y": Y[:-1]}, ValueError, r"y has shape \(21,\)"),
            ({"y": ONE_HOT[:, :-1]}, ValueError, "the model has 5 classes"),
            ({"y": ONE_HOT / 2}, ValueError, "not one-hot"),
            ({"x": (255 * X).astype(np.uint8)}, ValueError, "x has dtype torch.uint8"),
            ({"x": X[:0], "y": Y[:0]}, ValueError, "x has .*at least one"),
            ({"training_mode": 0}, TypeError, "training_mode=0: must be True or False"),
            ({"verbose": True}, TypeError, "verbose=True: an argument of the trainer"),
        ],
    )
    def test_of_fit(self, classifier, arguments, error, match):
        before = weights(classifier)
        trainer = ours(classifier, FGSM(classifier, eps=EPS))
        with pytest.raises(error, match=match):
            trainer.fit(**{"x": X, "y": Y, **arguments})
        assert torch.equal(weights(classifier), before)

    @pytest.mark.parametrize("holdout", [N, N + 1])
    def test_holdout_as_large_as_the_data(self, classifier, holdout):
        with pytest.raises(ValueError, match=f"holdout={holdout}: there are only 22 images"):
            fitted(ours(classifier, FGSM(classifier, eps=EPS), holdout=holdout))

    @pytest.mark.parametrize(
        "kind",
        [lambda c: art_attacks.FastGradientMethod(c, eps=EPS), lambda c: CarliniWagnerL2(c, max_iter=1, verbose=False)],
    )
    def test_holdout_wants_an_attack_with_a_ball(self, classifier, kind):
        with pytest.raises(ValueError, match="holdout=5: the first attack must be native FGSM or PGD"):
            fitted(ours(classifier, [kind(classifier), FGSM(classifier, eps=EPS)], holdout=5))

    def test_of_fit_generator(self, classifier):
        generator = NumpyDataGenerator(X, ONE_HOT, batch_size=BATCH, drop_remainder=False, shuffle=False)
        trainer = ours(classifier, FGSM(classifier, eps=EPS))
        with pytest.raises(ValueError, match="nb_epochs=-1: must be at least 0"):
            trainer.fit_generator(generator, nb_epochs=-1)
        for name, value in (("verbose", True), ("batch_size", 4)):
            for each in (trainer, ArtTrainer(classifier, FGSM(classifier, eps=EPS))):
                with pytest.raises(TypeError, match=name):
                    each.fit_generator(generator, **{name: value})
        with pytest.raises(TypeError, match="checkpoint='file': not an argument of fit_generator"):
            trainer.fit_generator(generator, checkpoint="file")
        elsewhere = ours(classifier, FGSM(art_classifier(small_net()), eps=EPS))
        few = NumpyDataGenerator(X[:-1], ONE_HOT[:-1], batch_size=BATCH, drop_remainder=False)
        few._size = N
        with pytest.raises(ValueError, match=r"generator\.size=22: it gave only 21 images"):
            elsewhere.fit_generator(few)
        generator._size = None
        with pytest.raises(ValueError, match=r"generator\.size=None: the generator must know how many images"):
            trainer.fit_generator(generator)
