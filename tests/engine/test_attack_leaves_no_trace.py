"""The user's model, tensors and autograd mode are as they were, and none of them changes the result."""

import numpy as np
import pytest
import torch
from models_for_tests import art_classifier, linear_model, small_net, some_images, some_labels

from guardians.attacks import FGSM, PGD

ATTACKS = {
    "PGD": lambda model, **options: PGD(model, eps=0.1, eps_step=0.05, max_iter=3, seed=0, verbose=False, **options),
    "FGSM": lambda model, **options: FGSM(model, eps=0.1, seed=0, **options),
    "minimal FGSM": lambda model, **options: FGSM(model, eps=0.1, eps_step=0.02, minimal=True, **options),
    "PGD with restarts": lambda model, **options: PGD(
        model, 2, 0.5, 0.2, max_iter=2, num_random_init=3, seed=0, verbose=False, **options
    ),
}
every_attack = pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
WRAPPERS = {"module": lambda model: model, "estimator": art_classifier}
every_wrapper = pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)


def used_net():
    """A net in the middle of a user's work: mixed modes, frozen parts, gradients accumulated, a hook."""
    net = small_net()
    net.train()
    net.features[1].eval()
    net.features[3].requires_grad_(False)
    for i, parameter in enumerate(net.parameters()):
        parameter.grad = torch.full_like(parameter, i) if i % 2 else None
    net.head.register_forward_hook(lambda module, inputs, output: None)
    return net


def snapshot(net):
    return {
        "state": {name: value.clone() for name, value in net.state_dict().items()},
        "grads": [None if p.grad is None else p.grad.clone() for p in net.parameters()],
        "requires_grad": [p.requires_grad for p in net.parameters()],
        "training": [part.training for part in net.modules()],
        "hooks": [list(part._forward_hooks.items()) + list(part._forward_pre_hooks.items()) for part in net.modules()],
        "identities": [id(tensor) for tensor in (*net.parameters(), *net.buffers())],
        "pointers": [tensor.data_ptr() for tensor in (*net.parameters(), *net.buffers())],
    }


def assert_as_before(net, before):
    after = snapshot(net)
    for name, tensor in before.pop("state").items():
        assert torch.equal(after["state"][name], tensor), name
    for old, new in zip(before.pop("grads"), after["grads"], strict=True):
        assert (old is None and new is None) or torch.equal(old, new)
    for name, value in before.items():
        assert after[name] == value, name


@every_attack
@every_wrapper
def test_the_model_comes_back_bit_for_bit(attack, wrap, x, y):
    net = used_net()
    wrapped = wrap(net)
    before = snapshot(net)
    attack(wrapped)(x, y)
    attack(wrapped).generate(x.numpy())
    assert_as_before(net, before)


@every_attack
@pytest.mark.parametrize("failing_call", [1, 2])
def test_the_model_comes_back_when_it_raises_mid_attack(attack, failing_call, x, y):
    net, calls = used_net(), []

    def fail(module, inputs):
        calls.append(1)
        if len(calls) == failing_call:
            raise ArithmeticError("the model's own error")

    net.register_forward_pre_hook(fail)
    before = snapshot(net)
    with pytest.raises(ArithmeticError, match="the model's own error"):
        attack(net)(x, y)
    assert_as_before(net, before)


@every_attack
@every_wrapper
def test_the_model_is_attacked_in_evaluation_mode(attack, wrap, x, y):
    in_evaluation, in_training = (attack(wrap(net))(x, y) for net in (small_net(), used_net()))
    assert torch.equal(in_evaluation, in_training)


@every_attack
@every_wrapper
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("labelled", [True, False])
def test_the_callers_autograd_mode_does_not_matter(attack, wrap, mode, labelled, net):
    x, y = some_images(6), some_labels(6) if labelled else None
    expected = attack(wrap(net))(x, y)
    with mode():
        enabled = torch.is_grad_enabled()
        # Made inside, so in inference mode these are inference tensors.
        inner_x, inner_y = x.clone(), None if y is None else y.clone()
        x_adv = attack(wrap(net))(inner_x, inner_y)
        generated = attack(wrap(net)).generate(x.numpy(), None if y is None else y.numpy())
        assert torch.is_grad_enabled() == enabled
        assert torch.equal(x_adv, expected)
    assert np.array_equal(generated, expected.numpy())


@every_attack
def test_masks_and_starts_may_be_inference_tensors(attack, net, x, y):
    mask, start = some_images(12, seed=2) > 0.5, some_images(12, seed=3)
    expected = attack(net)(x, y, mask=mask, x_adv_init=start)
    with torch.inference_mode():
        assert torch.equal(attack(net)(x, y, mask=mask.clone(), x_adv_init=start.clone()), expected)


@every_attack
def test_what_is_passed_in_is_not_modified(attack, net, x, y):
    mask, start = some_images(12, seed=2) > 0.5, some_images(12, seed=3)
    passed = (x, y, mask, start)
    before = [tensor.clone() for tensor in passed]
    x_adv = attack(net)(x, y, mask=mask, x_adv_init=start)
    attack(net).generate(x.numpy(), y.numpy(), mask=mask.numpy(), x_adv_init=start.numpy())
    assert all(torch.equal(old, new) for old, new in zip(before, passed, strict=True))
    x_adv.fill_(7)
    assert torch.equal(x, before[0])
    assert torch.equal(start, before[3])


@every_attack
def test_the_result_shares_no_memory_with_images_that_stay(attack, net, x, y):
    options = {"batch_size": 64}
    attacker = attack(net, **options)
    attacker.set_params(eps=0)
    before = x.clone()
    attacker(x, y).fill_(7)
    assert torch.equal(x, before)
    array = x.numpy().copy()
    attacker.generate(array, y.numpy())[:] = 7
    assert np.array_equal(array, before.numpy())


def test_images_that_require_gradients_are_taken_as_values(net, x, y):
    attack = ATTACKS["PGD"](net)
    expected = attack(x, y)
    x.requires_grad_(True)
    x_adv = attack(x, y)
    assert torch.equal(x_adv, expected)
    assert not x_adv.requires_grad
    assert x.grad is None


def test_arrays_need_be_neither_contiguous_nor_writable(net, x, y):
    attack, plain = ATTACKS["PGD"](net), x.numpy()
    expected = attack.generate(plain, y.numpy())
    channels_last = np.ascontiguousarray(plain.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    reversed_twice = plain[::-1].copy()[::-1]
    read_only = plain.copy()
    read_only.setflags(write=False)
    for array in (channels_last, reversed_twice, read_only):
        assert np.array_equal(attack.generate(array, y.numpy()), expected)
    assert torch.equal(attack(x.to(memory_format=torch.channels_last), y), torch.from_numpy(expected))


def test_double_models_are_attacked_in_double(x64, y):
    attack = ATTACKS["PGD"](linear_model())
    assert attack(x64, y).dtype == torch.float64
    generated = attack.generate(x64.float().numpy(), y.numpy())
    assert generated.dtype == np.float64


def test_a_model_may_change_its_dtype_after_the_attack_was_made(net, x64, y):
    attack = ATTACKS["PGD"](net)
    net.double()
    expected = ATTACKS["PGD"](net)(x64, y)
    assert torch.equal(attack(x64, y), expected)


def test_a_model_without_parameters_can_be_attacked(x, y):
    model = torch.nn.Sequential(torch.nn.AvgPool2d(4), torch.nn.Flatten())
    x_adv = ATTACKS["PGD"](model)(x, y)
    assert torch.nn.functional.cross_entropy(model(x_adv), y) > torch.nn.functional.cross_entropy(model(x), y)


@pytest.mark.gpu
@every_attack
def test_a_gpu_gives_the_images_of_the_cpu(attack, x64, y):
    on_cpu = attack(small_net(dtype=torch.float64))(x64, y)
    net = small_net(dtype=torch.float64).cuda()
    on_gpu = attack(net)(x64.cuda(), y.cuda())
    assert on_gpu.is_cuda
    torch.testing.assert_close(on_gpu.cpu(), on_cpu, rtol=0, atol=1e-10)
    generated = attack(net).generate(x64.numpy(), y.numpy())
    np.testing.assert_allclose(generated, on_cpu.numpy(), rtol=0, atol=1e-10)
    estimator = art_classifier(net, device_type="gpu")
    generated = attack(estimator).generate(x64.numpy(), y.numpy())
    np.testing.assert_allclose(generated, on_cpu.numpy(), rtol=0, atol=1e-10)
