"""Datasets as tensors: uint8 NCHW images with int64 labels.

`load_data` decodes a data set into memory, and `open_data` leaves that to those who ask for a part or for shards. Both
know a data set by what lies in its folder: one of torchvision's, an `ImageFolder` tree, or what Hugging Face's
`datasets` saved. Where no data set is named, they read the twenty original CIFAR-10 test images that the `foolbox`
package ships.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, partial
from io import BytesIO
from itertools import islice
from numbers import Integral
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info
from torch.utils.data import Dataset as TorchDataset
from torchvision.datasets import CIFAR10, CIFAR100, KMNIST, MNIST, SVHN, USPS, FashionMNIST, ImageFolder
from torchvision.transforms import functional

__all__ = [
    "CIFAR10_CLASSES",
    "ENVIRONMENT_VARIABLE",
    "Dataset",
    "LazyDataset",
    "class_balanced_mask",
    "class_balanced_subset",
    "load_data",
    "open_data",
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
_FILES_HASHED = 1000
"""At once, for the digest of a lazy data set."""

Index = slice | Sequence[int] | np.ndarray | Tensor
"""Of samples: a slice, their positions, or a mask."""


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

    def __getitem__(self, index: Index) -> Dataset:
        """The samples at a slice, at positions or in a mask; of a slice the images are a view."""
        where = index if isinstance(index, slice) else torch.from_numpy(_positions(index, len(self)))
        return replace(self, images=self.images[where], labels=self.labels[where])

    subset = __getitem__

    def shards(self, size: int, *, workers: int = 0, start: int = 0) -> Iterator[Dataset]:
        """Views of `size` samples each from sample `start` on, as those of a `LazyDataset`; `workers` have no work."""
        return (self[part] for part in _parts(len(self), size, workers, start))

    @property
    def image_shape(self) -> tuple[int, ...]:
        """(C, H, W)."""
        return tuple(self.images.shape[1:])

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


@dataclass(frozen=True, eq=False)
class LazyDataset:
    """Labels in memory, and images that are decoded when they are asked for; made by `open_data`.

    Attributes:
        labels: int64 tensor of shape (N,), each in [0, len(classes)).
        classes: the class names, in label order.
        source: where the images come from, for tables and messages.
        encoded: from indices (n,) to the names of images, for messages, and where each is; it goes to workers.
        index: of each sample in `encoded`, int64 (N,).
        size: to which images are brought.
        first: the name of an image, and its shape (H, W, C), which all must have.
    """

    labels: Tensor
    classes: tuple[str, ...]
    source: str
    encoded: Callable[[np.ndarray], list[tuple[str, _Encoded]]]
    index: np.ndarray
    size: _Size
    first: tuple[str, tuple[int, ...]]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Index) -> Dataset:
        """The samples at a slice, at positions or in a mask, decoded by as many threads as there are processors.

        Raises:
            ValueError: an image cannot be read, or has another shape than the others; the message has its name.
        """
        part = self.subset(index)
        images = _decode(self.encoded(part.index), self.size, self.first)
        return Dataset(images, part.labels, self.classes, self.source)

    def subset(self, index: Index) -> LazyDataset:
        """The samples at a slice, at positions or in a mask, not decoded."""
        positions = _positions(index, len(self))
        return replace(self, labels=self.labels[torch.from_numpy(positions)], index=self.index[positions])

    def shards(self, size: int, *, workers: int = 0, start: int = 0) -> Iterator[Dataset]:
        """The samples in memory, `size` at a time, in their order.

        Args:
            size: of a shard in samples; the last may have fewer.
            workers: processes of a `DataLoader` that share in each shard and decode one ahead. No more than a few
                shards are in memory: the one that was given out last, the next, and its parts. 0 decodes in this
                process, when a shard is asked for.
            start: index of the first sample, by which a stream that was cut off goes on.

        Raises:
            TypeError, ValueError: an argument is outside what is allowed.
            ValueError: as for `data[index]`, when the shard is asked for.
        """
        parts = _parts(len(self), size, workers, start)
        if workers == 0:
            return (self[part] for part in parts)
        return self._shards_of_workers(parts, workers)

    def _shards_of_workers(self, shards: list[slice], workers: int) -> Iterator[Dataset]:
        shares = [_slices(shard.start, shard.stop, -(-(shard.stop - shard.start) // workers)) for shard in shards]
        sampler = [part for parts in shares for part in parts]
        # One share of each worker at a time is one shard ahead.
        loader: DataLoader[Dataset | str] = DataLoader(
            _Decoded(self), sampler=sampler, batch_size=None, num_workers=workers, prefetch_factor=1
        )
        with torch.random.fork_rng(devices=[]):  # from which a loader draws
            found = iter(loader)
        try:
            for parts in shares:
                images, labels = [], []
                for decoded in islice(found, len(parts)):
                    if isinstance(decoded, str):
                        raise ValueError(decoded)
                    images.append(decoded.images)
                    labels.append(decoded.labels)
                shard = Dataset(torch.cat(images), torch.cat(labels), self.classes, self.source)
                del images, labels, decoded  # which would be one more while the next is decoded
                yield shard
                del shard
        finally:
            del found  # which ends the workers, now rather than when an error's traceback is forgotten

    @property
    def image_shape(self) -> tuple[int, ...]:
        """(C, H, W)."""
        height, width, channels = self.first[1]
        return channels, height, width

    @property
    def identity(self) -> str:
        """The source, and the first digits of the digest, by which tables know the data."""
        return f"{self.source}, {self.digest[:8]}"

    @cached_property
    def digest(self) -> str:
        """The first digits of a SHA-256 digest of the files, their size, the labels and the classes; not of any name.

        No image is decoded for it. So the same images in another format have another digest, and in memory a third.
        """
        state = hashlib.sha256(f"{self.image_shape}{self.size}\n{self.classes}".encode())
        state.update(self.labels.numpy().tobytes())
        with ThreadPoolExecutor() as pool:
            for first in range(0, len(self), _FILES_HASHED):
                files = self.encoded(self.index[first : first + _FILES_HASHED])
                for hashed in pool.map(lambda file: hashlib.sha256(_content(file[1])).digest(), files):
                    state.update(hashed)
        return state.hexdigest()[:12]


class _Decoded(TorchDataset[Dataset | str]):
    """Parts of a lazy data set as a `DataLoader`'s workers give them, or what is wrong with one."""

    def __init__(self, data: LazyDataset) -> None:
        self._data = data

    def __getitem__(self, part: slice) -> Dataset | str:
        try:
            return self._data[part]
        except ValueError as error:
            return str(error)


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
    """Read a data set, or a class-balanced subset of it, into memory.

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
    return open_data(root, split, n, seed=seed, download=download, resize=resize, crop=crop)[:]


def open_data(
    root: str | os.PathLike[str] | None = None,
    split: str = "test",
    n: int | None = None,
    *,
    seed: int = 0,
    download: bool = False,
    resize: int | None = None,
    crop: int | None = None,
) -> LazyDataset:
    """What `load_data` reads, of which only the first image is decoded yet.

    So a folder as large as ImageNet, `n01440764` to `n15075141` in `val/`, is attacked in the memory of a few shards::

        data = open_data("path/to/imagenet", resize=256, crop=224)
        for finished in attack.stream((shard.as_floats(), shard.labels) for shard in data.shards(128, workers=4)):
            ...

    Of torchvision's own data sets the pixels are in memory all the same, as large as their files have them.

    Args, Raises: as `load_data`; what is wrong with an image is raised when it is decoded.
    """
    if split not in _FOLDERS:
        raise ValueError(f"split={split!r}: allowed are 'train' and 'test'")
    for name, value in (("n", n), ("resize", resize), ("crop", crop)):
        if value is not None:
            _check_integer(name, value)
    if resize is not None and crop is not None and crop > resize:
        raise ValueError(f"crop={crop}: must be at most resize={resize}")
    size = _Size(resize, crop)
    root = root or os.environ.get(ENVIRONMENT_VARIABLE)
    if not root:
        if download:
            raise ValueError("download=True needs a folder to download into: give root (--data)")
        return _offline_sample(n, seed, size)
    found = _open(os.fspath(root), split, download)
    return _lazy(found, _choose(found.labels, n, seed), size)


def class_balanced_subset(labels: Sequence[int] | np.ndarray, n: int, seed: int = 0) -> np.ndarray:
    """Indices of `n` samples, drawn without replacement and as evenly over the classes as their sizes permit.

    Smaller subsets are prefixes of larger ones drawn with the same seed, so the first 200 images of a run on 1,000
    are those of a run on 200.

    Raises:
        ValueError: `n` is below 1 or exceeds the number of samples.
    """
    _check_integer("n", n)
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


def _check_integer(name: str, value: int, low: int = 1) -> None:
    if not isinstance(value, Integral) or value < low:
        raise ValueError(f"{name}={value!r}: must be an integer of at least {low}")


def _parts(n: int, size: int, workers: int, start: int) -> list[slice]:
    """The shards of `n` samples, see `LazyDataset.shards`."""
    _check_integer("size", size)
    _check_integer("workers", workers, 0)
    _check_integer("start", start, 0)
    if start > n:
        raise ValueError(f"start={start}: the data set has only {n} images")
    return _slices(start, n, size)


def _slices(start: int, stop: int, size: int) -> list[slice]:
    return [slice(first, min(first + size, stop)) for first in range(start, stop, size)]


def _positions(index: Index, n: int) -> np.ndarray:
    positions = np.arange(n)[index if isinstance(index, slice) else np.asarray(index)]
    if positions.ndim != 1:
        raise TypeError(f"index={index!r}: must be a slice, or a sequence of positions or of whether to take each")
    return positions


def _choose(labels: np.ndarray, n: int | None, seed: int) -> np.ndarray:
    return np.arange(len(labels)) if n is None else class_balanced_subset(labels, n, seed)


_Encoded = str | bytes | np.ndarray
"""An image: its file, what is in the file, or its pixels (H, W) or (H, W, C)."""


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
        encoded: see `LazyDataset`.
    """

    source: str
    classes: tuple[str, ...]
    labels: np.ndarray
    encoded: Callable[[np.ndarray], list[tuple[str, _Encoded]]]


def _lazy(found: _Split, chosen: np.ndarray, size: _Size) -> LazyDataset:
    ((name, image),) = found.encoded(chosen[:1])
    first = name, _pixels(name, image, size).shape
    labels = torch.from_numpy(found.labels[chosen])
    return LazyDataset(labels, found.classes, f"{found.source}{size}", found.encoded, chosen, size, first)


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

    images = np.asarray(found.data)
    images = images.transpose(0, 2, 3, 1) if dataset is SVHN else images
    labels = np.asarray(found.labels if dataset is SVHN else found.targets, dtype=np.int64)
    classes = tuple(getattr(found, "classes", map(str, range(10))))
    return _Split(source, classes, labels, partial(_rows_of_array, images, source))


def _rows_of_array(images: np.ndarray, source: str, chosen: np.ndarray) -> list[tuple[str, _Encoded]]:
    return [(source, images[i]) for i in chosen]


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

    labels = np.asarray(folder.targets, dtype=np.int64)
    # As an array a million names take little memory, and processes that are forked share it.
    files = np.array([os.fsencode(file) for file, _ in folder.samples])
    source = f"{path.resolve().name} ({place.name})"
    return _Split(source, tuple(folder.classes), labels, partial(_files_of_folder, files))


def _files_of_folder(files: np.ndarray, chosen: np.ndarray) -> list[tuple[str, _Encoded]]:
    return [(name, name) for name in map(os.fsdecode, files[chosen])]


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
    images = rows.select_columns(image).cast_column(image, ImageFeature(decode=False))
    classes = tuple(rows.features[label].names)
    return _Split(
        f"{path.resolve().name} ({name})", classes, labels, partial(_rows_of_table, images, image, path / name)
    )


def _rows_of_table(images: Any, column: str, path: Path, chosen: np.ndarray) -> list[tuple[str, _Encoded]]:
    rows = [row or {"bytes": b"", "path": None} for row in images.select(chosen)[:][column]]
    found = [row["path"] if row["bytes"] is None else row["bytes"] for row in rows]
    return [(f"{path}, image {i}", image) for i, image in zip(chosen, found, strict=True)]


def _offline_sample(n: int | None, seed: int, size: _Size) -> LazyDataset:
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
    source = f"offline sample: {len(chosen)} CIFAR-10 test images from the foolbox package"
    encoded = partial(_files_of_folder, np.array([os.fsencode(file) for file in files]))
    return _lazy(_Split(source, CIFAR10_CLASSES, labels, encoded), chosen, size)


def _decode(files: list[tuple[str, _Encoded]], size: _Size, first: tuple[str, tuple[int, ...]]) -> Tensor:
    """Pixels uint8 (N, C, H, W) of images that have names for messages, all of the shape (H, W, C) of the first."""
    first_name, (height, width, channels) = first
    images = np.empty((len(files), channels, height, width), dtype=np.uint8)
    kinds = {1: "greyscale", 3: "coloured"}

    def read(part: np.ndarray) -> None:
        for i in part:
            name, image = files[i]
            array = _pixels(name, image, size)
            if array.shape[2] != channels:
                kind, other = kinds[array.shape[2]], kinds[channels]
                raise ValueError(f"{name}: {kind}, but {first_name} is {other}; all must be one or the other")
            if array.shape != first[1]:
                raise ValueError(
                    f"{name}: shape {array.shape}, but {first_name} has {first[1]}; all must agree: "
                    "resize and crop (--resize, --crop) bring them to one"
                )
            images[i] = array.transpose(2, 0, 1)

    threads = 1 if get_worker_info() else os.cpu_count() or 1
    with ThreadPoolExecutor(threads) as pool:  # Pillow decodes without holding the GIL
        for _ in pool.map(read, np.array_split(np.arange(len(files)), 8 * threads)):
            pass
    return torch.from_numpy(images)


def _pixels(name: str, image: _Encoded, size: _Size) -> np.ndarray:
    """Of an image (H, W, C), brought to its size."""
    if isinstance(image, np.ndarray):
        return np.atleast_3d(np.asarray(size.of(Image.fromarray(image), name)) if any(size) else image)
    try:
        with Image.open(BytesIO(image) if isinstance(image, bytes) else image) as opened:
            picture = _grey_or_rgb(opened)
    except Exception as error:  # Pillow raises a different type for each way a file can be broken
        raise ValueError(f"{name}: cannot be read as an image: {error}") from error
    return np.atleast_3d(np.asarray(size.of(picture, name)))


def _content(image: _Encoded) -> bytes:
    if isinstance(image, str):
        return Path(image).read_bytes()
    return image if isinstance(image, bytes) else image.tobytes()


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
