"""The loader: what is embedded, every reader, and what happens to files that are missing, truncated or corrupt."""

import contextlib
import functools
import gzip
import hashlib
import os
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("sklearn")

from dlkernels.experiments import DataError, UsageError, atomic_path, data

needs_data = pytest.mark.skipif(not os.environ.get("DLKERNELS_DATA"), reason="DLKERNELS_DATA is not set")


def idx(array):
    return b"\0\0\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def small_set(count, size=5, seed=0):
    random = np.random.default_rng(seed)
    return random.integers(0, 256, (count, size, size), dtype=np.uint8), np.arange(count, dtype=np.uint8) % 3


@pytest.fixture
def mnist_like(tmp_path):
    """A folder in MNIST's layout with a few small images."""
    folder = tmp_path / "own"
    folder.mkdir()
    for part, count in (("train", 12), ("t10k", 6)):
        x, y = small_set(count)
        (folder / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(x)))
        (folder / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(y)))
    return folder


def cifar_records(count, seed=0):
    random = np.random.default_rng(seed)
    return random.integers(0, 10, count), random.integers(0, 256, (count, 3072), dtype=np.uint8)


def binary_batch(labels, pixels):
    return np.concatenate([labels[:, None].astype(np.uint8), pixels], axis=1).tobytes()


class TestEmbedded:
    def test_digits(self):
        loaded = data.digits(seed=3)
        assert loaded.train_x.shape == (1438, 1, 8, 8)
        assert loaded.test_x.shape == (359, 1, 8, 8)
        assert loaded.train_x.max() == loaded.white == 16
        shares = np.bincount(loaded.test_y) / np.bincount(np.concatenate([loaded.train_y, loaded.test_y]))
        assert np.abs(shares - 0.2).max() < 0.005

    def test_digits_are_split_by_the_seed(self):
        assert np.array_equal(data.digits(1).test_x, data.digits(1).test_x)
        assert not np.array_equal(data.digits(1).test_x, data.digits(2).test_x)

    def test_diabetes(self):
        columns = data.diabetes().columns
        assert len(columns) == 11
        assert columns["target"].shape == (442,)
        assert columns["age"].max() == 79  # years, not scikit-learn's scaled ones

    @given(st.lists(st.integers(0, 3), min_size=1, max_size=60), st.floats(0.05, 0.9), st.integers(0, 99))
    @settings(max_examples=50, deadline=None)
    def test_a_split_has_everything_once_and_every_class_its_share(self, labels, share, seed):
        y = np.array(labels)
        train, test = data.stratified_split(y, share, seed)
        assert sorted([*train, *test]) == list(range(len(y)))
        for label in set(labels):
            assert (y[test] == label).sum() == round(share * labels.count(label))

    def test_shortened(self):
        loaded = data.digits()
        short = loaded.shortened(100, 10_000)
        assert (len(short.train_x), len(short.train_y), len(short.test_x)) == (100, 100, 359)
        assert "100 images for training and 359 for testing" in short.note
        assert loaded.shortened(5000, 5000) is loaded


class TestImages:
    def test_mnist_layout_packed_and_unpacked(self, mnist_like):
        packed = data.images(str(mnist_like))
        for path in list(mnist_like.iterdir()):
            path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
            path.unlink()
        unpacked = data.images(str(mnist_like))
        assert packed.train_x.shape == (12, 1, 5, 5)
        assert packed.classes == ("0", "1", "2")
        for name in ("train_x", "train_y", "test_x", "test_y"):
            assert np.array_equal(getattr(packed, name), getattr(unpacked, name))

    def test_a_missing_companion_is_named(self, mnist_like):
        (mnist_like / "t10k-labels-idx1-ubyte.gz").unlink()
        with pytest.raises(DataError, match=r"t10k-labels-idx1-ubyte\.gz: missing\. Put it there"):
            data.images(str(mnist_like))

    def test_labels_of_another_set(self, mnist_like):
        (mnist_like / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(small_set(11)[1])))
        with pytest.raises(DataError, match="the train files do not belong together"):
            data.images(str(mnist_like))

    def test_cifar_binary_and_python_are_the_same(self, tmp_path):
        labels, pixels = cifar_records(7)
        for name in ("data_batch_1", "test_batch"):
            (tmp_path / f"{name}.bin.gz").write_bytes(gzip.compress(binary_batch(labels, pixels)))
        binary = data.images(str(tmp_path))
        for path in list(tmp_path.iterdir()):
            path.unlink()
        for name in ("data_batch_1", "test_batch"):
            content = {b"data": pixels, b"labels": labels.tolist()}
            (tmp_path / name).write_bytes(pickle.dumps(content, protocol=2))
        python = data.images(str(tmp_path))
        assert binary.train_x.shape == (7, 3, 32, 32)
        assert binary.train_x[2, 1, 3, 5] == pixels[2, 1024 + 3 * 32 + 5]  # plane G, row 3, column 5
        assert binary.train_y.tolist() == labels.tolist()
        assert np.array_equal(binary.train_x, python.train_x)
        assert np.array_equal(binary.train_y, python.train_y)
        assert binary.note == "Only 1 of CIFAR-10's 5 training batches are there."

    def test_neither_a_name_nor_a_folder(self, tmp_path):
        with pytest.raises(UsageError, match="'nonsense' is neither"):
            data.images("nonsense")
        with pytest.raises(DataError, match="no images found"):
            data.images(str(tmp_path))

    def test_root_comes_before_the_variable(self, tmp_path, monkeypatch, mnist_like):
        monkeypatch.setitem(data._MNIST_MD5, "mnist", (None,) * 4)
        for name, first in (("a", 1), ("b", 2)):
            folder = tmp_path / name / "MNIST" / "raw"
            folder.mkdir(parents=True)
            for path in mnist_like.iterdir():
                (folder / path.name).write_bytes(path.read_bytes())
            x, _ = small_set(12)
            x[0, 0, 0] = first
            (folder / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(x)))
        monkeypatch.setenv("DLKERNELS_DATA", str(tmp_path / "b"))
        assert data.images("mnist", tmp_path / "a").train_x[0, 0, 0, 0] == 1
        assert data.images("mnist").train_x[0, 0, 0, 0] == 2
        assert data.images("mnist", tmp_path).train_x[0, 0, 0, 0] == 2  # not there: the variable is next

    def test_a_checksum_that_differs_is_refused(self, tmp_path, mnist_like):
        (tmp_path / "MNIST").mkdir()
        mnist_like.rename(tmp_path / "MNIST" / "raw")
        with pytest.raises(DataError, match=r"train-images-idx3-ubyte\.gz: .* its MD5 is not f68b3c"):
            data.images("mnist", tmp_path)


class TestDamage:
    """Every damage ends in one DataError of one line that names the file."""

    @pytest.mark.parametrize("keep", [0, 1, 3, 10, 100, -1])
    def test_truncated_gzip(self, mnist_like, keep):
        path = mnist_like / "train-images-idx3-ubyte.gz"
        path.write_bytes(path.read_bytes()[:keep])
        self.refused(lambda: data.images(str(mnist_like)), path)

    @pytest.mark.parametrize("keep", [0, 3, 4, 9, 15, 16, 100])
    def test_truncated_idx(self, tmp_path, keep):
        path = tmp_path / "x-idx3-ubyte"
        path.write_bytes(idx(small_set(4)[0])[:keep])
        self.refused(lambda: data.read_idx(path), path)

    def test_too_long_an_idx(self, tmp_path):
        path = tmp_path / "x-idx3-ubyte"
        path.write_bytes(idx(small_set(4)[0]) + b"\0")
        self.refused(lambda: data.read_idx(path), path)

    def test_an_idx_that_claims_to_be_enormous(self, tmp_path):
        path = tmp_path / "x-idx3-ubyte"
        path.write_bytes(b"\0\0\x08\x03" + b"\xff" * 12)
        self.refused(lambda: data.read_idx(path), path)

    @pytest.mark.parametrize("dimensions", [0, 65])
    def test_an_idx_with_dimensions_that_no_data_has(self, tmp_path, dimensions):
        path = tmp_path / "x-idx3-ubyte"
        path.write_bytes(b"\0\0\x08" + bytes([dimensions]) + b"\0\0\0\1" * dimensions + b"x")
        self.refused(lambda: data.read_idx(path), path)

    @given(st.integers(0, 10**6), st.integers(1, 255))
    @settings(max_examples=60, deadline=None)
    def test_a_flipped_byte_in_gzip_is_seen(self, tmp_path_factory, place, change):
        """All but the header's remarks (time, system, level) is covered by structure or by the CRC."""
        content = bytearray(gzip.compress(idx(small_set(4)[0]), mtime=0))
        place = 10 + place % (len(content) - 10)
        content[place] ^= change
        path = tmp_path_factory.mktemp("flip") / "x-idx3-ubyte.gz"
        path.write_bytes(content)
        self.refused(lambda: data.read_idx(path), path)

    @pytest.mark.parametrize("keep", [0, 1, 3072, 3074, 6145])
    def test_truncated_cifar(self, tmp_path, keep):
        path = tmp_path / "data_batch_1.bin"
        path.write_bytes(binary_batch(*cifar_records(2))[:keep])
        self.refused(lambda: data.read_cifar(path), path)

    def test_a_label_that_cannot_be(self, tmp_path):
        path = tmp_path / "data_batch_1.bin"
        path.write_bytes(b"\x0a" + bytes(3072))
        self.refused(lambda: data.read_cifar(path), path)

    @pytest.mark.parametrize("label", [-1, 10])
    def test_a_label_that_cannot_be_in_a_pickle(self, tmp_path, label):
        path = tmp_path / "data_batch_1"
        path.write_bytes(pickle.dumps({b"data": np.zeros((1, 3072), np.uint8), b"labels": [label]}, protocol=2))
        self.refused(lambda: data.read_cifar(path), path)

    @pytest.mark.parametrize("keep", [0, 5, 500, -1])
    def test_truncated_pickle(self, tmp_path, keep):
        labels, pixels = cifar_records(2)
        path = tmp_path / "data_batch_1"
        path.write_bytes(pickle.dumps({b"data": pixels, b"labels": labels.tolist()}, protocol=2)[:keep])
        self.refused(lambda: data.read_cifar(path), path)

    def test_a_pickle_runs_no_code(self, tmp_path):
        class Harmful:
            def __reduce__(self):
                return os.mkdir, (str(tmp_path / "harm"),)

        path = tmp_path / "data_batch_1"
        path.write_bytes(pickle.dumps({b"data": Harmful(), b"labels": []}))
        self.refused(lambda: data.read_cifar(path), path)
        assert not (tmp_path / "harm").exists()

    def test_a_file_that_is_a_folder(self, tmp_path):
        self.refused(lambda: data.read_idx(tmp_path), tmp_path)

    def test_a_missing_file(self, tmp_path):
        self.refused(lambda: data.read_table(tmp_path / "none.csv"), tmp_path / "none.csv")

    @staticmethod
    def refused(read, path):
        with pytest.raises(DataError) as caught:
            read()
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)


class TestText:
    def test_tsv_quotation_marks_are_characters(self, tmp_path):
        path = tmp_path / "train.tsv"
        path.write_text("sentence\tlabel\nit 's \"fine \t1\n\nnot so\t0\n")
        texts, y = data.read_sentences(path)
        assert texts == ["it 's \"fine ", "not so"]
        assert y.tolist() == [1, 0]

    def test_parquet_is_read_as_tsv_is(self, tmp_path):
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        table = pyarrow.table({"idx": [0, 1], "sentence": ["good", "bad"], "label": [1, 0]})
        parquet.write_table(table, tmp_path / "train-00000-of-00001.parquet")
        (tmp_path / "dev.tsv").write_text("sentence\tlabel\nso so\t0\n")
        loaded = data.sentences(str(tmp_path))
        assert loaded.train_texts == ["good", "bad"]
        assert loaded.train_y.tolist() == [1, 0]
        assert loaded.test_texts == ["so so"]

    def test_parquet_in_several_pieces_is_read_whole(self, tmp_path):
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        for number, (text, label) in enumerate([("good", 1), ("bad", 0)]):
            table = pyarrow.table({"sentence": [text], "label": [label]})
            parquet.write_table(table, tmp_path / f"train-0000{number}-of-00002.parquet")
        (tmp_path / "dev.tsv").write_text("sentence\tlabel\nso so\t0\n")
        loaded = data.sentences(str(tmp_path))
        assert loaded.train_texts == ["good", "bad"]
        assert loaded.train_y.tolist() == [1, 0]

    def test_a_broken_parquet(self, tmp_path):
        pytest.importorskip("pyarrow")
        path = tmp_path / "train.parquet"
        path.write_bytes(b"PAR1 and then nothing")
        TestDamage.refused(lambda: data.read_sentences(path), path)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("", "expected a header"),
            ("sentence\tlabel\n", "expected a header"),
            ("text\tlabel\na\t1\n", "expected the columns"),
            ("sentence\tlabel\na\t1\nb\n", "row 2 of the data has 1 fields"),
            ("sentence\tlabel\na\t2\n", "label '2' in row 1"),
        ],
    )
    def test_broken_tsv(self, tmp_path, content, message):
        path = tmp_path / "train.tsv"
        path.write_text(content)
        with pytest.raises(DataError, match=message):
            data.read_sentences(path)

    def test_not_utf8(self, tmp_path):
        path = tmp_path / "train.tsv"
        path.write_bytes(b"sentence\tlabel\ncaf\xe9\t1\n")
        TestDamage.refused(lambda: data.read_sentences(path), path)

    def test_a_field_that_never_ends(self, tmp_path):
        """As after a quotation mark that is never closed, in a large file."""
        for path, read in ((tmp_path / "t.csv", data.read_table), (tmp_path / "train.tsv", data.read_sentences)):
            path.write_text("sentence\tlabel\n" + 200_000 * "x" + "\t1\n")
            TestDamage.refused(functools.partial(read, path), path)

    @pytest.mark.parametrize("separator", [",", ";", "\t"])
    def test_tables(self, tmp_path, separator):
        path = tmp_path / "t.csv.gz"
        rows = [("age", "name", "x y"), ("1.5", '"a' + separator + 'b"', ""), ("-2", "c", "3e2")]
        path.write_bytes(gzip.compress("\n".join(separator.join(row) for row in rows).encode()))
        columns = data.read_table(path).columns
        assert columns["age"].tolist() == [1.5, -2.0]
        assert columns["name"].tolist() == [f"a{separator}b", "c"]
        assert np.isnan(columns["x y"][0])
        assert columns["x y"][1] == 300

    def test_two_columns_of_one_name(self, tmp_path):
        path = tmp_path / "t.csv"
        path.write_text("a,a\n1,2\n")
        with pytest.raises(DataError, match="two columns have the same name"):
            data.read_table(path)


class TestWriting:
    def test_all_or_nothing(self, tmp_path):
        target = tmp_path / "new" / "file.txt"
        with atomic_path(target) as path:
            path.write_text("first")
            assert not target.exists()
        assert target.read_text() == "first"
        with contextlib.suppress(RuntimeError), atomic_path(target) as path:
            path.write_text("half of the seco")
            raise RuntimeError
        assert target.read_text() == "first"
        assert list(target.parent.iterdir()) == [target]

    def test_permissions_are_those_of_any_new_file(self, tmp_path):
        with atomic_path(tmp_path / "ours") as path:
            path.write_text("x")
        (tmp_path / "usual").write_text("x")
        assert (tmp_path / "ours").stat().st_mode == (tmp_path / "usual").stat().st_mode

    def test_a_download_that_fails_leaves_nothing(self, tmp_path):
        def fetch(folder: Path) -> Path:
            (folder / "half.bin").write_bytes(b"half")
            raise OSError("connection reset")

        with pytest.raises(DataError, match=r"the download failed \(connection reset\)\. Check the network"):
            data._download(tmp_path, "MNIST", fetch)
        assert list(tmp_path.iterdir()) == []

    def test_a_download_that_succeeds_is_moved_in_whole(self, tmp_path):
        def fetch(folder: Path) -> Path:
            assert not (tmp_path / "MNIST").exists()
            (folder / "MNIST" / "raw").mkdir(parents=True)
            (folder / "MNIST" / "raw" / "file").write_text("content")
            (folder / "leftover").write_text("")
            return folder / "MNIST"

        assert data._download(tmp_path, "MNIST", fetch) == tmp_path / "MNIST"
        assert [path.name for path in tmp_path.iterdir()] == ["MNIST"]
        assert (tmp_path / "MNIST" / "raw" / "file").read_text() == "content"

    def test_named_sets_are_downloaded_when_they_are_nowhere(self, tmp_path, monkeypatch, mnist_like):
        monkeypatch.delenv("DLKERNELS_DATA", raising=False)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        md5 = [
            hashlib.md5((mnist_like / f"{name}.gz").read_bytes(), usedforsecurity=False).hexdigest()
            for name in data._MNIST_FILES
        ]
        monkeypatch.setitem(data._MNIST_MD5, "mnist", tuple(md5))

        def fake(name, folder):
            (folder / name).mkdir()
            mnist_like.rename(folder / name / "raw")
            return folder / name

        monkeypatch.setattr(data, "_download_torchvision", fake)
        assert data.images("mnist").name == "MNIST"
        assert (tmp_path / "cache" / "dlkernels" / "MNIST" / "raw").is_dir()
        monkeypatch.setattr(data, "_download_torchvision", None)  # a second time nothing is downloaded
        assert len(data.images("mnist").train_x) == 12


def test_torchvision_imports_beside_any_torch():
    pytest.importorskip("PIL")
    try:
        vision = data.torchvision()
    except ImportError:
        pytest.skip("torchvision is not installed")
    from torchvision import datasets, transforms

    assert vision.__version__
    assert datasets.MNIST.resources[0][1] == data._MNIST_MD5["mnist"][0]
    assert transforms.Resize(4) is not None


@pytest.mark.data
@needs_data
class TestRealFiles:
    @pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
    def test_mnist_and_fashion(self, name):
        loaded = data.images(name)
        assert loaded.train_x.shape == (60_000, 1, 28, 28)
        assert loaded.test_x.shape == (10_000, 1, 28, 28)
        assert len(loaded.classes) == 10

    def test_cifar(self):
        loaded = data.images("cifar10")
        assert loaded.train_x.shape[1:] == (3, 32, 32)
        assert len(loaded.train_x) % 10_000 == 0
        assert loaded.test_x.shape == (10_000, 3, 32, 32)
        assert set(np.bincount(loaded.test_y)) == {1000}

    def test_sst2(self):
        loaded = data.sentences("sst2")
        assert (len(loaded.train_texts), len(loaded.test_texts)) == (67_349, 872)
        assert (loaded.train_y.sum(), loaded.test_y.sum()) == (37_569, 444)

    def test_tables(self):
        folder = Path(os.environ["DLKERNELS_DATA"]) / "tabular"
        if not folder.is_dir():
            pytest.skip("there is no folder `tabular` in DLKERNELS_DATA")
        housing = data.read_table(folder / "housing.csv.gz").columns
        assert len(housing["median_house_value"]) == 20_640
        assert np.isnan(housing["total_bedrooms"]).sum() == 207
        assert len(data.read_table(folder / "winequality-red.csv").columns["quality"]) == 1599
        assert len(data.read_table(folder / "diabetes.csv").columns["Y"]) == 442
