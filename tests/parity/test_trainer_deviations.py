"""What ART's adversarial trainer does otherwise than native; a row of docs/deviations.md each."""

import numpy as np
import pytest
import torch
from art.attacks.evasion import FastGradientMethod
from art.data_generators import NumpyDataGenerator
from art.defences import trainer as art
from models_for_tests import CLASSES, art_classifier, small_net, some_images
from torch import nn

from guardians.defences import AdversarialTrainer

N, EPS = 40, 0.05


def share_of_right_labels(kind):
    """Of the images that a trainer has trained on, all of them found by an attack on another estimator."""
    images, labels, targets = some_images(N), torch.arange(N) % CLASSES, []

    class Noting(nn.CrossEntropyLoss):
        def forward(self, logits, target):
            targets.append(target.clone())
            return super().forward(logits, target)

    net, seen = small_net(), []
    net.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    classifier = art_classifier(net, loss=Noting(), optimizer=optimizer)
    attack = FastGradientMethod(art_classifier(small_net(seed=1)), eps=EPS)
    generator = NumpyDataGenerator(images.numpy(), np.eye(CLASSES)[labels], batch_size=8, drop_remainder=False)
    np.random.seed(0)  # noqa: NPY002
    kind(classifier, attack, ratio=1.0).fit_generator(generator, nb_epochs=2)
    distances, rows = torch.cdist(torch.cat(seen).flatten(1), images.flatten(1), p=float("inf")).min(1)
    assert (distances <= EPS + 1e-6).all()
    return float((labels[rows] == torch.cat(targets)).double().mean())


def test_art_trainer_gives_transferred_images_of_a_generator_the_labels_of_others():
    assert share_of_right_labels(art.AdversarialTrainer) == pytest.approx(1 / CLASSES, abs=0.15)
    assert share_of_right_labels(AdversarialTrainer) == 1
