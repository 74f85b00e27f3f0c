"""Datasets as tensors: uint8 NCHW images with int64 labels, read once.

`load_data` is the only door. It knows a data set by what lies in its folder: one of torchvision's, an `ImageFolder`
tree, or what Hugging Face's `datasets` saved. Where no data set is named, it reads the twenty original CIFAR-10 test
images that the `foolbox` package ships.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from numbers import Integral
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.datasets import CIFAR10, CIFAR100, KMNIST, MNIST, SVHN, USPS, FashionMNIST, ImageFolder
from torchvision.transforms import functional

__all__ = [
    "CIFAR10_CLASSES",
    "ENVIRONMENT_VARIABLE",
    "Dataset",
    "class_balanced_mask",
    "class_balanced_subset",
    "load_data",
]

ENVIRONMENT_VARIABLE = "GUARDIANS_DATA"
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

_TORCHVISION = {
    "cifar10": CIFAR10,
    "cifar100": CIFAR100,
    "svhn": SVHN,
    "mnist": MNIST,
    "fashionmnist": FashionMNIST,
    "kmnist": KMNIST,
    "usps": USPS,
}
_HUGGING_FACE = ("dataset_dict.json", "state.json")
_FOLDERS = {"train": ("train",), "test": ("test", "val")}


@dataclass(frozen=True)
class Dataset:
    """Images and labels in memory.

    Attributes:
        images: uint8 tensor of shape (N, C, H, W), values 0 to 255; C is 1 for greyscale and 3 for colour images.
        labels: int64 tensor of shape (N,), each in [0, len(classes)).
        classes: the class names, in label order.
        source: where the images came from, for tables and messages.
    """

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    source: str

    def __len__(self) -> int:
        return len(self.images)

    @property
    def identity(self) -> str:
        """The source, and the first digits of a SHA-256 digest of images and labels, by which tables know the data."""
        digest = hashlib.sha256(self.images.cpu().numpy().tobytes() + self.labels.cpu().numpy().tobytes())
        return f"{self.source}, {digest.hexdigest()[:8]}"

    @property
    def digest(self) -> str:
        """The first digits of a SHA-256 digest of all but the source."""
        parts = [str(tuple(self.images.shape)), str(self.classes)]
        state = hashlib.sha256("\n".join(parts).encode())
        for tensor in (self.images, self.labels):
            state.update(tensor.cpu().contiguous().numpy().tobytes())
        return state.hexdigest()[:12]

    def as_floats(self) -> Tensor:
        """The images as float32 in [0, 1]."""
        return self.images.float() / 255


def load_data(
    root: str | os.PathLike[str] | None = None,
    split: str = "test",
    n: int | None = None,
    *,
    seed: int = 0,
    download: bool = False,
    resize: int | None = None,
    crop: int | None = None,
) -> Dataset:
    """Read a data set, or a class-balanced subset of it.

    Args:
        root: folder of one of these, known by what lies in it, or `KIND:FOLDER`, as in `mnist:path/to/data`:

            - `cifar10`, `cifar100`, `svhn`, `mnist`, `fashionmnist`, `kmnist`, `usps`: in the files and folders in
              which torchvision's own classes keep them.
            - `imagefolder`: an `ImageFolder` tree with `train/` and `test/`, or `val/` where there is no `test/`.
            - `hf`: what `save_to_disk` of a `Dataset` or `DatasetDict` of Hugging Face's `datasets` wrote, with one
              column of type `Image` and one of type `ClassLabel`; `validation` stands in where there is no `test`, and
              a `Dataset` without the name of a split is a `test`. Needs the extra `datasets`.

            Greyscale images keep their one channel, all others become RGB. None takes the environment variable
            `GUARDIANS_DATA`; where that is not set either, the offline sample: the 20 original CIFAR-10 test images in
            the `foolbox` package, whatever the split. An empty value counts as not set.
        split: "train" or "test".
        n: number of images, class-balanced and drawn with `seed` (see `class_balanced_subset`); None takes all, in
            the order of the data set. Of the offline sample, an `n` above 20 gives all 20.
        seed: seed of the subset.
        download: let torchvision download the data set into its folder: CIFAR-10 where `root` names no kind.
        resize: pixels of the shorter side, to which each image is resized in its own proportions: bilinear and
            antialiased, as in torchvision's classification presets. None leaves the size.
        crop: side of the square, in pixels, that is cut out of the centre, after `resize`. None leaves the shape.

    Raises:
        ValueError: the split is unknown, `n`, `resize` or `crop` is below 1, `n` is above the number of images, `crop`
            is above `resize` or a side of an image, or `download` is of a kind that is not torchvision's; or the folder
            holds several kinds and none is named, no images, images of several shapes, greyscale beside coloured ones,
            a file that is not an image or one with more than 8 bits a channel or with transparent pixels, images
            without a label, none or several columns of one of the two types, other classes in `train/` than in
            `test/`, or a data set of torchvision whose files are missing or changed. Of images that have a file or a
            row each, only those that are returned are read.
        FileNotFoundError: the folder does not exist, or no data is named and `foolbox` is not installed.
        ImportError: the folder is of Hugging Face, and `datasets` is not installed.
    """
    if split not in _FOLDERS:
        raise ValueError(f"split={split!r}: allowed are 'train' and 'test'")
    for name, value in (("n", n), ("resize", resize), ("crop", crop)):
        if value is not None:
            _check_positive(name, value)
    if resize is not None and crop is not None and crop > resize:
        raise ValueError(f"crop={crop}: must be at most resize={resize}")
    size = _Size(resize, crop)
    root = root or os.environ.get(ENVIRONMENT_VARIABLE)
    if not root:
        if download:
            raise ValueError("download=True needs a folder to download into: give root (--data)")
        return _offline_sample(n, seed, size)
    found = _open(os.fspath(root), split, download)
    chosen = _choose(found.labels, n, seed)
    images = found.read(chosen, size)
    return Dataset(images, torch.from_numpy(found.labels[chosen]), found.classes, f"{found.source}{size}")


def class_balanced_subset(labels: Sequence[int] | np.ndarray, n: int, seed: int = 0) -> np.ndarray:
    """Indices of `n` samples, drawn without replacement and as evenly over the classes as their sizes permit.

    Smaller subsets are prefixes of larger ones drawn with the same seed, so the first 200 images of a run on 1,000
    are those of a run on 200.

    Raises:
        ValueError: `n` is below 1 or exceeds the number of samples.
    """
    _check_positive("n", n)
    labels = np.asarray(labels)
    if n > len(labels):
        raise ValueError(f"n={n}: the data set has only {len(labels)} images")
    order = np.random.default_rng(seed).permutation(len(labels))
    rank = np.empty(len(labels), dtype=np.int64)  # how many of its own class come before a sample
    for label in np.unique(labels):
        members = order[labels[order] == label]
        rank[members] = np.arange(len(members))
    return order[np.lexsort((labels[order], rank[order]))][:n]


def class_balanced_mask(labels: Tensor, n: int, seed: int = 0) -> Tensor:
    """Where the samples of a `class_balanced_subset` are: bool, of the shape (N,) of `labels`."""
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    chosen[torch.from_numpy(class_balanced_subset(labels.numpy(), n, seed))] = True
    return chosen


def _check_positive(name: str, value: int) -> None:
    if not isinstance(value, Integral) or value < 1:
        raise ValueError(f"{name}={value!r}: must be an integer of at least 1")


def _choose(labels: np.ndarray, n: int | None, seed: int) -> np.ndarray:
    return np.arange(len(labels)) if n is None else class_balanced_subset(labels, n, seed)


class _Size(NamedTuple):
    """The size that images are brought to, see `load_data`."""

    resize: int | None
    crop: int | None

    def of(self, image: Image.Image, name: str) -> Image.Image:
        if self.resize is not None:
            image = functional.resize(image, [self.resize], functional.InterpolationMode.BILINEAR, antialias=True)
        if self.crop is None:
            return image
        if self.crop > min(image.size):  # torchvision would pad with black
            width, height = image.size
            raise ValueError(f"{name}: {height} x {width} pixels, too few for crop={self.crop}: name a resize")
        return functional.center_crop(image, [self.crop])

    def __str__(self) -> str:
        return "".join(f", {name}={value}" for name, value in self._asdict().items() if value is not None)


@dataclass(frozen=True)
class _Split:
    """A split whose labels are known and of which no image is decoded yet.

    Attributes:
        source: the data set and the split.
        classes: the class names, in label order.
        labels: int64 (N,).
        read: from the indices of images to their pixels, uint8 (n, C, H, W).
    """

    source: str
    classes: tuple[str, ...]
    labels: np.ndarray
    read: Callable[[np.ndarray, _Size], Tensor]


def _open(root: str, split: str, download: bool) -> _Split:
    kinds = (*_TORCHVISION, "imagefolder", "hf")
    kind, colon, folder = root.partition(":")
    if not colon or kind not in kinds:
        kind, folder = "cifar10" if download else "", root
    if not folder:
        raise ValueError(f"root={root!r}: names no folder, as {kind}:path/to/data would")
    path = Path(folder).expanduser()
    if download and kind not in _TORCHVISION:
        raise ValueError(f"root={root!r}: of {kind} nothing can be downloaded, only of {', '.join(_TORCHVISION)}")
    if not download and not path.is_dir():
        known = f"; before a colon, allowed are {', '.join(kinds)}" if ":" in folder else ""
        raise FileNotFoundError(f"data path {str(path)!r} does not exist or is not a folder{known}")
    kind = kind or _kind_of(path)
    if kind in _TORCHVISION:
        return _torchvision(path, kind, split, download)
    return _hugging_face(path, split) if kind == "hf" else _image_folder(path, split)


def _kind_of(path: Path) -> str:
    kinds = [kind for kind in _TORCHVISION if any((path / _place(kind, split)).exists() for split in _FOLDERS)]
    if any((path / file).exists() for file in _HUGGING_FACE):  # which may have folders train and test, too
        kinds.append("hf")
    elif any(_split_folder(path, split) for split in _FOLDERS):
        kinds.append("imagefolder")
    if len(kinds) > 1:
        named = " or ".join(f"{kind}:{path}" for kind in kinds)
        raise ValueError(f"data path {str(path)!r} holds several data sets: name one of them, {named}")
    return kinds[0] if kinds else "imagefolder"


def _place(kind: str, split: str) -> str:
    """The file or folder in which torchvision keeps a split."""
    dataset = _TORCHVISION[kind]
    if hasattr(dataset, "split_list"):
        return str(dataset.split_list[split][1])
    return str(getattr(dataset, "base_folder", dataset.__name__))


def _torchvision(path: Path, kind: str, split: str, download: bool) -> _Split:
    dataset = _TORCHVISION[kind]
    name = dataset.__name__.replace("CIFAR", "CIFAR-")
    which = {"split": split} if dataset is SVHN else {"train": split == "train"}
    try:
        found = dataset(str(path), **which, download=download)
    except Exception as error:  # a file is missing or changed, for which the classes have errors of many types
        if download and not isinstance(error, RuntimeError):  # of the network
            raise
        raise ValueError(f"data path {str(path / _place(kind, split))!r} is not {name}: {error}") from error
    source = f"{name} ({split})"

    def read(chosen: np.ndarray, size: _Size) -> Tensor:
        images = torch.as_tensor(found.data[chosen])
        if images.ndim == 3:
            images = images[:, None]
        elif images.shape[3] == 3:
            images = images.permute(0, 3, 1, 2)
        if any(size):
            pictures = (size.of(functional.to_pil_image(image), source) for image in images)
            images = torch.stack([functional.pil_to_tensor(picture) for picture in pictures])
        return images.contiguous()

    labels = np.asarray(found.labels if dataset is SVHN else found.targets, dtype=np.int64)
    return _Split(source, tuple(getattr(found, "classes", map(str, range(10)))), labels, read)


def _split_folder(path: Path, split: str) -> Path | None:
    return next((path / name for name in _FOLDERS[split] if (path / name).is_dir()), None)


def _image_folder(path: Path, split: str) -> _Split:
    place = _split_folder(path, split)
    if place is None:
        first, *more = dict.fromkeys(_place(kind, split) for kind in _TORCHVISION)
        raise ValueError(
            f"data path {str(path)!r} has neither {first!r} nor a folder {' or '.join(map(repr, _FOLDERS[split]))}, "
            f"nor any of {', '.join(map(repr, (*more, *_HUGGING_FACE)))}"
        )
    try:
        folder = ImageFolder(str(place))
    except FileNotFoundError as error:
        raise ValueError(f"data path {str(place)!r} has no images in class folders: {error}") from error
    other = _split_folder(path, "train" if split == "test" else "test")
    others = {entry.name for entry in other.iterdir() if entry.is_dir()} if other else set()
    if others and (differing := others ^ set(folder.classes)):  # the same label would mean another class in each
        names = " and ".join(sorted(f"{folder.name}/" for folder in (place, other) if folder))
        raise ValueError(f"data path {str(path)!r}: {names} differ in the classes {sorted(differing)}")

    def read(chosen: np.ndarray, size: _Size) -> Tensor:
        return _read_images({file: file for file in (folder.samples[i][0] for i in chosen)}, size)

    labels = np.asarray(folder.targets, dtype=np.int64)
    return _Split(f"{path.resolve().name} ({place.name})", tuple(folder.classes), labels, read)


def _hugging_face(path: Path, split: str) -> _Split:
    try:
        from datasets import ClassLabel, load_from_disk
        from datasets import Image as ImageFeature
    except ImportError as error:
        raise ImportError(f"data path {str(path)!r} is of Hugging Face: pip install guardians[datasets]") from error
    try:
        saved = load_from_disk(str(path))
    except Exception as error:  # files are missing or changed, in more than one format
        raise ValueError(f"data path {str(path)!r} is not what Hugging Face's datasets saves: {error}") from error
    if not isinstance(saved, dict):
        saved = {re.sub(r"\[[^]]*\]", "", str(saved.split or "test")): saved}  # it may be of a split as "test[:100]"
    names = {"train": ("train",), "test": ("test", "validation")}[split]
    name = next(filter(saved.__contains__, names), None)
    if name is None:
        allowed = " or ".join(map(repr, names))
        raise ValueError(f"data path {str(path)!r} has no split {allowed}, only {', '.join(map(repr, saved))}")
    rows = saved[name].with_format(None)

    def column_of(kind: Any) -> str:
        columns = [column for column, feature in rows.features.items() if isinstance(feature, kind)]
        if len(columns) != 1:
            raise ValueError(
                f"data path {str(path)!r}: must have one column of type {kind.__name__}, has {columns}: "
                "select_columns before save_to_disk leaves those that are meant"
            )
        return str(columns[0])

    image, label = column_of(ImageFeature), column_of(ClassLabel)
    found = rows.select_columns(label)[:][label]
    labels = np.asarray([-1 if value is None else value for value in found], dtype=np.int64)
    if not len(labels) or labels.min() < 0:
        what = f"no label of image {labels.argmin()}" if len(labels) else "no images"
        raise ValueError(f"data path {str(path)!r}: {what} in the split {name!r}")
    encoded = rows.select_columns(image).cast_column(image, ImageFeature(decode=False))

    def read(chosen: np.ndarray, size: _Size) -> Tensor:
        files: dict[str, str | BytesIO] = {}
        for i, row in zip(chosen, encoded.select(chosen)[:][image], strict=True):
            row = row or {"bytes": b"", "path": None}
            files[f"{path / name}, image {i}"] = row["path"] if row["bytes"] is None else BytesIO(row["bytes"])
        return _read_images(files, size)

    return _Split(f"{path.resolve().name} ({name})", tuple(rows.features[label].names), labels, read)


def _offline_sample(n: int | None, seed: int, size: _Size) -> Dataset:
    spec = importlib.util.find_spec("foolbox")
    folders = spec.submodule_search_locations if spec else None
    files = sorted((Path(folders[0]) / "data").glob("cifar10_*.png")) if folders else []
    if not files:
        raise FileNotFoundError(
            f"no data: give a folder (--data or {ENVIRONMENT_VARIABLE}), or install foolbox for its 20 sample images"
        )
    labels = np.asarray([int(file.stem.rsplit("_", 1)[1]) for file in files], dtype=np.int64)
    # The sample is a stand-in that the user did not choose: a larger n gets all of it, and `source` says so.
    chosen = _choose(labels, None if n is None else min(n, len(files)), seed)
    images = _read_images({str(files[i]): files[i] for i in chosen}, size)
    source = f"offline sample: {len(images)} CIFAR-10 test images from the foolbox package{size}"
    return Dataset(images, torch.from_numpy(labels[chosen]), CIFAR10_CLASSES, source)


def _read_images(files: Mapping[str, str | Path | BytesIO], size: _Size) -> Tensor:
    """Pixels uint8 (N, C, H, W) of encoded images, which have names for messages."""

    def read(name: str) -> np.ndarray:
        try:
            with Image.open(files[name]) as image:
                picture = _grey_or_rgb(image)
        except Exception as error:  # Pillow raises a different type for each way a file can be broken
            raise ValueError(f"{name}: cannot be read as an image: {error}") from error
        return np.atleast_3d(np.asarray(size.of(picture, name)))

    with ThreadPoolExecutor() as pool:  # Pillow decodes without holding the GIL
        arrays = dict(zip(files, pool.map(read, files), strict=True))
    (first_name, first), kinds = next(iter(arrays.items())), {1: "greyscale", 3: "coloured"}
    for name, array in arrays.items():
        if array.shape[2] != first.shape[2]:
            kind, other = kinds[array.shape[2]], kinds[first.shape[2]]
            raise ValueError(f"{name}: {kind}, but {first_name} is {other}; all must be one or the other")
        if array.shape != first.shape:
            raise ValueError(
                f"{name}: shape {array.shape}, but {first_name} has {first.shape}; all must agree: "
                "resize and crop (--resize, --crop) bring them to one"
            )
    return torch.from_numpy(np.stack(list(arrays.values()))).permute(0, 3, 1, 2).contiguous()


def _grey_or_rgb(image: Image.Image) -> Image.Image:
    """A greyscale or black and white image in mode L, any other in mode RGB, palettes resolved.

    Nothing is lost but an alpha channel that is opaque everywhere; other colour spaces, as CMYK, are converted as
    Pillow does it.

    Raises:
        ValueError: the image has more than 8 bits a channel, or pixels that are not opaque.
    """
    if _has_more_than_8_bits(image):
        raise ValueError("more than 8 bits a channel, which would be cut: store it with 8")
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        is_grey = image.mode in ("1", "L", "LA", "La")
        image = image.convert("RGBA")
        lowest = np.asarray(image.getchannel("A")).min()
        if lowest < 255:
            raise ValueError(f"transparent pixels, down to alpha {lowest} of 255: store it on a background")
        image = image.convert("RGB").getchannel("R") if is_grey else image
    return image.convert("L" if image.mode in ("1", "L") else "RGB")


def _has_more_than_8_bits(image: Image.Image) -> bool:
    """Whether the file has; must be asked before the image is loaded, for Pillow cuts colours to 8 bits in silence."""
    if image.mode.startswith(("I", "F")):
        return True
    for decoder, _, _, arguments in getattr(image, "tile", []):
        for argument in arguments if isinstance(arguments, tuple) else (arguments,):
            # "RGB;16B" is 16 bits a channel, "BGR;16" 16 bits a pixel; of ppm the number is the largest value.
            if isinstance(argument, str) and re.match(r"(?!BGR).*;16", argument):
                return True
            if decoder.startswith("ppm") and isinstance(argument, int) and argument > 255:
                return True
    return False
