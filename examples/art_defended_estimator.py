"""A defence as an ART classifier, under ART's attacks as they are and under native ones that average over the noise.

python examples/art_defended_estimator.py --n 20
"""

import argparse

import art.attacks.evasion
import numpy as np
import torch
from art.estimators.classification import PyTorchClassifier

from guardians.attacks import PGD
from guardians.data import load_data
from guardians.estimators import RandomSelfEnsembleClassifier
from guardians.models import load_model

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--n", type=int, default=20, help="images")
arguments = parser.parse_args()

data = load_data(n=arguments.n)
x, y = data.as_floats().numpy(), data.labels.numpy()
settings = {"loss": torch.nn.CrossEntropyLoss(), "input_shape": (3, 32, 32), "nb_classes": 10, "clip_values": (0, 1)}
classifiers = {
    "no defence": PyTorchClassifier(load_model("resnet9-16-standard"), **settings),
    "Random Self-Ensemble": RandomSelfEnsembleClassifier(
        load_model("resnet9-16-rse"), **settings, sigma_init=0.8, sigma_inner=0.2, n=5, seed=0
    ),
}

eps = 4 / 255
steps = {"eps": eps, "eps_step": eps / 4, "max_iter": 10, "verbose": False}
ATTACKS = {
    "ART FGSM": lambda c: art.attacks.evasion.FastGradientMethod(c, eps=eps),
    "ART PGD-10": lambda c: art.attacks.evasion.ProjectedGradientDescent(c, **steps),
    "native PGD-10": lambda c: PGD(c, **steps, seed=0),
    "native PGD-10, EOT of 4": lambda c: PGD(c, **steps, seed=0, eot_samples=4),
    "ART Square": lambda c: art.attacks.evasion.SquareAttack(c, eps=eps, max_iter=20, verbose=False),
}

for name, classifier in classifiers.items():
    print(f"{name}: clean accuracy {(classifier.predict(x).argmax(1) == y).mean():.1%}")
    for attack, make in ATTACKS.items():
        np.random.seed(0)  # noqa: NPY002 - ART draws from it
        x_adv = make(classifier).generate(x, y)
        accuracy = (classifier.predict(x_adv).argmax(1) == y).mean()
        print(f"    {attack:24} accuracy {accuracy:.1%}, largest change {np.abs(x_adv - x).max():.3f}")
