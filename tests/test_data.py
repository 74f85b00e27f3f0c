"""Data sets as tensors, against what PIL and the files themselves say."""

import hashlib
import pickle
import re
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torchvision.datasets import CIFAR10

import guardians.data
from guardians.data import CIFAR10_CLASSES, ENVIRONMENT_VARIABLE, Dataset, class_balanced_subset, load_data


@pytest.fixture(autouse=True)
def _no_data_set_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENVIRONMENT_VARIABLE, raising=False)


def write_image(file: Path, seed: int, size: tuple[int, int] = (6, 4), mode: str = "RGB") -> None:
    """A random image of `size` (width, height)."""
    file.parent.mkdir(parents=True, exist_ok=True)
    shape = (size[1], size[0], 3) if mode == "RGB" else (size[1], size[0])
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8), mode=mode).save(file)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """An ImageFolder: three classes, made out of alphabetical order; 2 x 3 training and 3 + 2 + 1 test images."""
    root = tmp_path / "tree"
    for label, name in ((2, "zebra"), (0, "ant"), (1, "Bee")):
        for i in range(2):
            write_image(root / "train" / name / f"{i}.png", seed=10 * label + i)
        for i in range(3 - label):
            write_image(root / "test" / name / f"{i}.png", seed=100 + 10 * label + i)
    return root


def save(image: Image.Image, file: Path, **options: object) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    image.save(file, **options)


def png_16(pixels: np.ndarray) -> bytes:
    """A PNG of 16 bits a channel (H, W, 3), which Pillow cannot write."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    height, width, _ = pixels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def ppm_16(pixels: np.ndarray) -> bytes:
    return b"P6 %d %d 65535\n" % (pixels.shape[1], pixels.shape[0]) + pixels.astype(">u2").tobytes()


def tiff_16(pixels: np.ndarray) -> bytes:
    content = pixels.astype("<u2").tobytes()
    height, width, _ = pixels.shape
    end = 8 + 2 + 10 * 12 + 4
    fields = [(256, 3, 1, width), (257, 3, 1, height), (258, 3, 3, end), (259, 3, 1, 1), (262, 3, 1, 2)]
    fields += [(273, 4, 1, end + 6), (277, 3, 1, 3), (278, 3, 1, height), (279, 4, 1, len(content)), (284, 3, 1, 1)]
    directory = b"".join(struct.pack("<HHII", *field) for field in fields)
    return struct.pack("<2sHIH", b"II", 42, 8, len(fields)) + directory + struct.pack("<I3H", 0, 16, 16, 16) + content


def as_pil(file: Path) -> np.ndarray:
    with Image.open(file) as image:
        return np.asarray(image.convert("RGB")).transpose(2, 0, 1)


class TestImageFolder:
    def test_images_are_those_of_pil_in_class_order(self, tree: Path) -> None:
        data = load_data(tree, "test")
        names = ("Bee", "ant", "zebra")  # Python's order: capitals first
        files = [file for name in names for file in sorted((tree / "test" / name).iterdir())]
        assert data.classes == names
        assert data.labels.tolist() == [names.index(file.parent.name) for file in files]
        assert data.labels.dtype == torch.int64
        assert data.images.dtype == torch.uint8
        assert data.images.shape == (6, 3, 4, 6)
        np.testing.assert_array_equal(data.images.numpy(), np.stack([as_pil(file) for file in files]))
        assert data.source.startswith(tree.name)
        assert "test" in data.source

    def test_splits_differ(self, tree: Path) -> None:
        train = load_data(tree, "train")
        assert len(train) == 6
        np.testing.assert_array_equal(train.images[0].numpy(), as_pil(tree / "train" / "Bee" / "0.png"))

    def test_jpeg_and_png_side_by_side(self, tmp_path: Path) -> None:
        write_image(tmp_path / "test" / "a" / "0.jpg", seed=0)
        write_image(tmp_path / "test" / "a" / "1.png", seed=1)
        images = load_data(tmp_path).images.numpy()
        np.testing.assert_array_equal(images[0], as_pil(tmp_path / "test" / "a" / "0.jpg"))
        np.testing.assert_array_equal(images[1], as_pil(tmp_path / "test" / "a" / "1.png"))

    def test_greyscale_stays_one_channel(self, tmp_path: Path) -> None:
        grey = np.random.default_rng(0).integers(0, 256, (3, 4, 6), dtype=np.uint8)
        black_and_white = Image.fromarray(grey[1] > 127)
        assert black_and_white.mode == "1"
        opaque = Image.merge("LA", (Image.fromarray(grey[2]), Image.new("L", (6, 4), 255)))
        for i, image in enumerate((Image.fromarray(grey[0]), black_and_white, opaque)):
            save(image, tmp_path / "test" / "a" / f"{i}.png")
        data = load_data(tmp_path)
        assert data.images.shape == (3, 1, 4, 6)
        expected = np.stack([grey[0], np.where(grey[1] > 127, 255, 0), grey[2]])
        np.testing.assert_array_equal(data.images.numpy()[:, 0], expected)

    @pytest.mark.parametrize(
        ("modes", "words"),
        [
            (("L", "RGB"), "coloured, but .*greyscale"),
            (("RGB", "L"), "greyscale, but .*coloured"),
            (("1", "P"), "coloured, but .*greyscale"),
            (("RGBA", "LA"), "greyscale, but .*coloured"),
        ],
    )
    def test_greyscale_beside_colours(self, tmp_path: Path, modes: tuple[str, str], words: str) -> None:
        for i, mode in enumerate((modes[0], *modes, modes[0])):
            save(Image.new("RGB", (6, 4)).convert(mode), tmp_path / "test" / "a" / f"{i}.png")
        first = re.escape(str(tmp_path / "test" / "a" / "0.png"))
        with pytest.raises(ValueError, match=rf"a/2\.png: {words.replace('.*', first + ' is ')}"):
            load_data(tmp_path)

    def test_palettes_and_opaque_alpha_become_rgb(self, tmp_path: Path) -> None:
        write_image(tmp_path / "rgb.png", seed=0)
        with Image.open(tmp_path / "rgb.png") as rgb:
            paletted, opaque = rgb.quantize(8), rgb.convert("RGBA")
            expected = np.stack([np.asarray(paletted.convert("RGB")), np.asarray(rgb)] * 2)
        save(paletted, tmp_path / "test" / "a" / "0.png")
        save(opaque, tmp_path / "test" / "a" / "1.png")
        save(paletted, tmp_path / "test" / "a" / "2.png", transparency=bytes([255] * 8))
        save(opaque, tmp_path / "test" / "a" / "3.tiff")
        images = load_data(tmp_path).images.numpy()
        np.testing.assert_array_equal(images, expected.transpose(0, 3, 1, 2))

    @pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
    def test_transparent_pixels(self, tmp_path: Path, mode: str) -> None:
        file = tmp_path / "test" / "a" / "0.png"
        if mode.endswith("A"):
            image = Image.new("RGBA", (6, 4), (9, 9, 9, 255))
            image.putpixel((3, 2), (9, 9, 9, 250))
            save(image.convert(mode), file)
        else:
            image = Image.new("RGB", (6, 4))
            image.putpixel((3, 2), (255, 255, 255))
            image = image.quantize(2) if mode == "P" else image.convert(mode)
            save(image, file, transparency=image.getpixel((3, 2)))
        with pytest.raises(ValueError, match=r"a/0\.png.*transparent pixels, down to alpha"):
            load_data(tmp_path)

    def test_a_transparent_colour_that_no_pixel_has(self, tmp_path: Path) -> None:
        save(Image.new("L", (6, 4), 7), tmp_path / "test" / "a" / "0.png", transparency=1)
        assert load_data(tmp_path).images.unique().tolist() == [7]
        assert load_data(tmp_path).images.shape == (1, 1, 4, 6)

    @pytest.mark.parametrize(
        ("name", "dtype"),
        [
            ("0.png", np.uint16),
            ("0.pgm", np.uint16),
            ("0.tiff", np.uint16),
            ("0.tiff", np.int32),
            ("0.tiff", np.float32),
        ],
    )
    def test_more_than_8_bits_of_grey(self, tmp_path: Path, name: str, dtype: type) -> None:
        save(Image.fromarray(np.full((4, 6), 700, dtype=dtype)), tmp_path / "test" / "a" / name)
        with pytest.raises(ValueError, match=r"a/0\..*more than 8 bits a channel"):
            load_data(tmp_path)

    @pytest.mark.parametrize("name", ["0.png", "0.ppm", "0.tiff"])
    def test_more_than_8_bits_of_colour(self, tmp_path: Path, name: str) -> None:
        """Of which Pillow keeps the upper 8 without a word."""
        file = tmp_path / "test" / "a" / name
        file.parent.mkdir(parents=True)
        pixels = np.arange(4 * 6 * 3, dtype=np.uint16).reshape(4, 6, 3) * 513
        file.write_bytes({"0.png": png_16, "0.ppm": ppm_16, "0.tiff": tiff_16}[name](pixels))
        assert as_pil(file).shape == (3, 4, 6)
        with pytest.raises(ValueError, match=r"a/0\..*more than 8 bits a channel"):
            load_data(tmp_path)

    def test_16_bits_a_pixel_are_fewer_than_8_a_channel(self, tmp_path: Path) -> None:
        file = tmp_path / "test" / "a" / "0.bmp"
        file.parent.mkdir(parents=True)
        header = struct.pack("<IiiHHIIiiII", 40, 6, -4, 1, 16, 3, 48, 0, 0, 0, 0)
        header += struct.pack("<III", 0xF800, 0x07E0, 0x001F)
        start = struct.pack("<IHHI", 14 + len(header) + 48, 0, 0, 14 + len(header))
        file.write_bytes(b"BM" + start + header + (np.arange(24, dtype="<u2") * 1000).tobytes())
        np.testing.assert_array_equal(load_data(tmp_path).images[0].numpy(), as_pil(file))

    @pytest.mark.parametrize("mode", ["CMYK", "LAB"])  # of which one has a band A that is no alpha
    def test_other_colour_spaces_as_pillow_converts_them(self, tmp_path: Path, mode: str) -> None:
        file = tmp_path / "test" / "a" / "0.tiff"
        save(Image.merge(mode, [Image.new("L", (6, 4), 20 * i) for i in range(len(mode))]), file)
        np.testing.assert_array_equal(load_data(tmp_path).images[0].numpy(), as_pil(file))

    def test_subset_keeps_images_and_labels_together(self, tree: Path) -> None:
        everything, subset = load_data(tree, "test"), load_data(tree, "test", n=4, seed=3)
        assert len(subset) == 4
        assert torch.bincount(subset.labels, minlength=3).min() >= 1
        for image, label in zip(subset.images, subset.labels, strict=True):
            matches = (everything.images == image).flatten(1).all(1)
            assert everything.labels[matches].tolist() == [label]

    def test_subset_reads_only_what_it_returns(self, tree: Path) -> None:
        chosen = load_data(tree, "test", n=3, seed=0)
        for file in (tree / "test").rglob("*.png"):
            if not (chosen.images.numpy() == as_pil(file)).reshape(3, -1).all(1).any():
                file.write_bytes(b"broken")
        assert torch.equal(load_data(tree, "test", n=3, seed=0).images, chosen.images)

    @pytest.mark.parametrize("n", [7, 1000])
    def test_n_above_the_number_of_images(self, tree: Path, n: int) -> None:
        with pytest.raises(ValueError, match=f"n={n}.*only 6 images"):
            load_data(tree, "test", n=n)

    def test_images_of_several_sizes(self, tree: Path) -> None:
        write_image(tree / "test" / "zebra" / "wide.png", seed=1, size=(7, 4))
        with pytest.raises(ValueError, match=r"zebra/wide\.png.*\(4, 7, 3\).*\(4, 6, 3\)"):
            load_data(tree, "test")

    @pytest.mark.parametrize("damage", ["text", "empty", "truncated", "flipped header"])
    def test_corrupt_image(self, tree: Path, damage: str) -> None:
        file = tree / "test" / "ant" / "1.png"
        whole = file.read_bytes()
        file.write_bytes(
            {"text": b"no image", "empty": b"", "truncated": whole[:-40], "flipped header": whole[:8] + whole[12:]}[
                damage
            ]
        )
        with pytest.raises(ValueError, match=r"ant/1\.png: cannot be read as an image"):
            load_data(tree, "test")

    def test_no_images_in_the_class_folders(self, tmp_path: Path) -> None:
        (tmp_path / "test" / "cat").mkdir(parents=True)
        (tmp_path / "test" / "cat" / "notes.txt").write_text("not an image")
        with pytest.raises(ValueError, match=r"test' has no images in class folders"):
            load_data(tmp_path)

    def test_one_empty_class_folder(self, tree: Path) -> None:
        (tree / "test" / "yak").mkdir()
        with pytest.raises(ValueError, match=r"has no images in class folders.*yak"):
            load_data(tree, "test")

    def test_no_class_folders(self, tmp_path: Path) -> None:
        write_image(tmp_path / "test" / "0.png", seed=0)
        with pytest.raises(ValueError, match="test' has no images in class folders"):
            load_data(tmp_path)

    def test_missing_split_folder(self, tmp_path: Path) -> None:
        write_image(tmp_path / "train" / "a" / "0.png", seed=0)
        with pytest.raises(ValueError, match=r"neither 'cifar-10-batches-py' nor a folder 'test'"):
            load_data(tmp_path, "test")
        assert len(load_data(tmp_path, "train")) == 1

    def test_classes_differ_between_splits(self, tree: Path) -> None:
        """`zebra` would be label 2 of the test images and 3 of the training images."""
        write_image(tree / "train" / "yak" / "0.png", seed=0)
        for split in ("train", "test"):
            with pytest.raises(ValueError, match=r"differ in the classes \['yak'\]"):
                load_data(tree, split)


class TestCifar10:
    @pytest.fixture
    def root(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """A folder of torchvision's layout with 2 images in each of 5 training batches and 30 test images."""
        folder = tmp_path / "cifar" / "cifar-10-batches-py"
        folder.mkdir(parents=True)
        rng = np.random.default_rng(0)

        def write(name: str, content: object) -> str:
            (folder / name).write_bytes(pickle.dumps(content))
            return hashlib.md5((folder / name).read_bytes()).hexdigest()

        def batch(labels: list[int]) -> dict[str, object]:
            return {"data": rng.integers(0, 256, (len(labels), 3072), dtype=np.uint8), "labels": labels}

        train = [[f"data_batch_{i}", write(f"data_batch_{i}", batch([i, 9 - i]))] for i in range(1, 6)]
        test = [["test_batch", write("test_batch", batch([9 - i % 10 for i in range(30)]))]]
        meta = {"filename": "batches.meta", "key": "label_names"}
        meta["md5"] = write("batches.meta", {"label_names": list(CIFAR10_CLASSES)})
        for name, value in (("train_list", train), ("test_list", test), ("meta", meta)):
            monkeypatch.setattr(CIFAR10, name, value)
        return folder.parent

    def test_images_are_those_of_the_file(self, root: Path) -> None:
        """A row of the file is the red, the green and the blue plane, each row by row."""
        raw = pickle.loads((root / "cifar-10-batches-py" / "test_batch").read_bytes())
        data = load_data(root, "test")
        np.testing.assert_array_equal(data.images.numpy(), raw["data"].reshape(30, 3, 32, 32))
        assert data.images.dtype == torch.uint8
        assert data.images.is_contiguous()
        assert data.labels.tolist() == raw["labels"]
        assert data.labels.dtype == torch.int64
        assert data.classes == CIFAR10_CLASSES
        assert data.source == "CIFAR-10 (test)"

    def test_train_split(self, root: Path) -> None:
        assert load_data(root, "train").labels.tolist() == [1, 8, 2, 7, 3, 6, 4, 5, 5, 4]

    def test_subset(self, root: Path) -> None:
        everything, subset = load_data(root), load_data(root, n=20, seed=1)
        assert torch.bincount(subset.labels, minlength=10).tolist() == [2] * 10
        chosen = class_balanced_subset(everything.labels.numpy(), 20, seed=1)
        assert torch.equal(subset.images, everything.images[chosen])

    def test_changed_file(self, root: Path) -> None:
        (root / "cifar-10-batches-py" / "data_batch_3").write_bytes(b"changed")
        with pytest.raises(ValueError, match="cifar-10-batches-py' is not CIFAR-10"):
            load_data(root)

    def test_empty_folder(self, tmp_path: Path) -> None:
        (tmp_path / "cifar-10-batches-py").mkdir()
        with pytest.raises(ValueError, match="cifar-10-batches-py' is not CIFAR-10"):
            load_data(tmp_path)

    def test_download_fetches_nothing_that_is_there(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*_: object, **__: object) -> None:
            raise AssertionError("the network was used")

        monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", refuse)
        assert len(load_data(root, download=True)) == 30
        with pytest.raises(AssertionError, match="network"):
            load_data(root / "elsewhere", download=True)


class TestWhichDataSet:
    def test_environment_variable(self, tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(ENVIRONMENT_VARIABLE, str(tree))
        assert torch.equal(load_data().images, load_data(tree).images)

    def test_root_beats_the_environment_variable(self, tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(ENVIRONMENT_VARIABLE, str(tree / "nothing here"))
        assert len(load_data(tree)) == 6
        with pytest.raises(FileNotFoundError, match="nothing here"):
            load_data()

    def test_empty_environment_variable_counts_as_not_set(self, tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(ENVIRONMENT_VARIABLE, "")
        monkeypatch.chdir(tree)
        assert "offline sample" in load_data().source

    def test_home_directory(self, tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HOME", str(tree.parent))
        assert len(load_data("~/tree")) == 6

    @pytest.mark.parametrize("name", ["nothing/here", "a file"])
    def test_path_is_no_folder(self, tmp_path: Path, name: str) -> None:
        (tmp_path / "a file").touch()
        with pytest.raises(FileNotFoundError, match=str(tmp_path / name)):
            load_data(tmp_path / name)

    @pytest.mark.parametrize("split", ["validation", "Test", "", None])
    def test_unknown_split(self, tree: Path, split: str) -> None:
        with pytest.raises(ValueError, match=f"split={split!r}.*'train' and 'test'"):
            load_data(tree, split)

    @pytest.mark.parametrize("n", [0, -1, 2.5, "3"])
    def test_bad_n(self, tree: Path, n: int) -> None:
        for root in (tree, None):
            with pytest.raises(ValueError, match=f"n={n!r}.*at least 1"):
                load_data(root, n=n)
        with pytest.raises(ValueError, match=f"n={n!r}.*at least 1"):
            class_balanced_subset([0, 1], n)

    def test_download_without_root(self) -> None:
        with pytest.raises(ValueError, match=r"download=True.*root"):
            load_data(download=True)


class TestOfflineSample:
    def test_images_and_labels_in_file_order(self) -> None:
        foolbox = pytest.importorskip("foolbox")
        files = sorted((Path(foolbox.__file__).parent / "data").glob("cifar10_*.png"))
        data = load_data()
        assert data.images.shape == (20, 3, 32, 32)
        # The first labels of CIFAR-10's test set: cat, ship, ship, airplane, frog, frog, automobile, frog, cat, ...
        assert data.labels[:10].tolist() == [3, 8, 8, 0, 6, 6, 1, 6, 3, 1]
        np.testing.assert_array_equal(data.images.numpy(), np.stack([as_pil(file) for file in files]))
        assert data.classes == CIFAR10_CLASSES
        assert "offline sample: 20" in data.source

    def test_subset(self) -> None:
        everything, subset = load_data(), load_data(n=10, seed=4)
        assert "offline sample: 10" in subset.source
        for image, label in zip(subset.images, subset.labels, strict=True):
            assert everything.labels[(everything.images == image).flatten(1).all(1)].tolist() == [label]

    def test_larger_n_gives_all(self) -> None:
        data = load_data(n=1000)
        assert len(data) == 20
        assert "offline sample: 20" in data.source
        assert sorted(data.labels.tolist()) == sorted(load_data().labels.tolist())

    def test_without_foolbox(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(guardians.data.importlib.util, "find_spec", lambda name: None)
        with pytest.raises(FileNotFoundError, match=r"GUARDIANS_DATA.*foolbox"):
            load_data()


def test_as_floats() -> None:
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    floats = Dataset(images, torch.zeros(1, dtype=torch.int64), ("a",), "ramp").as_floats()
    assert floats.dtype == torch.float32
    np.testing.assert_array_equal(floats.flatten().numpy(), np.arange(256, dtype=np.float32) / np.float32(255))


label_lists = st.lists(st.integers(0, 6), min_size=1, max_size=120)
seeds = st.integers(0, 2**32)


@given(label_lists, st.data(), seeds)
def test_subset_is_as_even_as_the_classes_permit(labels: list[int], data: st.DataObject, seed: int) -> None:
    n = data.draw(st.integers(1, len(labels)))
    chosen = class_balanced_subset(labels, n, seed)
    assert len(chosen) == n
    assert len(set(chosen.tolist())) == n
    sizes = np.bincount(labels, minlength=7)
    counts = np.bincount(np.asarray(labels)[chosen], minlength=7)
    # A class gets less than another one's count minus one only where all of it is taken.
    assert all(count >= counts.max() - 1 or count == size for count, size in zip(counts, sizes, strict=True))


@given(label_lists, st.data(), seeds)
def test_smaller_subsets_are_prefixes(labels: list[int], data: st.DataObject, seed: int) -> None:
    n = data.draw(st.integers(1, len(labels)))
    everything = class_balanced_subset(labels, len(labels), seed)
    assert sorted(everything) == list(range(len(labels)))
    np.testing.assert_array_equal(class_balanced_subset(np.asarray(labels), n, seed), everything[:n])


def test_subset_depends_on_the_seed() -> None:
    labels = np.arange(1000) % 10
    first = class_balanced_subset(labels, 100, seed=0)
    np.testing.assert_array_equal(first, class_balanced_subset(labels, 100, seed=0))
    assert len(set(first) & set(class_balanced_subset(labels, 100, seed=1))) < 50


def test_every_sample_of_a_class_can_be_drawn() -> None:
    drawn = {int(class_balanced_subset([0, 0, 0, 0, 1], 2, seed)[i]) for seed in range(60) for i in range(2)}
    assert drawn == {0, 1, 2, 3, 4}


def test_subset_larger_than_the_data() -> None:
    with pytest.raises(ValueError, match=r"n=4.*only 3 images"):
        class_balanced_subset([0, 1, 1], 4)


def test_the_identity_tells_data_of_the_same_source_apart():
    images, labels = torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.tensor([0, 1])
    data = Dataset(images, labels, ("a", "b"), "folder (test)")
    assert data.identity.startswith("folder (test), ")
    assert Dataset(images.clone(), labels.clone(), ("a", "b"), "folder (test)").identity == data.identity
    assert Dataset(images + 1, labels, ("a", "b"), "folder (test)").identity != data.identity
    assert Dataset(images, labels.flip(0), ("a", "b"), "folder (test)").identity != data.identity
