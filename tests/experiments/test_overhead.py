import pytest
from models_for_tests import small_net, some_images, some_labels

from guardians.experiments.overhead import OVERHEAD_COLUMNS, measure_overhead
from guardians.toolkits.build import IMPLEMENTATIONS


def test_every_implementation_is_measured_against_the_bare_loop():
    net = small_net()
    frame = measure_overhead(net, some_images(4), some_labels(4), steps=3, rounds=2)
    assert list(frame.columns) == list(OVERHEAD_COLUMNS)
    assert frame["implementation"].tolist() == ["bare loop", *IMPLEMENTATIONS]
    rows = frame.set_index("implementation")
    assert rows.loc["bare loop", "ratio"] == 1
    assert rows.loc["native", "native_ratio"] == 1
    assert (frame["seconds"] > 0).all()


def test_every_implementation_does_the_same_work():
    net = small_net()
    measure_overhead(net, some_images(4), some_labels(4), steps=3, rounds=1)
    # Per run of 4 images: 3 steps of each; ART predicts twice more, foolbox once. One warm-up and one round; one image
    # for the number of classes here, and in each of native, torchattacks and foolbox.
    assert net.images_seen == 2 * 4 * (5 * 3 + 3) + 4


@pytest.mark.parametrize("name", ["steps", "rounds"])
def test_bad_counts_are_refused(name):
    with pytest.raises(ValueError, match=f"{name}=0"):
        measure_overhead(small_net(), some_images(4), some_labels(4), **{name: 0})
