"""One import changed: ART's attacks and the native ones with the same arguments, on the same ART classifier.

    python examples/art_attack_swap.py --n 100

FGSM and PGD give the same images; the searches need not, and are measured by how much accuracy they leave.
"""

import argparse
import time

import art.attacks.evasion
import numpy as np
import torch
from art.estimators.classification import PyTorchClassifier

import guardians.attacks
from guardians.data import load_data
from guardians.models import load_model

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--n", type=int, default=50, help="images")
parser.add_argument("--model", default="resnet9-16-pgd-at")
arguments = parser.parse_args()

data = load_data(n=arguments.n)
x, y = data.as_floats().numpy(), data.labels.numpy()
classifier = PyTorchClassifier(
    load_model(arguments.model), torch.nn.CrossEntropyLoss(), input_shape=(3, 32, 32), nb_classes=10, clip_values=(0, 1)
)

eps = 8 / 255
ATTACKS = {
    "FastGradientMethod": {"eps": eps},
    "ProjectedGradientDescent": {"eps": eps, "eps_step": eps / 4, "max_iter": 10, "verbose": False},
    "AutoProjectedGradientDescent": {
        "eps": eps,
        "eps_step": 2 * eps,
        "max_iter": 10,
        "nb_random_init": 1,
        "verbose": False,
    },
    "SquareAttack": {"eps": eps, "max_iter": 20, "verbose": False},
    "CarliniL2Method": {"initial_const": 1, "binary_search_steps": 1, "max_iter": 5, "verbose": False},
}

clean = (classifier.predict(x).argmax(1) == y).mean()
print(f"{len(x)} images, clean accuracy {clean:.1%}\n")
print(f"{'attack':30} {'':9} accuracy   mean L2   seconds   largest difference")
for name, options in ATTACKS.items():
    found = {}
    for package in (art.attacks.evasion, guardians.attacks):
        np.random.seed(0)  # noqa: NPY002 - ART draws from it
        attack = getattr(package, name)(classifier, **options)
        start = time.perf_counter()
        x_adv = attack.generate(x, y)
        seconds = time.perf_counter() - start
        whose = "ART" if package is art.attacks.evasion else "Guardians"
        found[whose] = x_adv
        accuracy = (classifier.predict(x_adv).argmax(1) == y).mean()
        distance = np.linalg.norm((x_adv - x).reshape(len(x), -1), axis=1).mean()
        difference = f"{np.abs(x_adv - found['ART']).max():.1e}" if whose == "Guardians" else ""
        print(f"{name:30} {whose:9} {accuracy:8.1%} {distance:9.3f} {seconds:9.2f}   {difference}")
