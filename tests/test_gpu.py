"""Everything on a CUDA device: the answers of the CPU, on the device of the images, and nothing that moves about."""

import warnings

import numpy as np
import pytest
import torch
from models_for_tests import CLASSES, SHAPE, art_classifier, small_net, some_images, some_labels
from torch import nn

import guardians
from guardians.attacks import FGSM, PGD
from guardians.attacks.registry import Spec, families
from guardians.defences import AdversarialTrainer, AveragedMixturePGD, MixupInference, RandomSelfEnsemble
from guardians.engine.rng import bits, hashed, keys_on, with_normal
from guardians.engine.search import bfloat16_is_native
from guardians.engine.victim import predicted_labels
from guardians.estimators import MixupInferenceClassifier, RandomSelfEnsembleClassifier
from guardians.parity.cases import Case, cases
from guardians.parity.defences import DEFENCE_CASES
from guardians.parity.harness import compare
from guardians.toolkits.build import build_attack, is_available

pytestmark = pytest.mark.gpu

INF = float("inf")
EPS = {1: 1.5, 2: 0.3, INF: 0.03}
N = 12
SETTING = {"nb_classes": CLASSES, "input_shape": SHAPE, "batch_size": 5}


def specs():
    """Every native attack on any model in every norm that it has, of few steps."""
    for family in (family for family in families() if not family.made_for):
        for norm in sorted(EPS.keys() & set(family.norms)):
            steps = {"steps": 6} if "steps" in family.parameters else {}
            yield Spec(family.name, norm, None if family.minimises_norm else EPS[norm], params=steps)


every_attack = pytest.mark.parametrize("spec", list(specs()), ids=lambda spec: f"{spec.name}-{spec.norm:g}")


def on_gpu(spec, net, x, y, **options):
    attack = build_attack("native", spec, net, **SETTING | {"seed": 0} | options)
    x_adv = attack(x.cuda(), y.cuda())
    assert (x_adv.device.type, x_adv.dtype, x_adv.shape) == ("cuda", x.dtype, x.shape)
    return x_adv.cpu()


@every_attack
def test_in_float64_the_images_are_those_of_the_cpu(spec):
    x, y = some_images(N, dtype=torch.float64), some_labels(N)
    expected = build_attack("native", spec, small_net(dtype=torch.float64), **SETTING, seed=0)(x, y)
    found = on_gpu(spec, small_net(dtype=torch.float64).cuda(), x, y)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-8)


@every_attack
def test_in_float32_images_lie_in_ball_and_range_and_fool_as_many(spec):
    x, net = some_images(64), small_net()
    y = net(x).argmax(1)
    found = on_gpu(spec, small_net().cuda(), x, y)
    assert ((found >= 0) & (found <= 1)).all()
    if spec.eps is not None:
        norms = torch.linalg.vector_norm((found.double() - x.double()).flatten(1), spec.norm, dim=1)
        assert (norms <= torch.tensor(spec.eps, dtype=torch.float64) * (1 if spec.norm == INF else 1 + 1e-12)).all()
    on_cpu = build_attack("native", spec, net, **SETTING, seed=0)(x, y)
    fooled = [(net(images).argmax(1) != y).float().mean() for images in (found, on_cpu)]
    assert abs(fooled[0] - fooled[1]) <= 2 / 64


@every_attack
def test_the_batch_size_changes_nothing(spec):
    x, y, net = some_images(N, dtype=torch.float64), some_labels(N), small_net(dtype=torch.float64).cuda()
    found, other = (on_gpu(spec, net, x, y, batch_size=size) for size in (3, N))
    torch.testing.assert_close(found, other, rtol=0, atol=1e-8)


@pytest.mark.parametrize("precision", ["auto", "float32", "bfloat16"])
@pytest.mark.parametrize("early_stop", [False, True])
def test_cheaper_search_fools_as_many(precision, early_stop):
    x, net = some_images(256), small_net().cuda()
    y = predicted_labels(net, x.cuda()).cpu()
    spec = Spec("PGD", INF, 0.02, params={"steps": 10})
    found = on_gpu(spec, net, x, y, precision=precision, early_stop=early_stop)
    plain = build_attack("native", spec, small_net(), **SETTING, seed=0, precision="float32")(x, y)
    fooled = [(small_net()(images).argmax(1) != y).float().mean() for images in (found, plain)]
    assert fooled[0] >= fooled[1] - 3 / 256


@pytest.mark.parametrize(("width", "search"), [(1, "model"), (2048, "folded, channels_last, bfloat16")])
def test_low_precision_is_chosen_for_heavy_models_alone(width, search):
    if width > 1 and not bfloat16_is_native(torch.device("cuda")):
        pytest.skip("no bfloat16")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        wide = [nn.Conv2d(3, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1), nn.ReLU()]
        net = nn.Sequential(*wide, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, CLASSES)).eval().cuda()
    attack = PGD(net, eps=0.1, eps_step=0.05, max_iter=2, early_stop=True, batch_size=1024, verbose=False)
    attack(some_images(N).cuda(), some_labels(N).cuda())
    assert attack.report.search == search


def test_the_model_comes_back_as_it_was():
    net = small_net().train().cuda()
    before = {name: (value.data_ptr(), value.clone()) for name, value in net.state_dict().items()}
    PGD(net, eps=0.1, eps_step=0.05, max_iter=3, early_stop=True, verbose=False)(
        some_images(N).cuda(), some_labels(N).cuda()
    )
    assert net.training
    assert all(parameter.grad is None and parameter.requires_grad for parameter in net.parameters())
    for name, value in net.state_dict().items():
        assert value.data_ptr() == before[name][0]
        assert torch.equal(value, before[name][1])


def test_an_ambient_autocast_changes_nothing():
    x, y, net = some_images(N).cuda(), some_labels(N).cuda(), small_net().cuda()
    attack = PGD(net, eps=0.1, eps_step=0.05, max_iter=3, verbose=False)
    plain = attack(x, y)
    with torch.autocast("cuda", torch.float16):
        torch.testing.assert_close(attack(x, y), plain, rtol=0, atol=0)


def test_tensors_of_another_device_are_refused_and_arrays_taken():
    x, y, net = some_images(N, dtype=torch.float64), some_labels(N), small_net(dtype=torch.float64).cuda()
    attack = FGSM(net, eps=0.1)
    with pytest.raises(ValueError, match="x is on cpu, the model on cuda:0"):
        attack(x, y)
    expected = attack(x.cuda(), y.cuda()).cpu()
    np.testing.assert_allclose(attack.generate(x.numpy(), y.numpy()), expected.numpy(), rtol=0, atol=1e-10)


def test_the_classical_loop_waits_for_nothing():
    """But for what a first call finds out of the model."""
    x, y, net = some_images(N).cuda(), some_labels(N).cuda(), small_net().cuda()
    attack = PGD(net, eps=0.1, eps_step=0.05, max_iter=8, batch_size=N, precision="float32", verbose=False)

    def waits(steps):
        attack.set_params(max_iter=steps)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                attack(x, y)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        return sum("called a synchronizing" in str(warning.message) for warning in caught)

    attack(x, y)
    assert waits(4) == waits(40)


def test_a_data_loader_streams_to_the_device():
    x, y, net = some_images(N), some_labels(N), small_net().cuda()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=5, pin_memory=True)
    attack = PGD(net, eps=0.1, eps_step=0.05, max_iter=3, batch_size=4, verbose=False)
    found = torch.empty_like(x)
    for finished in attack.stream(loader):
        found[torch.as_tensor(finished.index)] = finished.x_adv.cpu()
    torch.testing.assert_close(found, attack(x.cuda(), y.cuda()).cpu(), rtol=0, atol=1e-6)


def defence_of(name, net):
    pool = some_images(10, seed=3), torch.arange(10) % CLASSES
    if name == "RSE":
        return RandomSelfEnsemble(net, 0.1, 0.05, 4, seed=0)
    return MixupInference(net, pool, name, num_samples=4, detection_samples=3, seed=0)


def test_noise_has_the_bits_of_the_cpu():
    keys, gpu = hashed(3, np.arange(70)), torch.device("cuda")
    on_cpu, on_gpu = keys_on(torch.device("cpu"), keys), keys_on(gpu, keys)
    for stream in (0, 5):
        assert torch.equal(bits(on_gpu, stream, 3, 50_000).cpu(), bits(on_cpu, stream, 3, 50_000))
        for shape in ((3, 7), (16, 32, 32), (64, 50, 49)):  # the last has two slabs
            expected = with_normal(torch.zeros(70, *shape, dtype=torch.float64), on_cpu, stream, 1)
            found = with_normal(torch.zeros(70, *shape, dtype=torch.float64, device=gpu), on_gpu, stream, 1)
            torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=1e-5)


def test_noise_for_large_images_takes_the_memory_that_is_stated():
    x = torch.zeros(64, 64, 112, 112, device="cuda")
    keys = keys_on(x.device, hashed(3, np.arange(64)))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    noisy = with_normal(x, keys, 0, 1)
    assert torch.cuda.max_memory_allocated() - before - noisy.numel() * 4 < 64 * 2**20
    assert abs(float(noisy.std()) - 1) < 1e-3


every_defence = pytest.mark.parametrize("name", ["RSE", "MI-PL", "MI-OL", "MI-Combined"])


@every_defence
def test_defences_answer_and_have_gradients_on_the_device(name):
    x = some_images(N)
    defence = defence_of(name, small_net().cuda()).cuda().eval()
    asked = x.cuda().requires_grad_()
    answer = defence(asked)
    answer.logsumexp(1).sum().backward()
    assert answer.is_cuda
    assert asked.grad.is_cuda
    torch.testing.assert_close(answer.exp().sum(1), torch.ones(N, device="cuda"))
    expected = defence_of(name, small_net()).eval()(x).detach()
    torch.testing.assert_close(answer.detach().cpu(), expected, rtol=1e-2, atol=1e-2)


@every_defence
def test_random_defences_are_attacked_by_eot_and_evaluated(name):
    x = some_images(N).cuda()
    defence = defence_of(name, small_net().cuda()).cuda().eval()
    y = predicted_labels(defence, x)
    x_adv = PGD(defence, eps=0.1, eps_step=0.03, max_iter=4, eot_samples=3, verbose=False)(x, y)
    assert x_adv.is_cuda
    assert (x_adv - x).abs().max() <= 0.1
    found = guardians.evaluate(defence, x, y, eps=0.1, budget="fast", verbose=False)
    assert found.robust_accuracy <= found.clean_accuracy


@pytest.mark.parametrize("method", ["MI-PL", "MI-OL"])
def test_the_adaptive_attack_on_mixup_inference(method):
    x, y = some_images(N).cuda(), some_labels(N).cuda()
    defence = defence_of(method, small_net().cuda()).cuda().eval()
    x_adv = AveragedMixturePGD(defence, 0.1, 0.03, max_iter=3, verbose=False)(x, y)
    assert x_adv.is_cuda
    assert (x_adv - x).abs().max() <= 0.1 + 1e-6


@pytest.mark.parametrize("budget", ["fast", "standard", "thorough"])
@pytest.mark.parametrize("norm", EPS)
def test_evaluate_gives_the_verdicts_of_the_cpu(budget, norm):
    x, net = some_images(40), small_net()
    y = net(x).argmax(1)
    options = {"norm": norm, "eps": EPS[norm] / 2, "budget": budget, "verbose": False}
    on_cpu = guardians.evaluate(net, x, y, **options)
    found = guardians.evaluate(small_net().cuda(), x.cuda(), y.cuda(), **options)
    assert abs(found.robust_accuracy - on_cpu.robust_accuracy) <= 1 / 40


@pytest.mark.parametrize("kind", ["exact", "dominance"])
def test_parity_holds_on_the_device(kind):
    pytest.importorskip("foolbox")
    x, y, net = some_images(N).cuda(), some_labels(N).cuda(), small_net().cuda()
    every = [case for case in cases() if isinstance(case, Case) and case.kind == kind]
    chosen = [case for case in every if case.spec.get("steps", 1) <= 40]
    failed = []
    for case in chosen:
        verdict = compare(case, net, x, y, nb_classes=CLASSES, batch_size=5).verdict
        if verdict not in ("exact", "dominates"):
            failed.append((case, verdict))
    assert chosen
    assert not failed


@pytest.mark.parametrize("case", DEFENCE_CASES, ids=lambda case: case.name)
def test_defences_are_those_of_the_papers_and_toolkits_on_the_device(case):
    pytest.importorskip("torchattacks")
    row = case.row(small_net().cuda(), some_images(N).cuda(), some_labels(N).cuda(), CLASSES, seed=0)
    assert row["verdict"] == "exact"


@pytest.mark.parametrize("toolkit", ["ART", "torchattacks", "foolbox"])
def test_adapted_attacks_take_images_of_the_device(toolkit):
    spec = Spec("PGD", INF, 0.03, params={"steps": 3, "eps_step": 0.01})
    assert is_available(toolkit, spec)
    x, y = some_images(N).cuda(), some_labels(N).cuda()
    x_adv = build_attack(toolkit, spec, small_net().cuda(), **SETTING, seed=0)(x, y)
    assert x_adv.is_cuda
    assert 0.02 < (x_adv - x).abs().max() <= 0.03 + 1e-6


def test_art_estimators_on_the_device():
    x, y = some_images(N).numpy(), np.eye(CLASSES, dtype=np.float32)[some_labels(N)]
    pool = some_images(10, seed=3), torch.arange(10) % CLASSES
    common = {"loss": nn.CrossEntropyLoss(), "input_shape": SHAPE, "nb_classes": CLASSES, "clip_values": (0, 1)}
    for make in (
        lambda: RandomSelfEnsembleClassifier(small_net(), **common, n=3, seed=0, device_type="gpu"),
        lambda: MixupInferenceClassifier(small_net(), **common, pool=pool, num_samples=3, seed=0, device_type="gpu"),
    ):
        estimator = make()
        assert estimator.device.type == "cuda"
        assert estimator.predict(x).shape == (N, CLASSES)
        assert np.abs(estimator.loss_gradient(x, y)).max() > 0
        assert estimator.class_gradient(x, label=1).shape == (N, 1, *SHAPE)
        assert FGSM(estimator, eps=0.1).generate(x, y).shape == x.shape


def test_adversarial_training_on_the_device():
    net = small_net()
    estimator = art_classifier(net, device_type="gpu", optimizer=torch.optim.SGD(net.parameters(), 0.1))
    x, y = some_images(64).numpy(), some_labels(64).numpy()
    before = estimator.predict(x)
    trainer = AdversarialTrainer(
        estimator, PGD(estimator, eps=0.05, eps_step=0.02, max_iter=2, verbose=False), ratio=1.0
    )
    trainer.fit(x, y, batch_size=16, nb_epochs=3)
    assert next(estimator.model.parameters()).is_cuda
    assert np.abs(estimator.predict(x) - before).max() > 0.01
