"""Datasets as tensors: uint8 NCHW images with int64 labels, read once.

`load_data` is the only door. It reads torchvision's CIFAR-10, any `ImageFolder` tree with `train/` and `test/`, or,
where no data set is named, the twenty original CIFAR-10 test images that the `foolbox` package ships.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.datasets import CIFAR10, ImageFolder

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
) -> Dataset:
    """Read a data set, or a class-balanced subset of it.

    Args:
        root: folder of torchvision's CIFAR-10 (`cifar-10-batches-py`), or of an `ImageFolder` tree with `train/` and
            `test/`; greyscale images keep their one channel, all others become RGB. None takes the environment
            variable `GUARDIANS_DATA`; where that is not set either, the offline sample: the 20 original CIFAR-10 test
            images in the `foolbox` package, whatever the split. An empty value counts as not set.
        split: "train" or "test".
        n: number of images, class-balanced and drawn with `seed` (see `class_balanced_subset`); None takes all, in
            the order of the data set. Of the offline sample, an `n` above 20 gives all 20.
        seed: seed of the subset.
        download: let torchvision download CIFAR-10 into `root`.

    Raises:
        ValueError: the split is unknown, `n` is below 1 or above the number of images, or the folder holds no images,
            images of several shapes, greyscale beside coloured ones, a file that is not an image or one with more than
            8 bits a channel or with transparent pixels, other classes in `train/` than in `test/`, or a CIFAR-10 whose
            files are missing or changed. Only the images that are returned are read.
        FileNotFoundError: `root` does not exist, or no data is named and `foolbox` is not installed.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split={split!r}: allowed are 'train' and 'test'")
    if n is not None:
        _check_size(n)
    root = root or os.environ.get(ENVIRONMENT_VARIABLE)
    if not root:
        if download:
            raise ValueError("download=True needs a folder to download into: give root (--data)")
        return _offline_sample(n, seed)
    path = Path(root).expanduser()
    if (path / CIFAR10.base_folder).is_dir() or download:
        return _torchvision_cifar10(path, split, n, seed, download)
    if not path.is_dir():
        raise FileNotFoundError(f"data path {str(path)!r} does not exist or is not a folder")
    return _image_folder(path, split, n, seed)


def class_balanced_subset(labels: Sequence[int] | np.ndarray, n: int, seed: int = 0) -> np.ndarray:
    """Indices of `n` samples, drawn without replacement and as evenly over the classes as their sizes permit.

    Smaller subsets are prefixes of larger ones drawn with the same seed, so the first 200 images of a run on 1,000
    are those of a run on 200.

    Raises:
        ValueError: `n` is below 1 or exceeds the number of samples.
    """
    _check_size(n)
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


def _check_size(n: int) -> None:
    if not isinstance(n, Integral) or n < 1:
        raise ValueError(f"n={n!r}: the number of images must be an integer of at least 1")


def _choose(labels: np.ndarray, n: int | None, seed: int) -> np.ndarray:
    return np.arange(len(labels)) if n is None else class_balanced_subset(labels, n, seed)


def _torchvision_cifar10(path: Path, split: str, n: int | None, seed: int, download: bool) -> Dataset:
    try:
        cifar10 = CIFAR10(str(path), train=split == "train", download=download)
    except RuntimeError as error:  # a file is missing or has another checksum
        raise ValueError(f"data path {str(path / CIFAR10.base_folder)!r} is not CIFAR-10: {error}") from error
    labels = np.asarray(cifar10.targets, dtype=np.int64)
    chosen = _choose(labels, n, seed)
    images = torch.from_numpy(cifar10.data[chosen]).permute(0, 3, 1, 2).contiguous()
    return Dataset(images, torch.from_numpy(labels[chosen]), CIFAR10_CLASSES, f"CIFAR-10 ({split})")


def _image_folder(path: Path, split: str, n: int | None, seed: int) -> Dataset:
    if not (path / split).is_dir():
        raise ValueError(f"data path {str(path)!r} has neither {CIFAR10.base_folder!r} nor a folder {split!r}")
    try:
        folder = ImageFolder(str(path / split))
    except FileNotFoundError as error:
        raise ValueError(f"data path {str(path / split)!r} has no images in class folders: {error}") from error
    other = path / ("train" if split == "test" else "test")
    others = {entry.name for entry in other.iterdir() if entry.is_dir()} if other.is_dir() else set()
    if others and (differing := others ^ set(folder.classes)):  # the same label would mean another class in each
        raise ValueError(f"data path {str(path)!r}: train/ and test/ differ in the classes {sorted(differing)}")
    labels = np.asarray(folder.targets, dtype=np.int64)
    chosen = _choose(labels, n, seed)
    images = _read_images([Path(folder.samples[i][0]) for i in chosen])
    return Dataset(images, torch.from_numpy(labels[chosen]), tuple(folder.classes), f"{path.resolve().name} ({split})")


def _offline_sample(n: int | None, seed: int) -> Dataset:
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
    images = _read_images([files[i] for i in chosen])
    source = f"offline sample: {len(images)} CIFAR-10 test images from the foolbox package"
    return Dataset(images, torch.from_numpy(labels[chosen]), CIFAR10_CLASSES, source)


def _read_images(files: Sequence[Path]) -> Tensor:
    def read(file: Path) -> np.ndarray:
        try:
            with Image.open(file) as image:
                return _pixels(image)
        except Exception as error:  # Pillow raises a different type for each way a file can be broken
            raise ValueError(f"{file}: cannot be read as an image: {error}") from error

    with ThreadPoolExecutor() as pool:  # Pillow decodes without holding the GIL
        arrays = list(pool.map(read, files))
    first, kinds = arrays[0], {1: "greyscale", 3: "coloured"}
    for file, array in zip(files, arrays, strict=True):
        if array.shape[2] != first.shape[2]:
            kind, other = kinds[array.shape[2]], kinds[first.shape[2]]
            raise ValueError(f"{file}: {kind}, but {files[0]} is {other}; all must be one or the other")
        if array.shape != first.shape:
            raise ValueError(f"{file}: shape {array.shape}, but {files[0]} has {first.shape}; all must agree")
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()


def _pixels(image: Image.Image) -> np.ndarray:
    """uint8 (H, W, 1) of a greyscale or black and white image; (H, W, 3) of any other, palettes resolved.

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
    if image.mode in ("1", "L"):
        return np.asarray(image.convert("L"))[:, :, None]
    return np.asarray(image.convert("RGB"))


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
