"""Training: it learns, it is a function of its seed, and no interruption leaves a trace."""

import csv
import logging
import math
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from guardians import training
from guardians.data import Dataset
from guardians.defences import RandomSelfEnsemble, training_loop
from guardians.engine.rng import hashed, row_keys
from guardians.engine.search import bfloat16_is_native
from guardians.training import LOG_COLUMNS, RECIPES, Recipe, accuracy, robust_accuracy, train

RECIPE = Recipe(epochs=3, batch_size=16, peak_lr=0.05, crop_padding=1, cutout=2)
STEPS = 4  # an epoch of RECIPE on `colours(70)`


def colours(n: int, seed: int = 0) -> Dataset:
    """Noisy 6 x 6 images whose strongest channel is their label."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (n,), generator=generator)
    images = torch.randint(0, 160, (n, 3, 6, 6), generator=generator)
    images[torch.arange(n), labels] += 60
    return Dataset(images.to(torch.uint8), labels, ("red", "green", "blue"), "synthetic")


EPS = 12 / 255


def two_features(n: int, seed: int) -> Dataset:
    """The channel of the label is faintly brighter; a chequered channel is that of the label in most images."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (n,), generator=generator)
    other = torch.randint(3, (n,), generator=generator)
    chequered = torch.where(torch.rand(n, generator=generator) < 0.7, labels, other)
    images = torch.randint(90, 110, (n, 3, 6, 6), generator=generator)
    images[torch.arange(n), labels] += 10
    images[torch.arange(n), chequered] += 60 * (-1) ** (torch.arange(6)[:, None] + torch.arange(6))
    return Dataset(images.to(torch.uint8), labels, ("red", "green", "blue"), "synthetic")


TRAIN, TEST = colours(70), colours(50, seed=1)


def small_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 3),
    )


def log_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "log.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))


def outcome(folder: Path, model: nn.Module, result: float) -> tuple[Any, ...]:
    """All that a run determines: weights, result, and the log but for the seconds."""
    weights = {key: value.tolist() for key, value in model.state_dict().items()}
    return weights, result, [{k: v for k, v in row.items() if k != "seconds"} for row in log_of(folder)]


def run(folder: Path, recipe: Recipe = RECIPE) -> tuple[Any, ...]:
    model = small_model()
    return outcome(folder, model, train(model, TRAIN, TEST, recipe, folder, verbose=False))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, ...]:
    return run(tmp_path_factory.mktemp("uninterrupted"))


class TestOutcome:
    def test_learns(self, tmp_path: Path) -> None:
        recipe = Recipe(epochs=6, batch_size=16, peak_lr=0.2, crop_padding=1, cutout=2)
        model, data = small_model(), colours(300, seed=2)
        before = accuracy(model, TEST)
        result = train(model, data, TEST, recipe, tmp_path, verbose=False)
        assert before < 0.6
        assert result > 0.95
        assert float(log_of(tmp_path)[-1]["train_accuracy"]) > 0.85
        assert float(log_of(tmp_path)[-1]["train_loss"]) < float(log_of(tmp_path)[0]["train_loss"])

    def test_returns_the_accuracy_of_the_model_it_leaves(self, tmp_path: Path) -> None:
        model = small_model()
        result = train(model, TRAIN, TEST, RECIPE, tmp_path, verbose=False)
        with torch.no_grad():
            correct = (model.eval()(TEST.as_floats()).argmax(1) == TEST.labels).float().mean()
        assert result == pytest.approx(float(correct))
        assert float(log_of(tmp_path)[-1]["test_accuracy"]) == result

    def test_model_comes_back_in_the_usual_memory_format(self, tmp_path: Path) -> None:
        model = small_model()
        train(model, TRAIN, TEST, RECIPE, tmp_path, verbose=False)
        assert all(parameter.is_contiguous() for parameter in model.parameters())

    def test_log(self, tmp_path: Path) -> None:
        run(tmp_path)
        header, *rows = (tmp_path / "log.csv").read_text().splitlines()
        columns = "epoch,learning_rate,train_loss,train_accuracy,test_accuracy,robust_accuracy,seconds"
        assert header == columns == ",".join(LOG_COLUMNS)
        assert [row.split(",")[0] for row in rows] == ["1", "2", "3"]
        for row in log_of(tmp_path):
            # Fractions of 4 x 16 training and of 50 test images.
            assert (float(row["train_accuracy"]) * 64).is_integer()
            assert float(row["test_accuracy"]) * 50 == pytest.approx(round(float(row["test_accuracy"]) * 50))
        seconds = [float(row["seconds"]) for row in log_of(tmp_path)]
        assert seconds == sorted(seconds)

    def test_adversarial_training_makes_robust(self, tmp_path: Path) -> None:
        """Where a feature within the ball says more than one beyond it (Tsipras et al. 2019, section 2)."""
        data, test = two_features(1000, seed=2), two_features(200, seed=3)
        recipe = Recipe(epochs=8, batch_size=50, peak_lr=0.2, crop_padding=1, cutout=0, eps=EPS, eps_step=EPS)
        robust = {}
        for steps in (0, 1, 2):
            model = small_model()
            train(model, data, test, replace(recipe, attack_steps=steps), tmp_path / str(steps), verbose=False)
            robust[steps] = robust_accuracy(model, test, 10, eps=EPS)
            assert {row["robust_accuracy"] for row in log_of(tmp_path / str(steps))} == {"nan"}  # nothing is held out
        assert robust[0] + 0.2 < min(robust[1], robust[2])

    def test_trains_on_images_in_the_ball(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """About the augmented images, and leaves the parameters trainable."""
        clean, seen, augment = [], [], training._augment

        def recorded(*args: Any) -> Tensor:
            clean.append(augment(*args))
            return clean[-1]

        monkeypatch.setattr(training, "_augment", recorded)
        model = small_model()
        model.register_forward_hook(lambda m, args, _: seen.append(args[0].clone()) if m.training else None)
        train(model, TRAIN, TEST, replace(RECIPE, attack_steps=2, eps=0.1, eps_step=0.06), tmp_path, verbose=False)
        assert len(seen) == len(clean)
        for x, x_adv in zip(clean, seen, strict=True):
            assert ((x_adv.double() - x.double()).abs() <= 0.1).all()
            assert (x_adv != x).float().mean() > 0.5
            assert ((x_adv >= 0) & (x_adv <= 1)).all()
        assert all(parameter.requires_grad for parameter in model.parameters())

    def test_partial_batch_is_dropped(self, tmp_path: Path) -> None:
        model, seen = small_model(), []
        model.register_forward_hook(lambda m, args, _: seen.append(len(args[0])) if m.training else None)
        train(model, TRAIN, TEST, replace(RECIPE, epochs=1), tmp_path, verbose=False)
        assert seen == [16] * STEPS

    def test_steps_are_those_of_the_papers(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Label smoothing (Szegedy et al. 2016, section 7), Nesterov momentum and weight decay, written out."""
        monkeypatch.setattr(training_loop, "bfloat16_is_native", lambda device: False)
        recipe = Recipe(epochs=4, batch_size=70, peak_lr=1.0, crop_padding=0, cutout=0, label_smoothing=0.3)
        recipe = replace(recipe, weight_decay=0.1)
        data = replace(TRAIN, images=TRAIN.images[..., :1].expand(-1, -1, -1, 6).contiguous())  # flips change nothing
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(108, 3))
        weight, velocity = model[1].weight.detach().double().clone(), torch.zeros(3, 108, dtype=torch.float64)
        bias, bias_velocity = model[1].bias.detach().double().clone(), torch.zeros(3, dtype=torch.float64)
        train(model, data, TEST, recipe, tmp_path, verbose=False)
        x = data.as_floats().double().flatten(1)
        target = torch.full((70, 3), 0.1).index_put((torch.arange(70), data.labels), torch.tensor(0.8)).double()
        for row in log_of(tmp_path):
            log_probabilities = (x @ weight.T + bias).log_softmax(1)
            assert float(row["train_loss"]) == pytest.approx(
                -float((target * log_probabilities).sum(1).mean()), rel=1e-5
            )
            error = (log_probabilities.exp() - target) / 70
            gradient, bias_gradient = error.T @ x + 0.1 * weight, error.sum(0)
            velocity, bias_velocity = 0.9 * velocity + gradient, 0.9 * bias_velocity + bias_gradient
            rate = float(row["learning_rate"])
            weight = weight - rate * (gradient + 0.9 * velocity)
            bias = bias - rate * (bias_gradient + 0.9 * bias_velocity)
        torch.testing.assert_close(model[1].weight.double(), weight, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model[1].bias.double(), bias, rtol=1e-4, atol=1e-5)

    def test_weights_decay_and_biases_do_not(self, tmp_path: Path) -> None:
        """Where the gradient is zero, a step multiplies each weight by 1 - learning rate x decay."""

        class Constant(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

            def forward(self, x: Tensor) -> Tensor:
                return self.norm(self.conv(x)).mean((2, 3)) * 0

        model = Constant()
        before = {key: value.clone() for key, value in model.named_parameters()}
        recipe = replace(RECIPE, epochs=5, batch_size=70, momentum=0, weight_decay=0.5, warmup=0.4, peak_lr=0.5)
        train(model, TRAIN, TEST, recipe, tmp_path, verbose=False)
        factor = np.prod([1 - float(row["learning_rate"]) * 0.5 for row in log_of(tmp_path)])
        assert factor < 0.8
        torch.testing.assert_close(model.conv.weight, before["conv.weight"] * factor)
        for key in ("conv.bias", "norm.weight", "norm.bias"):
            assert torch.equal(model.get_parameter(key), before[key])

    @pytest.mark.parametrize("warmup", [0, 0.2, 0.25, 1 / 3, 0.5, 0.9])
    @pytest.mark.parametrize("epochs", [1, 2, 3, 4, 5])
    def test_learning_rate_is_one_cycle(self, tmp_path: Path, epochs: int, warmup: float) -> None:
        """From a 25th of the peak linearly to the peak, which the last step of the warm-up has, then to next to 0."""
        recipe = Recipe(epochs=epochs, batch_size=70, peak_lr=0.5, warmup=warmup, crop_padding=0)
        train(nn.Sequential(nn.Flatten(), nn.Linear(108, 3)), TRAIN, TEST, recipe, tmp_path, verbose=False)
        peak_step = warmup * epochs - 1
        steps, rates = [peak_step, epochs - 1], [0.5, 0.5 / 25e4]
        if peak_step > 0:
            steps, rates = [0, *steps], [0.5 / 25, *rates]
        expected = np.interp(range(epochs), steps, rates)
        np.testing.assert_allclose([float(row["learning_rate"]) for row in log_of(tmp_path)], expected, rtol=1e-5)

    def test_speaks_only_when_asked(self, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
        run(tmp_path / "quiet")
        assert capfd.readouterr() == ("", "")
        train(small_model(), TRAIN, TEST, RECIPE, tmp_path / "loud")
        output = "".join(capfd.readouterr())
        assert output.count("test_accuracy") == 3
        assert "epoch 2/3" in output


class TestWeightAveraging:
    RECIPE = replace(RECIPE, schedule="swa", peak_lr=0.1)

    def test_weights_are_the_mean_over_the_ends_of_the_epochs(self, tmp_path: Path) -> None:
        after_epoch = []
        for epochs in (1, 2, 3):  # at a constant rate the shorter runs are the beginning of the longer ones
            model = small_model()
            train(model, TRAIN, TEST, replace(self.RECIPE, epochs=epochs), tmp_path / str(epochs), verbose=False)
            after_epoch.append(torch.load(tmp_path / str(epochs) / "checkpoint.pt", weights_only=True)["model"])
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter, torch.stack([state[name] for state in after_epoch]).mean(0))
        assert not torch.equal(parameter, after_epoch[-1][name])

    def test_batch_norm_knows_the_training_images(self, tmp_path: Path) -> None:
        model = small_model()
        train(model, TRAIN, TEST, self.RECIPE, tmp_path, verbose=False)
        features = [model[0](batch) for batch in TRAIN.as_floats().split(self.RECIPE.batch_size)]
        mean = torch.stack([batch.mean((0, 2, 3)) for batch in features]).mean(0)
        torch.testing.assert_close(model[1].running_mean, mean, rtol=0.02, atol=0.02)  # in bfloat16 where there is one

    def test_learning_rate_is_constant(self, tmp_path: Path) -> None:
        run(tmp_path, self.RECIPE)
        assert {float(row["learning_rate"]) for row in log_of(tmp_path)} == {0.1}

    @pytest.mark.parametrize("where", ["in the middle of an epoch", "after an epoch"])
    def test_resumed_run_is_the_uninterrupted_one(self, tmp_path: Path, where: str) -> None:
        model = small_model()
        with pytest.MonkeyPatch.context() as patch:
            (while_loading(STEPS + 2, interrupt) if where.startswith("in") else evaluating(2, interrupt))(patch, model)
            with pytest.raises(KeyboardInterrupt):
                train(model, TRAIN, TEST, self.RECIPE, tmp_path / "stopped", verbose=False)
        assert run(tmp_path / "stopped", self.RECIPE) == run(tmp_path / "whole", self.RECIPE)


class TestSeed:
    def test_same_seed_same_run(self, tmp_path: Path, uninterrupted: tuple[Any, ...]) -> None:
        assert run(tmp_path) == uninterrupted

    def test_other_seed_other_run(self, tmp_path: Path, uninterrupted: tuple[Any, ...]) -> None:
        assert run(tmp_path, replace(RECIPE, seed=1))[0] != uninterrupted[0]

    def test_global_seed_does_not_matter(self, tmp_path: Path, uninterrupted: tuple[Any, ...]) -> None:
        model = small_model()
        torch.manual_seed(123)
        result = train(model, TRAIN, TEST, RECIPE, tmp_path, verbose=False)
        assert outcome(tmp_path, model, result) == uninterrupted

    def test_global_random_stream_is_left_alone(self, tmp_path: Path) -> None:
        model = small_model()
        torch.manual_seed(7)
        state = torch.get_rng_state()
        train(model, TRAIN, TEST, RECIPE, tmp_path, verbose=False)
        assert torch.equal(torch.get_rng_state(), state)


Prepare = Callable[[pytest.MonkeyPatch, nn.Module], None]


def at_call(number: int, function: Callable[..., Any], action: Callable[[], None]) -> Callable[..., Any]:
    """`function`, with `action` before its call of this number, from 1 on."""
    calls = iter(range(1, 10**6))

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == number:
            action()
        return function(*args, **kwargs)

    return wrapped


def interrupt() -> None:
    raise KeyboardInterrupt


def control_c() -> None:
    """What the terminal does; Python turns it into a KeyboardInterrupt, if nobody holds it back."""
    signal.raise_signal(signal.SIGINT)


def while_loading(step: int, action: Callable[[], None]) -> Prepare:
    return lambda patch, model: patch.setattr(training, "_augment", at_call(step, training._augment, action))


def inside_the_model(forward: int, action: Callable[[], None]) -> Prepare:
    """Batch norm has updated its running statistics by then. An epoch has 4 forward passes and 1 of the evaluation."""

    def prepare(patch: pytest.MonkeyPatch, model: nn.Module) -> None:
        patch.setattr(model[3], "forward", at_call(forward, model[3].forward, action))

    return prepare


def in_backward(step: int, action: Callable[[], None]) -> Prepare:
    return lambda patch, model: patch.setattr(Tensor, "backward", at_call(step, Tensor.backward, action))


def in_the_optimiser(step: int, action: Callable[[], None]) -> Prepare:
    return lambda patch, model: patch.setattr(torch.optim.SGD, "step", at_call(step, torch.optim.SGD.step, action))


def before_the_schedule(step: int, action: Callable[[], None]) -> Prepare:
    """The constructor of the schedule takes a step too."""
    cls = training.OneCycleLR
    return lambda patch, model: patch.setattr(cls, "step", at_call(step + 1, cls.step, action))


def evaluating(epoch: int, action: Callable[[], None]) -> Prepare:
    return lambda patch, model: patch.setattr(training, "accuracy", at_call(epoch, training.accuracy, action))


def writing_the_row(epoch: int, action: Callable[[], None]) -> Prepare:
    return lambda patch, model: patch.setattr(training, "_append_row", at_call(epoch, training._append_row, action))


def writing_the_checkpoint(epoch: int, action: Callable[[], None]) -> Prepare:
    return lambda patch, model: patch.setattr(torch, "save", at_call(epoch, torch.save, action))


INTERRUPTIONS: dict[str, Prepare] = {
    f"{where.__name__} {number}, {action.__name__}": where(number, action)
    for where, numbers in (
        (while_loading, (1, 3, 4, 5, 12)),
        (inside_the_model, (1, 3, 4, 5, 8, 15)),
        (in_backward, (2, 6)),
        (in_the_optimiser, (1, 4, 7)),
        (before_the_schedule, (2, 12)),
        (evaluating, (1, 2, 3)),
        (writing_the_row, (1, 2, 3)),
        (writing_the_checkpoint, (1, 3)),
    )
    for number in numbers
    for action in (interrupt, control_c)
}


class TestInterruption:
    @pytest.mark.parametrize("where", INTERRUPTIONS)
    def test_resumed_run_is_the_uninterrupted_one(
        self, tmp_path: Path, where: str, uninterrupted: tuple[Any, ...]
    ) -> None:
        model = small_model()
        with pytest.MonkeyPatch.context() as patch:
            INTERRUPTIONS[where](patch, model)
            with pytest.raises(KeyboardInterrupt):
                train(model, TRAIN, TEST, RECIPE, tmp_path, verbose=False)
        assert run(tmp_path) == uninterrupted

    def test_interrupted_at_every_step(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uninterrupted: tuple[Any, ...]
    ) -> None:
        """Each run makes a single step, and the evaluation of each epoch is interrupted once."""
        batches, evaluate = training._batches, training.accuracy

        def one_batch(*args: Any) -> Iterator[tuple[Tensor, Tensor]]:
            for batch in batches(*args):
                yield batch
                raise KeyboardInterrupt

        monkeypatch.setattr(training, "_batches", one_batch)
        runs = 0
        while True:
            runs += 1
            monkeypatch.setattr(training, "accuracy", evaluate if runs % 2 else at_call(1, evaluate, interrupt))
            try:
                result = run(tmp_path)
                break
            except KeyboardInterrupt:
                assert runs < 100
        assert runs > 3 * STEPS
        assert result == uninterrupted

    def test_control_c_loses_no_step(self, tmp_path: Path) -> None:
        """The step that it falls into is finished and kept."""
        model = small_model()
        with pytest.MonkeyPatch.context() as patch:
            inside_the_model(STEPS + 1 + 2, control_c)(patch, model)  # the second step of the second epoch
            with pytest.raises(KeyboardInterrupt):
                train(model, TRAIN, TEST, RECIPE, tmp_path, verbose=False)
        steps = 0
        model = small_model()

        def count(module: nn.Module, *_: Any) -> None:
            nonlocal steps
            steps += module.training

        model.register_forward_hook(count)
        train(model, TRAIN, TEST, RECIPE, tmp_path, verbose=False)
        assert steps == 3 * STEPS - (STEPS + 2)

    def test_seconds_go_on(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A clock that advances by 1 at each reading: what passes between the two runs does not count."""
        clock = iter(range(10**6))
        monkeypatch.setattr(training_loop.time, "perf_counter", lambda: float(next(clock)))
        with pytest.MonkeyPatch.context() as patch:
            evaluating(2, interrupt)(patch, small_model())
            with pytest.raises(KeyboardInterrupt):
                run(tmp_path)
        for _ in range(1000):
            next(clock)
        run(tmp_path)
        assert [float(row["seconds"]) for row in log_of(tmp_path)] == [1, 3, 4]

    def test_kill_between_row_and_checkpoint(self, tmp_path: Path, uninterrupted: tuple[Any, ...]) -> None:
        """A kill runs no handler: the row is there, the checkpoint is the one before."""

        class Killed(BaseException):
            pass

        def kill() -> None:
            raise Killed

        with pytest.MonkeyPatch.context() as patch:
            writing_the_checkpoint(2, kill)(patch, small_model())
            with pytest.raises(Killed):
                run(tmp_path)
        assert [row["epoch"] for row in log_of(tmp_path)] == ["1", "2"]
        assert run(tmp_path) == uninterrupted

    def test_a_kill_costs_no_more_than_the_time_since_the_last_checkpoint(
        self, tmp_path: Path, uninterrupted: tuple[Any, ...]
    ) -> None:
        class Killed(BaseException):
            pass

        def kill() -> None:
            raise Killed

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(training_loop, "SAVED_EVERY", 0.0)
            while_loading(STEPS + 3, kill)(patch, small_model())
            with pytest.raises(Killed):
                run(tmp_path)
        saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["progress"]
        assert (saved["epoch"], saved["step"]) == (1, 2)
        assert run(tmp_path) == uninterrupted

    @pytest.mark.parametrize("torn", ["2", "2,0.01", "1", "11,0.1", "3,1,1,1,1,1\r\n"])
    def test_torn_row(self, tmp_path: Path, torn: str, uninterrupted: tuple[Any, ...]) -> None:
        with pytest.MonkeyPatch.context() as patch:
            while_loading(STEPS + 2, interrupt)(patch, small_model())
            with pytest.raises(KeyboardInterrupt):
                run(tmp_path)
        with (tmp_path / "log.csv").open("a", newline="") as stream:
            stream.write(torn)
        assert run(tmp_path) == uninterrupted

    @pytest.mark.parametrize("left", ["", "epoch,lear", "epoch,learning_rate\r\n1,2\r\n"])
    def test_log_without_checkpoint_is_started_over(
        self, tmp_path: Path, left: str, uninterrupted: tuple[Any, ...]
    ) -> None:
        (tmp_path / "log.csv").write_text(left)
        assert run(tmp_path) == uninterrupted

    def test_finished_run_is_not_run_again(self, tmp_path: Path, uninterrupted: tuple[Any, ...]) -> None:
        run(tmp_path)
        log = (tmp_path / "log.csv").read_bytes()
        with pytest.MonkeyPatch.context() as patch:
            while_loading(1, interrupt)(patch, small_model())
            assert run(tmp_path) == uninterrupted
        assert (tmp_path / "log.csv").read_bytes() == log

    def test_nothing_but_log_checkpoint_and_lock_is_left(self, tmp_path: Path) -> None:
        run(tmp_path / "new" / "folder")
        left = {file.name for file in (tmp_path / "new" / "folder").iterdir()}
        assert left - {"lock"} == {"checkpoint.pt", "log.csv"}

    @pytest.mark.parametrize("interrupted", [False, True])
    def test_signal_handler_of_the_caller_comes_back(self, tmp_path: Path, interrupted: bool) -> None:
        """A handler that only takes note does not end the training."""
        received: list[int] = []

        def note(number: int, _: object) -> None:
            received.append(number)

        previous = signal.signal(signal.SIGINT, note)
        try:
            with pytest.MonkeyPatch.context() as patch:
                if interrupted:
                    in_backward(2, control_c)(patch, small_model())
                run(tmp_path)
            assert signal.getsignal(signal.SIGINT) is note
        finally:
            signal.signal(signal.SIGINT, previous)
        assert received == [signal.SIGINT] * interrupted

    def test_in_another_thread(self, tmp_path: Path, uninterrupted: tuple[Any, ...]) -> None:
        """Where Python lets nobody set signal handlers."""
        results: list[tuple[Any, ...]] = []
        thread = threading.Thread(target=lambda: results.append(run(tmp_path)))
        thread.start()
        thread.join()
        assert results == [uninterrupted]


class TestTwoProcesses:
    """On one folder. The other one trains, stops in the middle of the second epoch, says so and waits."""

    @pytest.fixture
    def other(self, tmp_path: Path) -> Iterator["subprocess.Popen[bytes]"]:
        script = f"""
import sys, time
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent)!r})
import torch
from test_training import RECIPE, STEPS, TEST, TRAIN, at_call, small_model, train, training

torch.set_num_threads(1)  # as the tests, whose weights these are compared with

def wait():
    Path({str(tmp_path / "waits")!r}).touch()
    time.sleep(600)

training._augment = at_call(STEPS + 2, training._augment, wait)
train(small_model(), TRAIN, TEST, RECIPE, {str(tmp_path / "run")!r}, verbose=False)
"""
        with subprocess.Popen([sys.executable, "-c", script]) as process:
            try:
                while not (tmp_path / "waits").exists():
                    assert process.poll() is None
                    time.sleep(0.05)
                yield process
            finally:
                process.kill()

    def test_the_second_is_refused_until_the_first_is_killed(
        self, tmp_path: Path, other: "subprocess.Popen[bytes]", uninterrupted: tuple[Any, ...]
    ) -> None:
        folder, model = tmp_path / "run", small_model()
        before = {file.name: file.read_bytes() for file in folder.iterdir()}
        weights = [parameter.clone() for parameter in model.parameters()]
        with pytest.raises(ValueError, match=f"folder='{folder}': is in use by another training"):
            train(model, TRAIN, TEST, RECIPE, folder, verbose=False)
        assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
        assert all(map(torch.equal, model.parameters(), weights))
        assert run(tmp_path / "another") == uninterrupted
        other.kill()
        other.wait()
        assert run(folder) == uninterrupted


def seen_in_training(monkeypatch: pytest.MonkeyPatch, model: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """Lists to which come the augmented images of each step, and those that the model is trained on."""
    clean: list[Tensor] = []
    seen: list[Tensor] = []
    augment = training._augment

    def recorded(*args: Any) -> Tensor:
        clean.append(augment(*args).clone())
        return clean[-1].clone()

    monkeypatch.setattr(training, "_augment", recorded)
    model.register_forward_hook(lambda m, args, _: seen.append(args[0].clone()) if m.training else None)
    return clean, seen


def numbered(n: int) -> Dataset:
    """Flat images, each of a colour of its own that survives the augmentation; labels in blocks of uneven length."""
    labels = torch.arange(n).pow(2) * 3 // n**2
    return Dataset(
        torch.arange(n, dtype=torch.uint8).view(n, 1, 1, 1).expand(-1, 3, 6, 6), labels, TRAIN.classes, "flat"
    )


class TestRecipes:
    @pytest.mark.parametrize("name", RECIPES)
    def test_are_recipes(self, name: str) -> None:
        recipe = Recipe(**RECIPES[name])
        assert recipe.is_adversarial == (name in ("fgsm-at", "pgd-at", "iat"))
        assert recipe.is_noisy == (name == "rse")
        assert (recipe.mixup_alpha > 0) == (name in ("mixup", "iat"))
        assert (recipe.holdout > 0) == recipe.is_adversarial

    @pytest.mark.parametrize(
        ("changes", "is_adversarial"),
        [({}, False), ({"attack_steps": 1}, True), ({"attack_steps": 1, "ratio": 0}, False), ({"ratio": 0.5}, False)],
    )
    def test_is_adversarial(self, changes: dict[str, float], is_adversarial: bool) -> None:
        assert Recipe(**changes).is_adversarial == is_adversarial

    @pytest.mark.parametrize(("sigmas", "is_noisy"), [((0, 0), False), ((0.1, 0), True), ((0, 0.1), True)])
    def test_is_noisy(self, sigmas: tuple[float, float], is_noisy: bool) -> None:
        assert Recipe(sigma_init=sigmas[0], sigma_inner=sigmas[1]).is_noisy == is_noisy


class TestPerturbedImages:
    RECIPE = replace(RECIPE, epochs=2, attack_steps=1, eps=0.05, eps_step=0.05)

    @pytest.mark.parametrize("ratio", [0, 0.01, 0.4, 0.5, 1])
    def test_are_the_first_of_each_batch(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ratio: float) -> None:
        model = small_model()
        clean, seen = seen_in_training(monkeypatch, model)
        train(model, TRAIN, TEST, replace(self.RECIPE, ratio=ratio), tmp_path, verbose=False)
        share = math.ceil(ratio * 16)
        assert len(seen) == len(clean) == 2 * STEPS
        for x, found in zip(clean, seen, strict=True):
            changed = (found != x).flatten(1).any(1)
            assert changed.tolist() == [True] * share + [False] * (16 - share)

    def test_one_step_of_eps_from_the_image_is_fgsm(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        model = small_model()
        clean, seen = seen_in_training(monkeypatch, model)
        train(model, TRAIN, TEST, replace(self.RECIPE, random_start=False), tmp_path, verbose=False)
        moved = []
        for x, found in zip(clean, seen, strict=True):
            change = found - x
            inside = (found > 0) & (found < 1) & (change != 0)
            torch.testing.assert_close(change[inside].abs(), torch.full_like(change[inside], 0.05), rtol=0, atol=1e-6)
            assert (change.abs() <= 0.05 + 1e-6).all()
            moved.append((change != 0).float().mean())
        assert min(moved) > 0.5

    def test_random_starts_are_others_in_each_step(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A step of next to nothing shows them."""
        model = small_model()
        clean, seen = seen_in_training(monkeypatch, model)
        train(model, TRAIN, TEST, replace(self.RECIPE, eps_step=1e-6), tmp_path, verbose=False)
        inside = [(found > 0) & (found < 1) for found in seen]
        starts = [(found - x) * kept for x, found, kept in zip(clean, seen, inside, strict=True)]
        for i, start in enumerate(starts):
            assert 0.045 < start.abs().max() <= 0.05 + 1e-6
            assert len(start.unique()) > start.numel() / 4
            assert all((start - other).abs().max() > 0.05 for other in starts[:i])

    def test_attack_is_on_the_model_in_evaluation_mode(self, tmp_path: Path) -> None:
        """So batch norm sees each image once."""
        model = small_model()
        train(model, TRAIN, TEST, self.RECIPE, tmp_path, verbose=False)
        assert int(model[1].num_batches_tracked) == 2 * STEPS


class TestMixup:
    RECIPE = replace(RECIPE, epochs=2, mixup_alpha=1.0)

    @pytest.mark.parametrize(
        "changes",
        [{}, {"label_smoothing": 0.0}, {"attack_steps": 1, "eps": 0.02, "eps_step": 0.02, "ratio": 0.5, "holdout": 6}],
        ids=["smooth labels", "hard labels", "interpolated adversarial training"],
    )
    def test_model_sees_mixtures_and_learns_from_both_labels(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, float]
    ) -> None:
        monkeypatch.setattr(training_loop, "bfloat16_is_native", lambda device: False)
        recipe, model = replace(self.RECIPE, **changes), small_model()
        clean, seen = seen_in_training(monkeypatch, model)
        inputs: list[Tensor] = []  # of mixup: the images with those that are perturbed
        labels: list[Tensor] = []
        logits: list[Tensor] = []
        model.register_forward_hook(lambda m, _, out: logits.append(out.detach()) if m.training else None)
        batches, cat = training._batches, torch.cat

        def recorded(*args: Any) -> Iterator[tuple[Tensor, Tensor]]:
            for x, y in batches(*args):
                labels.append(y)
                inputs.append(x)
                yield x, y

        def recorded_cat(tensors: list[Tensor], *args: Any, **kwargs: Any) -> Tensor:
            joined = cat(tensors, *args, **kwargs)
            if joined.shape == (16, 3, 6, 6) and len(tensors) == 2 and len(tensors[0]) == 8:
                inputs[-1] = joined.clone()
            return joined

        monkeypatch.setattr(training, "_batches", recorded)
        monkeypatch.setattr(torch, "cat", recorded_cat)
        train(model, TRAIN, TEST, recipe, tmp_path, verbose=False)
        perturbed = 8 if recipe.is_adversarial else 0
        weights, losses = [], []
        for number, x in enumerate(inputs):
            if perturbed:
                assert ((x[:8] != clean[number][:8]).flatten(1).any(1)).all()
            seed = training._seed(recipe.seed, number // STEPS, number % STEPS)
            weight, partners = training._mixup(16, perturbed, 1.0, seed)
            assert sorted(partners[:perturbed].tolist()) == list(range(perturbed))
            assert sorted(partners.tolist()) == list(range(16))
            torch.testing.assert_close(seen[number], weight * x + (1 - weight) * x[partners], rtol=0, atol=1e-6)
            one_hot = torch.eye(3)[labels[number]] * (1 - recipe.label_smoothing) + recipe.label_smoothing / 3
            target = weight * one_hot + (1 - weight) * one_hot[partners]
            losses.append(-float((target * logits[number].log_softmax(1)).sum(1).mean()))
            weights.append(weight)
        assert len(set(weights)) == 2 * STEPS
        assert [float(row["train_loss"]) for row in log_of(tmp_path)] == pytest.approx(
            np.reshape(losses, (2, STEPS)).mean(1).tolist(), rel=1e-5
        )

    @pytest.mark.parametrize("alpha", [0.2, 1.0, 4.0])
    def test_weight_is_beta_distributed(self, alpha: float) -> None:
        """Of mean 1/2 and variance 1 / (4 (2 alpha + 1))."""
        weights = [training._mixup(4, 0, alpha, training._seed(0, 0, step))[0] for step in range(2000)]
        variance = 1 / (4 * (2 * alpha + 1))
        assert np.mean(weights) == pytest.approx(0.5, abs=4 * (variance / 2000) ** 0.5)
        assert np.var(weights) == pytest.approx(variance, rel=0.15)
        assert 0 <= min(weights) <= max(weights) <= 1

    def test_partners_are_any(self) -> None:
        """Each of the own kind as often as any other."""
        partners = torch.stack([training._mixup(5, 2, 1.0, seed)[1] for seed in range(1000)])
        counts = torch.stack([row.bincount(minlength=5) for row in partners.T])
        assert (counts[:2, 2:] == 0).all()
        assert (counts[2:, :2] == 0).all()
        assert ((counts[:2, :2] - 500).abs() < 80).all()
        assert ((counts[2:, 2:] - 333).abs() < 80).all()

    def test_alpha_0_turns_it_off(self) -> None:
        weight, partners = training._mixup(6, 2, 0.0, 1)
        assert weight == 1
        assert partners.tolist() == list(range(6))


class TestNoise:
    RECIPE = replace(RECIPE, sigma_init=0.3, sigma_inner=0.2)

    def test_trains_the_model_and_leaves_its_structure(self, tmp_path: Path, uninterrupted: tuple[Any, ...]) -> None:
        model = small_model()
        modules, keys, before = dict(model.named_modules()), list(model.state_dict()), model[0].weight.detach().clone()
        parameters = [id(parameter) for parameter in model.parameters()]
        result = train(model, TRAIN, TEST, self.RECIPE, tmp_path, verbose=False)
        assert dict(model.named_modules()) == modules
        assert list(model.state_dict()) == keys
        assert [id(parameter) for parameter in model.parameters()] == parameters
        assert (model[0].weight - before).abs().max() > 0.01
        assert outcome(tmp_path, model, result)[0] != uninterrupted[0]

    def test_noise_of_a_step_is_that_of_its_seed(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """One step by hand on an ensemble that shares the parameters."""

        def make() -> nn.Sequential:
            torch.manual_seed(0)
            convolutions = nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 3, 3, padding=1)
            return nn.Sequential(*convolutions, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())

        monkeypatch.setattr(training_loop, "bfloat16_is_native", lambda device: False)
        recipe = replace(self.RECIPE, epochs=1, batch_size=70, momentum=0.0, weight_decay=0.0, seed=4)
        recipe = replace(recipe, schedule="swa", peak_lr=1.0)
        model, other = make(), make()
        clean, _ = seen_in_training(monkeypatch, model)
        batches, labels = training._batches, []
        monkeypatch.setattr(training, "_batches", lambda *args: ((x, labels.append(y) or y) for x, y in batches(*args)))
        train(model, TRAIN, TEST, recipe, tmp_path, verbose=False)
        ensemble = RandomSelfEnsemble(other.train(), 0.3, 0.2, n=1, seed=4, share_parameters=True)
        with row_keys(hashed(training._seed(4, 0, 0), np.arange(70))):
            answers = ensemble(clean[0])
        nn.functional.cross_entropy(answers, labels[0], label_smoothing=recipe.label_smoothing).backward()
        for parameter, found in zip(other.parameters(), model.parameters(), strict=True):
            assert parameter.grad.abs().max() > 1e-3
            torch.testing.assert_close(found, parameter - parameter.grad, rtol=1e-4, atol=1e-6)

    def test_result_is_that_of_an_ensemble_of_ten(self, tmp_path: Path) -> None:
        model, recipe = small_model(), replace(self.RECIPE, epochs=6, peak_lr=0.2, sigma_init=0.5, seed=3)
        result = train(model, colours(300, seed=2), TEST, recipe, tmp_path, verbose=False)
        by_n = {n: accuracy(RandomSelfEnsemble(model.eval(), 0.5, 0.2, n=n, seed=3), TEST) for n in (1, 10)}
        assert by_n[1] != by_n[10]
        assert result == by_n[10]
        assert float(log_of(tmp_path)[-1]["test_accuracy"]) == by_n[1]


ALL_AT_ONCE = replace(
    RECIPE, sigma_init=0.1, sigma_inner=0.05, mixup_alpha=1.0, attack_steps=2, eps=0.05, eps_step=0.03, ratio=0.5
)
ALL_AT_ONCE = replace(ALL_AT_ONCE, holdout=6)  # which leaves 64 images: as many steps as without


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, ...]:
    """The uninterrupted run of `ALL_AT_ONCE`."""
    result = run(tmp_path_factory.mktemp("whole"), ALL_AT_ONCE)
    assert len(result[-1]) == 3
    return result


class TestAllAtOnce:
    """Noise, mixup, a share of attacked images and images held out."""

    def test_each_part_has_an_effect(self, tmp_path: Path, whole: tuple[Any, ...]) -> None:
        changes = [{"sigma_init": 0, "sigma_inner": 0}, {"mixup_alpha": 0}, {"attack_steps": 0}, {"ratio": 1}]
        changes += [{"holdout": 5}, {"random_start": False}]
        weights = [run(tmp_path / str(i), replace(ALL_AT_ONCE, **c))[0] for i, c in enumerate(changes)]
        weights.append(whole[0])
        assert all(weights[i] != weights[j] for i in range(len(weights)) for j in range(i))

    @pytest.mark.parametrize("action", [interrupt, control_c], ids=lambda action: action.__name__)
    @pytest.mark.parametrize(
        "where",
        [
            lambda action: while_loading(STEPS + 2, action),
            lambda action: in_backward(1, action),
            lambda action: in_the_optimiser(STEPS + 3, action),
            lambda action: evaluating(2, action),
            lambda action: writing_the_row(2, action),
            lambda action: writing_the_checkpoint(1, action),
        ],
        ids=["loading", "backward", "optimiser", "evaluating", "row", "checkpoint"],
    )
    def test_resumed_run_is_the_uninterrupted_one(
        self,
        tmp_path: Path,
        where: Callable[[Callable[[], None]], Prepare],
        action: Callable[[], None],
        whole: tuple[Any, ...],
    ) -> None:
        model = small_model()
        with pytest.MonkeyPatch.context() as patch:
            where(action)(patch, model)
            with pytest.raises(KeyboardInterrupt):
                train(model, TRAIN, TEST, ALL_AT_ONCE, tmp_path, verbose=False)
        assert run(tmp_path, ALL_AT_ONCE) == whole

    def test_global_seed_does_not_matter(self, tmp_path: Path, whole: tuple[Any, ...]) -> None:
        model = small_model()
        torch.manual_seed(123)
        result = train(model, TRAIN, TEST, ALL_AT_ONCE, tmp_path, verbose=False)
        assert outcome(tmp_path, model, result) == whole


class TestHoldout:
    RECIPE = replace(RECIPE, epochs=6, attack_steps=1, eps=0.05, eps_step=0.05, holdout=6)
    LOGGER = "guardians.defences.training_loop"

    @staticmethod
    def script(patch: pytest.MonkeyPatch, standings: tuple[float, ...]) -> list[dict[str, Any]]:
        """Robust accuracies after each epoch; the model's weights and the other arguments come to the list."""
        asked: list[dict[str, Any]] = []

        def scripted(
            model: nn.Module, data: Dataset, steps: int, n: int | None = None, *, eps: float, **_: Any
        ) -> float:
            weights = {key: value.tolist() for key, value in model.state_dict().items()}
            asked.append({"weights": weights, "data": data, "steps": steps, "n": n, "eps": eps})
            return standings[len(asked) - 1]

        patch.setattr(training, "robust_accuracy", scripted)
        return asked

    def test_held_out_images_are_class_balanced_and_never_trained_on(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked, model, data = self.script(monkeypatch, (0.5,) * 6), small_model(), numbered(70)
        clean, _ = seen_in_training(monkeypatch, model)
        train(model, data, TEST, replace(self.RECIPE, cutout=0), tmp_path, verbose=False)
        trained = {int(value) for x in clean for value in (x[:, 0, 0, 0] * 255).round()}
        held = asked[0]["data"]
        assert data.labels.bincount().tolist() != [23, 23, 24]
        assert held.labels.bincount().tolist() == [2, 2, 2]
        numbers = held.images[:, 0, 0, 0].tolist()
        assert torch.equal(data.labels[numbers], held.labels)
        assert not trained & set(numbers)
        assert sorted(trained | set(numbers)) == list(range(70))
        assert all(torch.equal(call["data"].images, held.images) for call in asked)
        assert {(call["steps"], call["n"], call["eps"]) for call in asked} == {(10, None, 0.05)}

    def test_row_has_the_robust_accuracy_on_them(self, tmp_path: Path) -> None:
        model, recipe = small_model(), replace(self.RECIPE, epochs=2, holdout=22)
        train(model, TRAIN, TEST, recipe, tmp_path, verbose=False)
        _, held = training._split(TRAIN, 22, recipe.seed)
        rows = [float(row["robust_accuracy"]) for row in log_of(tmp_path)]
        assert rows[-1] == pytest.approx(robust_accuracy(model, held, 10, eps=0.05))
        assert all(22 * value == pytest.approx(round(22 * value)) for value in rows)

    @pytest.mark.parametrize("changes", [{"attack_steps": 0}, {"ratio": 0}])
    def test_of_other_training_is_nothing(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, float]
    ) -> None:
        asked = self.script(monkeypatch, ())
        recipe = replace(self.RECIPE, **changes)
        assert run(tmp_path / "with", recipe)[0] == run(tmp_path / "without", replace(recipe, holdout=0))[0]
        assert not asked

    def collapsed(self, folder: Path, standings: tuple[float, ...]) -> tuple[tuple[Any, ...], list[dict[str, Any]]]:
        with pytest.MonkeyPatch.context() as patch:
            asked = self.script(patch, standings)
            return run(folder, self.RECIPE), asked

    @pytest.mark.parametrize(
        ("standings", "best"), [((0.5, 0.6, 0.1), 2), ((0.6, 0.5, 0.29), 1), ((0.5, 0.5, 0.24), 2)]
    )
    def test_collapse_ends_training_with_the_best_epoch(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture, standings: tuple[float, ...], best: int
    ) -> None:
        (weights, result, log), asked = self.collapsed(tmp_path, standings)
        assert [row["epoch"] for row in log] == ["1", "2", "3"]
        assert [float(row["robust_accuracy"]) for row in log] == list(standings)
        assert weights == asked[best - 1]["weights"] != asked[-1]["weights"]
        assert float(log[best - 1]["test_accuracy"]) == result
        (record,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
        assert record.name == self.LOGGER
        message = record.getMessage()
        assert f"from {max(standings):.1%} to {standings[-1]:.1%} in epoch 3" in message
        assert f"model of epoch {best}" in message

    @pytest.mark.parametrize("standings", [(0.6, 0.5, 0.4, 0.31, 0.3, 0.3), (0,) * 6, (0.1, 0.5, 0.3, 0.25, 0.6, 0.4)])
    def test_slow_decline_does_not(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture, standings: tuple[float, ...]
    ) -> None:
        (weights, _, log), asked = self.collapsed(tmp_path, standings)
        assert len(log) == 6
        assert weights == asked[-1]["weights"]
        assert not caplog.records

    def test_finished_run_is_not_run_again(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        first, _ = self.collapsed(tmp_path, (0.5, 0.6, 0.1))
        caplog.clear()
        with pytest.MonkeyPatch.context() as patch:
            while_loading(1, interrupt)(patch, small_model())
            asked = self.script(patch, ())
            assert run(tmp_path, self.RECIPE) == first
        assert not asked
        assert not caplog.records

    @pytest.mark.parametrize("where", [while_loading(STEPS + 2, interrupt), while_loading(2 * STEPS + 2, interrupt)])
    def test_interruption_before_the_collapse(self, tmp_path: Path, where: Prepare) -> None:
        """In the best epoch, and after it."""
        standings = (0.5, 0.6, 0.1)
        whole, _ = self.collapsed(tmp_path / "whole", standings)
        with pytest.MonkeyPatch.context() as patch:
            model = small_model()
            asked = self.script(patch, standings)
            where(patch, model)
            with pytest.raises(KeyboardInterrupt):
                train(model, TRAIN, TEST, self.RECIPE, tmp_path / "stopped", verbose=False)
        again, _ = self.collapsed(tmp_path / "stopped", standings[len(asked) :])
        assert again == whole

    def test_with_averaged_weights(self, tmp_path: Path) -> None:
        """A collapse leaves those of the best epoch, not an average."""
        recipe = replace(self.RECIPE, schedule="swa", peak_lr=0.1)
        with pytest.MonkeyPatch.context() as patch:
            asked = self.script(patch, (0.5, 0.6, 0.1))
            weights, _, _ = run(tmp_path, recipe)
        assert weights == asked[1]["weights"]


class TestMicroBatches:
    RECIPE = replace(RECIPE, attack_steps=2, ratio=0.4, mixup_alpha=1.0, holdout=6, label_smoothing=0.1)

    @pytest.mark.parametrize("micro_batches", [2, 5, 16])
    def test_without_batch_norm_they_are_the_batch(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, micro_batches: int
    ) -> None:
        """Augmented, perturbed, mixed and weighed as the whole, also where some are smaller than others."""
        monkeypatch.setattr(training_loop, "bfloat16_is_native", lambda device: False)
        logs, states = [], []
        for number in (1, micro_batches):
            torch.manual_seed(0)
            model = nn.Sequential(
                nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 3)
            )
            options: dict[str, Any] = {"micro_batches": number, "verbose": False}
            train(model, TRAIN, TEST, self.RECIPE, tmp_path / str(number), **options)
            logs.append([float(row["train_loss"]) for row in log_of(tmp_path / str(number))])
            states.append(model.state_dict())
        torch.testing.assert_close(states[0], states[1], rtol=1e-3, atol=1e-5)
        assert logs[0] == pytest.approx(logs[1], rel=1e-4)

    def test_running_statistics_move_by_the_mean_over_them(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(training_loop, "bfloat16_is_native", lambda device: False)
        recipe, model, inputs = replace(RECIPE, epochs=1, batch_size=70), small_model(), []
        model[0].register_forward_hook(lambda m, _, output: inputs.append(output.detach()) if model.training else None)
        train(model, TRAIN, TEST, recipe, tmp_path, micro_batches=4, verbose=False)
        assert [len(x) for x in inputs] == [18, 18, 17, 17]
        parts = [x.double().transpose(0, 1).flatten(1) for x in inputs]
        for statistic, start, found in (("mean", 0.0, model[1].running_mean), ("var", 1.0, model[1].running_var)):
            mean = sum(len(x) / 70 * getattr(part, statistic)(1) for x, part in zip(inputs, parts, strict=True))
            torch.testing.assert_close(found.double(), 0.9 * start + 0.1 * mean, rtol=1e-5, atol=1e-6)
        assert int(model[1].num_batches_tracked) == 1

    def test_with_batch_norm_the_model_is_as_good(self, tmp_path: Path) -> None:
        data, test = two_features(1000, seed=2), two_features(200, seed=3)
        recipe = Recipe(epochs=8, batch_size=50, peak_lr=0.2, crop_padding=1, cutout=0, eps=EPS, eps_step=EPS / 2)
        recipe, found = replace(recipe, attack_steps=3), []
        for number in (1, 2):
            model = small_model()
            options: dict[str, Any] = {"micro_batches": number, "verbose": False}
            clean = train(model, data, test, recipe, tmp_path / str(number), **options)
            found.append((clean, robust_accuracy(model, test, 10, eps=EPS)))
        assert min(map(min, found)) > 0.5
        assert np.abs(np.subtract(*found)).max() < 0.1

    def test_a_run_goes_on_with_as_many(self, tmp_path: Path) -> None:
        whole, model = small_model(), small_model()
        result = train(whole, TRAIN, TEST, RECIPE, tmp_path / "whole", micro_batches=3, verbose=False)
        with pytest.MonkeyPatch.context() as patch:
            while_loading(STEPS + 2, interrupt)(patch, model)
            with pytest.raises(KeyboardInterrupt):
                train(model, TRAIN, TEST, RECIPE, tmp_path / "run", micro_batches=3, verbose=False)
        assert run(tmp_path / "run") == outcome(tmp_path / "whole", whole, result)

    def test_out_of_range(self, tmp_path: Path) -> None:
        for number in (0, -1):
            with pytest.raises(ValueError, match=f"micro_batches={number}: must be"):
                train(small_model(), TRAIN, TEST, RECIPE, tmp_path / "run", micro_batches=number)
        with pytest.raises(ValueError, match=r"micro_batches=17: must be from 1.* to batch_size=16"):
            train(small_model(), TRAIN, TEST, RECIPE, tmp_path / "run", micro_batches=17)
        for value in (0.0, -1.0, math.nan, math.inf):
            with pytest.raises(ValueError, match=f"timeout={value}: must be above 0"):
                train(small_model(), TRAIN, TEST, RECIPE, tmp_path / "run", timeout=value)
        assert not (tmp_path / "run").exists()

    def test_full_disk(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def no_space(*_: Any) -> None:
            raise OSError(28, "No space left on device")

        with pytest.MonkeyPatch.context() as patch:
            writing_the_checkpoint(2, no_space)(patch, small_model())
            with pytest.raises(OSError, match=r"checkpoint .*run/checkpoint.pt' cannot be written: .*No space left"):
                run(tmp_path / "run")
        assert run(tmp_path / "run") == run(tmp_path / "whole")

    def test_dropout_is_a_function_of_the_seed(self, tmp_path: Path) -> None:
        states = []
        for seed in (1, 2):
            model = small_model().append(nn.Dropout(0.3))
            torch.manual_seed(seed)
            train(model, TRAIN, TEST, RECIPE, tmp_path / str(seed), verbose=False)
            states.append(model[5].weight.tolist())
        assert states[0] == states[1]


class TestBadCheckpoint:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        run(tmp_path / "run", replace(RECIPE, epochs=1))
        return tmp_path / "run"

    def refuses(self, folder: Path, match: str, recipe: Recipe, model: nn.Module, data: Dataset = TRAIN) -> None:
        checkpoint, log = (folder / "checkpoint.pt").read_bytes(), (folder / "log.csv").read_bytes()
        with pytest.raises(ValueError, match=rf"run/checkpoint\.pt' cannot be resumed(.|\n)*{match}(.|\n)*delete it"):
            train(model, data, TEST, recipe, folder, verbose=False)
        assert (folder / "checkpoint.pt").read_bytes() == checkpoint
        assert (folder / "log.csv").read_bytes() == log

    @pytest.mark.parametrize("content", [b"", b"no checkpoint", b"PK\x03\x04 half an archive"])
    def test_corrupt(self, folder: Path, content: bytes) -> None:
        (folder / "checkpoint.pt").write_bytes(content)
        self.refuses(folder, "", replace(RECIPE, epochs=1), small_model())

    def test_truncated(self, folder: Path) -> None:
        whole = (folder / "checkpoint.pt").read_bytes()
        (folder / "checkpoint.pt").write_bytes(whole[: len(whole) // 2])
        self.refuses(folder, "", replace(RECIPE, epochs=1), small_model())

    @pytest.mark.parametrize("content", [{}, [1], {"recipe": 3}, {"model": {}}])
    def test_something_else(self, folder: Path, content: object) -> None:
        torch.save(content, folder / "checkpoint.pt")
        self.refuses(folder, "", replace(RECIPE, epochs=1), small_model())

    @pytest.mark.parametrize(("name", "value"), [("epochs", 2), ("peak_lr", 0.06), ("cutout", 0), ("seed", 1)])
    def test_other_recipe(self, folder: Path, name: str, value: float) -> None:
        there = getattr(replace(RECIPE, epochs=1), name)
        match = rf"other settings or data.*'{name}': \({there}, {value}\)"
        self.refuses(folder, match, replace(RECIPE, **{"epochs": 1, name: value}), small_model())

    def test_other_model(self, folder: Path) -> None:
        other = nn.Sequential(nn.Flatten(), nn.Linear(108, 3))
        self.refuses(folder, r"1\.weight", replace(RECIPE, epochs=1), other)

    def test_other_number_of_images(self, folder: Path) -> None:
        self.refuses(
            folder, r"other settings or data.*'steps': \(4, 6\)", replace(RECIPE, epochs=1), small_model(), colours(100)
        )

    def test_weights_are_not_unpickled(self, folder: Path, tmp_path: Path) -> None:
        trap = tmp_path / "trap"

        class RunsOnLoading:
            def __reduce__(self) -> tuple[object, ...]:
                return Path.touch, (trap,)

        torch.save({"recipe": RunsOnLoading()}, folder / "checkpoint.pt")
        self.refuses(folder, "", replace(RECIPE, epochs=1), small_model())
        assert not trap.exists()


class TestBadArguments:
    @pytest.mark.parametrize(
        ("name", "values"),
        [
            ("epochs", (0, -1)),
            ("batch_size", (0, -16)),
            ("peak_lr", (0, -0.1, float("nan"), float("inf"))),
            ("warmup", (-0.1, 1, 1.5, float("nan"))),
            ("momentum", (-0.1, 1, 1.5, float("nan"))),
            ("label_smoothing", (-0.1, 1, float("nan"))),
            ("weight_decay", (-1e-4, float("nan"), float("inf"))),
            ("crop_padding", (-1,)),
            ("cutout", (-1,)),
            ("attack_steps", (-1,)),
            ("eps", (-0.1, float("nan"), float("inf"))),
            ("eps_step", (0, -0.1, float("nan"), float("inf"))),
            ("ratio", (-0.1, 1.1, float("nan"), float("inf"))),
            ("holdout", (-1,)),
            ("mixup_alpha", (-1, float("nan"), float("inf"))),
            ("sigma_init", (-0.1, float("nan"), float("inf"))),
            ("sigma_inner", (-0.1, float("nan"), float("inf"))),
        ],
    )
    def test_recipe_out_of_range(self, name: str, values: tuple[float, ...]) -> None:
        for value in values:
            with pytest.raises(ValueError, match=rf"^{name}=.*must be (above|in|at least)"):
                Recipe(**{name: value})

    @pytest.mark.parametrize(
        "name", ["epochs", "batch_size", "crop_padding", "cutout", "attack_steps", "holdout", "seed"]
    )
    @pytest.mark.parametrize("value", [1.5, 2.0, "3", None, True])
    def test_recipe_counts_are_integers(self, name: str, value: object) -> None:
        with pytest.raises(TypeError, match=f"^{name}={value!r}: must be an integer"):
            Recipe(**{name: value})

    @pytest.mark.parametrize(
        "name",
        [
            *("peak_lr", "warmup", "momentum", "weight_decay", "label_smoothing"),
            *("eps", "eps_step", "ratio", "mixup_alpha", "sigma_init", "sigma_inner"),
        ],
    )
    @pytest.mark.parametrize("value", ["0.1", None, True, [0.1]])
    def test_recipe_rates_are_numbers(self, name: str, value: object) -> None:
        with pytest.raises(TypeError, match=f"^{name}=.*: must be a number"):
            Recipe(**{name: value})

    def test_numpy_numbers_in_a_recipe_can_be_resumed(self, tmp_path: Path) -> None:
        recipe = replace(RECIPE, epochs=np.int64(1), peak_lr=np.float64(0.05), seed=np.int32(0))
        first = run(tmp_path, recipe)
        assert run(tmp_path, replace(RECIPE, epochs=1)) == first

    @pytest.mark.parametrize("value", [0, 1, "yes", None])
    def test_random_start_is_a_flag(self, value: object) -> None:
        with pytest.raises(TypeError, match=f"random_start={value!r}: must be True or False"):
            Recipe(random_start=value)

    @pytest.mark.parametrize("holdout", [70, 71])
    def test_holdout_as_large_as_the_data(self, tmp_path: Path, holdout: int) -> None:
        recipe = replace(RECIPE, attack_steps=1, holdout=holdout)
        with pytest.raises(ValueError, match=f"holdout={holdout}: there are only 70 images"):
            train(small_model(), TRAIN, TEST, recipe, tmp_path / "run")
        with pytest.raises(ValueError, match="batch_size=16: the training set has only 15 images"):
            train(small_model(), TRAIN, TEST, replace(recipe, holdout=55), tmp_path / "run")
        assert not (tmp_path / "run").exists()

    def test_noise_without_a_convolution(self, tmp_path: Path) -> None:
        model = nn.Sequential(nn.Flatten(), nn.Linear(108, 3))
        with pytest.raises(ValueError, match="must have a convolution"):
            train(model, TRAIN, TEST, replace(RECIPE, sigma_init=0.1), tmp_path / "run")

    def test_unknown_schedule(self) -> None:
        with pytest.raises(ValueError, match="schedule='cosine': must be one of one-cycle, swa"):
            Recipe(schedule="cosine")

    def test_fewer_images_than_a_batch(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="batch_size=71: the training set has only 70 images"):
            train(small_model(), TRAIN, TEST, replace(RECIPE, batch_size=71), tmp_path / "run")
        assert not (tmp_path / "run").exists()

    def test_no_test_images(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="test_data has no images"):
            train(small_model(), TRAIN, colours(0), RECIPE, tmp_path / "run")
        assert not (tmp_path / "run").exists()

    def test_padding_as_wide_as_the_image(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="crop_padding=6: must be below 6"):
            train(small_model(), TRAIN, TEST, replace(RECIPE, crop_padding=6), tmp_path / "run")
        assert not (tmp_path / "run").exists()
        train(small_model(), TRAIN, TEST, replace(RECIPE, crop_padding=5, epochs=1), tmp_path, verbose=False)

    @pytest.mark.parametrize("name", ["file", "file/run", "file/run/deeper"])
    def test_folder_that_cannot_be_made(self, tmp_path: Path, name: str) -> None:
        (tmp_path / "file").write_text("in the way")
        with pytest.raises(ValueError, match=f"folder='{tmp_path / name}': cannot be made"):
            train(small_model(), TRAIN, TEST, RECIPE, tmp_path / name)


class TestAccuracy:
    DATA = Dataset(
        images=torch.tensor([10, 20, 30, 40, 50, 60, 70], dtype=torch.uint8).view(7, 1, 1, 1),
        labels=torch.tensor([0, 0, 0, 1, 1, 0, 1]),
        classes=("dark", "bright"),
        source="steps of grey",
    )

    class Threshold(nn.Module):
        """Says "bright" above 35/255."""

        def forward(self, x: Tensor) -> Tensor:
            self.seen = (
                x.dtype,
                float(x.max()),
                torch.is_grad_enabled(),
                torch.is_autocast_enabled("cpu"),
                self.training,
            )
            return torch.cat([torch.full((len(x), 1), 35 / 255), x.flatten(1)], dim=1)

    @pytest.mark.parametrize("batch_size", [1, 3, 7, 500])
    def test_share_of_correct_images(self, batch_size: int) -> None:
        assert accuracy(self.Threshold(), self.DATA, batch_size) == 6 / 7

    def test_model_sees_float_images_in_evaluation_mode_without_gradients(self) -> None:
        model = self.Threshold().train()
        accuracy(model, self.DATA)
        assert model.seen == (torch.float32, pytest.approx(70 / 255), False, False, False)

    def test_no_images(self) -> None:
        with pytest.raises(ValueError, match="no images"):
            accuracy(small_model(), colours(0))


def test_bfloat16_is_native() -> None:
    on_cpu = bfloat16_is_native(torch.device("cpu"))
    assert isinstance(on_cpu, bool)
    cpuinfo = Path("/proc/cpuinfo")
    if on_cpu and cpuinfo.exists():
        assert "avx512_bf16" in cpuinfo.read_text()
    assert bfloat16_is_native(torch.device("meta")) is False


class TestAugmentation:
    """Called through its private door: what a step trains on is not to be seen from outside."""

    @staticmethod
    def augment(images: Tensor, seed: int = 0, **recipe: int) -> Tensor:
        return training._augment(images, Recipe(**recipe), torch.Generator().manual_seed(seed))

    @given(st.integers(3, 9), st.integers(3, 9), st.integers(0, 2), st.integers(0, 2**32), st.sampled_from([1, 3]))
    def test_crop_and_flip_only_move_pixels(self, height: int, width: int, padding: int, seed: int, c: int) -> None:
        """Each image is a window, straight or mirrored, of its own reflection-padded self."""
        images = np.random.default_rng(seed).integers(0, 256, (3, c, height, width), dtype=np.uint8)
        out = self.augment(torch.from_numpy(images), seed, crop_padding=padding, cutout=0).numpy()
        assert out.shape == images.shape
        assert out.dtype == np.float32
        padded = np.pad(images, [(0, 0), (0, 0), (padding, padding), (padding, padding)], mode="reflect")
        padded = padded.astype(np.float32) / np.float32(255)
        for image, source in zip(out, padded, strict=True):
            windows = [
                source[:, i : i + height, j : j + width] for i in range(2 * padding + 1) for j in range(2 * padding + 1)
            ]
            assert any(np.array_equal(image, w) or np.array_equal(image, w[:, :, ::-1]) for w in windows)

    def test_every_crop_and_flip_occurs(self) -> None:
        image = torch.arange(25, dtype=torch.uint8).view(1, 1, 5, 5)
        out = self.augment(image.expand(2000, -1, -1, -1), crop_padding=1, cutout=0)
        kinds, counts = torch.unique(out.flatten(1), dim=0, return_counts=True)
        assert len(kinds) == 3 * 3 * 2
        assert counts.min() > 2000 / 18 / 2
        assert counts.max() < 2000 / 18 * 2

    @given(st.integers(0, 12), st.integers(0, 2**32))
    def test_cutout_greys_one_square(self, cutout: int, seed: int) -> None:
        side = cutout - 1 + cutout % 2 if cutout else 0  # odd, with a central pixel
        white = torch.full((8, 3, 9, 9), 255, dtype=torch.uint8)
        out = self.augment(white, seed, crop_padding=2, cutout=cutout)
        assert set(out.unique().tolist()) <= {0.5, 1.0}
        for image in out:
            grey = image == 0.5
            assert torch.equal(grey[0], grey[1])
            assert torch.equal(grey[0], grey[2])
            rows, columns = grey[0].any(1).nonzero().flatten(), grey[0].any(0).nonzero().flatten()
            assert int(grey[0].sum()) == len(rows) * len(columns)  # a rectangle, if both are without gaps
            for lines in (rows.tolist(), columns.tolist()):
                assert lines == list(range(lines[0], lines[-1] + 1)) if side else lines == []
                cut_by_the_border = side and (lines[0] == 0 or lines[-1] == 8)
                assert (side + 1) // 2 <= len(lines) <= side if cut_by_the_border else len(lines) == side

    def test_values_stay_in_range(self) -> None:
        images = torch.randint(0, 256, (64, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        out = self.augment(images, crop_padding=3, cutout=3)
        assert out.min() >= 0
        assert out.max() <= 1
        assert out.max() > 0.9

    def test_seed_determines_it(self) -> None:
        images = colours(32).images
        assert torch.equal(self.augment(images, seed=5), self.augment(images, seed=5))
        assert not torch.equal(self.augment(images, seed=5), self.augment(images, seed=6))

    def test_images_are_not_changed(self) -> None:
        images = colours(8).images
        before = images.clone()
        self.augment(images)
        assert torch.equal(images, before)


class TestBatches:
    RECIPE = Recipe(batch_size=8, crop_padding=0, cutout=0)

    @staticmethod
    def batches(epoch: int, first_step: int = 0, seed: int = 0) -> list[tuple[list[int], list[int]]]:
        """The values of 35 plain images, image i of value and label i, batch by batch."""
        images = torch.arange(35, dtype=torch.uint8).view(35, 1, 1, 1).expand(-1, 3, 4, 4)
        recipe = replace(TestBatches.RECIPE, seed=seed)
        batches = training._batches(images, torch.arange(35), recipe, epoch, first_step)
        return [((x[:, 0, 0, 0] * 255).round().int().tolist(), y.tolist()) for x, y in batches]

    def test_an_epoch_shows_each_image_at_most_once_with_its_label(self) -> None:
        batches = self.batches(epoch=0)
        assert [len(values) for values, _ in batches] == [8] * 4
        values = [value for batch, _ in batches for value in batch]
        assert len(set(values)) == 32
        assert values == [label for _, labels in batches for label in labels]

    def test_order_differs_between_epochs_and_seeds(self) -> None:
        orders = [self.batches(epoch, seed=seed) for epoch in range(3) for seed in range(3)]
        assert all(orders[i] != orders[j] for i in range(9) for j in range(i))

    @pytest.mark.parametrize("first_step", [1, 3, 4])
    def test_going_on_in_an_epoch(self, first_step: int) -> None:
        assert self.batches(2, first_step) == self.batches(2)[first_step:]
