"""The labels that a module gives."""

import pytest
import torch
from models_for_tests import small_net, snapshot, some_images

from guardians.defences import RandomSelfEnsemble
from guardians.engine.victim import predicted_labels

N = 12


@pytest.mark.parametrize("batch_size", [1, 5, N, 100])
def test_predicted_labels_are_the_same_in_batches_of_any_size(batch_size):
    net, x = small_net(), some_images(N)
    with torch.no_grad():
        assert torch.equal(predicted_labels(net, x, batch_size), net(x).argmax(1))
    defended, other = (RandomSelfEnsemble(net, 2.0, 1.0, 3, seed=2) for _ in range(2))
    assert torch.equal(predicted_labels(defended, x, batch_size), predicted_labels(other, x))


def test_predicted_labels_leave_the_module_as_it_was():
    net, x = small_net(), some_images(N)
    expected = predicted_labels(net, x)
    net.train()
    net.features[1].eval()
    net.head.bias.requires_grad_(False)
    before = snapshot(net)
    labels = predicted_labels(net, x, 3)
    assert torch.equal(labels, expected)  # in evaluation mode
    assert not labels.requires_grad
    assert snapshot(net) == before
    with pytest.raises(RuntimeError):
        predicted_labels(net, x[:, :1])
    assert snapshot(net) == before
