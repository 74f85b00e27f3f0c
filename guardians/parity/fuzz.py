"""Differential fuzzing: native against the toolkits on random small problems, shrunk to a minimal counterexample.

The attacks are those of the harness's exact cases (`guardians.parity.cases`), with other radii, step sizes, numbers of
steps and parameters, on other networks, images, labels and masks; the comparison is the harness's
(`guardians.parity.comparison`, `guardians.parity.single_images`), with a toolkit's rules where it has any.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot
from tqdm.auto import tqdm

from guardians.attacks.registry import family_of
from guardians.engine.checks import check_integer
from guardians.engine.victim import predicted_labels
from guardians.parity.cases import Case, cases
from guardians.parity.comparison import FLOAT64_TOLERANCE, Steps, compare_steps, free_run, native_attack, record, replay
from guardians.parity.rules import goes_step_by_step
from guardians.parity.single_images import before_ties, largest_difference, runs_of_one
from guardians.toolkits.base import installed
from guardians.toolkits.build import TOOLKITS, global_seed, is_installed

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

__all__ = ["Findings", "Problem", "fuzz", "problems"]

_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {"linear": nn.Identity, "smooth": nn.Softplus, "ReLU": nn.ReLU}
_PIXELS: dict[str, Callable[[Tensor], Tensor]] = {
    "grey": lambda u: torch.full_like(u, 0.5),
    "continuous": lambda u: (1.25 * u - 0.125).clamp(0, 1),  # a tenth at each bound
    "8-bit": lambda u: (255 * u).round() / 255,
    "binary": lambda u: u.round(),
}


@dataclass(frozen=True)
class Problem:
    """An attack of a toolkit, the network and the images: all that it takes to repeat a comparison.

    Attributes:
        case: attack, threat model and toolkit.
        net: "linear", "smooth" (softplus) or "ReLU": one convolution, where there is an activation, and a linear layer.
        classes: of the network, at least 2.
        gain: factor of the logits; with 100 the model is sure of most images.
        shape: of an image, (channels, height, width).
        pixels: "grey" (all of them 0.5), "continuous" (uniform, a tenth at each bound), "8-bit" or "binary".
        n: number of images.
        batch_size: images that native and the toolkit are given at a time; without effect on attacks that minimise a
            norm, which are compared each image alone.
        label: how many classes the label or target is after the predicted one, of each image.
        one_hot: whether labels are given as rows (n, classes) rather than as indices (n,).
        masked: whether a random half of the pixels is fixed.
        dtype: "float64" or "float32", of the network and the images.
        seed: of weights, pixels and mask, and of the toolkit's draws.
    """

    case: Case
    net: str = "linear"
    classes: int = 2
    gain: int = 1
    shape: tuple[int, int, int] = (1, 1, 1)
    pixels: str = "grey"
    n: int = 1
    batch_size: int = 1
    label: int = 0
    one_hot: bool = False
    masked: bool = False
    dtype: str = "float64"
    seed: int = 0

    @property
    def code(self) -> str:
        """Python that makes the comparison again."""
        return "\n".join(
            (
                "from math import inf",
                "from guardians.attacks.registry import Spec",
                "from guardians.parity import Case",
                "from guardians.parity.fuzz import Problem",
                f"print({self!r}.difference())",
            )
        )

    def difference(self) -> str | None:
        """How native and the toolkit differ by more than the exact level allows; None where they agree.

        In float64 the last images of free runs, or all queries of attacks that minimise a norm, agree within 1e-10; in
        float32 each step from each iterate, up to the rounding of gradients. An error of either is a difference too.
        """
        try:
            with global_seed(self.seed, torch.device("cpu")):
                return self._difference()
        except Exception as error:
            return f"{type(error).__name__}: {error}"

    def _difference(self) -> str | None:
        model, x, mask = self._drawn()
        labels = (predicted_labels(model, x, len(x)) + self.label) % self.classes
        given = one_hot(labels, self.classes) if self.one_hot else labels
        case, spec = self.case, self.case.spec
        if not goes_step_by_step(spec):
            runs = runs_of_one(case.reference, spec, model, x, given, self.classes)
            runs = [(native, before_ties(run, model)) for native, run in runs]
            return _beyond(largest_difference(runs, x, spec.norm), "of a query or of what is returned")
        steps, furthest = Steps(0, 0, 0.0), 0.0
        for rows in torch.arange(self.n).split(self.batch_size):
            images, y = x[rows], labels[rows]
            options = {} if mask is None else {"mask": mask[rows]}
            reference = record(case.reference, spec, model, images, given[rows], self.classes, self.seed, **options)
            start = reference.iterates[0]
            native = free_run(spec, case.reference, model, images, given[rows], start, **options)
            if self.dtype == "float64":
                furthest = max(furthest, (native.x_adv - reference.x_adv).abs().nan_to_num(nan=math.inf).max().item())
                continue
            attack, number = native_attack(spec, model, len(images), case.reference), spec.get("steps", 1)
            steps = steps + compare_steps(attack, reference, images, y, **options)
            steps = steps + replay(attack, native, images, y, number, **options)
        if steps.unexplained:
            return f"{steps.unexplained} pixels of all steps, by up to {steps.max_abs_diff:.3g}"
        return _beyond(furthest, "of the last images")

    def _drawn(self) -> tuple[nn.Module, Tensor, Tensor | None]:
        channels, height, width = self.shape
        dtype, features = getattr(torch, self.dtype), 1 if self.net == "linear" else 3
        layers: list[nn.Module] = [nn.Flatten(), nn.Linear(features * height * width, self.classes)]
        if self.net == "linear":
            layers[1] = nn.Linear(channels * height * width, self.classes)
        else:
            layers = [nn.Conv2d(channels, features, 3, padding=1), _ACTIVATIONS[self.net](), *layers]
        uniform = torch.rand((self.n, *self.shape), dtype=torch.float64)
        mask = torch.rand((self.n, *self.shape)) < 0.5 if self.masked else None
        with torch.no_grad():
            for parameter in layers[-1].parameters():
                parameter.mul_(self.gain)
        return nn.Sequential(*layers).to(dtype).eval(), _PIXELS[self.pixels](uniform).to(dtype), mask


@dataclass(frozen=True)
class Findings:
    """What a run of the fuzzer found.

    Attributes:
        counts: the problems on which native was compared with each toolkit, those of shrinking left out.
        counterexample: the smallest problem found on which they differ; None where they agree on all.
        difference: how they differ there.
    """

    counts: Counter[str]
    counterexample: Problem | None
    difference: str | None


def fuzz(
    n: int,
    *,
    attacks: Sequence[str] = (),
    references: Sequence[str] = (),
    seed: int = 0,
    verbose: bool = True,
) -> Findings:
    """Compare native with the toolkits on `n` random problems, and shrink the first on which they differ.

    Args:
        n: number of problems.
        attacks, references: only these; empty for all, see `guardians.parity.cases`, of toolkits that are installed.
        seed: of the problems.
        verbose: show a progress bar.

    Raises:
        ValueError: an attack or a reference is unknown, or they have no exact case.
        ImportError: hypothesis, or one of the `references`, is not installed.
    """
    check_integer("n", n, low=1)
    check_integer("seed", seed, low=0)
    hypothesis = installed("hypothesis")
    strategy, counts, differed = problems(attacks, references), Counter[str](), False
    progress = tqdm(total=n, desc="fuzz", unit="problem", disable=not verbose)

    def differs(problem: Problem) -> bool:
        nonlocal differed
        found = problem.difference() is not None
        if not differed:
            counts[problem.case.reference] += 1
            progress.update()
        if found and not differed:
            differed = True
            progress.set_description("shrinking")
        return found

    settings = hypothesis.settings(
        max_examples=n,
        database=None,
        deadline=None,
        derandomize=False,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    with progress:
        try:
            smallest = hypothesis.find(strategy, differs, settings=settings, random=Random(seed))
        except hypothesis.errors.NoSuchExample:
            return Findings(counts, None, None)
    return Findings(counts, smallest, smallest.difference())


def problems(attacks: Sequence[str] = (), references: Sequence[str] = ()) -> SearchStrategy[Problem]:
    """The hypothesis strategy: problems of the attacks and toolkits, see `fuzz`.

    Raises:
        ValueError: an attack or a reference is unknown, or they have no exact case.
        ImportError: hypothesis, or one of the `references`, is not installed.
    """
    installed("hypothesis")
    from hypothesis import strategies as st

    known = [case for case in cases(attacks, references) if isinstance(case, Case)]
    stated = [case for case in known if case.kind == "exact"]
    for reference in {case.reference for case in stated} if references else ():
        installed(TOOLKITS[reference].PACKAGE)
    stated = [case for case in stated if is_installed(case.reference)]
    if not stated:
        raise ValueError(f"attacks={list(attacks)}, references={list(references)}: no toolkit here has an exact case")
    forms: dict[tuple[str, float, str], list[Case]] = {}
    for case in stated:
        forms.setdefault((case.spec.family, case.spec.norm, case.reference), []).append(case)
    factors = st.floats(0.05, 20)
    drawn_anew: dict[str, SearchStrategy[Any]] = {
        "steps": st.integers(1, 12),
        "gamma": st.floats(0.01, 0.5),
        "init_epsilon": st.floats(0.1, 3),
        "max_stepsize": st.floats(0.1, 2),
        "min_stepsize": st.floats(0.001, 0.1),
        "rho": st.floats(0.5, 0.99),
        "confidence": st.floats(0, 1),
        "searches": st.integers(1, 4),
    }
    # torchattacks' Carlini-Wagner weighs a distance of 1e-16, the rounding of arctanh and tanh. Adam divides by it plus
    # 1e-8, so that each step moves a pixel by 6e-9 of the learning rate.
    scaled = {"eps_step": factors, "const": factors, "learning_rate": st.floats(0.05, 0.5)}

    @st.composite
    def problem(draw: Any) -> Problem:
        case = draw(st.sampled_from(list(forms.values())).flatmap(st.sampled_from))
        spec = case.spec
        given = dict(spec.params)
        params = {name: given[name] * draw(factor) for name, factor in scaled.items() if name in given}
        for name in family_of(spec).parameters:
            # torchattacks searches for no c, and keeps images without the confidence (docs/deviations.md).
            without = ("confidence", "searches") if case.reference == "torchattacks" else ()
            if name in drawn_anew and name not in without and (name in given or name != "steps"):
                params[name] = draw(drawn_anew[name])
        eps = None if spec.eps is None else spec.eps * draw(factors)
        spec = replace(spec.having(**params), eps=eps)
        n, by_step = draw(st.integers(1, 4)), goes_step_by_step(spec)
        classes = draw(st.integers(3 if spec.get("loss") == "difference_logits_ratio" else 2, 10))
        # ART casts to float32. Attacks that minimise a norm choose between queries, which rounding decides in float32;
        # the harness compares them in float64 too.
        dtypes = ["float32"] if case.reference == "ART" else ["float64", "float32"] if by_step else ["float64"]
        # Where ReLUs are all off, DDN goes in a direction drawn at random.
        nets = ["linear", "smooth"] if spec.family == "DDN" else list(_ACTIVATIONS)
        # ART's L2 steps vanish where the squares of a gradient underflow in float32 (docs/deviations.md).
        gains = [1, 10] if (case.reference, spec.norm) == ("ART", 2) else [1, 10, 100]
        # Of attacks that minimise a norm, and of APGD, only those images are compared that are not fooled as they are:
        # native gives them back at once, and the toolkits descend from them.
        labels = (
            st.integers(0, classes - 1) if by_step else st.just(0) if not spec.targeted else st.integers(1, classes - 1)
        )
        return Problem(
            replace(case, spec=spec),
            net=draw(st.sampled_from(nets)),
            classes=classes,
            gain=draw(st.sampled_from(gains)),
            shape=(draw(st.sampled_from([1, 3])), draw(st.integers(1, 6)), draw(st.integers(1, 6))),
            pixels=draw(st.sampled_from(list(_PIXELS))),
            n=n,
            batch_size=draw(st.integers(1, n)),
            label=draw(labels),
            one_hot=draw(st.booleans()),
            masked=case.reference == "ART" and draw(st.booleans()),  # no other toolkit takes masks
            dtype=draw(st.sampled_from(dtypes)),
            seed=draw(st.integers(0, 2**16)),
        )

    return problem()


def _beyond(difference: float, where: str) -> str | None:
    agrees = difference <= FLOAT64_TOLERANCE  # NaN is none
    return None if agrees else f"up to {difference:.3g} in a pixel {where}"
