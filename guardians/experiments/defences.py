"""Robust accuracy of models and defences, by attacks that know more and more of them."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from guardians.attacks import FGSM, PGD, CarliniWagnerL2
from guardians.attacks.norms import lp_norm
from guardians.attacks.objectives import margin
from guardians.data import Dataset
from guardians.defences import AveragedMixturePGD, MixupInference
from guardians.engine.attack import Attack
from guardians.engine.checks import check_choice, check_integer
from guardians.engine.interfaces import ClassifierAttack
from guardians.engine.rng import hashed
from guardians.engine.search import bfloat16_is_native
from guardians.engine.state import State
from guardians.engine.victim import predicted_labels
from guardians.experiments.names import written
from guardians.experiments.subject import PASSES, SEARCH_PASSES, Subject, defended
from guardians.models import digest, load_model, model_card
from guardians.statistics import wilson_interval
from guardians.tables import BENCHMARK_COLUMNS, Table, file_name, write_csv

__all__ = [
    "ATTACKS",
    "BUNDLED",
    "DEFENCE_COLUMNS",
    "RUN_COLUMNS",
    "as_markdown",
    "attacks_on",
    "bundled",
    "evaluate",
    "summarise",
]

EPS, EPS_STEP = 8 / 255, 2 / 255
L2_RADIUS = 0.5
"""Within which Carlini-Wagner's smallest perturbations count."""
EOT_SAMPLES = 5
"""Gradients, of `SEARCH_PASSES` passes each, that EOT averages."""
RANDOM_STARTS = 5
"""Of the adaptive attack on a model that is not random."""

ATTACKS = {
    "clean": "the images as they are",
    "transfer": "PGD-40 on the undefended standard model: the attacker knows nothing of the defence",
    "oblivious": "PGD-40 on the network behind a randomised defence: the attacker knows its weights, not the defence",
    "FGSM": "on the defence",
    "PGD-10": "on the defence, from the image",
    "PGD-40": "on the defence, from the image",
    "EOT-PGD": f"PGD-20 with gradients averaged over {EOT_SAMPLES} answers of a randomised defence",
    "adaptive": f"made for the defence: for a model that is not random PGD-40 with {RANDOM_STARTS} random starts on "
    "the margin between logits; for Random Self-Ensemble PGD-20 from a random start, with "
    f"{SEARCH_PASSES * EOT_SAMPLES} single noisy passes a gradient; for Mixup Inference `AveragedMixturePGD`",
    "PGD-L2": f"PGD-20 in norm 2, eps {L2_RADIUS:g}; gradients of a randomised defence averaged as in EOT-PGD",
    "C&W": f"Carlini-Wagner L2 on the defence; an image stands where it takes more than {L2_RADIUS:g}",
}
"""What each attack is; the norm is inf and eps 8/255 but for `IN_L2`."""
IN_L2 = ("PGD-L2", "C&W")
"""Those in norm 2; they are run with a single seed."""

_MEASURED = {
    "accuracy": "robust accuracy: fraction classified correctly both clean and attacked, by fresh draws of the defence "
    "for each; of clean, by one",
    "l2_median": "median L2 norm of the perturbations; of C&W, of those that fool the defence",
    "forward_per_image": "samples forward through the model that the attack asks; empty where it does not count",
    "backward_per_image": "samples backward through it",
    "judgement_per_image": "samples forward through it for judgement",
    "seconds": "wall-clock time of the attack on all images",
}
_KEY = ["defence", "model_digest", "attack", "data", "n", "seed", "params"]
_SUMMARY_KEY = [name for name in _KEY if name != "seed"]
RUN_COLUMNS = {
    "defence": "model, or model and defence",
    "model_digest": "of model and defence, as it answers: " + BENCHMARK_COLUMNS["model_digest"],
    "attack": "see `ATTACKS`",
    "data": "where the images came from, and the first digits of a SHA-256 digest of images and labels",
    "n": "number of images",
    "seed": "of the draws of defence and attack",
    "params": "JSON: radius and step size of the attack; of transfer the digest of the surrogate; of a randomised "
    "defence its passes when it answers and for a gradient, and draws of EOT; of the adaptive attack on another model "
    "its loss and random starts",
    **_MEASURED,
}
DEFENCE_COLUMNS = {
    "defence": RUN_COLUMNS["defence"],
    "model_digest": RUN_COLUMNS["model_digest"],
    "attack": RUN_COLUMNS["attack"],
    "data": RUN_COLUMNS["data"],
    "n": RUN_COLUMNS["n"],
    "params": RUN_COLUMNS["params"],
    "seeds": "number of seeds; 1 where nothing is random",
    "accuracy": "mean over the seeds of robust accuracy",
    "accuracy_low": "lower end of its 95% Wilson interval over the images",
    "accuracy_high": "upper end of it",
    "seed_sd": "standard deviation of the accuracy over the seeds",
    "seed_min": "lowest accuracy of a seed",
    "seed_max": "highest accuracy of a seed",
    **{name: f"mean over the seeds: {text}" for name, text in _MEASURED.items() if name != "accuracy"},
    "flags": "flattering: another attack in the same ball leaves an interval that lies below this one's",
}


_Found = dict[Any, tuple[Tensor, tuple[float, float, float], float]]
"""Adversarial images, samples forward, backward and for judgement, and seconds."""


def attacks_on(subject: Subject) -> list[str]:
    """Those that tell something new of it: EOT and obliviousness need something random."""
    left_out = {"transfer"} if subject.name == "standard" else set()
    return [a for a in ATTACKS if a not in left_out | ({"oblivious", "EOT-PGD"} if subject.make is None else set())]


BUNDLED = ("standard", "fgsm-at", "pgd-at", "rse", "mixup+MI-PL", "mixup+MI-OL", "iat+MI-OL")


def bundled(name: str, pool: Dataset, device: torch.device | str = "cpu", prefix: str = "resnet9-16") -> Subject:
    """A bundled model, with the defence that it is made for.

    Args:
        name: of `BUNDLED`: a recipe, and for Mixup Inference the method.
        pool: images of Mixup Inference, none of those that are attacked.
        device: of the model.
        prefix: architecture of the model.

    Raises:
        ValueError: it is none of them, or there is no such model.
    """
    check_choice("name", name, BUNDLED)
    recipe, _, method = name.partition("+")
    base, defence = load_model(f"{prefix}-{recipe}", device=device), method or "none"
    if recipe == "rse":
        card = model_card(f"{prefix}-{recipe}")["defence"]
        defence = written("rse", {key: card[key] for key in ("sigma_init", "sigma_inner")})
    return defended(name, base, defence, pool)


def evaluate(
    defences: Sequence[Subject],
    data: Dataset,
    out: str | os.PathLike[str],
    *,
    surrogate: nn.Module,
    seeds: int = 5,
    attacks: Sequence[str] = (),
    batch_size: int = 64,
    verbose: bool = True,
) -> pd.DataFrame:
    """Attack each defence in each way, and append a row for each seed to `out/defences_runs.csv`.

    A row that is on disk is not run again. It is known by the digest of the defence with all that it is made of, see
    `guardians.models.digest`, and by what the attack is given. Whether each image stands goes to
    `out/defences_outcomes`, and the summary of all rows to `out/defences.csv`.

    Args:
        defences: what is attacked, in evaluation mode.
        data: images and labels.
        out: folder of the tables, created where it does not exist.
        surrogate: the standard model of the transfer attack.
        seeds: how often a randomised defence is attacked, with other draws of defence and attack; but in norm 2 once.
        attacks: only these, of `ATTACKS`; empty for all.
        batch_size: images in one step of an attack.
        verbose: show a progress bar.

    Returns:
        The part of the summary that this call is about; columns `DEFENCE_COLUMNS`.

    Raises:
        TypeError, ValueError: an argument is outside what is allowed.
    """
    check_integer("seeds", seeds, low=1)
    check_integer("batch_size", batch_size, low=1)
    unknown = sorted(set(attacks) - set(ATTACKS))
    if unknown:
        raise ValueError(f"attacks={unknown}: unknown; known are {', '.join(ATTACKS)}")
    table = Table(Path(out) / "defences_runs.csv", RUN_COLUMNS, _KEY)
    jobs = [
        (subject, attack, seed)
        for seed in range(seeds)  # so that a run that is cut short has all defences
        for subject in defences
        for attack in attacks_on(subject)
        if (not attacks or attack in attacks) and (seed == 0 or (subject.make is not None and attack not in IN_L2))
    ]
    digests = {id(subject): digest(subject.module(0, PASSES)) for subject in defences}
    identity, surrogate_digest, found, wanted = data.identity, digest(surrogate), _Found(), set()
    progress = tqdm(jobs, desc="defences", unit="attack", disable=not verbose)
    for subject, attack, seed in progress:
        progress.set_postfix_str(f"{subject.name}: {attack}, seed {seed}")
        key: dict[str, Any] = {"defence": subject.name}
        key |= {"model_digest": digests[id(subject)], "attack": attack, "data": identity}
        key |= {"n": len(data), "seed": seed, "params": json.dumps(_params(subject, attack, surrogate_digest))}
        wanted.add(tuple(key[name] for name in _SUMMARY_KEY))
        if key in table:
            continue
        device = next(subject.base.parameters()).device
        images, labels = data.as_floats().to(device), data.labels.to(device)
        outcome, row = _measure(subject, attack, images, labels, surrogate, seed, batch_size, found)
        hashed_key = hashlib.sha256(json.dumps(list(key.values())).encode()).hexdigest()[:8]
        name = file_name(subject.name, attack.replace("&", ""), seed, hashed_key)
        path = Path(out) / "defences_outcomes" / f"{name}.csv"
        table.append({**key, **row}, (path, outcome.reset_index(names="index")))
    summary = summarise(table.frame())
    write_csv(summary, Path(out) / "defences.csv")
    is_wanted = [row in wanted for row in summary[_SUMMARY_KEY].itertuples(index=False, name=None)]
    return summary[is_wanted].reset_index(drop=True)


def summarise(runs: pd.DataFrame) -> pd.DataFrame:
    """A row for each defence and attack, in the order in which they first stand in the rows of the single seeds."""
    rows = []
    for same, group in runs.groupby(_SUMMARY_KEY, sort=False):
        known: dict[str, Any] = dict(zip(_SUMMARY_KEY, same, strict=True))
        accuracy = group["accuracy"].to_numpy(dtype=float)
        low, high = wilson_interval(round(float(accuracy.mean()) * known["n"]), known["n"])
        rows.append(
            known
            | {"seeds": len(group)}
            | {"accuracy": accuracy.mean(), "accuracy_low": low, "accuracy_high": high}
            | {"seed_sd": accuracy.std(ddof=1) if len(group) > 1 else np.nan}
            | {"seed_min": accuracy.min(), "seed_max": accuracy.max()}
            | {name: group[name].mean() for name in _MEASURED if name != "accuracy"}
        )
    frame = pd.DataFrame(rows, columns=[name for name in DEFENCE_COLUMNS if name != "flags"])
    ball = frame["attack"].map({"clean": "none", **dict.fromkeys(IN_L2, "2")}).fillna("inf")
    ball += frame["params"].map(lambda params: f" {json.loads(params).get('eps')}")
    highs = frame["accuracy_high"].groupby([*(frame[name] for name in ("defence", "model_digest", "data")), ball])
    frame["flags"] = np.where(frame["accuracy_low"] > highs.transform("min"), "flattering", "")
    return frame


def as_markdown(summary: pd.DataFrame) -> str:
    """A row for each defence and a column for each attack: accuracy in percent ± its deviation over the seeds.

    A star is the flag "flattering".
    """
    lines = ["| model or defence | " + " | ".join(ATTACKS) + " |", "| --- " * (1 + len(ATTACKS)) + "|"]
    for defence in sorted(summary["defence"].unique(), key=lambda name: (*BUNDLED, name).index(name)):
        cells = dict.fromkeys(ATTACKS, "")
        for row in summary[summary["defence"] == defence].itertuples():
            spread = "" if np.isnan(row.seed_sd) else f" ± {100 * row.seed_sd:.1f}"
            cells[row.attack] = f"{100 * row.accuracy:.1f}{spread}{'*' if row.flags else ''}"
        lines.append(f"| {defence} | " + " | ".join(cells.values()) + " |")
    return "\n".join(lines)


def _measure(
    subject: Subject,
    attack: str,
    x: Tensor,
    y: Tensor,
    surrogate: nn.Module,
    seed: int,
    batch_size: int,
    found: _Found,
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Outcomes of the single images, and the columns of a row.

    `found` keeps what attacks have found that know nothing of the defence, nor of its seed, by the model that they ask.
    """
    x_adv, counts, seconds = x, (0.0, 0.0, 0.0), 0.0
    attacked = {"transfer": surrogate, "oblivious": subject.base}.get(attack)
    if attacked in found:
        x_adv, counts, seconds = found[attacked]
    elif attack != "clean":
        attacker = _attack(subject, attack, surrogate, seed, batch_size)
        start = time.perf_counter()
        x_adv = attacker(x, y)
        if x_adv.is_cuda:
            torch.cuda.synchronize(x_adv.device)
        seconds = time.perf_counter() - start
        counts = (np.nan, np.nan, np.nan)
        if isinstance(attacker, Attack) and attacker.report is not None:
            report = attacker.report
            counts = (report.search_forward, report.search_backward, report.judgement_forward)
        if attacked is not None:
            found[attacked] = x_adv, counts, seconds
    # Draws that no attack has seen, of the full ensemble.
    answers = [
        predicted_labels(subject.module(_defence_seed(seed, number), PASSES), images, batch_size) == y
        for number, images in enumerate((x, x_adv))
    ]
    l2 = lp_norm(x_adv - x, 2).flatten()
    stands = answers[0] & (answers[1] | (l2 > L2_RADIUS) if attack == "C&W" else answers[1])
    if attack == "clean":
        stands = answers[0]
    outcome = pd.DataFrame({"label": y.tolist(), "stands": stands.int().tolist(), "l2": l2.tolist()})
    counted = ~answers[1] if attack == "C&W" else torch.ones_like(stands)
    n = len(x)
    return outcome, {
        "accuracy": stands.double().mean().item(),
        "l2_median": outcome["l2"][counted.tolist()].median(),
        "forward_per_image": counts[0] / n,
        "backward_per_image": counts[1] / n,
        "judgement_per_image": counts[2] / n,
        "seconds": seconds,
    }


def _params(subject: Subject, attack: str, surrogate_digest: str) -> dict[str, Any]:
    """All that the answer depends on and other columns do not say."""
    params: dict[str, Any] = {}
    if attack in IN_L2:
        params["eps"] = L2_RADIUS
    elif attack != "clean":
        params |= {"eps": EPS} if attack == "FGSM" else {"eps": EPS, "eps_step": EPS_STEP}
    if attack == "transfer":
        params["surrogate"] = surrogate_digest
    if subject.make is not None:
        return params | {"passes": PASSES, "search_passes": SEARCH_PASSES, "eot_samples": EOT_SAMPLES}
    return params | ({"loss": "margin", "num_random_init": RANDOM_STARTS} if attack == "adaptive" else {})


def _defence_seed(seed: int, number: int) -> int:
    """Of a defence that answers (0 and 1), or that an attack asks (2)."""
    return int(hashed(seed, number)) // 2


def _attack(subject: Subject, attack: str, surrogate: nn.Module, seed: int, batch_size: int) -> ClassifierAttack:
    common: dict[str, Any] = {"seed": seed, "batch_size": batch_size, "verbose": False}

    def pgd(model: nn.Module, kind: type[PGD] = PGD, draws: int = 1, **options: Any) -> PGD:
        expectation = {"eot_samples": draws, "batch_size": draws * batch_size}
        return kind(model, **{"eps": EPS, "eps_step": EPS_STEP, "early_stop": True, **common, **expectation, **options})

    if attack in ("transfer", "oblivious"):  # the images shall be as wrong as possible, for they meet another model
        asked = surrogate if attack == "transfer" else subject.base
        precision = "bfloat16" if bfloat16_is_native(next(surrogate.parameters()).device) else "auto"
        return pgd(asked, max_iter=40, early_stop=False, precision=precision)
    asked = subject.module(_defence_seed(seed, 2), SEARCH_PASSES)
    if attack == "FGSM":
        return FGSM(asked, eps=EPS, seed=seed, batch_size=batch_size)
    if attack in ("PGD-10", "PGD-40"):
        return pgd(asked, max_iter=int(attack.partition("-")[2]))
    if attack == "EOT-PGD":
        return pgd(asked, max_iter=20, draws=EOT_SAMPLES)
    if attack == "PGD-L2":
        draws = 1 if subject.make is None else EOT_SAMPLES
        return pgd(asked, max_iter=20, draws=draws, norm=2, eps=L2_RADIUS, eps_step=L2_RADIUS / 5)
    if attack == "C&W":
        return CarliniWagnerL2(asked, **common)
    if subject.make is None:
        return pgd(asked, _MarginPGD, max_iter=40, num_random_init=RANDOM_STARTS)
    if isinstance(asked, MixupInference):
        return AveragedMixturePGD(asked, EPS, EPS_STEP, **common)
    single = subject.module(_defence_seed(seed, 2), 1)
    return pgd(single, max_iter=20, num_random_init=1, draws=SEARCH_PASSES * EOT_SAMPLES)


class _MarginPGD(PGD):
    """PGD on the margin between the largest other logit and the label's, which no softmax flattens."""

    def objective(self, logits: Tensor, y: Tensor, state: State) -> Tensor:
        return margin(logits, y, targeted=self.targeted)
