"""`evaluate`: no weaker than AutoAttack, the same in any batch, resumable, and plain about what it cannot see."""

import numpy as np
import pandas as pd
import pytest
import torch
from models_for_tests import (
    CLASSES,
    Constant,
    art_classifier,
    is_fooled,
    linear_model,
    small_net,
    snapshot,
    some_images,
)
from PIL import Image
from torch import nn

import guardians
from guardians.attacks import AutoAttack
from guardians.data import Dataset, LazyDataset, open_data
from guardians.defences import RandomSelfEnsemble
from guardians.evaluation import FLAGS, Evaluation

INF = float("inf")


def predicted(net, x):
    with torch.no_grad():
        return net(x).argmax(1)


def evaluated(net, x, y, **options):
    return guardians.evaluate(net, x, y, **{"eps": 0.02, "verbose": False, **options})


class Masked(nn.Module):
    """A model whose gradients are zero: its input is rounded."""

    def __init__(self, net, levels=16):
        super().__init__()
        self.net, self.levels = net, levels

    def forward(self, x):
        return self.net((x * self.levels).round() / self.levels)


class WithoutGradient(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        with torch.no_grad():
            return self.net(x)


class Noisy(nn.Module):
    def __init__(self, net, sigma=0.5):
        super().__init__()
        self.net, self.sigma = net, sigma

    def forward(self, x):
        logits = self.net(x)
        return logits + self.sigma * torch.randn_like(logits)


class Probabilities(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x).softmax(1)


@pytest.mark.parametrize(("norm", "eps"), [(INF, 0.02), (2, 0.2), (1, 1.5)])
def test_what_it_says_is_what_the_model_says(net, x, norm, eps):
    y = predicted(net, x)
    y[0] = (y[0] + 1) % 3
    before = snapshot(net)
    found = evaluated(net, x, y, norm=norm, eps=eps)
    assert snapshot(net) == before
    stands = found.stage < 0
    assert np.array_equal(is_fooled(net, found.x_adv, y), ~stands)
    assert found.stages[found.stage[0]] == "clean"
    assert found.clean_accuracy == (len(x) - 1) / len(x)
    size = torch.linalg.vector_norm((found.x_adv.double() - x.double()).flatten(1), norm, dim=1).numpy()
    assert (size <= eps).all()
    assert np.array_equal(found.distance[~stands], size[~stands])
    assert np.isnan(found.distance[stands]).all()
    assert found.robust_accuracy == stands.mean()


@pytest.mark.parametrize("norm", [INF, 2, 1])
def test_no_weaker_than_auto_attack(norm):
    net, x = small_net(3), some_images(24, seed=5)
    y = predicted(net, x)
    for eps in {INF: (0.005, 0.01), 2: (0.05, 0.1), 1: (0.3, 0.6)}[norm]:
        attack = AutoAttack(net, norm, eps, max_iter=20, n_queries=200, seed=0, verbose=False)
        attack(x, y)
        found = evaluated(net, x, y, norm=norm, eps=eps)
        assert found.robust_accuracy <= 1 - attack.report.fooled.mean()


def test_a_linear_model_stands_exactly_where_its_boundary_is_out_of_reach():
    net, x = linear_model(), 0.3 + 0.4 * some_images(40, dtype=torch.float64)
    y = predicted(net, x)
    weight = net[-1].weight.detach()
    logits = net(x).detach()
    gap = logits.gather(1, y[:, None]) - logits
    reach = (weight[y][:, None] - weight[None]).norm(dim=-1) if weight.ndim == 2 else None
    distance = (gap / reach).masked_fill(gap == 0, torch.inf).nan_to_num(nan=torch.inf).amin(1).numpy()
    eps = float(np.median(distance))
    clear = abs(distance - eps) > 1e-3 * eps
    found = evaluated(net, x, y, norm=2, eps=eps, budget="thorough")
    assert np.array_equal((found.stage < 0)[clear], (distance > eps)[clear])


def test_batch_size_changes_nothing(net64, x64):
    y = predicted(net64, x64)
    first, second = (evaluated(net64, x64, y, batch_size=size) for size in (3, 50))
    assert np.array_equal(first.stage, second.stage)
    assert torch.allclose(first.x_adv, second.x_adv, rtol=0, atol=1e-9)


def test_a_part_of_the_images_has_the_result_that_it_has_among_all(net64, x64):
    """An image's draws do not depend on which others still stand."""
    y = predicted(net64, x64)
    whole, part = evaluated(net64, x64, y), evaluated(net64, x64[:5], y[:5])
    assert np.array_equal(whole.stage[:5], part.stage)
    assert torch.allclose(whole.x_adv[:5], part.x_adv, rtol=0, atol=1e-9)


class StoppedError(Exception):
    pass


def test_an_interrupted_evaluation_goes_on(net, x, tmp_path, monkeypatch):
    y = predicted(net, x)
    whole = evaluated(net, x, y, eps=0.004)
    from guardians import evaluation

    real, calls = evaluation.run_stage, []

    def stops(number, *arguments, **options):
        for count in real(number, *arguments, **options):
            calls.append(number)
            yield count
            if number == 1:
                raise StoppedError

    monkeypatch.setattr(evaluation, "run_stage", stops)
    with pytest.raises(StoppedError):
        evaluated(net, x, y, eps=0.004, out=tmp_path)
    with np.load(next(tmp_path.glob("*.npz"))) as saved:
        known = (saved["stage"] >= 0) | (saved["finished"] > 1)
    monkeypatch.setattr(evaluation, "run_stage", real)
    again = evaluated(net, x, y, eps=0.004, out=tmp_path)
    assert np.array_equal(again.stage, whole.stage)
    assert torch.equal(again.x_adv, whole.x_adv)
    assert 0 < known.sum() < len(x)
    assert np.array_equal(again.backward[known], whole.backward[known])
    # The others are searched by a copy whose rounding is measured on other images, which may call for a second search.
    assert (again.backward[~known] > 0).all()


def test_a_finished_evaluation_is_not_done_again(net, x, tmp_path):
    y = predicted(net, x)
    first = evaluated(net, x, y, out=tmp_path)

    class Never(type(net)):
        pass

    second = evaluated(net, x, y, out=tmp_path)
    assert np.array_equal(first.stage, second.stage)
    assert np.array_equal(first.forward, second.forward)
    other = small_net(7)
    other_y = predicted(other, x)
    assert np.array_equal(evaluated(other, x, other_y, out=tmp_path).stage, evaluated(other, x, other_y).stage)


def test_a_finished_evaluation_of_a_random_model_is_not_done_again(net, x, tmp_path):
    y, noisy = predicted(net, x), Noisy(net)
    first = evaluated(noisy, x, y, eps=0.004, budget="fast", out=tmp_path)
    second = evaluated(noisy, x, y, eps=0.004, budget="fast", out=tmp_path)
    assert np.array_equal(first.stage, second.stage)
    assert np.array_equal(first.forward, second.forward)
    assert torch.equal(first.x_adv, second.x_adv)


@pytest.fixture
def data(net, x):
    images = (x * 255).round().to(torch.uint8)
    return Dataset(images, predicted(net, images.to(x.dtype) / 255), tuple("abcde"), "noise")


def test_shards_find_what_each_finds_by_itself(net, data):
    found = evaluated(net, data, None, shard=5, eps=[0.004, 0.001])
    for which, radius in enumerate((0.004, 0.001)):
        parts = [
            evaluated(net, part.as_floats(), part.labels, eps=[0.004, 0.001], first_index=first)[which]
            for first, part in ((0, data[:5]), (5, data[5:10]), (10, data[10:]))
        ]
        merged = found[which]
        assert merged.eps == radius
        for column in ("stage", "distance", "forward", "backward"):
            of_parts = pd.concat([part.by_image() for part in parts])[column]
            assert merged.by_image()[column].equals(of_parts.reset_index(drop=True)), column
        assert merged.robust_accuracy == np.mean(np.concatenate([part.stage for part in parts]) == -1)
    assert found[0].robust_accuracy < 1


def test_a_lazy_data_set_is_never_whole_in_memory(net, data, tmp_path, monkeypatch):
    for index, (image, label) in enumerate(zip(data.images, data.labels, strict=True)):
        folder = tmp_path / "images" / "test" / f"{int(label)}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{index:02}.png")
    lazy = open_data(tmp_path / "images")
    read = []
    real = LazyDataset.__getitem__

    def reads(self, index):
        part = real(self, index)
        read.append(len(part))
        return part

    monkeypatch.setattr(LazyDataset, "__getitem__", reads)
    found = evaluated(net, lazy, None, shard=5, out=tmp_path / "out", budget="fast")
    assert read == [1, 5, 5, len(lazy) - 10]
    monkeypatch.undo()
    assert found.by_image().equals(evaluated(net, lazy[:], None, shard=5, budget="fast").by_image())
    for path in (tmp_path / "out").glob("*.npz"):  # on disk there are no images either
        assert "x_adv" not in np.load(path)
    again = evaluated(net, lazy, None, shard=5, out=tmp_path / "out", budget="fast")
    assert again.by_image().equals(found.by_image())


def test_what_a_data_set_may_not_come_with(net, x, data):
    with pytest.raises(ValueError, match="labels are given"):
        evaluated(net, data, data.labels)
    with pytest.raises(ValueError, match="shard=5: is of a data set"):
        evaluated(net, x, predicted(net, x), shard=5)
    with pytest.raises(ValueError, match="shard"):
        evaluated(net, data, None, shard=0)
    with pytest.raises(ValueError, match="first_index"):
        evaluated(net, data, None, first_index=-1)


def test_a_larger_ball_takes_over_what_a_smaller_one_has_fooled(net, x):
    y = predicted(net, x)
    found = evaluated(net, x, y, eps=[0.02, 0.002, 0.01])
    assert [one.eps for one in found] == [0.02, 0.002, 0.01]
    large, small, middle = found
    assert ((small.stage >= 0) <= (middle.stage >= 0)).all()
    assert ((middle.stage >= 0) <= (large.stage >= 0)).all()


def test_what_fools_a_surrogate_is_tried_on_models_that_give_no_gradients():
    net, x = small_net(1), some_images(16)
    y = predicted(net, x)
    reached = evaluated(net, x, y, eps=0.05, budget="fast")
    for model in (WithoutGradient(net), Masked(net, levels=255)):
        before = snapshot(net)
        found = evaluated(model, x, y, eps=0.05, surrogates=[small_net(1)], budget="fast")
        assert snapshot(net) == before
        assert found.stages[:3] == ["clean", "transfer-1", "square"]
        # The very model that it was before its gradients were taken away falls to nearly as much.
        assert (found.stage == 1).mean() >= 0.9 * (reached.stage > 0).mean() > 0
        assert np.array_equal(is_fooled(model, found.x_adv, y), found.stage >= 0)
        assert (found.distance[found.stage >= 0] <= 0.05).all()


@pytest.mark.parametrize("norm", [INF, 2, 1])
def test_transfer_comes_after_gradients_that_are_of_use_and_says_when_it_finds_more(norm):
    net, x = small_net(1), some_images(16)
    y, eps = predicted(net, x), {INF: 0.1, 2: 1.0, 1: 8.0}[norm]

    class Backwards(nn.Module):
        """Its gradients lead away from where it can be fooled."""

        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x):
            logits = self.net(x)
            return 2 * logits.detach() - logits

    found = evaluated(Backwards(), x, y, norm=norm, eps=eps, surrogates=[net], budget="fast")
    transfer = found.stages.index("transfer-1")
    assert transfer == len(found.stages) - 1
    assert (found.stage == transfer).any()
    assert "gradient masking" in found.flags
    assert np.array_equal(is_fooled(net, found.x_adv, y), found.stage >= 0)
    alone = evaluated(net, x, y, norm=norm, eps=eps, budget="fast")
    assert found.robust_accuracy <= alone.robust_accuracy + 1 / 16


def test_other_surrogates_are_another_evaluation(net, x, tmp_path):
    model, y = WithoutGradient(net), predicted(net, x)
    first = evaluated(model, x, y, surrogates=[small_net(5)], budget="fast", out=tmp_path)
    second = evaluated(model, x, y, surrogates=[net], budget="fast", out=tmp_path)
    assert len(list(tmp_path.glob("*.npz"))) == 2
    again = evaluated(model, x, y, surrogates=[net], budget="fast", out=tmp_path)
    assert np.array_equal(again.stage, second.stage)
    assert (second.stage == 1).sum() > (first.stage == 1).sum()


@pytest.mark.parametrize(
    ("surrogates", "error", "message"),
    [
        (small_net(), TypeError, "surrogates of type"),
        (["resnet9"], TypeError, r"surrogates\[0\] of type str"),
        ([nn.Sequential(nn.Flatten(), nn.Linear(192, 1))], ValueError, r"surrogates\[0\] has 1 classes"),
        ([art_classifier(small_net(), clip_values=(0, 255))], ValueError, r"surrogates\[0\] has clip_values"),
    ],
)
def test_surrogates_that_do_not_fit_are_named(net, x, surrogates, error, message):
    y = torch.arange(len(x)) % 3
    with pytest.raises(error, match=message):
        evaluated(net, x, y, surrogates=surrogates)


def test_models_without_gradients_fall_to_square():
    net, x = small_net(1), some_images(16)
    for model, flag in ((WithoutGradient(net), "no gradient"), (Masked(net), "vanishing gradients")):
        y = predicted(model, x)
        found = evaluated(model, x, y, eps=0.2)
        assert flag in found.flags
        assert found.robust_accuracy < 1
        assert "square" in found.stages
        assert flag in str(found)


def test_probabilities_are_recognised_and_attacked_as_their_logits(net, x):
    y = predicted(net, x)
    logits, probabilities = evaluated(net, x, y), evaluated(Probabilities(net), x, y)
    assert "probabilities" in probabilities.flags
    assert "probabilities" not in logits.flags
    assert probabilities.robust_accuracy <= logits.robust_accuracy


def test_random_models_are_judged_by_draws_that_chose_nothing():
    """Against a model that guesses: no attack can make it wrong more often than it is."""

    class Guesses(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        def forward(self, x):
            right = torch.rand(len(x)) < 0.7
            logits = torch.zeros(len(x), 3) + 1e-3 * x.mean((1, 2, 3))[:, None]
            return logits + torch.stack([right.float(), (~right).float(), torch.zeros(len(x))], 1)

    x = some_images(60)
    found = evaluated(Guesses(), x, torch.zeros(60, dtype=torch.long), budget="fast")
    assert "random" in found.flags
    assert found.robust_accuracy > 0.75  # nine draws are right in most 90 times of 100


def test_a_gradient_costs_as_many_passes_whether_draws_or_the_defence_average_them():
    class Counts(nn.Module):
        asked = 0

        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.LazyLinear(CLASSES)).eval()
            self.layers(some_images(1))

        def forward(self, x):
            self.asked += len(x) * x.requires_grad
            return self.layers(x)

    asked = {}
    for n in (1, 10, 20, 40):
        model = Counts()
        defence = RandomSelfEnsemble(model, sigma_init=1e-3, sigma_inner=0, n=n, seed=0).eval()
        x = some_images(4)
        assert defence(x[:0]).shape == (0, CLASSES)
        assert evaluated(defence, x, defence(x).argmax(1), eps=1e-5).robust_accuracy == 1
        asked[n] = defence.model.asked
    assert asked[1] == pytest.approx(asked[10], rel=0.25)
    assert asked[1] == pytest.approx(asked[20], rel=0.25)
    assert asked[40] == pytest.approx(2 * asked[20], rel=0.25)


def test_of_a_random_model_pgd_is_run_on_all_that_stands(net, x):
    defence = RandomSelfEnsemble(net, sigma_init=1e-3, sigma_inner=0, n=20, seed=0).eval()
    found = evaluated(defence, x, predicted(net, x), eps=1e-5)
    assert found.stages == ["clean", "malt", "pgd", "square"]
    number = found.stages.index("pgd")
    assert found.robust_accuracy > 0
    assert (found.ledger.finished[found.ledger.stands] > number).all()


def test_images_that_a_random_model_often_gets_right_are_attacked_though_it_mostly_gets_them_wrong():
    class Brightness(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(40.0))

        def forward(self, x):
            return self.scale * (x.mean((1, 2, 3)) - 0.5)[:, None] * torch.tensor([1, -1]) + torch.randn(len(x), 2)

    net, x, y = Brightness(), torch.full((40, 3, 8, 8), 0.49), torch.zeros(40, dtype=torch.long)
    found = evaluated(net, x, y, eps=0.1, budget="fast")
    assert found.robust_accuracy <= 2 / 40  # one image or two may be lucky in the last draws
    assert 0 < found.clean_accuracy < 0.5  # right in 29 draws of 100
    with torch.no_grad():
        right = torch.stack([net(found.x_adv).argmax(1) == y for _ in range(100)]).double().mean(0)
    assert right.mean() < 0.05


def test_a_model_that_is_all_wrong(net, x):
    y = (predicted(net, x) + 1) % 3
    found = evaluated(net, x, y)
    assert found.robust_accuracy == found.clean_accuracy == 0
    assert "all wrong" in found.flags
    assert found.backward.sum() == 0


@pytest.mark.parametrize("classes", [2, 3])
def test_few_classes(classes):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, classes))
    x = torch.rand(6, 3, 8, 8)
    y = predicted(net, x)
    assert evaluated(net, x, y, eps=0.5, budget="thorough").robust_accuracy == 0


def test_a_constant_model_stands(x):
    net = Constant()
    found = evaluated(net, x, predicted(net, x))
    assert found.robust_accuracy == 1
    assert {"no gradient", "vanishing gradients"} & set(found.flags)


def test_an_art_classifier(net, x):
    y = predicted(net, x)
    found = guardians.evaluate(art_classifier(net), x.numpy(), y.numpy(), eps=0.02, verbose=False)
    assert np.array_equal(found.stage, evaluated(net, x, y).stage)


def test_tables(net, x, tmp_path):
    y = predicted(net, x)
    found = evaluated(net, x, y)
    assert isinstance(found, Evaluation)
    found.save(tmp_path)
    found.save_images(tmp_path / "images")
    found.plot(tmp_path / "curve.png")
    assert (tmp_path / "curve.png").stat().st_size > 1000
    images = pd.read_csv(tmp_path / "evaluation_images.csv", keep_default_na=False)
    assert (images["stage"] == "").sum() == (found.stage < 0).sum()
    stages = pd.read_csv(tmp_path / "evaluation_stages.csv")
    assert stages["felled"].sum() == (found.stage >= 0).sum()
    assert stages["robust_accuracy"].iloc[-1] == pytest.approx(found.robust_accuracy)
    assert found.curve()["robust_accuracy"].iloc[-1] == pytest.approx(found.robust_accuracy)
    assert np.array_equal(np.load(tmp_path / "images" / "x_adv.npy"), found.x_adv.numpy())
    assert f"{found.robust_accuracy:.1%}" in str(found)
    assert set(found.flags) <= set(FLAGS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eps": 0}, "eps"),
        ({"eps": -0.1}, "eps"),
        ({"eps": []}, "eps"),
        ({"norm": 3}, "norm"),
        ({"norm": "two"}, "norm"),
        ({"budget": "endless"}, "budget"),
        ({"seed": -1}, "seed"),
    ],
)
def test_bad_arguments_are_named(net, x, y, options, message):
    with pytest.raises(ValueError, match=message):
        evaluated(net, x, y, **options)


def test_labels_are_needed(net, x):
    with pytest.raises(ValueError, match="labels=None"):
        evaluated(net, x, None)
