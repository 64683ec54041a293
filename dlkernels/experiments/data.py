"""The one place where data is loaded: what is inside installed packages, local files, and downloads.

Named sets (:func:`images`, :func:`sentences`) are looked for in ``root``, which is ``--root`` or the variable
DLKERNELS_DATA, in the folders that torchvision uses too. What is not there is downloaded, by torchvision or by
Hugging Face ``datasets``. Checksums are verified where the authors published them. Every reader checks all of a
file's structure, and a file that is missing, truncated or corrupt ends in one :class:`DataError` that names it.
"""

from __future__ import annotations

import contextlib
import csv
import fcntl
import gzip
import hashlib
import io
import os
import pickle
import shutil
import struct
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from dlkernels.experiments import DataError, UsageError

__all__ = [
    "Images",
    "Sentences",
    "Table",
    "diabetes",
    "digits",
    "images",
    "read_cifar",
    "read_idx",
    "read_sentences",
    "read_table",
    "sentences",
    "stratified_split",
    "torchvision",
]

IMAGE_SETS = ("digits", "mnist", "fashion-mnist", "cifar10")
SENTENCE_SETS = ("sst2",)


@dataclass(frozen=True)
class Images:
    """Labelled images, as whole-number pixels.

    Attributes:
        name: for people.
        train_x, test_x: (N, channels, height, width) uint8.
        train_y, test_y: (N,) int64.
        classes: names of the classes.
        white: the pixel value of full brightness.
        note: what a reader of the results should know about this set.
    """

    name: str
    train_x: np.ndarray
    train_y: np.ndarray
    test_x: np.ndarray
    test_y: np.ndarray
    classes: tuple[str, ...]
    white: int = 255
    note: str = ""

    def shortened(self, train: int, test: int) -> Images:
        """The first `train` and `test` images only; the set itself if it has no more than that."""
        if len(self.train_y) <= train and len(self.test_y) <= test:
            return self
        train, test = min(train, len(self.train_y)), min(test, len(self.test_y))
        return replace(
            self,
            train_x=self.train_x[:train],
            train_y=self.train_y[:train],
            test_x=self.test_x[:test],
            test_y=self.test_y[:test],
            note=f"{self.note} Shortened to the first {train:,} images for training and {test:,} for testing.".strip(),
        )


@dataclass(frozen=True)
class Sentences:
    """Labelled sentences: lists of texts, and (N,) int64 labels."""

    name: str
    train_texts: list[str]
    train_y: np.ndarray
    test_texts: list[str]
    test_y: np.ndarray
    classes: tuple[str, ...]


@dataclass(frozen=True)
class Table:
    """A table by columns: numbers as float64 with NaN for blanks, anything else as strings."""

    name: str
    columns: dict[str, np.ndarray]


# ---------------------------------------------------------------------------------------- inside installed packages


def digits(seed: int = 0) -> Images:
    """scikit-learn's 1,797 real handwritten digits, 8x8 pixels of 0..16, split 80/20 with equal shares per class."""
    rows = _inside_sklearn("digits.csv.gz", ",").astype(np.int64)
    x, y = rows[:, :64].astype(np.uint8).reshape(-1, 1, 8, 8), rows[:, 64]
    train, test = stratified_split(y, 0.2, seed)
    return Images(
        name="scikit-learn's handwritten digits",
        train_x=x[train],
        train_y=y[train],
        test_x=x[test],
        test_y=y[test],
        classes=tuple("0123456789"),
        white=16,
    )


def diabetes() -> Table:
    """scikit-learn's diabetes set in its original units: 442 patients, ten measurements and `target`."""
    names = ("age", "sex", "bmi", "bp", "s1", "s2", "s3", "s4", "s5", "s6")
    columns = dict(zip(names, _inside_sklearn("diabetes_data_raw.csv.gz", None).T.copy(), strict=True))
    return Table("scikit-learn's diabetes set", {**columns, "target": _inside_sklearn("diabetes_target.csv.gz", None)})


def _inside_sklearn(name: str, separator: str | None) -> np.ndarray:
    """Numbers from a file of scikit-learn's package; importing scikit-learn itself would take a second or two."""
    spec = find_spec("sklearn")
    if spec is None or spec.origin is None:
        raise DataError(f"{name}: comes with scikit-learn, which is not installed. Run `pip install scikit-learn`.")
    return np.loadtxt(io.StringIO(_text(Path(spec.origin).parent / "datasets" / "data" / name)), delimiter=separator)


def stratified_split(y: np.ndarray, test_share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of a training and a test set in which every class has its share, to the nearest example.

    Args:
        y: (N,) classes.
        test_share: of each class, between 0 and 1.
        seed: of the choice.

    Returns:
        Two sorted int64 arrays that together have every index once.
    """
    random = np.random.default_rng(seed)
    test = np.zeros(len(y), dtype=bool)
    for label in np.unique(y):
        members = random.permutation(np.flatnonzero(y == label))
        test[members[: round(test_share * len(members))]] = True
    return np.flatnonzero(~test), np.flatnonzero(test)


# -------------------------------------------------------------------------------------------------------- named sets


def images(source: str, root: Path | None = None, seed: int = 0) -> Images:
    """Load a set of images.

    Args:
        source: "digits", "mnist", "fashion-mnist", "cifar10", or the path of a folder that holds files in MNIST's
            layout (four IDX files) or in CIFAR-10's (binary or Python batches).
        root: folder to look in first; then DLKERNELS_DATA; then a download.
        seed: of the split, for digits; the others come split.

    Raises:
        UsageError: there is no such set or folder.
        DataError: a file is missing, truncated or corrupt.
    """
    if source == "digits":
        return digits(seed)
    if source in ("mnist", "fashion-mnist"):
        return _named_mnist(source, root)
    if source == "cifar10":
        return _named_cifar(root)
    return _image_folder(_existing(source, "a set of images", IMAGE_SETS))


def sentences(source: str, root: Path | None = None) -> Sentences:
    """Load sentences with a sentiment: "sst2", or a folder with train and dev files as TSV or parquet.

    Raises:
        UsageError: there is no such set or folder.
        DataError: a file is missing, truncated or corrupt.
    """
    if source != "sst2":
        return _sentence_folder(_existing(source, "a set of sentences", SENTENCE_SETS), name=source)
    for folder in _places(root, "sst2"):
        return _sentence_folder(folder, name="SST-2")
    return _sentence_folder(_download(root, "sst2", _download_sst2), name="SST-2")


def _existing(source: str, kind: str, names: tuple[str, ...]) -> Path:
    path = Path(source).expanduser()
    if not path.is_dir():
        raise UsageError(f"'{source}' is neither {kind} ({', '.join(names)}) nor a folder that exists")
    return path


def _places(root: Path | None, folder: str) -> list[Path]:
    """The local folders called `folder`, in the order in which they are tried."""
    variable = os.environ.get("DLKERNELS_DATA")
    roots = [root, Path(variable) if variable else None, _cache()]
    return [place / folder for place in roots if place and (place / folder).is_dir()]


def _cache() -> Path:
    """Where downloads go when no root was given."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dlkernels"


_CLOTHES = ("T-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
_THINGS = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_MNIST_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
_MNIST_MD5 = {
    "mnist": (
        "f68b3c2dcbeaaa9fbdd348bbdeb94873",
        "d53e105ee54ea40749a09fcbcd1e9432",
        "9fb629c4189551a2d022fa330f9573f3",
        "ec29112dd5afa0611ce80d1b7f02629c",
    ),
    "fashion-mnist": (
        "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
        "25c81989df183df01b3e8a0aad5dffbe",
        "bef4ecab320f06d8554ea6380940ec79",
        "bb300cfdad3c16e7a12a480ee83cd310",
    ),
}
_CIFAR_MD5 = {
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    "test_batch": "40351d587109b95175f43aff81a1287e",
}


def _named_mnist(source: str, root: Path | None) -> Images:
    """MNIST or Fashion-MNIST, its checksums verified."""
    official = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST"}[source]
    places = [place / "raw" if (place / "raw").is_dir() else place for place in _places(root, official)]
    if not places:
        places = [_download(root, official, lambda folder: _download_torchvision(official, folder)) / "raw"]
    loaded = _mnist_folder(places[0], md5=dict(zip(_MNIST_FILES, _MNIST_MD5[source], strict=True)))
    if source == "mnist":
        return replace(loaded, name="MNIST")
    return replace(loaded, name="Fashion-MNIST", classes=_CLOTHES)


def _named_cifar(root: Path | None) -> Images:
    """CIFAR-10; Python batches have published checksums."""
    for name in ("cifar-10-batches-py", "cifar-10-batches-bin"):
        for place in _places(root, name):
            return replace(_cifar_folder(place, md5=_CIFAR_MD5), name="CIFAR-10", classes=_THINGS)
    folder = _download(root, "cifar-10-batches-py", lambda folder: _download_torchvision("CIFAR10", folder))
    return replace(_cifar_folder(folder, md5=_CIFAR_MD5), name="CIFAR-10", classes=_THINGS)


# ----------------------------------------------------------------------------------------------------------- folders


def _image_folder(folder: Path) -> Images:
    """Images in somebody's own folder, in MNIST's layout or in CIFAR's."""
    for place in (folder, folder / "raw"):
        if _first_existing(place, _MNIST_FILES[0]):
            return _mnist_folder(place, md5={})
    if _cifar_batch(folder, "test_batch"):
        return _cifar_folder(folder, md5={})
    raise DataError(
        f"{folder}: no images found. Expected {_MNIST_FILES[0]}.gz and its three companions (MNIST's layout), "
        "or data_batch_1 and test_batch (CIFAR-10's layout)."
    )


def _mnist_folder(folder: Path, md5: dict[str, str]) -> Images:
    """The four IDX files of a folder. Checksums are those of the .gz files; an unpacked file has none."""
    arrays = []
    for name in _MNIST_FILES:
        path = _first_existing(folder, name)
        if path is None:
            raise DataError(f"{folder / name}.gz: missing. Put it there, or remove the folder to download it again.")
        arrays.append(read_idx(path, md5.get(name) if path.suffix == ".gz" else None))
    train_x, train_y, test_x, test_y = arrays
    for name, x, y in (("train", train_x, train_y), ("t10k", test_x, test_y)):
        if x.ndim != 3 or y.ndim != 1 or len(x) != len(y) or len(x) == 0:
            raise DataError(
                f"{folder}: the {name} files do not belong together: images {x.shape}, labels {y.shape}. "
                "Expected (N, height, width) and (N,)."
            )
    if train_x.shape[1:] != test_x.shape[1:]:
        raise DataError(f"{folder}: images for training and testing differ in size: {train_x.shape}, {test_x.shape}.")
    classes = tuple(str(label) for label in range(int(max(train_y.max(), test_y.max())) + 1))
    return Images(
        folder.name, train_x[:, None], train_y.astype(np.int64), test_x[:, None], test_y.astype(np.int64), classes
    )


def _cifar_folder(folder: Path, md5: dict[str, str]) -> Images:
    """All training batches that are there (CIFAR-10 has five), and the test batch."""
    train_paths = [path for i in range(1, 6) if (path := _cifar_batch(folder, f"data_batch_{i}"))]
    test_path = _cifar_batch(folder, "test_batch")
    if not train_paths or not test_path:
        missing = "test_batch" if train_paths else "data_batch_1"
        raise DataError(f"{folder / missing}: missing. Put it there, or remove the folder to download it again.")
    batches = [read_cifar(path, md5.get(path.name)) for path in [*train_paths, test_path]]
    test_x, test_y = batches.pop()
    train_x = np.concatenate([x for x, _ in batches])
    train_y = np.concatenate([y for _, y in batches])
    note = "" if len(batches) == 5 else f"Only {len(batches)} of CIFAR-10's 5 training batches are there."
    classes = tuple(str(label) for label in range(10))
    return Images(folder.name, train_x, train_y, test_x, test_y, classes, note=note)


def _sentence_folder(folder: Path, name: str) -> Sentences:
    """train and dev (or validation) files of a folder, TSV or parquet. GLUE's own test labels are secret: dev it is."""
    loaded = {}
    for part, stems in (("train", ("train",)), ("test", ("dev", "validation"))):
        patterns = [f"{stem}{rest}" for stem in stems for rest in (".tsv", ".tsv.gz", ".parquet", "-*.parquet")]
        paths = next((sorted(found) for pattern in patterns if (found := list(folder.rglob(pattern)))), [])
        if not paths:
            raise DataError(f"{folder / stems[0]}.tsv: missing. Put it there, as TSV or parquet.")
        pieces = [read_sentences(path) for path in paths if path.parent == paths[0].parent]  # parquet comes in pieces
        loaded[part] = [text for texts, _ in pieces for text in texts], np.concatenate([y for _, y in pieces])
    classes = ("negative", "positive")
    return Sentences(name, *loaded["train"], *loaded["test"], classes)


def _first_existing(folder: Path, name: str) -> Path | None:
    """The .gz file before the unpacked one: it is the one with a checksum."""
    return next((path for path in (folder / f"{name}.gz", folder / name) if path.is_file()), None)


def _cifar_batch(folder: Path, name: str) -> Path | None:
    names = (name, f"{name}.bin", f"{name}.bin.gz")
    return next((folder / name for name in names if (folder / name).is_file()), None)


# ----------------------------------------------------------------------------------------------------------- readers


def read_idx(path: Path, md5: str | None = None) -> np.ndarray:
    """Read an IDX file of bytes (.gz or not): the format of MNIST.

    Two zero bytes, the type (8 = unsigned byte), the number of dimensions, each dimension as a big-endian 32-bit
    number, then the bytes.
    """
    content = _read(path, md5)
    if len(content) < 4 or content[:3] != b"\0\0\x08" or not 1 <= content[3] <= 32:  # more, NumPy may not have
        raise DataError(f"{path}: not an IDX file of bytes. {_REPLACE}")
    header = 4 + 4 * content[3]
    if len(content) < header:
        raise DataError(f"{path}: truncated in its header. {_REPLACE}")
    shape = struct.unpack(f">{content[3]}I", content[4:header])
    return _exact(path, content, header, shape)


def read_cifar(path: Path, md5: str | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Read one batch of CIFAR-10: binary (.bin, .bin.gz) or the pickled one of the Python version.

    A binary record is one label byte and 3072 pixel bytes: the red plane row by row, then green, then blue.

    Returns:
        Images (N, 3, 32, 32) uint8 and labels (N,) int64.
    """
    content = _read(path, md5)
    if ".bin" in path.suffixes:
        records = _exact(path, content, 0, (max(1, -(-len(content) // 3073)), 3073))
        pixels, labels = records[:, 1:], records[:, 0].astype(np.int64)
    else:
        pixels, labels = _unpickled_batch(path, content)
    if wrong := [label for label in (labels.min(), labels.max()) if not 0 <= label <= 9]:
        raise DataError(f"{path}: corrupt, it has a label {wrong[0]} and CIFAR-10 has ten classes. {_REPLACE}")
    return pixels.reshape(-1, 3, 32, 32), labels


def read_sentences(path: Path) -> tuple[list[str], np.ndarray]:
    """Read labelled sentences: columns `sentence` and `label` (0 or 1) of a TSV (.gz) or parquet file.

    A quotation mark in a TSV is an ordinary character: that is GLUE's convention.
    """
    if path.suffix == ".parquet":
        columns = _parquet_columns(path)
    else:
        columns = _by_columns(path, _fields(path, _text(path), delimiter="\t", quoting=csv.QUOTE_NONE))
    if not {"sentence", "label"} <= set(columns):
        raise DataError(f"{path}: expected the columns 'sentence' and 'label', found {', '.join(columns) or 'none'}.")
    labels = [str(label) for label in columns["label"]]
    for row, label in enumerate(labels):
        if label not in ("0", "1"):
            raise DataError(f"{path}: label '{label}' in row {row + 1} of the data; expected 0 or 1.")
    return [str(text) for text in columns["sentence"]], np.array(labels, dtype=np.int64)


def read_table(path: Path) -> Table:
    """Read a table with a header from .csv, .tsv or .txt (.gz or not); the separator is the header's: tab, ; or ,."""
    text = _text(path)
    header = text.partition("\n")[0]
    separator = max("\t;,", key=header.count)
    columns = _by_columns(path, _fields(path, text, delimiter=separator))
    return Table(path.name, {name: _numbers_or_strings(values) for name, values in columns.items()})


_REPLACE = "Replace it with a good copy, or remove it to download it again."


def _read(path: Path, md5: str | None = None) -> bytes:
    """All of a file, its MD5 verified if one is given, unpacked if its name ends in .gz."""
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise DataError(f"{path}: missing. Check the path, or the folder given with --root.") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}). Check the path and its permissions.") from error
    if md5 and hashlib.md5(content, usedforsecurity=False).hexdigest() != md5:
        raise DataError(f"{path}: truncated or corrupt, its MD5 is not {md5}. {_REPLACE}")
    if path.suffix != ".gz":
        return content
    try:
        return gzip.decompress(content)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path}: truncated or corrupt, it does not unpack ({error}). {_REPLACE}") from error


def _exact(path: Path, content: bytes, offset: int, shape: tuple[int, ...]) -> np.ndarray:
    """The bytes after `offset` as an array of `shape`, which they must fill exactly."""
    expected = offset + int(np.prod(shape, dtype=object))
    if len(content) != expected:
        raise DataError(f"{path}: truncated or corrupt, {len(content):,} bytes instead of {expected:,}. {_REPLACE}")
    return np.frombuffer(content, np.uint8, offset=offset).reshape(shape)


class _PlainUnpickler(pickle.Unpickler):
    """Unpickles arrays and plain containers only: a pickle may otherwise run any code."""

    _ALLOWED = frozenset({"_reconstruct", "ndarray", "dtype", "encode"})

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] in ("numpy", "_codecs") and name in self._ALLOWED:
            return super().find_class(module.replace("numpy.core", "numpy._core"), name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def _unpickled_batch(path: Path, content: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Pixels (N, 3072) and labels (N,) of a Python batch."""
    try:
        batch = _PlainUnpickler(io.BytesIO(content), encoding="bytes").load()
        pixels = np.asarray(batch[b"data"], dtype=np.uint8)
        labels = np.asarray(batch[b"labels"], dtype=np.int64)
    except Exception as error:  # a damaged pickle can raise anything
        raise DataError(f"{path}: truncated or corrupt, it does not unpickle ({error}). {_REPLACE}") from error
    if pixels.ndim != 2 or pixels.shape[1] != 3072 or labels.shape != (len(pixels),) or len(pixels) == 0:
        raise DataError(f"{path}: corrupt, pixels {pixels.shape} and labels {labels.shape}. {_REPLACE}")
    return pixels, labels


def _text(path: Path) -> str:
    try:
        return _read(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text at byte {error.start:,}. Save it as UTF-8.") from error


def _fields(path: Path, text: str, **how: Any) -> list[list[str]]:
    """The lines of a table, cut into fields."""
    try:
        return list(csv.reader(io.StringIO(text), **how))
    except csv.Error as error:
        raise DataError(f"{path}: corrupt, not a table ({error}). {_REPLACE}") from error


def _by_columns(path: Path, rows: list[list[str]]) -> dict[str, list[str]]:
    """Columns by name; the first row is the header, empty lines do not count, every other row is complete."""
    rows = [row for row in rows if row]
    if len(rows) < 2:
        raise DataError(f"{path}: expected a header and at least one row, found {len(rows)} rows.")
    header = rows[0]
    if len(set(header)) != len(header):
        raise DataError(f"{path}: two columns have the same name. Rename one.")
    for number, row in enumerate(rows[1:], start=1):
        if len(row) != len(header):
            raise DataError(f"{path}: row {number} of the data has {len(row)} fields, the header has {len(header)}.")
    return {name: list(column) for name, column in zip(header, zip(*rows[1:], strict=True), strict=True)}


def _numbers_or_strings(values: list[str]) -> np.ndarray:
    try:
        return np.array([float(value) if value.strip() else np.nan for value in values])
    except ValueError:
        return np.array(values)


def _parquet_columns(path: Path) -> dict[str, list[Any]]:
    import pyarrow
    from pyarrow import parquet

    try:
        return parquet.read_table(io.BytesIO(_read(path))).to_pydict()
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: truncated or corrupt, not a parquet file ({error}). {_REPLACE}") from error


# --------------------------------------------------------------------------------------------------------- downloads


def torchvision() -> ModuleType:
    """Import torchvision, also beside a torch without CUDA.

    Its compiled part declares the operators nms and qnms; where that part does not load, the import fails with
    "operator torchvision::nms does not exist". Declaring the two is enough for datasets, transforms and models.
    """
    try:
        import torchvision
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        library = torch.library.Library("torchvision", "FRAGMENT")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _declared.append(library)
        import torchvision
    return torchvision


_declared: list[torch.library.Library] = []  # a declaration lives as long as its Library object


def _download(root: Path | None, name: str, fetch: Any) -> Path:
    """Fetch a set into `root/name`, wholly or not at all.

    Args:
        root: folder for it; the cache if None.
        name: of the folder it must become.
        fetch: called with an empty folder, returns the folder inside that has become the set.

    Returns:
        The folder `root/name`.
    """
    target = (root or _cache()) / name
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _alone(target.parent), tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{name}.") as temporary:
            if not target.is_dir():  # another process may have been faster
                shutil.move(fetch(Path(temporary)), target)
    except Exception as error:  # network, disk, a changed server: the person needs one sentence
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(
            f"{target}: not there, and the download failed ({reason}). Check the network, or put the files there."
        ) from error
    return target


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Let one process at a time download into a folder."""
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def _download_torchvision(name: str, folder: Path) -> Path:
    from importlib import import_module

    torchvision()
    dataset = getattr(import_module("torchvision.datasets"), name)
    dataset(folder, download=True)
    return folder / ("cifar-10-batches-py" if name == "CIFAR10" else name)


def _download_sst2(folder: Path) -> Path:
    from datasets import load_dataset

    (folder / "sst2").mkdir()
    for part in ("train", "validation"):
        rows = load_dataset("stanfordnlp/sst2", split=part, cache_dir=str(folder / "cache"))
        rows.to_parquet(folder / "sst2" / f"{part}.parquet")
    return folder / "sst2"
