"""Data sets of torchvision and of Hugging Face in their own file formats, trees with val/, resize and crop."""

import bz2
import hashlib
import io
import json
import pickle
import re
import struct
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import scipy.io
import torch
from PIL import Image
from torchvision.datasets import CIFAR100, KMNIST, MNIST, SVHN, USPS, FashionMNIST
from torchvision.models import ResNet18_Weights

from guardians.data import ENVIRONMENT_VARIABLE, class_balanced_subset, load_data

DIGITS = tuple("0123456789")
RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def _no_data_set_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENVIRONMENT_VARIABLE, raising=False)


def noise(*shape: int) -> np.ndarray:
    return RNG.integers(0, 256, shape, dtype=np.uint8)


def write_image(file: Path, height: int, width: int) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noise(height, width, 3)).save(file)


def write_mnist(root: Path, kind: type, split: str, images: np.ndarray, labels: list[int]) -> None:
    """The idx files: magic number and sizes as big-endian integers, then bytes."""
    raw = root / kind.__name__ / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    prefix = {"train": "train", "test": "t10k"}[split]
    header = struct.pack(">IIII", 0x803, *images.shape)
    (raw / f"{prefix}-images-idx3-ubyte").write_bytes(header + images.tobytes())
    (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 0x801, len(labels)) + bytes(labels))


def write_both_of_mnist(root: Path, kind: type = MNIST) -> None:
    for split in ("train", "test"):
        write_mnist(root, kind, split, noise(4, 28, 28), [3, 1, 4, 1])


class TestTorchvision:
    def test_cifar100(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A row of the file is the red, the green and the blue plane; of the two labels, the fine one."""
        folder = tmp_path / "cifar-100-python"
        folder.mkdir()

        def write(name: str, content: object) -> str:
            (folder / name).write_bytes(pickle.dumps(content))
            return hashlib.md5((folder / name).read_bytes()).hexdigest()

        rows = {"train": noise(4, 3072), "test": noise(3, 3072)}
        fine = {"train": [99, 0, 7, 7], "test": [5, 98, 5]}
        for split in ("train", "test"):
            batch = {"data": rows[split], "fine_labels": fine[split], "coarse_labels": [0] * len(rows[split])}
            monkeypatch.setattr(CIFAR100, f"{split}_list", [[split, write(split, batch)]])
        names = [f"class {i}" for i in range(100)]
        meta = {"filename": "meta", "key": "fine_label_names", "md5": write("meta", {"fine_label_names": names})}
        monkeypatch.setattr(CIFAR100, "meta", meta)
        for split in ("train", "test"):
            data = load_data(tmp_path, split)
            np.testing.assert_array_equal(data.images.numpy(), rows[split].reshape(-1, 3, 32, 32))
            assert data.images.is_contiguous()
            assert data.labels.tolist() == fine[split]
            assert data.classes == tuple(names)
            assert data.source == f"CIFAR-100 ({split})"
        assert load_data(f"cifar100:{tmp_path}", n=2).labels.sort().values.tolist() == [5, 98]
        (folder / "test").write_bytes(b"changed")
        with pytest.raises(ValueError, match="cifar-100-python' is not CIFAR-100"):
            load_data(tmp_path)

    def test_svhn(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The files hold X (H, W, C, N) and y in 1 to 10, where 10 is the digit 0."""
        pixels = {"train": noise(32, 32, 3, 4), "test": noise(32, 32, 3, 5)}
        labels = {"train": [1, 10, 9, 3], "test": [10, 2, 2, 10, 5]}
        files = {}
        for split in ("train", "test"):
            file = tmp_path / f"{split}_32x32.mat"
            scipy.io.savemat(file, {"X": pixels[split], "y": np.array(labels[split], dtype=np.uint8)[:, None]})
            files[split] = ["", file.name, hashlib.md5(file.read_bytes()).hexdigest()]
        monkeypatch.setattr(SVHN, "split_list", files)
        for split in ("train", "test"):
            data = load_data(tmp_path, split)
            for i, image in enumerate(data.images.numpy()):
                np.testing.assert_array_equal(image.transpose(1, 2, 0), pixels[split][:, :, :, i])
            assert data.images.is_contiguous()
            assert data.labels.tolist() == [label % 10 for label in labels[split]]
            assert data.classes == DIGITS
            assert data.source == f"SVHN ({split})"
        (tmp_path / "test_32x32.mat").write_bytes(b"changed")
        with pytest.raises(ValueError, match=r"test_32x32\.mat' is not SVHN"):
            load_data(f"svhn:{tmp_path}")
        assert len(load_data(tmp_path, "train")) == 4

    @pytest.mark.parametrize("kind", [MNIST, FashionMNIST, KMNIST])
    def test_mnist_and_its_kin(self, tmp_path: Path, kind: type) -> None:
        images, labels = noise(5, 28, 28), [7, 2, 1, 0, 7]
        write_mnist(tmp_path, kind, "train", noise(2, 28, 28), [0, 1])
        write_mnist(tmp_path, kind, "test", images, labels)
        data = load_data(tmp_path)
        assert data.images.shape == (5, 1, 28, 28)
        np.testing.assert_array_equal(data.images.numpy()[:, 0], images)
        assert data.labels.tolist() == labels
        assert data.labels.dtype == torch.int64
        assert data.classes == tuple(kind.classes)
        assert data.source == f"{kind.__name__} (test)"
        assert load_data(f"{kind.__name__.lower()}:{tmp_path}", "train").labels.tolist() == [0, 1]
        chosen = class_balanced_subset(labels, 4, seed=1)
        np.testing.assert_array_equal(load_data(tmp_path, n=4, seed=1).images.numpy()[:, 0], images[chosen])

    @pytest.mark.parametrize("damage", ["missing", "cut", "text", "empty"])
    def test_broken_mnist(self, tmp_path: Path, damage: str) -> None:
        write_both_of_mnist(tmp_path)
        file = tmp_path / "MNIST" / "raw" / "t10k-images-idx3-ubyte"
        whole = file.read_bytes()
        file.unlink()
        if damage != "missing":
            file.write_bytes({"cut": whole[:-9], "text": b"these are no images", "empty": b""}[damage])
        with pytest.raises(ValueError, match="MNIST' is not MNIST"):
            load_data(tmp_path)

    def test_usps(self, tmp_path: Path) -> None:
        """A line is the label in 1 to 10 and index:value of each pixel, in -1 to 1."""
        values = np.array([[-1.0, 1.0] * 128, [0.0] * 256])
        lines = [
            " ".join([str(label), *(f"{i}:{v}" for i, v in enumerate(row, 1))])
            for label, row in zip((10, 1), values, strict=True)
        ]
        (tmp_path / "usps.t.bz2").write_bytes(bz2.compress("\n".join(lines).encode()))
        data = load_data(tmp_path)
        assert data.images.shape == (2, 1, 16, 16)
        assert data.images[0].unique().tolist() == [0, 255]
        assert data.images[1].unique().tolist() == [127]
        assert data.labels.tolist() == [9, 0]
        assert data.classes == DIGITS
        assert data.source == "USPS (test)"
        with pytest.raises(ValueError, match=r"usps\.bz2' is not USPS"):
            load_data(tmp_path, "train")

    @pytest.mark.parametrize(
        ("kind", "function"),
        [
            (CIFAR100, "cifar.download_and_extract_archive"),
            (FashionMNIST, "mnist.download_and_extract_archive"),
            (SVHN, "svhn.download_url"),
            (USPS, "usps.download_url"),
        ],
    )
    def test_download_of_the_kind_that_is_named(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type, function: str
    ) -> None:
        asked = []

        def offline(url: str, *_: object, **__: object) -> None:
            asked.append(url)
            raise ConnectionError("no network")

        monkeypatch.setattr(f"torchvision.datasets.{function}", offline)
        with pytest.raises(ConnectionError, match="no network"):
            load_data(f"{kind.__name__.lower()}:{tmp_path / 'new'}", download=True)
        (url,) = asked
        assert re.search(
            {"CIFAR100": "cifar-100", "FashionMNIST": "fashion", "SVHN": "test_32", "USPS": r"usps\.t"}[kind.__name__],
            url,
        )


class TestWhichOfThem:
    def test_several_in_one_folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        write_both_of_mnist(tmp_path)
        write_both_of_mnist(tmp_path, KMNIST)
        write_image(tmp_path / "test" / "ant" / "0.png", 4, 6)
        named = [f"{kind}:{tmp_path}" for kind in ("mnist", "kmnist", "imagefolder")]
        with pytest.raises(ValueError, match=f"several data sets: name one of them, {' or '.join(named)}"):
            load_data(tmp_path)
        sources = [load_data(name).source for name in named]
        assert sources == ["MNIST (test)", "KMNIST (test)", f"{tmp_path.name} (test)"]
        monkeypatch.setenv(ENVIRONMENT_VARIABLE, named[1])
        assert load_data().source == "KMNIST (test)"
        assert load_data(Path(named[0])).source == "MNIST (test)"

    def test_home_directory_after_the_colon(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        write_both_of_mnist(tmp_path / "data")
        monkeypatch.setenv("HOME", str(tmp_path))
        assert len(load_data("mnist:~/data")) == 4

    def test_a_folder_with_a_colon_in_its_name(self, tmp_path: Path) -> None:
        write_both_of_mnist(tmp_path / "all:data")
        assert len(load_data(tmp_path / "all:data")) == 4
        assert len(load_data(f"mnist:{tmp_path}/all:data")) == 4

    @pytest.mark.parametrize("kind", ["cifar10", "svhn", "kmnist", "hf", "imagefolder"])
    def test_a_kind_that_is_not_there(self, tmp_path: Path, kind: str) -> None:
        if kind == "hf":
            pytest.importorskip("datasets")
        write_both_of_mnist(tmp_path)
        with pytest.raises(ValueError, match=re.escape(str(tmp_path))):
            load_data(f"{kind}:{tmp_path}")
        with pytest.raises(FileNotFoundError, match="nowhere' does not exist"):
            load_data(f"{kind}:{tmp_path / 'nowhere'}")

    def test_an_unknown_kind(self, tmp_path: Path) -> None:
        with pytest.raises(
            FileNotFoundError, match=r"'cifar:/data' does not exist.*allowed are cifar10, cifar100, svhn"
        ):
            load_data("cifar:/data")

    def test_a_kind_without_a_folder(self) -> None:
        with pytest.raises(ValueError, match="root='mnist:': names no folder"):
            load_data("mnist:")

    @pytest.mark.parametrize("kind", ["imagefolder", "hf"])
    def test_download_of_what_torchvision_does_not_have(self, tmp_path: Path, kind: str) -> None:
        with pytest.raises(ValueError, match=f"root='{kind}:.*nothing can be downloaded.*cifar10, cifar100"):
            load_data(f"{kind}:{tmp_path}", download=True)

    def test_a_folder_of_nothing_that_is_known(self, tmp_path: Path) -> None:
        with pytest.raises(
            ValueError, match=r"neither 'cifar-10-batches-py' nor a folder 'test' or 'val', nor any of .*MNIST"
        ):
            load_data(tmp_path)


class TestVal:
    @pytest.fixture
    def imagenet(self, tmp_path: Path) -> Path:
        for split, count in (("train", 2), ("val", 3)):
            for name in ("n01440764", "n01443537"):
                for i in range(count):
                    write_image(tmp_path / "imagenet" / split / name / f"{i}.png", 4, 6)
        return tmp_path / "imagenet"

    def test_val_where_there_is_no_test(self, imagenet: Path) -> None:
        data = load_data(imagenet)
        assert data.source == "imagenet (val)"
        assert data.classes == ("n01440764", "n01443537")
        assert data.labels.tolist() == [0, 0, 0, 1, 1, 1]
        assert load_data(imagenet, "train").labels.tolist() == [0, 0, 1, 1]
        write_image(imagenet / "test" / "n01440764" / "0.png", 4, 6)
        write_image(imagenet / "test" / "n01443537" / "0.png", 4, 6)
        assert load_data(imagenet).source == "imagenet (test)"

    def test_classes_differ(self, imagenet: Path) -> None:
        write_image(imagenet / "val" / "n09" / "0.png", 4, 6)
        for split in ("train", "test"):
            with pytest.raises(ValueError, match=r"train/ and val/ differ in the classes \['n09'\]"):
                load_data(imagenet, split)


class TestSize:
    SIZES = ((40, 30), (30, 40), (64, 64), (17, 90), (24, 24), (12, 13))  # height, width

    @pytest.fixture
    def tree(self, tmp_path: Path) -> Path:
        for i, size in enumerate(self.SIZES):
            write_image(tmp_path / "tree" / "test" / "a" / f"{i}.png", *size)
        return tmp_path / "tree"

    @pytest.mark.parametrize(("resize", "crop"), [(24, 16), (24, 24), (25, 16), (50, 33)])
    def test_resize_and_crop_are_those_of_torchvisions_weights(self, tree: Path, resize: int, crop: int) -> None:
        transform = ResNet18_Weights.IMAGENET1K_V1.transforms(
            resize_size=resize, crop_size=crop, mean=(0, 0, 0), std=(1, 1, 1)
        )
        data = load_data(tree, resize=resize, crop=crop)
        files = sorted((tree / "test" / "a").iterdir())
        expected = torch.stack([transform(Image.open(file).convert("RGB")) for file in files])
        torch.testing.assert_close(data.as_floats(), expected, rtol=0, atol=1e-6)
        assert data.source == f"tree (test), resize={resize}, crop={crop}"

    def test_resize_is_that_of_pillow(self, tmp_path: Path) -> None:
        for i in range(2):
            write_image(tmp_path / "test" / "a" / f"{i}.png", 40, 30)
        images = load_data(tmp_path, resize=15).images.numpy()
        for i in range(2):
            with Image.open(tmp_path / "test" / "a" / f"{i}.png") as image:
                expected = np.asarray(image.resize((15, 20), Image.Resampling.BILINEAR))
            np.testing.assert_array_equal(images[i].transpose(1, 2, 0), expected)

    def test_crop_is_the_centre(self, tree: Path) -> None:
        data = load_data(tree, crop=12)
        for file, image in zip(sorted((tree / "test" / "a").iterdir()), data.images.numpy(), strict=True):
            with Image.open(file) as whole:
                pixels = np.asarray(whole).transpose(2, 0, 1)
            top, left = (round((side - 12) / 2) for side in pixels.shape[1:])
            np.testing.assert_array_equal(image, pixels[:, top : top + 12, left : left + 12])

    def test_several_shapes_without_them(self, tree: Path) -> None:
        for options in ({}, {"resize": 24}):
            with pytest.raises(ValueError, match=r"1\.png: shape .* must agree: resize and crop"):
                load_data(tree, **options)

    def test_crop_of_more_than_there_is(self, tree: Path) -> None:
        with pytest.raises(ValueError, match=r"3\.png: 17 x 90 pixels, too few for crop=18"):
            load_data(tree, crop=18)

    @pytest.mark.parametrize("name", ["resize", "crop"])
    @pytest.mark.parametrize("value", [0, -1, 2.5, "8"])
    def test_bad_size(self, tree: Path, name: str, value: int) -> None:
        with pytest.raises(ValueError, match=f"{name}={value!r}: must be an integer of at least 1"):
            load_data(tree, **{name: value})

    def test_crop_above_resize(self, tree: Path) -> None:
        with pytest.raises(ValueError, match="crop=25: must be at most resize=24"):
            load_data(tree, resize=24, crop=25)

    def test_greyscale_stays_one_channel(self, tmp_path: Path) -> None:
        file = tmp_path / "test" / "a" / "0.png"
        file.parent.mkdir(parents=True)
        Image.fromarray(noise(20, 10)).save(file)
        images = load_data(tmp_path, resize=5, crop=4).images
        assert images.shape == (1, 1, 4, 4)

    def test_of_data_that_have_one_size(self, tmp_path: Path) -> None:
        write_both_of_mnist(tmp_path)
        whole, data = load_data(tmp_path), load_data(tmp_path, resize=14)
        assert data.source == "MNIST (test), resize=14"
        for image, small in zip(whole.images, data.images, strict=True):
            expected = Image.fromarray(image[0].numpy()).resize((14, 14), Image.Resampling.BILINEAR)
            np.testing.assert_array_equal(small[0].numpy(), np.asarray(expected))
        with pytest.raises(ValueError, match="28 x 28 pixels, too few for crop=29"):
            load_data(tmp_path, crop=29)

    def test_of_the_offline_sample(self) -> None:
        pytest.importorskip("foolbox")
        data = load_data(n=2, crop=20)
        assert torch.equal(data.images, load_data(n=2).images[:, :, 6:26, 6:26])
        assert data.source.endswith("crop=20")


class Value:
    """A feature that is neither an image nor a label."""


class StandIn(ModuleType):
    """As much of Hugging Face's `datasets` as is used, on a file of its own."""

    class Image:
        def __init__(self, decode: bool = True) -> None:
            self.decode = decode

    class ClassLabel:
        def __init__(self, names: list[str]) -> None:
            self.names = names

    class Dataset:
        def __init__(self, columns: dict[str, list], features: dict[str, object], split: str | None) -> None:
            self.columns, self.features, self.split = columns, features, split

        def with_format(self, kind: None) -> "StandIn.Dataset":
            return self

        def select_columns(self, name: str) -> "StandIn.Dataset":
            return StandIn.Dataset({name: self.columns[name]}, {name: self.features[name]}, self.split)

        def cast_column(self, name: str, feature: object) -> "StandIn.Dataset":
            return StandIn.Dataset(self.columns, self.features | {name: feature}, self.split)

        def select(self, indices: np.ndarray) -> "StandIn.Dataset":
            columns = {name: [values[i] for i in indices] for name, values in self.columns.items()}
            return StandIn.Dataset(columns, self.features, self.split)

        def __getitem__(self, rows: slice) -> dict[str, list]:
            assert not any(getattr(feature, "decode", False) for feature in self.features.values())
            return {name: values[rows] for name, values in self.columns.items()}

    @staticmethod
    def load_from_disk(path: str) -> "StandIn.Dataset | dict[str, StandIn.Dataset]":
        return pickle.loads((Path(path) / "rows.pickle").read_bytes())

    @staticmethod
    def save(root: Path, splits: dict[str, tuple[dict, dict]] | tuple[dict, dict], split: str | None = None) -> None:
        root.mkdir(parents=True)
        if isinstance(splits, dict):
            (root / "dataset_dict.json").write_text(json.dumps({"splits": list(splits)}))
            saved = {name: StandIn.Dataset(*rows, name) for name, rows in splits.items()}
            for name in splits:
                (root / name).mkdir()  # which makes it look like an ImageFolder tree
        else:
            (root / "state.json").write_text("{}")
            (root / "dataset_info.json").write_text("{}")
            saved = StandIn.Dataset(*splits, split)
        (root / "rows.pickle").write_bytes(pickle.dumps(saved))


def save_real(root: Path, splits: dict[str, tuple[dict, dict]] | tuple[dict, dict], split: str | None = None) -> None:
    import datasets

    def made(rows: tuple[dict, dict], name: str | None) -> datasets.Dataset:
        columns, features = rows
        kinds = {
            StandIn.Image: lambda feature: datasets.Image(),
            StandIn.ClassLabel: lambda feature: datasets.ClassLabel(names=feature.names),
            Value: lambda feature: datasets.Value("int64"),
        }
        features = datasets.Features({name: kinds[type(f)](f) for name, f in features.items()})
        return datasets.Dataset.from_dict(columns, features=features, split=name)

    if isinstance(splits, dict):
        datasets.DatasetDict({name: made(rows, name) for name, rows in splits.items()}).save_to_disk(root)
    else:
        made(splits, split).save_to_disk(root)


def encoded(pixels: np.ndarray, kind: str = "png") -> dict[str, object]:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return {"bytes": buffer.getvalue(), "path": None}


def rows(images: list, labels: list, **others: list) -> tuple[dict, dict]:
    """Columns and features, the label first and the image after the other columns."""
    columns = {"answer": labels, **others, "picture": images}
    features = {"answer": StandIn.ClassLabel(["cat", "dog", "eel"]), **{name: Value() for name in others}}
    return columns, features | {"picture": StandIn.Image()}


class TestHuggingFace:
    @pytest.fixture(params=["stand-in", "datasets"])
    def save(self, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
        if request.param == "datasets":
            pytest.importorskip("datasets")
            return save_real
        monkeypatch.setitem(sys.modules, "datasets", StandIn("datasets"))
        return StandIn.save

    def test_splits_of_a_dict(self, tmp_path: Path, save) -> None:
        pixels = noise(5, 8, 6, 3)
        images = [encoded(image) for image in pixels]
        save(
            tmp_path / "pets",
            {"test": rows(images[:3], [2, 0, 1], id=[7, 8, 9]), "train": rows(images[3:], [1, 1], id=[0, 0])},
        )
        data = load_data(tmp_path / "pets")
        np.testing.assert_array_equal(data.images.numpy(), pixels[:3].transpose(0, 3, 1, 2))
        assert data.images.dtype == torch.uint8
        assert data.images.is_contiguous()
        assert data.labels.tolist() == [2, 0, 1]
        assert data.labels.dtype == torch.int64
        assert data.classes == ("cat", "dog", "eel")
        assert data.source == "pets (test)"
        train = load_data(f"hf:{tmp_path / 'pets'}", "train")
        np.testing.assert_array_equal(train.images.numpy(), pixels[3:].transpose(0, 3, 1, 2))
        assert train.labels.tolist() == [1, 1]

    def test_validation_where_there_is_no_test(self, tmp_path: Path, save) -> None:
        save(tmp_path / "pets", {"validation": rows([encoded(noise(8, 6, 3))], [1])})
        assert load_data(tmp_path / "pets").source == "pets (validation)"
        with pytest.raises(ValueError, match="pets' has no split 'train', only 'validation'"):
            load_data(tmp_path / "pets", "train")

    @pytest.mark.parametrize(
        ("name", "split"),
        [("test", "test"), ("train", "train"), ("validation", "test"), ("test[:10%]", "test"), (None, "test")],
    )
    def test_a_single_data_set(self, tmp_path: Path, save, name: str | None, split: str) -> None:
        save(tmp_path / "pets", rows([encoded(noise(8, 6, 3))], [1]), name)
        assert load_data(tmp_path / "pets", split).labels.tolist() == [1]
        with pytest.raises(ValueError, match="has no split"):
            load_data(tmp_path / "pets", "train" if split == "test" else "test")

    def test_a_single_data_set_of_several_splits(self, tmp_path: Path, save) -> None:
        save(tmp_path / "pets", rows([encoded(noise(8, 6, 3))], [1]), "train+test")
        with pytest.raises(ValueError, match=r"no split 'test' or 'validation', only 'train\+test'"):
            load_data(tmp_path / "pets")

    def test_subset_reads_only_what_it_returns(self, tmp_path: Path, save) -> None:
        labels = [0, 0, 0, 0, 1, 2, 2]
        pixels = noise(7, 8, 6, 3)
        chosen = class_balanced_subset(labels, 3, seed=5)
        broken = [
            encoded(image) if i in chosen else {"bytes": b"broken", "path": None} for i, image in enumerate(pixels)
        ]
        save(tmp_path / "pets", {"test": rows(broken, labels)})
        data = load_data(tmp_path / "pets", n=3, seed=5)
        np.testing.assert_array_equal(data.images.numpy(), pixels[chosen].transpose(0, 3, 1, 2))
        assert data.labels.tolist() == np.array(labels)[chosen].tolist()
        first = min(set(range(7)) - set(chosen.tolist()))
        with pytest.raises(ValueError, match=f"pets/test, image {first}: cannot be read as an image"):
            load_data(tmp_path / "pets")

    def test_greyscale_resize_and_crop(self, tmp_path: Path, save) -> None:
        pixels = [noise(30, 20), noise(16, 40)]
        save(tmp_path / "pets", {"test": rows([encoded(image) for image in pixels], [0, 1])})
        with pytest.raises(ValueError, match=r"image 1: shape .*resize and crop"):
            load_data(tmp_path / "pets")
        data = load_data(tmp_path / "pets", resize=8, crop=8)
        assert data.images.shape == (2, 1, 8, 8)
        expected = np.asarray(Image.fromarray(pixels[0]).resize((8, 12), Image.Resampling.BILINEAR))[2:10]
        np.testing.assert_array_equal(data.images[0, 0].numpy(), expected)

    def test_images_that_lie_in_files(self, tmp_path: Path, save) -> None:
        write_image(tmp_path / "0.png", 8, 6)
        save(tmp_path / "pets", {"test": rows([{"bytes": None, "path": str(tmp_path / "0.png")}], [0])})
        with Image.open(tmp_path / "0.png") as image:
            np.testing.assert_array_equal(load_data(tmp_path / "pets").images[0].permute(1, 2, 0), np.asarray(image))

    def test_more_than_8_bits(self, tmp_path: Path, save) -> None:
        save(tmp_path / "pets", {"test": rows([encoded(np.full((4, 6), 700, dtype=np.uint16))], [0])})
        with pytest.raises(ValueError, match=r"image 0: .*more than 8 bits a channel"):
            load_data(tmp_path / "pets")

    def test_a_row_without_an_image(self, tmp_path: Path, save) -> None:
        save(tmp_path / "pets", {"test": rows([encoded(noise(8, 6, 3)), None], [0, 1])})
        with pytest.raises(ValueError, match="image 1: cannot be read as an image"):
            load_data(tmp_path / "pets")

    @pytest.mark.parametrize("missing", [-1, None])
    def test_a_row_without_a_label(self, tmp_path: Path, save, missing: int | None) -> None:
        save(tmp_path / "pets", {"test": rows([encoded(noise(8, 6, 3))] * 2, [1, missing])})
        with pytest.raises(ValueError, match="pets': no label of image 1 in the split 'test'"):
            load_data(tmp_path / "pets")

    def test_a_split_without_rows(self, tmp_path: Path, save) -> None:
        save(tmp_path / "pets", {"test": rows([], [])})
        # datasets 5 cannot load such a folder itself.
        with pytest.raises(ValueError, match=r"pets'(: no images in the split 'test'| is not what .* saves)"):
            load_data(tmp_path / "pets")

    def test_n_above_the_number_of_images(self, tmp_path: Path, save) -> None:
        save(tmp_path / "pets", {"test": rows([encoded(noise(8, 6, 3))], [1])})
        with pytest.raises(ValueError, match=r"n=2.*only 1 images"):
            load_data(tmp_path / "pets", n=2)

    @pytest.mark.parametrize("kind", ["Image", "ClassLabel"])
    def test_columns_of_which_there_must_be_one(self, tmp_path: Path, save, kind: str) -> None:
        columns, features = rows([encoded(noise(8, 6, 3))], [1])
        name = {"Image": "picture", "ClassLabel": "answer"}[kind]
        twice = ({**columns, "again": columns[name]}, {**features, "again": features[name]})
        save(tmp_path / "two", {"test": twice})
        with pytest.raises(ValueError, match=rf"one column of type {kind}, has \['{name}', 'again'\]"):
            load_data(tmp_path / "two")
        without = ({**columns, name: [3]}, {**features, name: Value()})
        save(tmp_path / "none", {"test": without})
        with pytest.raises(ValueError, match=rf"one column of type {kind}, has \[\]"):
            load_data(tmp_path / "none")

    def test_a_folder_that_is_broken(self, tmp_path: Path, save) -> None:
        save(tmp_path / "pets", {"test": rows([encoded(noise(8, 6, 3))], [1])})
        for file in (tmp_path / "pets").rglob("*"):
            if file.is_file():
                file.write_bytes(b"broken")
        with pytest.raises(ValueError, match="pets' is not what Hugging Face's datasets saves"):
            load_data(tmp_path / "pets")

    def test_without_the_package(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        StandIn.save(tmp_path / "pets", {"test": rows([encoded(noise(8, 6, 3))], [1])})
        monkeypatch.setitem(sys.modules, "datasets", None)
        with pytest.raises(ImportError, match=r"pip install guardians\[datasets\]"):
            load_data(tmp_path / "pets")
