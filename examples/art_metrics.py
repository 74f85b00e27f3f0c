"""art.metrics with native attacks and a native estimator.

    python examples/art_metrics.py --n 50

`adversarial_accuracy` takes any attack. `empirical_robustness` takes the name of one, which ART looks up in a table of
its own; the table is public, so an attack that ART does not know is entered there.
"""

import argparse

import art.attacks.evasion
import numpy as np
import torch
from art.estimators.classification import PyTorchClassifier
from art.metrics import adversarial_accuracy, empirical_robustness, loss_sensitivity
from art.metrics.metrics import SUPPORTED_METHODS

import guardians.attacks
from guardians.data import load_data
from guardians.estimators import RandomSelfEnsembleClassifier
from guardians.models import load_model

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--n", type=int, default=50, help="images")
arguments = parser.parse_args()

data = load_data(n=arguments.n)
x, y = data.as_floats().numpy(), data.labels.numpy()
settings = {"loss": torch.nn.CrossEntropyLoss(), "input_shape": (3, 32, 32), "nb_classes": 10, "clip_values": (0, 1)}
classifier = PyTorchClassifier(load_model("resnet9-16-pgd-at"), **settings)

eps = 8 / 255
pgd = {"eps": eps, "eps_step": eps / 4, "max_iter": 10, "verbose": False}
for whose, package in (("ART", art.attacks.evasion), ("Guardians", guardians.attacks)):
    crafter = package.ProjectedGradientDescent(classifier, **pgd)
    accuracy = adversarial_accuracy(classifier, x, y, attack_crafter=crafter)
    print(f"adversarial accuracy, PGD-10 of {whose}: {accuracy:.4f}")

SUPPORTED_METHODS["guardians"] = {"class": guardians.attacks.FastGradientMethod}
for whose, name in (("ART", "fgsm"), ("Guardians", "guardians")):
    robustness = empirical_robustness(classifier, x, name, {"eps": 1.0, "eps_step": 0.01})
    print(f"empirical robustness, FGSM of {whose}: {robustness:.5f}")

# The same mean of ||x_adv - x|| / ||x||, of an attack that looks for the nearest image rather than along one direction.
attack = guardians.attacks.FMN(classifier, norm=np.inf, max_iter=50, verbose=False)
labels = classifier.predict(x).argmax(1)
changes = (attack.generate(x, labels) - x)[attack.report.fooled].reshape(attack.report.fooled.sum(), -1)
sizes = np.abs(x[attack.report.fooled]).reshape(changes.shape).max(1)
print(f"empirical robustness, FMN of Guardians: {(np.abs(changes).max(1) / sizes).mean():.5f}")

one_hot = np.eye(10, dtype=np.float32)[y]
defended = RandomSelfEnsembleClassifier(
    load_model("resnet9-16-rse"), **settings, sigma_init=0.8, sigma_inner=0.2, seed=0
)
for name, estimator in (("PyTorchClassifier", classifier), ("RandomSelfEnsembleClassifier", defended)):
    print(f"loss sensitivity, {name}: {loss_sensitivity(estimator, x, one_hot):.5f}")
