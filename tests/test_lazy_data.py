"""Data sets whose images are decoded when they are asked for, against those that are decoded at once."""

import importlib.util
import pickle
import shutil
import sys
import weakref
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models_for_tests import small_net
from PIL import Image
from test_data_sets import StandIn, encoded, rows, save_real
from torchvision.datasets import ImageNet

import guardians.data
from guardians.attacks import PGD
from guardians.data import ENVIRONMENT_VARIABLE, Dataset, LazyDataset, load_data, open_data

N = 14
HAS_DATASETS = importlib.util.find_spec("datasets") is not None


@pytest.fixture(autouse=True)
def _no_data_set_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENVIRONMENT_VARIABLE, raising=False)


def write_tree(root: Path, sizes: dict[str, int], shape: tuple[int, int] = (9, 7)) -> Path:
    """An ImageFolder with so many images of `shape` (height, width) in each class."""
    rng = np.random.default_rng(0)
    for name, n in sizes.items():
        folder = root / "test" / name
        folder.mkdir(parents=True)
        for i in range(n):
            Image.fromarray(rng.integers(0, 256, (*shape, 3), dtype=np.uint8)).save(folder / f"{i}.jpg")
    return root


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tree(tmp_path_factory.mktemp("data") / "tree", {"cat": 6, "ant": 5, "bee": 3})


def mnist(folder: Path) -> str:
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True)
    images = np.random.default_rng(1).integers(0, 256, (5, 28, 28), dtype=np.uint8)
    for prefix in ("t10k", "train"):
        header = b"".join(number.to_bytes(4, "big") for number in (0x803, *images.shape))
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(header + images.tobytes())
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(b"\0\0\x08\x01\0\0\0\x05" + bytes([4, 1, 0, 1, 9]))
    return str(folder)


def svhn(folder: Path) -> str:
    """Only its pixels are of another layout; the file itself is torchvision's business."""
    scipy_io = pytest.importorskip("scipy.io")
    images = np.random.default_rng(2).integers(0, 256, (32, 32, 3, 4), dtype=np.uint8)
    scipy_io.savemat(folder / "test_32x32.mat", {"X": images, "y": np.array([[1], [10], [3], [3]], dtype=np.uint8)})
    return f"svhn:{folder}"


def hugging_face(folder: Path) -> str:
    pixels = np.random.default_rng(3).integers(0, 256, (5, 9, 7, 3), dtype=np.uint8)
    save = save_real if HAS_DATASETS else StandIn.save
    save(folder / "pets", {"test": rows([encoded(image) for image in pixels], [0, 1, 1, 0, 2])})
    return str(folder / "pets")


def joined(shards: list[Dataset]) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.cat([shard.images for shard in shards]), torch.cat([shard.labels for shard in shards])


class TestSameAsInMemory:
    @pytest.mark.parametrize("workers", [0, 1])
    @pytest.mark.parametrize("options", [{}, {"n": 4, "seed": 3}, {"resize": 8, "crop": 6}])
    @pytest.mark.parametrize("kind", [mnist, svhn, hugging_face])
    def test_of_every_kind(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Callable, options: dict, workers: int
    ) -> None:
        monkeypatch.setattr("torchvision.datasets.svhn.check_integrity", lambda *_: True)
        if not HAS_DATASETS:
            monkeypatch.setitem(sys.modules, "datasets", StandIn("datasets"))
        root = kind(tmp_path)
        whole, lazy = load_data(root, **options), open_data(root, **options)
        assert (lazy.classes, lazy.source, len(lazy)) == (whole.classes, whole.source, len(whole))
        assert lazy.image_shape == whole.image_shape == whole.images.shape[1:]
        assert torch.equal(lazy.labels, whole.labels)
        shards = list(lazy.shards(2, workers=workers))
        assert [len(shard) for shard in shards] == [2, 2, 1][: len(shards)]
        for found, expected in zip(joined(shards), (whole.images, whole.labels), strict=True):
            assert torch.equal(found, expected)

    @given(st.integers(1, N + 2), st.integers(0, N))
    def test_any_size_from_any_start(self, tree: Path, size: int, start: int) -> None:
        whole, lazy = load_data(tree), open_data(tree)
        for data in (whole, lazy):
            shards = list(data.shards(size, start=start))
            assert [len(shard) for shard in shards] == [len(part) for part in batched(range(start, N), size)]
            for shard, part in zip(shards, batched(range(start, N), size), strict=True):
                assert torch.equal(shard.images, whole.images[part])
                assert shard.labels.tolist() == whole.labels[part].tolist()
                assert (shard.classes, shard.source) == (whole.classes, whole.source)

    @pytest.mark.parametrize(("size", "workers", "start"), [(5, 1, 3), (5, 2, 0), (1, 2, 1), (20, 2, 0), (4, 2, N)])
    def test_whatever_the_number_of_workers(self, tree: Path, size: int, workers: int, start: int) -> None:
        lazy, expected = open_data(tree), list(load_data(tree).shards(size, start=start))
        found = list(lazy.shards(size, workers=workers, start=start))
        assert len(found) == len(expected)
        for shard, other in zip(found, expected, strict=True):
            assert torch.equal(shard.images, other.images)
            assert torch.equal(shard.labels, other.labels)

    @given(st.lists(st.integers(-N, N - 1), max_size=5))
    def test_positions(self, tree: Path, positions: list[int]) -> None:
        """In their order, and an image as often as it is named."""
        whole, lazy = load_data(tree), open_data(tree)
        positions = np.array(positions, dtype=np.int64)
        for part in (whole[positions], lazy[positions], lazy[torch.from_numpy(positions)]):
            assert torch.equal(part.images, whole.images[torch.from_numpy(positions)])
            assert torch.equal(part.labels, whole.labels[torch.from_numpy(positions)])
        subset = lazy.subset(positions)
        assert isinstance(subset, LazyDataset)
        assert torch.equal(subset[:].images, whole.images[torch.from_numpy(positions)])

    def test_masks_and_slices(self, tree: Path) -> None:
        whole, lazy = load_data(tree), open_data(tree)
        mask = whole.labels == 1
        for part in (lazy[mask], whole[mask], lazy.subset(mask)[:], lazy[mask.numpy()]):
            assert torch.equal(part.images, whole.images[mask])
        assert torch.equal(lazy.subset(slice(2, 9))[1:].images, whole.images[3:9])
        assert whole[2:5].images.data_ptr() == whole.images[2:].data_ptr()  # no copy

    @pytest.mark.parametrize("index", [3, [[0, 1]], torch.tensor(2)])
    def test_what_is_no_index(self, tree: Path, index: object) -> None:
        for data in (load_data(tree), open_data(tree)):
            with pytest.raises(TypeError, match=r"index=.*slice"):
                data[index]


def batched(numbers: range, size: int) -> list[list[int]]:
    return [list(numbers[first : first + size]) for first in range(0, len(numbers), size)]


class TestDecoding:
    def test_only_what_is_asked_for(self, tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        decoded = []
        original = guardians.data._pixels
        monkeypatch.setattr(
            guardians.data, "_pixels", lambda name, *rest: decoded.append(name) or original(name, *rest)
        )
        lazy = open_data(tree)
        assert len(decoded) == 1  # whose shape all must have
        assert len(lazy.subset(range(5)).digest) == 12
        shards = lazy.shards(4, start=2)
        assert len(decoded) == 1
        for number in (5, 9, 13):
            next(shards)
            assert len(decoded) == number

    @pytest.mark.parametrize("workers", [1, 2])
    def test_workers_are_one_shard_ahead(self, tmp_path: Path, workers: int) -> None:
        """Files of what is further ahead may still be broken, or mended."""
        root = write_tree(tmp_path, {"a": 12})
        files = sorted((root / "test" / "a").iterdir(), key=str)
        lazy = open_data(root)
        whole = load_data(root)
        shards = lazy.shards(2, workers=workers)
        first = next(shards)
        for file in files[4:]:  # neither in the first shard nor in the second
            file.write_bytes(b"broken")
        assert torch.equal(first.images, whole.images[:2])
        assert torch.equal(next(shards).images, whole.images[2:4])
        with pytest.raises(ValueError, match="cannot be read as an image"):
            list(shards)

    @pytest.mark.parametrize("workers", [0, 1])
    def test_shards_are_let_go(self, tree: Path, workers: int) -> None:
        """While the next is decoded, only the last is alive."""
        given = []
        for shard in open_data(tree).shards(3, workers=workers):
            assert sum(images() is not None for images in given) <= 1
            given.append(weakref.ref(shard.images))
        assert len(given) == 5

    def test_nothing_is_drawn_from_the_global_generator(self, tree: Path) -> None:
        state = torch.get_rng_state()
        list(open_data(tree).shards(5, workers=1))
        assert torch.equal(torch.get_rng_state(), state)

    def test_a_subset_reads_no_other_file(self, tree: Path, tmp_path: Path) -> None:
        root = tmp_path / "copy"
        shutil.copytree(tree, root)
        expected = load_data(root, n=4, seed=1)
        lazy = open_data(root, n=4, seed=1)
        names = {name for name, _ in lazy.encoded(lazy.index)}
        for file in (root / "test").rglob("*.jpg"):
            if str(file) not in names:
                file.write_bytes(b"broken")
        assert torch.equal(lazy[:].images, expected.images)


class TestErrors:
    @pytest.mark.parametrize("workers", [0, 1])
    @pytest.mark.parametrize(
        ("pixels", "message"),
        [
            (np.zeros((9, 8, 3), dtype=np.uint8), r"cat/4\.png: shape \(9, 8, 3\), but .*ant/0\.jpg has \(9, 7, 3\)"),
            (np.zeros((9, 7), dtype=np.uint8), r"cat/4\.png: greyscale, but .*ant/0\.jpg is coloured"),
            (None, r"cat/4\.png: cannot be read as an image"),
        ],
    )
    def test_an_image_that_does_not_fit(
        self, tree: Path, tmp_path: Path, pixels: np.ndarray | None, message: str, workers: int
    ) -> None:
        """It is named when it is reached, also where all of its own shard agree."""
        root = tmp_path / "copy"
        shutil.copytree(tree, root)
        (root / "test" / "cat" / "4.jpg").unlink()
        file = root / "test" / "cat" / "4.png"
        file.write_bytes(b"broken") if pixels is None else Image.fromarray(pixels).save(file)
        shards = open_data(root).shards(1, workers=workers)
        assert len([next(shards) for _ in range(12)]) == 12
        with pytest.raises(ValueError, match=rf"^[^\n]*{message}"):
            next(shards)

    def test_the_first_image_is_broken(self, tmp_path: Path) -> None:
        write_tree(tmp_path, {"a": 2})
        (tmp_path / "test" / "a" / "0.jpg").write_bytes(b"broken")
        with pytest.raises(ValueError, match=r"a/0\.jpg: cannot be read as an image"):
            open_data(tmp_path)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"size": 0}, "size=0: must be an integer of at least 1"),
            ({"size": 2.5}, r"size=2\.5"),
            ({"size": 2, "workers": -1}, "workers=-1: must be an integer of at least 0"),
            ({"size": 2, "start": -1}, "start=-1: must be an integer of at least 0"),
            ({"size": 2, "start": N + 1}, f"start={N + 1}: the data set has only {N} images"),
        ],
    )
    def test_arguments_of_shards(self, tree: Path, options: dict, message: str) -> None:
        for data in (load_data(tree), open_data(tree)):
            with pytest.raises(ValueError, match=message):
                data.shards(**options)


class TestDigest:
    def test_of_the_same_files_elsewhere(self, tree: Path, tmp_path: Path) -> None:
        shutil.copytree(tree, tmp_path / "elsewhere")
        (tmp_path / "elsewhere" / "test" / "bee" / "2.jpg").rename(tmp_path / "elsewhere" / "test" / "bee" / "two.jpg")
        digest = open_data(tree).digest
        assert open_data(tmp_path / "elsewhere").digest == digest
        assert pickle.loads(pickle.dumps(open_data(tree))).digest == digest
        assert open_data(tree).identity == f"tree (test), {digest[:8]}"

    def test_of_anything_else(self, tree: Path, tmp_path: Path) -> None:
        root = tmp_path / "tree"
        shutil.copytree(tree, root)
        data = open_data(tree)
        digests = [data.digest, data.subset(slice(1, None)).digest, data.subset(np.arange(N)[::-1]).digest]
        digests += [open_data(tree, resize=7).digest, open_data(tree, crop=7).digest, open_data(tree, n=N).digest]
        (root / "test" / "ant" / "4.jpg").rename(root / "test" / "bee" / ".jpg")  # whose place in the order it keeps
        digests.append(open_data(root).digest)
        (root / "test" / "cat").rename(root / "test" / "dog")
        digests.append(open_data(root).digest)
        Image.new("RGB", (7, 9)).save(root / "test" / "dog" / "3.jpg")
        digests.append(open_data(root).digest)
        assert len(set(digests)) == len(digests)

    def test_of_images_in_memory_is_that_of_the_pixels(self) -> None:
        """The stores and tables of earlier versions know their data by it."""
        data = Dataset(torch.arange(24, dtype=torch.uint8).view(2, 3, 2, 2), torch.tensor([1, 0]), ("a", "b"), "ramp")
        assert data.digest == "7a6a256362f1"
        assert data.identity == "ramp, def62876"


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A thousand classes, made in another order than theirs; the colour of an image says of which it is."""
    root = tmp_path_factory.mktemp("data") / "imagenet"
    names = [f"n{number:08d}" for number in range(1_440_764, 1_440_764 + 13_000 * 1000, 13_000)]
    for i in np.random.default_rng(0).permutation(1000):
        (root / "val" / names[i]).mkdir(parents=True)
        file = root / "val" / names[i] / f"ILSVRC2012_val_{i:08d}.png"
        Image.new("RGB", (2, 2), (i // 256, i % 256, 0)).save(file)
    torch.save(({name: (name,) for name in names}, []), root / "meta.bin")
    return root


class TestImageNet:
    def test_labels_are_those_of_the_sorted_names(self, imagenet: Path) -> None:
        data = open_data(imagenet)
        assert data.source == "imagenet (val)"
        assert data.labels.tolist() == list(range(1000))
        assert data.classes == tuple(sorted(folder.name for folder in (imagenet / "val").iterdir()))
        for shard in data.shards(300):
            colours = shard.images[:, :, 0, 0].long()
            assert torch.equal(256 * colours[:, 0] + colours[:, 1], shard.labels)

    def test_they_are_torchvisions(self, imagenet: Path) -> None:
        theirs, ours = ImageNet(str(imagenet), "val"), open_data(imagenet)
        assert theirs.targets == ours.labels.tolist()
        assert tuple(theirs.wnids) == ours.classes
        assert [file for file, _ in theirs.samples] == [name for name, _ in ours.encoded(ours.index)]


class TestStream:
    @pytest.mark.parametrize(("cut", "workers"), [(0, 1), (6, 0), (9, 1)])
    def test_a_stream_goes_on_where_it_stopped(self, tmp_path: Path, cut: int, workers: int) -> None:
        """With a seed, the images of two streams are those of one call on all."""
        root = write_tree(tmp_path, {"a": 7, "b": 5}, shape=(8, 8))
        whole, lazy = load_data(root), open_data(root)
        attack = PGD(
            small_net(), np.inf, 0.03, 0.01, max_iter=3, num_random_init=1, batch_size=4, seed=5, verbose=False
        )
        expected = attack(whole.as_floats(), whole.labels)
        found = torch.zeros_like(expected)
        for start, stop in ((0, cut), (cut, len(lazy))):
            shards = lazy.subset(slice(0, stop)).shards(3, workers=workers, start=start)
            batches = ((shard.as_floats(), shard.labels) for shard in shards)
            for finished in attack.stream(batches, first_index=start):
                found[torch.from_numpy(finished.index + start)] = finished.x_adv
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
