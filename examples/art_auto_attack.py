"""ART's AutoAttack runs a list of attacks, each on the images that still stand: ART's own, then native ones.

python examples/art_auto_attack.py --n 100
"""

import argparse
import multiprocessing
import sys
import time
from types import ModuleType

import art.attacks.evasion
import numpy as np
import torch
from art.estimators.classification import PyTorchClassifier

import guardians.attacks
from guardians.data import load_data
from guardians.models import load_model

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--n", type=int, default=50, help="images")
parser.add_argument("--iterations", type=int, default=20, help="of each attack")
parser.add_argument("--model", default="resnet9-16-pgd-at")
arguments = parser.parse_args()

data = load_data(n=arguments.n)
x, y = data.as_floats().numpy(), data.labels.numpy()
classifier = PyTorchClassifier(
    load_model(arguments.model), torch.nn.CrossEntropyLoss(), input_shape=(3, 32, 32), nb_classes=10, clip_values=(0, 1)
)
eps = 8 / 255
options = {"eps": eps, "max_iter": arguments.iterations, "verbose": False}


def sequence(package: ModuleType) -> list:
    """The same attacks of either package."""
    apgd = {**options, "eps_step": 2 * eps, "nb_random_init": 1}
    return [
        package.AutoProjectedGradientDescent(classifier, **apgd, loss_type="cross_entropy"),
        package.AutoProjectedGradientDescent(classifier, **apgd, loss_type="difference_logits_ratio"),
        package.SquareAttack(classifier, **options),
    ]


fastest = [guardians.attacks.MALT(classifier, **options, early_stop=True), *sequence(guardians.attacks)]
for attack in fastest:
    attack.set_params(early_stop=True)

sys.modules.setdefault("multiprocess", multiprocessing)  # ART imports it, and needs it with parallel_pool_size only
for name, attacks in {
    "ART's attacks": sequence(art.attacks.evasion),
    "the same, native": sequence(guardians.attacks),
    "MALT first, early_stop": fastest,
}.items():
    np.random.seed(0)  # noqa: NPY002 - ART draws from it
    auto_attack = art.attacks.evasion.AutoAttack(classifier, eps=eps, eps_step=2 * eps, attacks=attacks)
    start = time.perf_counter()
    x_adv = auto_attack.generate(x, y)
    seconds = time.perf_counter() - start
    accuracy = (classifier.predict(x_adv).argmax(1) == y).mean()
    felled = [int((auto_attack.best_attacks == number).sum()) for number in range(len(attacks))]
    print(f"{name:25} robust accuracy {accuracy:.1%}, felled by each attack {felled}, {seconds:.1f} s")
