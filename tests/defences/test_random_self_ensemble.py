"""Random Self-Ensemble against a transcription of the paper, ART's randomised smoothing, and what its users rely on."""

import copy
import tracemalloc

import numpy as np
import pytest
import torch
import torchvision
from art.estimators.certification.randomized_smoothing import PyTorchRandomizedSmoothing
from models_for_tests import (
    CLASSES,
    SHAPE,
    Viewing,
    ask,
    close,
    small_net,
    snapshot,
    some_images,
    some_labels,
    traceable_net,
)
from torch import nn
from torch.nn import functional as F

from guardians.defences import RandomSelfEnsemble
from guardians.defences.random_self_ensemble import GaussianNoise
from guardians.engine.rng import hashed, keys_on, row_keys, with_normal

N, SEED = 6, 11
NAN, INF = float("nan"), float("inf")
SHAPES = ((3, 8, 8), (8, 8, 8))
"""Of what the convolutions of `small_net` are given."""

nets = pytest.mark.parametrize("make_net", [small_net, traceable_net], ids=["not traceable", "folded"])


def plain_keys(n, seed=SEED, first=0):
    """What a defence with a seed makes of the numbers of the images."""
    return hashed(seed, np.arange(first, first + n))


def noises_of(key, shapes, dtype=torch.float64):
    """Noise (1, C, ...) of variance 1 for each layer, whose law tests/engine/test_rng.py tests."""
    keys = keys_on(torch.device("cpu"), np.atleast_1d(key))
    return [with_normal(torch.zeros(1, *shape, dtype=dtype), keys, layer, 1) for layer, shape in enumerate(shapes)]


def layers_of(net):
    """The convolutions, batch norms and linear layer of `small_net` or `traceable_net`."""
    kinds = (nn.Conv2d, nn.BatchNorm2d, nn.Linear)
    first, first_norm, second, second_norm, head = (part for part in net.modules() if isinstance(part, kinds))
    return first, first_norm, second, second_norm, head


def literal_logits(net, x, noises, sigmas, training=False):
    """Of images (N, 3, 8, 8), with noise in front of either convolution."""
    first, first_norm, second, second_norm, head = layers_of(net)
    hidden = x
    layers = (first, first_norm, 1), (second, second_norm, 2)
    for (conv, norm, stride), sigma, noise in zip(layers, sigmas, noises, strict=True):
        hidden = hidden + sigma * noise
        hidden = F.conv2d(hidden, conv.weight, conv.bias, stride=stride, padding=1)
        mean, variance = norm.running_mean, norm.running_var
        if training:
            mean, variance = hidden.mean((0, 2, 3)), hidden.var((0, 2, 3), unbiased=False)
        hidden = (hidden - mean[:, None, None]) / (variance[:, None, None] + norm.eps).sqrt()
        hidden = (hidden * norm.weight[:, None, None] + norm.bias[:, None, None]).clamp(min=0)
    return hidden.flatten(1) @ head.weight.T + head.bias


def literal_rse(net, x, keys, n=4, sigmas=(0.2, 0.1)):
    """Algorithm 1 of Liu et al. 2018, for the seeds (N,) of images (N, 3, 8, 8)."""
    answers = []
    for image, key in zip(x, keys, strict=True):
        mean = torch.zeros(CLASSES, dtype=x.dtype)
        for k in range(n):
            noises = noises_of(hashed(key, k), SHAPES, x.dtype)
            logits = literal_logits(net, image[None], noises, sigmas)[0]
            mean = mean + (logits - logits.max()).exp() / (logits - logits.max()).exp().sum() / n
        answers.append(mean.log())
    return torch.stack(answers)


def rse(net, sigma_init=0.2, sigma_inner=0.1, n=4, **options):
    return RandomSelfEnsemble(net, sigma_init, sigma_inner, n, **{"seed": SEED, **options})


def calls_of(module):
    """A list that grows by the number of images whenever `module` is called."""
    sizes = []
    module.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    return sizes


# Against the paper


@nets
@pytest.mark.parametrize("sigmas", [(0.2, 0.1), (0.0, 0.3), (0.7, 0.0)])
@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
def test_is_that_of_the_paper(make_net, sigmas, n, grad):
    net, x = make_net(dtype=torch.float64), some_images(N, dtype=torch.float64)
    with torch.set_grad_enabled(grad):
        answers = rse(net, *sigmas, n)(x)
    assert answers.requires_grad == grad
    close(answers, literal_rse(net, x, plain_keys(N), n, sigmas))
    assert (answers - net(x).log_softmax(1)).abs().max() > 0.05  # so that noise is what is compared


@nets
def test_the_gradient_is_that_of_the_paper(make_net):
    net, y = make_net(dtype=torch.float64), some_labels(N)
    x, x_literal = (some_images(N, dtype=torch.float64).requires_grad_(True) for _ in range(2))
    F.nll_loss(rse(net)(x), y).backward()
    F.nll_loss(literal_rse(net, x_literal, plain_keys(N)), y).backward()
    assert x_literal.grad.abs().max() > 1e-3
    close(x.grad, x_literal.grad)


@nets
def test_without_noise_it_is_the_model(make_net):
    net, x = make_net(dtype=torch.float64), some_images(N, dtype=torch.float64)
    expected = F.log_softmax(net(x), 1).detach()
    close(ask(rse(net, 0, 0), x), expected)
    close(ask(rse(net, 0, 0).train(), x), F.log_softmax(net.train()(x), 1).detach())


def test_log_probabilities_are_those_of_a_distribution():
    answer = ask(rse(small_net(), 0.8, 0.5), some_images(N))
    close(answer.exp().sum(1), torch.ones(N), 1e-6)
    assert (answer <= 0).all()


@nets
def test_training_mode_is_one_pass_and_batch_norm_sees_the_whole_batch(make_net):
    net, x = make_net(dtype=torch.float64), some_images(N, dtype=torch.float64)
    module = rse(net, chunk_size=2).train()
    rows, sigmas = [noises_of(hashed(key, 0), SHAPES) for key in plain_keys(N)], (0.2, 0.1)
    noises = [torch.cat(layer) for layer in zip(*rows, strict=True)]
    with torch.no_grad():
        close(module(x), literal_logits(net, x, noises, sigmas, training=True).log_softmax(1))
        first, norm = layers_of(net)[:2]
        hidden = F.conv2d(x + sigmas[0] * noises[0], first.weight, first.bias, padding=1)
    learned = layers_of(module.model)[1]
    close(learned.running_mean, 0.9 * norm.running_mean + 0.1 * hidden.mean((0, 2, 3)))
    close(learned.running_var, 0.9 * norm.running_var + 0.1 * hidden.var((0, 2, 3)))
    assert int(learned.num_batches_tracked) == 1
    # Back in evaluation mode it is the mean of n again, with what was learned.
    module.eval()
    with torch.no_grad():
        close(ask(module, x), literal_rse(module.model, x, plain_keys(N)))


def test_evaluation_does_not_move_running_statistics():
    module = rse(small_net())
    before = {name: value.clone() for name, value in module.state_dict().items()}
    for grad in (False, True):
        ask(module, some_images(N), grad=grad)
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("mode", [True, False])
def test_begins_in_the_mode_of_the_model(mode):
    module = rse(small_net().train(mode))
    assert module.training == mode
    calls = calls_of(module.model)
    ask(module, some_images(N))
    assert calls[-1] == (N if mode else 4 * N)


# The noise itself


class Registered(nn.Module):
    """Convolutions that keep their input, registered in another order than the one in which they are asked."""

    def __init__(self):
        super().__init__()
        self.last, self.middle, self.first = (nn.Conv2d(3, 3, 1, groups=3, bias=False) for _ in range(3))
        for conv in (self.last, self.middle, self.first):
            nn.init.ones_(conv.weight)

    def forward(self, x):
        return self.last(self.middle(self.first(x))).flatten(1)


def layer_noise(module, x):
    """Output less input of each noise layer, by its name."""
    ask(module.requires_grad_(False), x)  # the first time other passes come before
    found = {}
    for path, part in module.model.named_modules():
        if isinstance(part, GaussianNoise):
            name = path.partition(".")[0]
            keep = found.setdefault(name, []).append
            part.register_forward_hook(lambda _, inputs, output, keep=keep: keep(output - inputs[0]))
    ask(module, x)
    return {name: torch.cat(parts) for name, parts in found.items()}


def test_the_first_layer_of_a_forward_pass_has_sigma_init_and_all_others_sigma_inner():
    x = torch.zeros(400, *SHAPE)
    noise = layer_noise(rse(Registered().eval(), 0.5, 0.125, n=1), x)
    assert noise.keys() == {"first", "middle", "last"}
    for name, sigma in (("first", 0.5), ("middle", 0.125), ("last", 0.125)):
        values = noise[name].flatten()
        assert abs(float(values.mean())) < 4.5 * sigma / len(values) ** 0.5
        assert float(values.std()) == pytest.approx(sigma, rel=4.5 / (2 * len(values)) ** 0.5)
        assert float((values.abs() < sigma).float().mean()) == pytest.approx(0.6827, abs=0.01)
    # Layers, images and passes do not share numbers.
    correlations = torch.corrcoef(torch.stack([values.flatten() for values in noise.values()]))
    assert (correlations - torch.eye(3)).abs().max() < 4.5 / 76800**0.5
    rows = noise["first"].flatten(1)
    assert (torch.corrcoef(rows[:50]) - torch.eye(50)).abs().max() < 6 / 192**0.5


def test_passes_of_an_image_have_noise_of_their_own():
    noise = layer_noise(rse(Registered().eval(), 0.5, 0, n=3), torch.zeros(1, *SHAPE))
    assert noise["first"].shape == (3, *SHAPE)
    assert (torch.corrcoef(noise["first"].flatten(1)) - torch.eye(3)).abs().max() < 4.5 / 192**0.5


class Twice(Registered):
    """A convolution that is asked twice."""

    def forward(self, x):
        return self.first(self.first(x)).flatten(1)


class TwoNames(Twice):
    """A convolution that is asked twice, by one name and by another."""

    def __init__(self):
        super().__init__()
        self.last = self.first

    def forward(self, x):
        return self.last(self.first(x)).flatten(1)


@pytest.mark.parametrize("kind", [Twice, TwoNames])
def test_a_convolution_that_is_asked_twice_has_new_noise_each_time(kind):
    answers = ask(rse(kind().double().eval(), 0.5, 0.25, n=1), torch.zeros(1, *SHAPE, dtype=torch.float64))
    first, second = noises_of(hashed(plain_keys(1), 0)[0], (SHAPE, SHAPE))
    close(answers, F.log_softmax((0.5 * first + 0.25 * second).flatten(1), 1))


def test_the_unit_of_the_noise_is_that_of_what_a_convolution_is_given():
    class Scaled(Registered):
        def forward(self, x):
            return super().forward(x / 0.25)

    noise = layer_noise(rse(Scaled().eval(), 0.8, 0.1, n=1), torch.rand(50, *SHAPE))
    assert float(noise["first"].std()) == pytest.approx(0.8, rel=0.05)


def test_noise_for_images_of_imagenets_size_is_made_in_little_memory():
    """ResNet-18 takes 2.2 million numbers for an image and a pass, here 140 MB."""
    module = rse(torchvision.models.resnet18(num_classes=CLASSES).eval(), n=2)
    numbers = []
    for part in module.modules():
        if isinstance(part, GaussianNoise):
            part.register_forward_hook(lambda _, inputs, output: numbers.append(output.numel()))
    x = torch.rand(8, 3, 224, 224)
    ask(module, x[:1])
    numbers.clear()
    tracemalloc.start()  # which counts what numpy allocates: all that noise needs on a CPU
    try:
        answers = ask(module, x)
        kept, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert answers.isfinite().all()
    assert 4 * sum(numbers) > 130e6
    assert peak < 5e6 * torch.get_num_threads()
    assert kept < 1e6


# Against ART


@pytest.mark.parametrize("sigma", [0.15, 0.5])
def test_with_noise_at_the_input_alone_votes_are_those_of_arts_randomised_smoothing(sigma, monkeypatch):
    net, x, n = small_net(), some_images(10), 40
    keys = hashed(plain_keys(10)[:, None], np.arange(n))
    noise = np.stack([torch.cat([noises_of(key, (SHAPE,), torch.float32)[0] for key in row]).numpy() for row in keys])

    module, votes = rse(net, sigma, 0.0, n), []
    ask(module, x[:1])  # the first pass ever measures
    module.model.register_forward_hook(lambda _, inputs, logits: votes.append(logits.argmax(1)))
    ask(module, x)
    votes = torch.cat(votes).view(10, n)
    counts = np.stack([np.bincount(image, minlength=CLASSES) for image in votes.numpy()])

    smoothing = PyTorchRandomizedSmoothing(
        net, nn.CrossEntropyLoss(), SHAPE, CLASSES, device_type="cpu", sample_size=n, scale=sigma
    )
    images = iter(noise)

    def normal(scale, size):
        assert (scale, size) == (sigma, (n, *SHAPE))
        return scale * next(images)

    monkeypatch.setattr(np.random, "normal", normal)
    reference = np.stack([smoothing._prediction_counts(image) for image in x.numpy()])
    np.testing.assert_array_equal(counts, reference)
    assert (np.sort(reference, axis=1)[:, -1] < n).any()  # so that noise changes some votes


# The base model


@nets
@pytest.mark.parametrize("mode", [True, False])
def test_the_model_stays_as_it_is(make_net, mode):
    net = make_net()
    net.train(mode)
    before = snapshot(net)
    module = rse(net)
    ask(module, some_images(N))
    F.nll_loss(module.train()(some_images(N)), some_labels(N)).backward()
    torch.optim.SGD(module.parameters(), lr=0.1).step()
    assert snapshot(net) == before
    ids = {id(tensor) for tensor in (*net.parameters(), *net.buffers())}
    assert not ids & {id(tensor) for tensor in (*module.parameters(), *module.buffers())}


def test_without_draws_the_copy_is_silent():
    net, x = small_net(), some_images(N)
    module = rse(net)
    ask(module, x)
    assert torch.equal(module.model(x), net(x))


@nets
def test_with_share_parameters_training_one_trains_the_other(make_net):
    net, x, y = make_net(), some_images(N), some_labels(N)
    parts = [(name, id(part)) for name, part in net.named_modules()]
    module = rse(net, share_parameters=True).train()
    for tensors in ("parameters", "buffers"):
        assert {id(tensor) for tensor in getattr(net, tensors)()} == {
            id(tensor) for tensor in getattr(module, tensors)()
        }
    assert [(name, id(part)) for name, part in net.named_modules()] == parts
    before = {name: value.clone() for name, value in net.state_dict().items()}
    F.nll_loss(module(x), y).backward()
    torch.optim.SGD(module.parameters(), lr=0.1).step()
    for name, value in net.state_dict().items():
        assert not torch.equal(value, before[name]), name
    # The noisy model follows the base as well, folded or not.
    module.eval(), net.eval()
    ask(module, x)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(0.5)
    assert torch.equal(ask(module, x), ask(rse(net), x))


# Independence of how it is asked


@nets
@pytest.mark.parametrize("size", [1, 5, 12])
def test_the_same_in_batches_of_any_size(make_net, size):
    net, x = make_net(dtype=torch.float64), some_images(12, dtype=torch.float64)
    module = rse(net)
    with torch.no_grad():
        answers = torch.cat([module(batch) for batch in x.split(size)])
        close(answers, rse(net)(x))
        assert module.images_seen == 12
        assert (module(x) - answers).abs().max() > 1e-3  # the next images have other numbers


@nets
@pytest.mark.parametrize("chunk_size", [1, 3, 4, 7, np.int64(24)])
@pytest.mark.parametrize("freeze", [False, True])
def test_the_same_in_chunks_of_any_size_and_so_are_gradients(make_net, chunk_size, freeze):
    found = []
    for size in (chunk_size, 512):
        module = rse(make_net(dtype=torch.float64).requires_grad_(not freeze), chunk_size=size)
        calls = calls_of(layers_of(module.model)[-1])  # the folded copy asks its own
        x = some_images(N, dtype=torch.float64).requires_grad_(True)
        answers = ask(module, x, grad=True)
        F.nll_loss(answers, some_labels(N)).backward()
        assert max(calls) <= max(size, N)  # N: where a copy is compared
        gradients = [x.grad, *(parameter.grad for parameter in module.parameters() if not freeze)]
        assert all(gradient.abs().max() > 0 for gradient in gradients)
        close(ask(module, x.detach()), answers.detach())
        found.append([answers.detach(), *gradients])
    assert len(found[0]) == (2 if freeze else 12)
    for actual, expected in zip(*found, strict=True):
        close(actual, expected)


@nets
def test_the_seed_decides(make_net):
    net, x = make_net(), some_images(N)
    first, same, other = (ask(rse(net, seed=seed), x) for seed in (3, 3, 4))
    assert torch.equal(first, same)
    assert (first - other).abs().max() > 1e-3
    assert torch.equal(ask(rse(net, seed=np.int64(3)), x), first)


def test_without_a_seed_torchs_generator_gives_one():
    seeds = []
    for start in (0, 0, 1):
        torch.manual_seed(start)
        seeds.append(RandomSelfEnsemble(small_net()).seed)
    assert seeds[0] == seeds[1] != seeds[2]


def test_draws_leave_torchs_generator_alone():
    module, state = rse(small_net()), torch.get_rng_state()
    module(some_images(N))
    module.train()(some_images(N))
    assert torch.equal(torch.get_rng_state(), state)


def test_keys_that_are_given_come_before_the_count():
    module, x = rse(small_net(dtype=torch.float64)), some_images(N, dtype=torch.float64)
    keys = np.array([7, 3, 2**64 - 1, 7, 0, 1], dtype=np.uint64)
    answers = ask(module, x, keys)
    assert module.images_seen == 0
    with torch.no_grad():
        close(answers, literal_rse(module.model, x, hashed(SEED, keys)))
    # An image's draws are its key's, wherever it stands.
    order = [4, 2, 0]
    close(ask(module, x[order], keys[order]), answers[order])
    # Keys for another number of images are not for these.
    close(ask(module, x, keys[:2]), ask(module, x))
    assert module.images_seen == N


# The view with folded batch norm


def asked_itself(module, x, grad):
    """Whether the model itself answers, and not its folded view."""
    with torch.set_grad_enabled(grad):
        return module.fast_model(x).module is module.model


def test_a_folded_view_answers_where_no_gradient_of_parameters_is_wanted():
    x = some_images(N)
    module = rse(traceable_net())
    assert not asked_itself(module, x, grad=False)
    assert asked_itself(module, x, grad=True)
    module.requires_grad_(False)
    assert not asked_itself(module, x, grad=True)
    assert asked_itself(module.train(), x, grad=False)
    assert asked_itself(rse(small_net()), x, grad=False)  # cannot be traced
    hooked = rse(traceable_net())
    hooked.model[0].register_forward_hook(lambda *_: None)
    assert asked_itself(hooked, x, grad=False)


def test_the_view_is_bit_for_bit_stable():
    module, x = rse(traceable_net()), some_images(N)
    answers = ask(module, x)
    with torch.no_grad():
        view = module.fast_model(x)
    ask(module, x, grad=True).sum().backward()
    assert torch.equal(ask(module, x), answers)
    with torch.no_grad():
        assert module.fast_model(x) is view


def change_by_state_dict(module):
    module.load_state_dict(rse(traceable_net(seed=1)).state_dict())


def change_by_optimiser(module):
    F.nll_loss(ask(module, some_images(N), grad=True), some_labels(N)).backward()
    torch.optim.Adam(module.parameters(), lr=0.05).step()


def change_by_training(module):
    """Of running statistics alone."""
    ask(module.train(), some_images(N))
    module.eval()


def change_in_place(module):
    with torch.no_grad():
        layers_of(module.model)[2].weight.mul_(1.5)


def change_of_data(module):
    """Of which the version counter of a tensor knows nothing."""
    layers_of(module.model)[2].weight.data.mul_(1.5)


def change_of_tensor(module):
    layers_of(module.model)[-1].weight = nn.Parameter(layers_of(module.model)[-1].weight.detach() * 1.5)


@pytest.mark.parametrize(
    "change",
    [change_by_state_dict, change_by_optimiser, change_by_training, change_in_place, change_of_data, change_of_tensor],
)
def test_the_view_follows_the_weights(change):
    module, x = rse(traceable_net()), some_images(N)
    before = ask(module, x)
    change(module)
    after = ask(module, x)
    assert (after - before).abs().max() > 1e-3
    close(after, ask(module, x, grad=True).detach(), 1e-5)  # which the model itself answers


def test_follows_the_dtype():
    module, x = rse(traceable_net()), some_images(N)
    single = ask(module, x)
    double = ask(module.to(torch.float64), x.double())
    assert (single.dtype, double.dtype) == (torch.float32, torch.float64)
    close(single.double(), double, 1e-5)
    with torch.no_grad():
        close(double, literal_rse(module.model, x.double(), plain_keys(N)))


def test_parameters_get_their_gradients_from_the_model_itself():
    net, x, y = traceable_net(dtype=torch.float64), some_images(N, dtype=torch.float64), some_labels(N)
    module = rse(net)
    ask(module, x)
    F.nll_loss(ask(module, x, grad=True), y).backward()
    F.nll_loss(literal_rse(net, x, plain_keys(N)), y).backward()
    for ours, literal in zip(module.parameters(), net.parameters(), strict=True):
        close(ours.grad, literal.grad)


# Other models


def test_norms_in_training_mode_are_not_folded():
    module, x = rse(traceable_net(dtype=torch.float64), 0, 0), some_images(N, dtype=torch.float64)
    layers_of(module.model)[1].train()
    expected = copy.deepcopy(module.model)(x).log_softmax(1)
    close(ask(module, x), expected)


class Undecided(nn.Module):
    """Takes one of two ways, as the batch says, which cannot be traced."""

    def __init__(self):
        super().__init__()
        self.net = traceable_net()

    def forward(self, x):
        return self.net(x) if x.mean() > 0.25 else self.net(x + 0.25)


def test_a_model_that_cannot_be_traced_works():
    x = some_images(N)
    assert float(x.mean()) > 0.4
    assert torch.equal(ask(rse(Undecided().eval()), x), ask(rse(small_net()), x))


class Auxiliary(nn.Module):
    """A head for training alone, as Inception has it."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 8), nn.Conv2d(3, 4, 8)

    def forward(self, x):
        return (self.conv(x) + self.head(x) if self.training else self.conv(x)).flatten(1)


def test_a_model_that_asks_more_convolutions_in_training():
    module, x = rse(Auxiliary()), some_images(N)
    for mode in (False, True, False, True):
        first, second = (ask(module.train(mode), x, np.arange(N) + i) for i in range(2))
        assert ((first - second).abs().amax(1) > 0).all()  # noise is there


def test_a_model_that_channels_last_breaks():
    net, x = Viewing(traceable_net(dtype=torch.float64)), some_images(N, dtype=torch.float64)
    close(rse(net)(x), literal_rse(net, x, plain_keys(N)))
    assert rse(net).train()(x).isfinite().all()


class ReadsItsConvolution(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net, self.norm = net, net[1]
        self.training = net.training

    def forward(self, x):
        first = self.net[0]
        assert first.out_channels == len(first.weight) == 8
        hidden = F.conv2d(x, first.weight, first.bias, first.stride, first.padding)
        return self.net[2:](self.norm(hidden))


def test_a_model_that_reads_its_convolutions(caplog):
    """What it computes with their weights has no noise in front, which is said once; the next one is the first then."""
    net, x = traceable_net(dtype=torch.float64), some_images(N, dtype=torch.float64)
    module = rse(ReadsItsConvolution(net), 0.3, 5.0, n=1)
    answers = ask(module, x)
    ask(module, x)
    assert [record.message for record in caplog.records] == [
        "a forward pass does not call net.0: no noise is in front of them"
    ]
    keys = hashed(hashed(SEED, np.arange(N)), 0)
    noise = torch.cat([noises_of(key, [(8, 8, 8)])[0] for key in keys])
    expected = net[3:](net[:3](x) + 0.3 * noise)
    close(answers, expected.log_softmax(1))


def test_images_of_one_dimension():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv1d(2, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(40, 3)).double().eval()
    x, n = torch.rand(5, 2, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), 3
    expected = []
    for image, key in zip(x, plain_keys(5), strict=True):
        passes = [image + 0.3 * noises_of(hashed(key, k), ((2, 10),))[0] for k in range(n)]
        expected.append(torch.stack([net(one).softmax(1)[0] for one in passes]).mean(0).log())
    close(ask(rse(net, 0.3, n=n), x), torch.stack(expected).detach())


def test_images_of_several_sizes():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    module = rse(net, n=2)
    for size in (8, 5, 8, 11):
        x = torch.rand(3, 3, size, size, generator=torch.Generator().manual_seed(size))
        assert torch.equal(ask(module, x), ask(rse(net, n=2), x))


class JustAConvolution(nn.Conv2d):
    def forward(self, x):
        return super().forward(x).flatten(1)


def test_a_model_that_is_a_convolution_itself():
    net = JustAConvolution(3, 4, 8).double().eval()
    x, key = some_images(1, dtype=torch.float64), plain_keys(1)
    noise = noises_of(hashed(key, 0)[0], (SHAPE,))[0]
    close(ask(rse(net, 0.5, n=1), x), net(x + 0.5 * noise).log_softmax(1).detach())


def test_a_deep_copy_is_another_ensemble_with_the_same_draws():
    x = some_images(N)
    for make_net in (small_net, traceable_net):
        module = rse(make_net())
        ask(module, x)  # leaves a folded copy and a tape behind
        module(x)
        twin = copy.deepcopy(module)
        assert torch.equal(twin(x), module(x))
        assert twin.images_seen == module.images_seen == 2 * N
        before = ask(module, x)
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.mul_(0.5)
        assert torch.equal(ask(module, x), before)
        assert (ask(twin, x) - before).abs().max() > 1e-3


def test_weights_go_there_and_back():
    trained, x = rse(traceable_net(seed=1)), some_images(N)
    fresh = rse(traceable_net(seed=2))
    assert fresh.load_state_dict(copy.deepcopy(trained.state_dict())).missing_keys == []
    assert torch.equal(ask(fresh, x), ask(trained, x))
    assert len(trained.state_dict()) == len(traceable_net().state_dict())  # the noise has none


@pytest.mark.parametrize("first", ["inference_mode", "no_grad"])
def test_inference_mode_leaves_nothing_behind(first):
    module, x, y = rse(traceable_net(dtype=torch.float64)), some_images(N, dtype=torch.float64), some_labels(N)
    module.requires_grad_(False)
    with getattr(torch, first)(), row_keys(np.arange(N)):
        before = module(x)
    inputs = x.clone().requires_grad_(True)
    after = ask(module, inputs, grad=True)
    close(after.detach(), before.clone())
    F.nll_loss(after, y).backward()
    assert inputs.grad.abs().max() > 0


def test_says_what_it_is():
    assert "sigma_init=0.25, sigma_inner=0.125, n=7" in repr(rse(small_net(), 0.25, 0.125, 7))


# What is not allowed

BAD = {
    "sigma_init negative": ({"sigma_init": -0.1}, ValueError, "sigma_init=-0.1"),
    "sigma_init NaN": ({"sigma_init": NAN}, ValueError, "sigma_init=nan"),
    "sigma_init infinite": ({"sigma_init": INF}, ValueError, "sigma_init=inf"),
    "sigma_init string": ({"sigma_init": "0.2"}, TypeError, "sigma_init='0.2'"),
    "sigma_init none": ({"sigma_init": None}, TypeError, "sigma_init=None"),
    "sigma_init array": ({"sigma_init": np.ones(2)}, TypeError, r"sigma_init has shape \(2,\)"),
    "sigma_inner negative": ({"sigma_inner": -1e-9}, ValueError, "sigma_inner=-1e-09"),
    "sigma_inner NaN": ({"sigma_inner": NAN}, ValueError, "sigma_inner=nan"),
    "sigma_inner true": ({"sigma_inner": True}, TypeError, "sigma_inner=True"),
    "n zero": ({"n": 0}, ValueError, "n=0"),
    "n negative": ({"n": -3}, ValueError, "n=-3"),
    "n fraction": ({"n": 2.5}, TypeError, "n=2.5"),
    "n true": ({"n": True}, TypeError, "n=True"),
    "chunk_size zero": ({"chunk_size": 0}, ValueError, "chunk_size=0"),
    "chunk_size fraction": ({"chunk_size": 8.0}, TypeError, "chunk_size=8.0"),
    "seed negative": ({"seed": -1}, ValueError, "seed=-1"),
    "seed fraction": ({"seed": 0.5}, TypeError, "seed=0.5"),
    "share_parameters not bool": ({"share_parameters": 1}, TypeError, "share_parameters=1"),
    "no convolution": ({"model": nn.Sequential(nn.Flatten(), nn.Linear(192, 3))}, ValueError, "Sequential.*convolut"),
    "no module": ({"model": lambda x: x}, TypeError, "model of type function"),
    "no model": ({"model": None}, TypeError, "model of type NoneType"),
}


@pytest.mark.parametrize(("options", "error", "message"), BAD.values(), ids=BAD)
def test_what_is_not_allowed_is_refused_by_name(options, error, message):
    options = {"model": small_net(), **options}
    model = options["model"]
    with pytest.raises(error, match=message):
        RandomSelfEnsemble(**options)
    if isinstance(model, nn.Module):
        assert getattr(model, "images_seen", 0) == 0
