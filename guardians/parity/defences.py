"""Native defences, their attacks, classifiers and trainer, against transcriptions of their papers and the toolkits.

A transcription is slow and literal: one image, one pass and one layer at a time, in the order in which the paper states
it. Both sides have the same draws, which are functions of the seed and the number of an image.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr
from dataclasses import dataclass
from functools import cached_property, partial
from io import StringIO
from typing import Any
from unittest import mock

import numpy as np
import torch
from art.attacks.evasion import ProjectedGradientDescent as ArtPGD
from art.defences.preprocessor import MixupPyTorch
from art.defences.trainer import AdversarialTrainer as ArtTrainer
from art.estimators.certification.randomized_smoothing import PyTorchRandomizedSmoothing
from art.estimators.classification import PyTorchClassifier
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot
from torch.nn.modules.conv import _ConvNd

from guardians.attacks.pgd import PGD
from guardians.defences import AdversarialTrainer, AveragedMixturePGD, MixupInference, RandomSelfEnsemble
from guardians.defences.mixup_inference import METHODS
from guardians.engine.rng import given_keys, hashed, keys_on, row_keys, with_normal
from guardians.estimators import MixupInferenceClassifier, RandomSelfEnsembleClassifier
from guardians.parity.comparison import FLOAT64_TOLERANCE
from guardians.toolkits.build import build_attack, global_seed, own_spec

__all__ = ["DEFENCE_CASES", "PAPER", "DefenceCase"]

PAPER = "paper"
"""The reference that is a transcription."""
_FLOAT32_TOLERANCE = 1e-4
"""Of answers, which are relative to the largest; rounding leaves 1e-6."""
_IMAGES = 20
_PASSES = 4
_SIGMAS = 0.2, 0.1
_LAM = 0.6
_EPS, _EPS_STEP, _STEPS = 8 / 255, 2 / 255, 3


@dataclass(frozen=True)
class _About:
    """What is compared on.

    Attributes:
        model: the network, in evaluation mode, a copy that may be changed.
        x: images (N, C, H, W) in its dtype.
        y: labels (N,).
        classes: number of classes.
        seed: of all draws.
    """

    model: nn.Module
    x: Tensor
    y: Tensor
    classes: int
    seed: int

    @cached_property
    def keys(self) -> np.ndarray:
        """What a defence with this seed makes of the numbers of the images: (N,)."""
        return hashed(self.seed, np.arange(len(self.x)))

    @cached_property
    def pool(self) -> tuple[Tensor, Tensor]:
        """Images to mix with, at least one of each class; as any image will do, the labels are made up."""
        rows = torch.arange(max(len(self.x), 2 * self.classes), device=self.x.device)
        return self.x[rows % len(self.x)], rows % self.classes

    @property
    def for_art(self) -> dict[str, Any]:
        """Arguments of ART's classifiers, but for the model."""
        kind = "gpu" if self.x.is_cuda else "cpu"
        shape = tuple(self.x.shape[1:])
        return {"input_shape": shape, "nb_classes": self.classes, "clip_values": (0.0, 1.0), "device_type": kind}

    def after_cast(self) -> nn.Module:
        """The network behind a cast to its dtype, for ART, which makes all images float32."""
        return nn.Sequential(_Cast(self.x.dtype), self.model).eval()


Pair = tuple[Tensor, Tensor]
"""What native says of images (N, ...), and what the reference says."""


@dataclass(frozen=True)
class DefenceCase:
    """A native piece that is no attack on any model, against one reference; the agreement is exact.

    Attributes:
        attack: the name of the piece.
        what: is compared.
        reference: a toolkit, or `PAPER`.
        pair: native's and the reference's answers.
        only_in_float64: where in float32 the rounding of a gradient's sign decides.
        tolerance: of the difference in float64.
    """

    attack: str
    what: str
    reference: str
    pair: Callable[[_About], Pair]
    only_in_float64: bool = False
    tolerance: float = FLOAT64_TOLERANCE

    kind = "exact"

    @property
    def name(self) -> str:
        """For example "RSE votes vs ART"."""
        return f"{self.attack} {self.what} vs {self.reference}"

    def row(self, model: nn.Module, x: Tensor, y: Tensor, classes: int, seed: int) -> dict[str, Any]:
        """The columns of `PARITY_COLUMNS` that a comparison fills.

        Differences are relative to the largest answer of the reference, where that is above 1.

        Args:
            model: returns logits, float32.
            x: images (N, C, H, W).
            y: labels (N,).
            classes: number of classes.
            seed: of all draws.
        """
        found: dict[torch.dtype, float] = {}
        for dtype in (torch.float64,) if self.only_in_float64 else (torch.float32, torch.float64):
            about = _About(copy.deepcopy(model).to(dtype).eval(), x[:_IMAGES].to(dtype), y[:_IMAGES], classes, seed)
            with global_seed(seed, x.device):
                native, reference = (answer.double() for answer in self.pair(about))
            largest = max(1.0, float(reference.abs().max()))
            found[dtype] = float((native - reference).abs().max()) / largest
        agrees = found.get(torch.float32, 0.0) <= _FLOAT32_TOLERANCE and found[torch.float64] <= self.tolerance
        return {
            "max_abs_diff": found.get(torch.float32),
            "max_abs_diff_float64": found[torch.float64],
            "verdict": "exact" if agrees else "different",
            "note": f"{len(about.x)} images",
        }


class _Cast(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, ...) in the dtype."""
        return x.to(self.dtype)


def _rse(about: _About) -> Pair:
    """Algorithm 1 of Liu et al. 2018."""
    model, x = about.model, about.x
    shapes: list[torch.Size] = []
    with torch.no_grad(), _before_convolutions(model, lambda values: shapes.append(values.shape[1:])):
        model(x[:1])
    answers = []
    for image, key in zip(x, about.keys, strict=True):
        mean = x.new_zeros(about.classes)
        for number in range(_PASSES):
            sigmas = [_SIGMAS[0], *[_SIGMAS[1]] * (len(shapes) - 1)]
            pairs = zip(sigmas, _noises(hashed(key, number), shapes, x), strict=True)
            with torch.no_grad(), _before_convolutions(model, partial(_with_next, pairs)):
                mean += model(image[None])[0].softmax(0) / _PASSES
        answers.append(mean.log())
    with torch.no_grad():
        native = RandomSelfEnsemble(model, *_SIGMAS, _PASSES, seed=about.seed)(x)
    return native, torch.stack(answers)


def _with_next(pairs: Iterator[tuple[float, Tensor]], values: Tensor) -> Tensor:
    sigma, noise = next(pairs)
    return values + sigma * noise


def _noises(key: np.ndarray, shapes: Sequence[torch.Size], x: Tensor) -> Iterator[Tensor]:
    """Standard normal numbers for layer after layer, (1, C, ...) each."""
    keys = keys_on(x.device, np.atleast_1d(key))
    for layer, shape in enumerate(shapes):
        yield with_normal(x.new_zeros(1, *shape), keys, layer, 1)


@contextmanager
def _before_convolutions(model: nn.Module, change: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
    """What a convolution is given goes through `change` inside."""
    with ExitStack() as stack:
        for layer in model.modules():
            if isinstance(layer, _ConvNd):
                stack.enter_context(layer.register_forward_pre_hook(lambda _, inputs: change(inputs[0])))
        yield


def _rse_votes(about: _About) -> Pair:
    """Noise at the input alone, and answers that are votes: Cohen et al. 2019, as ART has it.

    A convolution that changes nothing takes the noise; what comes after it has none.
    """
    x, passes, sigma = about.x, 16, 0.25  # a power of two, with which numpy's and torch's products are the same
    channels, shape = x.shape[1], tuple(x.shape[1:])
    identity = nn.Conv2d(channels, channels, 1, bias=False).to(x)
    nn.init.dirac_(identity.weight)
    hears = nn.Sequential(identity, about.model, _Votes()).eval()
    defence = RandomSelfEnsemble(hears, sigma, 0.0, passes, seed=about.seed)
    with torch.no_grad():
        native = defence(x).exp() * passes
    noise = iter(
        np.concatenate([next(_noises(hashed(key, number), [x.shape[1:]], x)).cpu().numpy() for number in range(passes)])
        for key in about.keys
    )
    smoothing = PyTorchRandomizedSmoothing(
        about.after_cast(), nn.CrossEntropyLoss(), sample_size=passes, scale=sigma, **about.for_art
    )

    def normal(scale: float, size: tuple[int, ...]) -> np.ndarray:
        if size != (passes, *shape):
            raise RuntimeError(f"ART draws noise of shape {size}")
        return scale * next(noise)

    with mock.patch.object(np.random, "normal", normal):
        counts = np.stack([smoothing._prediction_counts(image) for image in x.float().cpu().numpy()])
    return native, torch.from_numpy(counts).to(native)


class _Votes(nn.Module):
    def forward(self, logits: Tensor) -> Tensor:
        """Logits (N, classes) of which the softmax is 1 for the largest."""
        return 1e4 * one_hot(logits.argmax(1), logits.shape[1]).to(logits.dtype)


def _partner(about: _About, key: np.ndarray, method: str, number: int, predicted: int) -> Tensor:
    """The image of the pool with which one is mixed for this time."""
    for_label, for_image = (int(hashed(key, METHODS.index(method), number, which)) >> 1 for which in range(2))
    images, labels = about.pool
    others = [label % about.classes for label in range(predicted + 1, predicted + about.classes)]
    label = others[for_label % len(others)] if method == "MI-OL" else predicted
    eligible = images[labels == label]
    return eligible[for_image % len(eligible)]


def _mixed(about: _About, image: Tensor, key: np.ndarray, method: str, lam: float, samples: int) -> Tensor:
    """Algorithm 1 of Pang et al. 2020: the mean probabilities (classes,) of mixtures of an image."""
    predicted = int(about.model(image[None]).argmax())
    mean = image.new_zeros(about.classes)
    for number in range(samples):
        mixture = lam * image + (1 - lam) * _partner(about, key, method, number, predicted)
        mean += about.model(mixture[None])[0].softmax(0) / samples
    return mean


def _mixup_inference(about: _About, method: str) -> Pair:
    """Algorithm 1, and for MI-Combined equation 11: the detection says whether an image is mixed with other labels'."""
    options: dict[str, Any] = {"lam": _LAM, "num_samples": _PASSES, "seed": about.seed}
    if method == "MI-Combined":
        scores = MixupInference(about.model, about.pool, method, **options).detection_score(about.x).detach()
        low, high = scores.sort().values[[(len(scores) - 1) // 2, len(scores) // 2]].tolist()
        options["threshold"] = (low + high) / 2  # so that it decides for some this way and for some that
    defence = MixupInference(about.model, about.pool, method, **options)
    answers = []
    with torch.no_grad():
        for image, key in zip(about.x, about.keys, strict=True):
            if method != "MI-Combined":
                answers.append(_mixed(about, image, key, method, _LAM, _PASSES))
                continue
            plain = about.model(image[None])[0].softmax(0)
            lost = plain - _mixed(about, image, key, "MI-PL", defence.detection_lam, defence.detection_samples)
            is_adversarial = lost[plain.argmax()] > defence.threshold
            answers.append(_mixed(about, image, key, "MI-OL", _LAM, _PASSES) if is_adversarial else plain)
        native = defence(about.x)
    return native, torch.stack(answers).log()


def _mixtures(about: _About) -> Pair:
    """What the model is asked about, against ART's preprocessor with the same weight and partners."""
    x, asked = about.x, list[Tensor]()
    defence = MixupInference(about.model, about.pool, "MI-OL", _LAM, _PASSES, seed=about.seed, chunk_size=10**6)
    predicted = defence.predicted(x)
    handle = defence.model.register_forward_pre_hook(lambda _, inputs: asked.append(inputs[0]))
    defence(x)
    handle.remove()
    mixtures = torch.cat(asked)[-len(x) * _PASSES :]
    partners = torch.stack(
        [
            _partner(about, key, "MI-OL", number, int(label))
            for key, label in zip(about.keys, predicted, strict=True)
            for number in range(_PASSES)
        ]
    )
    images, n = x.repeat_interleave(_PASSES, 0), len(partners)
    mixup = MixupPyTorch(about.classes, num_mix=2, device_type=about.for_art["device_type"])
    order = torch.arange(2 * n, device=x.device).roll(n)
    with (
        mock.patch.object(np.random, "dirichlet", return_value=np.array([_LAM, 1 - _LAM])),
        mock.patch.object(torch, "randperm", return_value=order),
    ):
        reference, _ = mixup.forward(torch.cat([images, partners]), torch.zeros(2 * n, dtype=torch.int64).to(x.device))
    return mixtures, reference[:n]


def _averaged_mixture_pgd(about: _About) -> Pair:
    """Section 4.4 of Pang et al. 2020: the mean perturbation that PGD finds for mixtures."""
    model, x, samples = about.model, about.x, 2
    defence = MixupInference(model, about.pool, "MI-OL", _LAM, _PASSES, seed=about.seed)
    attack = AveragedMixturePGD(defence, _EPS, _EPS_STEP, _STEPS, samples, seed=about.seed)
    images = []
    for image, label, key in zip(x, about.y, about.keys, strict=True):
        predicted, mean = int(model(image[None]).argmax()), torch.zeros_like(image)
        for number in range(samples):
            mixture = _LAM * image + (1 - _LAM) * _partner(about, key, "MI-OL", number, predicted)
            point = mixture
            for _ in range(_STEPS):
                point = point.detach().requires_grad_(True)
                (gradient,) = torch.autograd.grad(cross_entropy(model(point[None]), label[None]), point)
                point = point.detach() + _EPS_STEP * gradient.sign()
                point = torch.minimum(torch.maximum(point, mixture - _EPS), mixture + _EPS).clamp(0, 1)
            mean += (point - mixture) / samples
        images.append((image + mean).clamp(0, 1))
    return attack(x, about.y), torch.stack(images)


class _Recorded(nn.Module):
    """A random defence that keeps the keys of the draws for which gradients are asked."""

    def __init__(self, defence: nn.Module) -> None:
        super().__init__()
        self.defence, self.keys = defence, list[np.ndarray]()

    def forward(self, x: Tensor) -> Tensor:
        """Log-probabilities (N, classes)."""
        keys = given_keys(len(x))
        if x.requires_grad and keys is not None:
            self.keys.append(keys)
        logits: Tensor = self.defence(x)
        return logits


class _Replayed(nn.Module):
    """A random defence with the draws of these keys, one question after the other."""

    def __init__(self, defence: nn.Module, keys: np.ndarray) -> None:
        super().__init__()
        self.defence, self.keys = defence, keys

    def forward(self, x: Tensor) -> Tensor:
        """Log-probabilities (N, classes)."""
        if not x.requires_grad:
            logits: Tensor = self.defence(x)
            return logits
        keys, self.keys = self.keys[: len(x)], self.keys[len(x) :]
        with row_keys(keys):
            logits = self.defence(x)
        return logits


def _eot_pgd(about: _About) -> Pair:
    """PGD through the mean gradient of several answers of RSE (Athalye et al. 2018)."""
    x, y, draws = about.x, about.y, 3
    defence = RandomSelfEnsemble(about.model, *_SIGMAS, 2, seed=about.seed)
    recorded = _Recorded(defence)
    options: dict[str, Any] = {"eot_samples": draws, "batch_size": draws * len(x), "precision": "float32"}
    attack = PGD(recorded, eps=_EPS, eps_step=_EPS_STEP, max_iter=_STEPS, seed=about.seed, verbose=False, **options)
    native = attack(x, y)
    arguments = {"eps": _EPS, "alpha": _EPS_STEP, "steps": _STEPS, "eot_iter": draws, "random_start": False}
    spec = own_spec("torchattacks", "EOTPGD", arguments, np.inf, _EPS)
    replayed = _Replayed(defence, np.concatenate(recorded.keys))
    shape: dict[str, Any] = {"nb_classes": about.classes, "input_shape": tuple(x.shape[1:])}
    return native, build_attack("torchattacks", spec, replayed, batch_size=len(x), **shape)(x, y)


def _classifier(about: _About, make: Callable[..., PyTorchClassifier], what: str) -> Pair:
    """A defence that changes nothing is the model's log-probabilities, of which ART's own classifier knows."""
    model, x = about.after_cast(), about.x.float().cpu().numpy()
    native = make(model, loss=nn.CrossEntropyLoss(), **about.for_art)
    reference = PyTorchClassifier(nn.Sequential(model, nn.LogSoftmax(1)), loss=nn.CrossEntropyLoss(), **about.for_art)
    y = one_hot(about.y, about.classes).cpu().numpy()
    questions = {
        "predictions": lambda classifier: classifier.predict(x),
        "loss gradients": lambda classifier: classifier.loss_gradient(x, y),
        "class gradients": lambda classifier: classifier.class_gradient(x),
    }
    answers = [torch.from_numpy(np.asarray(questions[what](classifier))) for classifier in (native, reference)]
    return answers[0], answers[1]


def _silent_rse(about: _About, what: str) -> Pair:
    return _classifier(about, partial(RandomSelfEnsembleClassifier, sigma_init=0, sigma_inner=0, n=2), what)


def _unmixed(about: _About, what: str) -> Pair:
    pool = about.pool[0].float(), about.pool[1]
    make = partial(MixupInferenceClassifier, pool=pool, method="MI-PL", lam=1.0, num_samples=2)
    return _classifier(about, make, what)


def _adversarial_trainer(about: _About, ratio: float) -> Pair:
    """The weights after an epoch on the same batches in the same order, relative to the largest change."""
    x, y = about.x.float().cpu().numpy(), one_hot(about.y, about.classes).cpu().numpy()
    ball: dict[str, Any] = {"eps": _EPS, "eps_step": _EPS_STEP, "max_iter": _STEPS, "verbose": False}

    def trained(make: Callable[[PyTorchClassifier], Any]) -> Tensor:
        model = copy.deepcopy(about.after_cast())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        classifier = PyTorchClassifier(model, loss=nn.CrossEntropyLoss(), optimizer=optimizer, **about.for_art)
        before = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
        with global_seed(about.seed, about.x.device), redirect_stderr(StringIO()):  # ART's progress bars
            make(classifier).fit(x, y, batch_size=max(2, len(x) // 4), nb_epochs=1)
        return nn.utils.parameters_to_vector(model.parameters()).detach() - before

    native = trained(lambda classifier: AdversarialTrainer(classifier, PGD(classifier, **ball), ratio, verbose=False))
    reference = trained(lambda classifier: ArtTrainer(classifier, ArtPGD(classifier, **ball), ratio))
    largest = reference.abs().max()
    return native / largest, reference / largest


_CLASSIFIERS = {"RandomSelfEnsembleClassifier": _silent_rse, "MixupInferenceClassifier": _unmixed}
DEFENCE_CASES = (
    DefenceCase("RSE", "log-probabilities", PAPER, _rse),
    DefenceCase("RSE", "votes", "ART", _rse_votes),
    *(DefenceCase(method, "log-probabilities", PAPER, partial(_mixup_inference, method=method)) for method in METHODS),
    DefenceCase("MI-OL", "mixtures", "ART", _mixtures),
    DefenceCase("AveragedMixturePGD", "images", PAPER, _averaged_mixture_pgd, only_in_float64=True),
    DefenceCase("EOT-PGD", "images", "torchattacks", _eot_pgd, only_in_float64=True),
    *(
        DefenceCase(name, what, "ART", partial(pair, what=what))
        for name, pair in _CLASSIFIERS.items()
        for what in ("predictions", "loss gradients", "class gradients")
    ),
    *(
        # On adversarial images that ART makes in float32.
        DefenceCase(
            "AdversarialTrainer",
            f"weights at ratio {ratio:g}",
            "ART",
            partial(_adversarial_trainer, ratio=ratio),
            tolerance=1e-6,
        )
        for ratio in (0.5, 1.0)
    ),
)
