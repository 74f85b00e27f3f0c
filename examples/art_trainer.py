"""Adversarial training in ART's trainer, with its attack and with a native one, and in the native trainer.

    python examples/art_trainer.py --n 500 --epochs 2

The three train the same network: the weights differ by rounding, which training makes larger.
"""

import argparse
import time

import art.attacks.evasion
import art.defences.trainer
import numpy as np
import torch
from art.estimators.classification import PyTorchClassifier

import guardians.attacks
import guardians.defences
from guardians.data import load_data
from guardians.models import load_model

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--n", type=int, default=200, help="images")
parser.add_argument("--epochs", type=int, default=1)
arguments = parser.parse_args()

data = load_data(n=arguments.n)
x, y = data.as_floats().numpy(), np.eye(10, dtype=np.float32)[data.labels]
eps = 8 / 255
pgd = {"eps": eps, "eps_step": eps / 4, "max_iter": 7, "verbose": False}


def robust_accuracy(classifier: PyTorchClassifier) -> float:
    """On the images that it was trained on, under PGD-10."""
    attack = guardians.attacks.PGD(classifier, eps=eps, eps_step=eps / 4, early_stop=True, max_iter=10, verbose=False)
    attack.generate(x, y)
    return 1 - attack.report.fooled.mean()


weights = {}
for name, trainers, attacks in (
    ("ART's trainer, ART's PGD", art.defences.trainer, art.attacks.evasion),
    ("ART's trainer, native PGD", art.defences.trainer, guardians.attacks),
    ("native trainer, native PGD", guardians.defences, guardians.attacks),
):
    model = load_model("resnet9-16-fgsm-at")
    classifier = PyTorchClassifier(
        model,
        torch.nn.CrossEntropyLoss(),
        input_shape=(3, 32, 32),
        nb_classes=10,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.01),
        clip_values=(0, 1),
    )
    before = robust_accuracy(classifier)
    np.random.seed(0)  # noqa: NPY002 - the trainers draw from it
    torch.manual_seed(0)
    trainer = trainers.AdversarialTrainer(classifier, attacks.ProjectedGradientDescent(classifier, **pgd), ratio=1.0)
    start = time.perf_counter()
    trainer.fit(x, y, batch_size=50, nb_epochs=arguments.epochs)
    seconds = time.perf_counter() - start
    weights[name] = torch.cat([parameter.detach().flatten().cpu() for parameter in model.parameters()])
    difference = (weights[name] - weights["ART's trainer, ART's PGD"]).abs().max()
    print(
        f"{name:27} robust accuracy {before:.1%} -> {robust_accuracy(classifier):.1%}, {seconds:.1f} s, "
        f"weights differ by {difference:.1e}"
    )
