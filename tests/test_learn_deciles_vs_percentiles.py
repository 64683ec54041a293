"""Tables, batches, quantiles and ordered classes, against torch, pandas, scikit-learn and definitions."""

import gzip

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import TensorDataset

from dlkernels import DropNorm
from dlkernels.learn.deciles_vs_percentiles import (
    DataLoader,
    DropNormMLP,
    OrdinalHead,
    QuantileEncoding,
    Standardiser,
    TabularDataset,
    class_values,
    folds,
    quantile,
    quantile_labels,
    train_test_loaders,
)

NAN = float("nan")
MODES = ["linear", "lower", "higher", "midpoint", "nearest"]
HOUSES = {"rooms": [2, 3, "?", 5], "town": ["b", "a", "b", ""], "price": [10, 20, 30, "NA"]}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def written(path, text):
    path.write_text(text)
    return path


class TestTabularDataset:
    @pytest.mark.parametrize("separator", [",", ";", "\t"])
    def test_a_text_file_is_read_by_column_names(self, separator, tmp_path):
        text = "a,b,c\n1,2.5,-3e2\n4, 5 ,6\n".replace(",", separator)
        data = TabularDataset(written(tmp_path / "t.csv", text), target="b")
        assert data.feature_names == ["a", "c"]
        assert data.target_name == "b"
        assert data.x.tolist() == [[1, -300], [4, 6]]
        assert data.y.tolist() == [2.5, 5]
        assert data.x.dtype == data.y.dtype == torch.float32
        assert data.rows.tolist() == [1, 2]
        chosen = TabularDataset(str(tmp_path / "t.csv"), "a", ["c", "a"], dtype=torch.float64)  # the target among them
        assert chosen.x.tolist() == [[-300, 1], [6, 4]]
        assert chosen.x.dtype == torch.float64

    def test_byte_order_mark_quotes_windows_line_ends_and_gzip(self, tmp_path):
        path = tmp_path / "t.csv.gz"
        path.write_bytes(gzip.compress(b'\xef\xbb\xbf"a; b";y\r\n"1";2\r\n\r\n3;4\r\n'))
        data = TabularDataset(path, "y")
        assert data.feature_names == ["a; b"]
        assert data.x.tolist() == [[1], [3]]

    def test_dataframe_mapping_array_and_tensor_are_the_same_table(self, tmp_path):
        pandas = pytest.importorskip("pandas")
        array = np.arange(12.0).reshape(4, 3)
        frame = pandas.DataFrame(array, columns=["a", "b", "c"])
        frame.to_csv(tmp_path / "t.csv", index=False)
        sources = [(tmp_path / "t.csv", "b"), (frame, "b"), (frame.to_dict("list"), "b")]
        for source, target in [*sources, (array, 1), (torch.tensor(array), 1)]:
            data = TabularDataset(source, target)
            assert data.x.tolist() == array[:, [0, 2]].tolist()
            assert data.y.tolist() == array[:, 1].tolist()

    def test_pandas_kinds_of_missing_and_of_numbers(self):
        pandas = pytest.importorskip("pandas")
        frame = pandas.DataFrame(
            {
                "integer": pandas.array([1, None, 3], dtype="Int64"),
                "flag": [True, False, True],
                "object": [None, "2", 3.5],
                "kind": pandas.Categorical(["x", None, "y"]),
                "y": [1, 2, 3],
            }
        )
        data = TabularDataset(frame, "y", categorical=["kind"])
        expected = [[1, 1, NAN, 1, 0], [NAN, 0, 2, NAN, NAN], [3, 1, 3.5, 0, 1]]
        np.testing.assert_array_equal(data.x.numpy(), np.array(expected, dtype=np.float32))

    def test_categories_become_one_hot_columns(self):
        data = TabularDataset(HOUSES, "price", categorical=["town"])
        assert data.feature_names == ["rooms", "town=a", "town=b"]
        np.testing.assert_array_equal(data.x.numpy(), np.float32([[2, 0, 1], [3, 1, 0], [NAN, 0, 1]]))

    def test_numbers_may_be_categories(self):
        data = TabularDataset({"k": [3, 1, 3], "y": [1, 2, 3]}, "y", categorical=["k"])
        assert data.feature_names == ["k=1", "k=3"]
        assert data.x.tolist() == [[0, 1], [1, 0], [0, 1]]

    def test_missing_values_by_the_stated_rule(self):
        """Rows without a target go; blanks stay NaN for the training mean, or their rows go, or it is an error."""
        table = {**HOUSES, "price": [10, "", 30, 40]}
        kept = TabularDataset(table, "price", categorical=["town"])
        assert kept.rows.tolist() == [1, 3, 4]
        np.testing.assert_array_equal(kept.x.numpy(), np.float32([[2, 0, 1], [NAN, 0, 1], [5, NAN, NAN]]))
        dropped = TabularDataset(table, "price", categorical=["town"], missing="drop")
        assert dropped.rows.tolist() == [1]
        assert dropped.y.tolist() == [10]
        with pytest.raises(ValueError, match="column 'price', row 2: missing"):
            TabularDataset(table, "price", categorical=["town"], missing="error")
        with pytest.raises(ValueError, match="column 'town=a', row 4: missing"):
            TabularDataset({**table, "rooms": [1, 2, 3, 4], "price": [1, 2, 3, 4]}, "price", categorical=["town"],
                           missing="error")  # fmt: skip

    @pytest.mark.parametrize("blank", ["", "  ", "NA", "n/a", "NaN", "null", "None", "?", None, NAN])
    def test_what_counts_as_missing(self, blank):
        data = TabularDataset({"x": [1, blank], "y": [1, 2]}, "y")
        assert data.x.isnan().tolist() == [[False], [True]]

    @pytest.mark.parametrize(
        ("table", "chosen", "message"),
        [
            ({"x": [1], "y": [2]}, {"target": "z"}, "there is no column 'z'; there are x, y"),
            ({"x": [1], "y": [2]}, {"features": ["x", "w"]}, "there is no column 'w'; there are x, y"),
            ({"x": [1], "y": [2]}, {"categorical": ["v"]}, "there is no column 'v'; there are x, y"),
            ({"x": [1], "y": [2]}, {"categorical": ["y"]}, "categorical column 'y' is not among the features"),
            ({"x": [1], "y": [2]}, {"features": []}, "at least one feature"),
            ({"x": [1], "y": [2]}, {"missing": "zero"}, "mean, drop, error, got 'zero'"),
            ({"x": [1, 2, "abc"], "y": [1, 2, 3]}, {}, "column 'x', row 3: 'abc' is not a finite number; name it in"),
            ({"x": [1, "inf"], "y": [1, 2]}, {}, "column 'x', row 2: 'inf' is not a finite number$"),
            ({"x": [1, 1e39], "y": [1, 2]}, {}, "column 'x', row 2: '1e\\+39' is too large for torch.float32"),
            ({"x": [1, 2], "y": [1, "-1e39"]}, {}, "column 'y', row 2: '-1e39' is too large for torch.float32"),
            ({"x": [10**400], "y": [1]}, {}, "column 'x', row 1: '10{400}' is not a finite number$"),
            ({"x": ["1_000"], "y": [1]}, {}, "column 'x', row 1: '1_000' is not"),
            ({"x": [1, 2], "y": ["low", 2]}, {}, "column 'y', row 1: 'low' is not"),
            ({"x": [1, 2], "y": [1]}, {}, "one length"),
            ({"x": [1, 2], "y": [None, ""]}, {}, "no row is left"),
            ({"x": ["", None], "y": [1, 2]}, {"categorical": ["x"]}, "categorical column 'x' has no values"),
            (np.zeros(3), {}, r"two dimensions.*\(3,\)"),
        ],
    )
    def test_what_is_wrong_is_named_with_its_column_and_row(self, table, chosen, message):
        with pytest.raises(ValueError, match=message):
            TabularDataset(table, **{"target": "y", **chosen})

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("a,y\n1,2\n3\n", r"t.csv: row 2 has 1 cells, the header has 2"),
            ("a,a\n1,2\n", "two columns have the same name"),
            ("a,y\n", "at least one row"),
            ("", "at least one row"),
        ],
    )
    def test_what_is_wrong_in_a_file_is_named_with_its_row(self, text, message, tmp_path):
        with pytest.raises(ValueError, match=message):
            TabularDataset(written(tmp_path / "t.csv", text), "y")

    def test_a_missing_file_and_a_wrong_source(self, tmp_path):
        with pytest.raises(FileNotFoundError):
            TabularDataset(tmp_path / "none.csv", "y")
        with pytest.raises(TypeError, match="got int"):
            TabularDataset(3, "y")
        for argument in ("features", "categorical"):
            with pytest.raises(TypeError, match=f"{argument} must be a list of names, got the text 'xy'"):
                TabularDataset({"x": [1], "y": [2]}, "y", **{argument: "xy"})

    def test_is_a_dataset(self):
        data = TabularDataset(torch.arange(12.0).reshape(4, 3), 2)
        assert len(data) == 4
        x, y = data[1]
        assert (x.tolist(), y.item()) == ([3, 4], 5)
        assert data[torch.tensor([2, 0])][1].tolist() == [8, 2]
        assert data[1:3][1].tolist() == [5, 8]
        batches = list(torch.utils.data.DataLoader(data, batch_size=3))  # torch's loader takes it, too
        assert torch.equal(batches[0][0], data.x[:3])

    def test_subsets_and_splits_have_every_row_once(self):
        data = TabularDataset(torch.arange(40.0).reshape(20, 2), 1)
        train, test = data.split(0.25, generator(1))
        assert (len(train), len(test)) == (15, 5)
        assert sorted([*train.rows.tolist(), *test.rows.tolist()]) == list(range(1, 21))
        assert torch.equal(test.x, data.x[test.rows - 1])
        assert torch.equal(data.split(0.25, generator(1))[1].rows, test.rows)
        assert not torch.equal(data.split(0.25, generator(2))[1].rows, test.rows)
        assert data.subset(data.y > 30).rows.tolist() == [16, 17, 18, 19, 20]
        for share in (0, 0.001, 1, -1):
            with pytest.raises(ValueError, match="empty"):
                data.split(share)


class TestStandardiser:
    def test_mean_zero_and_deviation_one(self):
        x = 1e3 + 5 * torch.rand(100, 3, generator=generator())
        scaled = Standardiser(x)(x)
        torch.testing.assert_close(scaled.mean(dim=0), torch.zeros(3), atol=1e-3, rtol=0)
        torch.testing.assert_close(scaled.std(dim=0, correction=0), torch.ones(3), atol=1e-3, rtol=0)

    def test_is_scikit_learns(self):
        preprocessing = pytest.importorskip("sklearn.preprocessing")
        x = torch.randn(50, 4, dtype=torch.float64, generator=generator())
        x[:, 2] = 7
        x[3, 0] = NAN
        theirs = preprocessing.StandardScaler().fit(x.numpy()).transform(x.numpy())
        torch.testing.assert_close(Standardiser(x)(x), torch.from_numpy(theirs).nan_to_num(nan=0.0))

    def test_a_blank_becomes_the_training_mean(self):
        train = torch.tensor([[1.0, NAN], [3.0, NAN], [NAN, NAN]])
        standardise = Standardiser(train)
        assert standardise.mean.tolist() == [2, 0]
        assert standardise(train).tolist() == [[-1, 0], [1, 0], [0, 0]]
        assert standardise(torch.tensor([[NAN, 5.0]])).tolist() == [[0, 5]]

    def test_a_constant_feature_is_shifted_only(self):
        assert Standardiser(torch.full((7, 1), 0.1))(torch.tensor([[0.1], [1.1]])).flatten().tolist() == [0, 1]


class TestDataLoader:
    def dataset(self, rows=10):
        return TensorDataset(torch.arange(float(rows))[:, None], torch.arange(rows))

    @given(st.integers(0, 30), st.integers(1, 12), st.booleans(), st.booleans())
    @settings(max_examples=60, deadline=None)
    def test_batches_and_length_are_torchs(self, rows, batch_size, shuffle, drop_last):
        dataset = self.dataset(rows)
        ours = DataLoader(dataset, batch_size, shuffle, drop_last, generator())
        theirs = torch.utils.data.DataLoader(dataset, batch_size, drop_last=drop_last)
        sizes = [len(y) for _, y in ours]
        assert sizes == [len(y) for _, y in theirs]
        assert len(ours) == len(theirs) == len(sizes)
        seen = sorted(torch.cat([y for _, y in ours]).tolist()) if sizes else []
        if not drop_last:
            assert seen == list(range(rows))
        assert len(set(seen)) == len(seen)

    def test_in_order_without_shuffle_and_again_each_epoch(self):
        loader = DataLoader(self.dataset(), batch_size=4)
        for _ in range(2):
            assert [y.tolist() for _, y in loader] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]

    def test_shuffle_has_a_new_order_each_epoch_and_the_generator_repeats_it(self):
        def epochs(seed):
            loader = DataLoader(self.dataset(30), 7, shuffle=True, generator=generator(seed))
            return [torch.cat([y for _, y in loader]).tolist() for _ in range(3)]

        assert epochs(3) == epochs(3)
        assert epochs(3) != epochs(4)
        first, second, third = epochs(3)
        assert first != second != third
        assert sorted(first) == sorted(second) == list(range(30))

    def test_x_and_y_stay_together(self):
        for x, y in DataLoader(self.dataset(), 3, shuffle=True, generator=generator()):
            assert torch.equal(x[:, 0].long(), y)

    def test_two_loops_at_once_do_not_disturb_each_other(self):
        loader = DataLoader(self.dataset(6), 2)
        assert [(a[1].tolist(), b[1].tolist()) for a, b in zip(loader, loader, strict=True)] == [
            ([0, 1], [0, 1]),
            ([2, 3], [2, 3]),
            ([4, 5], [4, 5]),
        ]

    def test_standardises_batches(self):
        dataset = TabularDataset(torch.arange(20.0).reshape(10, 2), 1)
        loader = DataLoader(dataset, 4, standardise=Standardiser(dataset.x))
        torch.testing.assert_close(torch.cat([x for x, _ in loader]), Standardiser(dataset.x)(dataset.x))

    @pytest.mark.parametrize("batch_size", [0, -1, 2.5, True, "4", None])
    def test_refuses_what_is_not_a_size(self, batch_size):
        message = f"batch_size should be a positive integer value, but got batch_size={batch_size}$"
        with pytest.raises(ValueError, match=message):
            DataLoader(self.dataset(), batch_size)

    def test_the_test_rows_never_touch_the_training_batches(self):
        """The same split, once with absurd values in all test rows: the training batches are the same, bit for bit."""
        table = torch.rand(50, 4, generator=generator())
        clean_train, clean_test = train_test_loaders(TabularDataset(table, 3), 0.3, 8, generator(5))
        table[clean_test.dataset.rows - 1] = 1e6
        spoilt_train, spoilt_test = train_test_loaders(TabularDataset(table, 3), 0.3, 8, generator(5))
        for (x, y), (other_x, other_y) in zip(clean_train, spoilt_train, strict=True):
            assert torch.equal(x, other_x)
            assert torch.equal(y, other_y)
        assert clean_train.shuffle
        assert not clean_test.shuffle
        assert next(iter(spoilt_test))[0].min() > 1e5  # scaled as the training rows are, not to 0
        assert len(clean_train.dataset) == 35

    def test_a_linear_model_learns_from_it(self):
        x = torch.randn(200, 3, generator=generator())
        table = torch.cat([100 * x + 7, x @ torch.tensor([[1.0], [2.0], [-3.0]])], dim=1)
        train, test = train_test_loaders(TabularDataset(table, 3), 0.2, 20, generator(1))
        model = nn.Linear(3, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(20):
            for x, y in train:
                optimizer.zero_grad()
                ((model(x)[:, 0] - y) ** 2).mean().backward()
                optimizer.step()
        with torch.no_grad():
            assert all(((model(x)[:, 0] - y) ** 2).mean() < 1e-4 for x, y in test)


class TestFolds:
    @pytest.mark.parametrize(("rows", "k"), [(10, 5), (442, 5), (7, 3), (4, 4), (5, 2)])
    def test_every_row_is_the_test_once(self, rows, k):
        parts = folds(rows, k, generator())
        assert len(parts) == k
        assert sorted(torch.cat([test for _, test in parts]).tolist()) == list(range(rows))
        for train, test in parts:
            assert sorted([*train.tolist(), *test.tolist()]) == list(range(rows))
            assert len(test) in (rows // k, rows // k + 1)

    def test_the_generator_decides(self):
        assert torch.equal(folds(20, 4, generator(1))[0][1], folds(20, 4, generator(1))[0][1])
        assert not torch.equal(folds(20, 4, generator(1))[0][1], folds(20, 4, generator(2))[0][1])

    @pytest.mark.parametrize("k", [1, 11])
    def test_refuses_what_cannot_be(self, k):
        with pytest.raises(ValueError, match=r"k must lie in 2..10"):
            folds(10, k)


class TestQuantile:
    @pytest.mark.parametrize("interpolation", MODES)
    @given(
        st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=40),
        st.lists(st.floats(0, 1, width=32), max_size=6),
        st.sampled_from([torch.float32, torch.float64]),
    )
    @settings(max_examples=60, deadline=None)
    def test_is_torchs_bit_for_bit(self, interpolation, values, q, dtype):
        values, q = torch.tensor(values, dtype=dtype), torch.tensor([*q, 0, 0.5, 1], dtype=dtype)
        expected = torch.quantile(values, q, interpolation=interpolation)
        assert torch.equal(quantile(values, q, interpolation=interpolation), expected)
        for one in q.tolist()[:2]:
            expected = torch.quantile(values, one, interpolation=interpolation)
            assert torch.equal(quantile(values, one, interpolation=interpolation), expected)

    @pytest.mark.parametrize("interpolation", MODES)
    @pytest.mark.parametrize("keepdim", [False, True])
    @pytest.mark.parametrize("dim", [None, 0, 1, 2, -1, -3])
    @pytest.mark.parametrize("q", [0.3, torch.tensor(0.3), torch.tensor([0.0, 0.25, 0.5, 1.0, 0.1]), torch.zeros(0)])
    def test_dimensions_are_torchs(self, q, dim, keepdim, interpolation):
        x = torch.randint(5, (3, 4, 5), generator=generator()).float()  # ties
        x[0, 1, 2] = NAN
        expected = torch.quantile(x, q, dim, keepdim, interpolation=interpolation)
        torch.testing.assert_close(
            quantile(x, q, dim, keepdim, interpolation=interpolation), expected, rtol=0, atol=0, equal_nan=True
        )

    @pytest.mark.parametrize("interpolation", MODES)
    @pytest.mark.parametrize(
        "values", [[1.0, NAN, 2.0], [NAN], [1.0, float("inf")], [-float("inf"), 2.0, float("inf")]], ids=str
    )
    def test_nan_and_infinity_are_torchs(self, values, interpolation):
        x, q = torch.tensor(values), torch.tensor([0.0, 0.3, 0.5, 1.0])
        ours = quantile(x, q, interpolation=interpolation)
        expected = torch.quantile(x, q, interpolation=interpolation)
        torch.testing.assert_close(ours, expected, rtol=0, atol=0, equal_nan=True)
        assert ours.isnan().all() or not x.isnan().any()

    def test_a_number_and_odd_strides(self):
        for q in (0.5, torch.tensor([0.2, 0.9])):
            for dim, keepdim in ((None, False), (0, False), (-1, True), (None, True)):
                x = torch.tensor(3.0)
                assert torch.equal(quantile(x, q, dim, keepdim), torch.quantile(x, q, dim, keepdim))
        x = torch.rand(6, 8, generator=generator())[::2, 1::3].t()
        assert torch.equal(quantile(x, 0.4, 1), torch.quantile(x, 0.4, 1))

    @pytest.mark.parametrize("interpolation", MODES)
    def test_gradient_is_torchs(self, interpolation):
        x = torch.rand(4, 7, dtype=torch.float64, generator=generator()).requires_grad_()
        q = torch.tensor([0.15, 0.5], dtype=torch.float64)
        weight = torch.rand(2, 4, dtype=torch.float64, generator=generator(1))
        grads = [
            torch.autograd.grad((f(x, q, 1, interpolation=interpolation) * weight).sum(), x)[0]
            for f in (quantile, torch.quantile)
        ]
        torch.testing.assert_close(*grads)

    @pytest.mark.parametrize(
        "arguments",
        [
            {"x": torch.zeros(0)},
            {"x": torch.zeros(2, 0), "dim": 1},
            {"x": torch.zeros(2, 0), "dim": 0},
            {"x": torch.arange(3)},
            {"x": torch.zeros(3, dtype=torch.half)},
            {"x": torch.zeros(3, dtype=torch.complex64)},
            {"q": torch.tensor(0.5, dtype=torch.double)},
            {"q": torch.tensor(1)},
            {"q": torch.zeros(2, 2)},
            {"q": torch.tensor(0.5, device="meta")},
            {"q": 1.5},
            {"q": -0.25},
            {"q": NAN},
            {"q": torch.tensor([0.5, -0.1])},
            {"q": torch.tensor([NAN])},
            {"dim": 1},
            {"dim": -2},
            {"x": torch.zeros(2, 3), "dim": 5},
            {"x": torch.tensor(1.0), "dim": 1},
            {"interpolation": "cubic"},
            # two mistakes at once: the one that torch looks for first is named
            {"q": 1.5, "interpolation": "cubic"},
            {"q": torch.tensor(1.5), "interpolation": "cubic"},
            {"x": torch.zeros(0), "dim": 1},
            {"x": torch.zeros(0), "q": torch.zeros(2, 2)},
            {"x": torch.arange(3), "q": torch.zeros(2, 2)},
            {"x": torch.zeros(0), "q": torch.tensor(0.5, dtype=torch.double)},
            {"q": torch.tensor(1.5), "dim": 5},
        ],
        ids=str,
    )
    def test_errors_are_torchs(self, arguments):
        arguments = {"x": torch.rand(4), "q": 0.5, **arguments}
        x, q = arguments.pop("x"), arguments.pop("q")
        errors = []
        for function in (torch.quantile, quantile):
            with pytest.raises((RuntimeError, IndexError)) as caught:
                function(x, q, **arguments)
            errors.append((type(caught.value), str(caught.value)))
        assert errors[0] == errors[1]

    def test_wrong_types(self):
        for arguments in (
            ([1.0], 0.5),
            (torch.rand(3), "0.5"),
            (torch.rand(3), [0.5]),
            (torch.rand(3), True),
            (torch.rand(3), 0.5, 0.5),
        ):
            with pytest.raises(TypeError, match=r"quantile\(\)"):
                quantile(*arguments)

    @pytest.mark.slow
    def test_more_numbers_than_torch_takes(self):
        n = 2**24 + 3
        with pytest.raises(RuntimeError, match="too large"):
            torch.quantile(torch.zeros(n), 0.5)
        x = torch.arange(n, dtype=torch.float64).flip(0)
        assert quantile(x, 0.5).item() == (n - 1) / 2


class TestQuantileLabels:
    def test_classes_have_equal_sizes(self):
        y = torch.rand(1000, generator=generator())
        found = quantile_labels(y, 10)
        assert found.classes == 10
        assert len(found.edges) == 9
        assert torch.bincount(found.labels).tolist() == [100] * 10

    @pytest.mark.parametrize("n", [2, 4, 10, 100])
    def test_are_those_of_pandas(self, n):
        pandas = pytest.importorskip("pandas")
        y = torch.randn(500, dtype=torch.float64, generator=generator())
        found = quantile_labels(y, n)
        assert found.labels.tolist() == pandas.qcut(y.numpy(), n, labels=False).tolist()
        torch.testing.assert_close(found.edges, torch.quantile(y, torch.arange(1, n).double() / n))

    def test_an_edge_belongs_to_the_class_below(self):
        found = quantile_labels(torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0]), 2)
        assert found.edges.tolist() == [2]
        assert found.labels.tolist() == [0, 0, 0, 1, 1]

    def test_edges_come_from_the_training_rows_only(self):
        y = torch.rand(100, generator=generator())
        train = torch.randperm(100, generator=generator())[:80]
        found = quantile_labels(y, 10, train)
        alone = quantile_labels(y[train], 10)
        assert torch.equal(found.edges, alone.edges)
        assert torch.equal(found.labels[train], alone.labels)
        spoilt = y.clone()
        spoilt[torch.ones(100, dtype=torch.bool).scatter(0, train, False)] = 1e6
        changed = quantile_labels(spoilt, 10, train)
        assert torch.equal(changed.edges, found.edges)
        assert changed.labels.max() == 9  # beyond all edges is the last class
        mask = torch.zeros(100, dtype=torch.bool).scatter(0, train, True)
        assert torch.equal(quantile_labels(y, 10, mask).edges, found.edges)

    def test_tied_edges_merge_and_the_number_that_remains_is_reported(self):
        y = torch.tensor([1.0] * 50 + [2.0] * 30 + [3.0] * 20)
        found = quantile_labels(y, 10)
        assert found.classes == 3
        assert found.edges.tolist() == [1, 2]
        assert torch.bincount(found.labels).tolist() == [50, 30, 20]

    def test_a_constant_target_is_one_class(self):
        found = quantile_labels(torch.full((5,), 7.0), 100)
        assert (found.classes, found.edges.tolist(), found.labels.tolist()) == (1, [], [0] * 5)

    def test_fewer_rows_than_classes(self):
        found = quantile_labels(torch.tensor([3.0, 1.0, 2.0]), 100)
        assert found.classes == 3
        assert found.labels.tolist() == [2, 0, 1]

    @given(st.lists(st.integers(0, 12), min_size=1, max_size=60), st.integers(1, 30), st.integers(0, 10**6))
    @settings(max_examples=150, deadline=None)
    def test_by_definition(self, values, n, seed):
        """Every class has a training row, labels are the edges below, order is kept, no class is larger than needed."""
        y = torch.tensor(values, dtype=torch.float64)
        train = torch.randperm(len(y), generator=generator(seed))[: max(1, len(y) // 2)]
        labels, edges, classes = quantile_labels(y, n, train)
        assert classes == len(edges) + 1 <= min(n, len(y[train].unique()))
        assert sorted(labels[train].unique().tolist()) == list(range(classes))
        assert labels.tolist() == [sum(edge < value for edge in edges.tolist()) for value in y.tolist()]
        wanted = [torch.quantile(y[train], k / n).item() for k in range(1, n)]
        assert edges.tolist() == sorted(set(edges.tolist()))
        assert all(min(abs(edge - w) for w in wanted) < 1e-12 for edge in edges.tolist())

    @pytest.mark.parametrize(
        ("y", "n", "train", "message"),
        [
            (torch.rand(3), 0, None, "at least 1, got 0"),
            (torch.rand(3), 2.5, None, "whole number of at least 1, got 2.5"),
            (torch.rand(3, 1), 2, None, r"one dimension, got torch.float32 of shape \(3, 1\)"),
            (torch.arange(3), 2, None, "y must be float32 or float64 of one dimension, got torch.int64"),
            (torch.tensor([1.0, NAN]), 2, None, r"y\[1\] is nan"),
            (torch.tensor([float("inf")]), 2, None, r"y\[0\] is inf"),
            (torch.rand(3), 2, torch.zeros(3, dtype=torch.bool), "training row"),
        ],
    )
    def test_refuses_what_cannot_be_labelled(self, y, n, train, message):
        with pytest.raises(ValueError, match=message):
            quantile_labels(y, n, train)

    def test_class_values_are_medians(self):
        y = torch.tensor([1.0, 2.0, 9.0, 20.0, 30.0])
        assert class_values(y, torch.tensor([0, 0, 0, 1, 1]), 2).tolist() == [2, 25]


class TestNets:
    def test_encoding_is_the_definition(self):
        x = torch.rand(200, 2, dtype=torch.float64, generator=generator())
        encode = QuantileEncoding(x, bins=4)
        edges = torch.quantile(x, torch.linspace(0, 1, 5, dtype=torch.float64), dim=0)
        asked = torch.rand(30, 2, dtype=torch.float64, generator=generator(1)) * 2 - 0.5
        encoded = encode(asked)
        assert encode.width == 8
        for f in range(2):
            for b in range(4):
                low, high = edges[b, f], edges[b + 1, f]
                expected = ((asked[:, f] - low) / (high - low)).clamp(0, 1)
                torch.testing.assert_close(encoded[:, 4 * f + b], expected)

    def test_encoding_of_a_training_row_is_its_rank(self):
        x = torch.randperm(101, generator=generator()).float()[:, None]
        torch.testing.assert_close(QuantileEncoding(x, bins=20)(x).sum(dim=1), x[:, 0] / 5)

    def test_encoding_merges_ties_and_leaves_out_constants(self):
        x = torch.tensor([[0.0, 5.0, 1.0], [1.0, 5.0, 2.0], [1.0, 5.0, 3.0], [1.0, 5.0, 4.0]])
        encode = QuantileEncoding(x, bins=3)
        assert encode.feature.tolist() == [0, 2, 2, 2]
        assert encode(x).isfinite().all()
        state = encode.state_dict()
        assert set(state) == {"feature", "low", "high"}

    def test_the_perceptron_drops_and_normalises_while_training(self):
        torch.manual_seed(0)
        model = DropNormMLP(6, 4, hidden=20, p=0.5)
        assert sum(isinstance(layer, DropNorm) for layer in model.layers) == 2
        hidden = model.layers[:2](torch.rand(8, 6))
        assert ((hidden == 0).all(dim=0)).sum() == 10
        model.eval()
        x = torch.rand(8, 6)
        assert torch.equal(model(x), model(x))
        assert model(x).shape == (8, 4)


class TestOrdinalHead:
    def head(self, features=3, classes=5, seed=0):
        torch.manual_seed(seed)
        head = OrdinalHead(features, classes).double()
        with torch.no_grad():
            for parameter in head.parameters():
                parameter.add_(torch.randn(parameter.shape, dtype=torch.float64) / 2)
        return head

    def test_probabilities_are_the_definition(self):
        head, x = self.head(), torch.randn(7, 3, dtype=torch.float64, generator=generator())
        p = head(x).exp()
        torch.testing.assert_close(p.sum(dim=1), torch.ones(7, dtype=torch.float64))
        above = torch.sigmoid(head.log_sharpness.exp() * (head.score(x) - head.thresholds))  # P(class > c)
        padded = torch.cat([torch.ones(7, 1), above, torch.zeros(7, 1)], dim=1)
        torch.testing.assert_close(p, padded[:, :-1] - padded[:, 1:])

    @pytest.mark.parametrize("classes", [2, 3, 10, 100])
    def test_it_starts_with_equal_classes(self, classes):
        log_p = OrdinalHead(4, classes)(torch.zeros(1, 4))
        torch.testing.assert_close(log_p.exp(), torch.full((1, classes), 1 / classes))

    def test_thresholds_are_ordered_whatever_is_learned(self):
        head = self.head(classes=40)
        with torch.no_grad():
            head.steps.normal_(generator=generator()).mul_(10)
        assert (head.thresholds.diff() > 0).all()

    def test_far_away_scores_stay_finite(self):
        head = OrdinalHead(1, 10)
        with torch.no_grad():
            head.score.weight.fill_(1.0)
            head.log_sharpness.fill_(5.0)
        x = torch.tensor([[-1e3], [1e3]], requires_grad=True)
        log_p = head(x)
        assert log_p.isfinite().all()
        assert log_p.argmax(dim=1).tolist() == [0, 9]
        nn.functional.cross_entropy(log_p, torch.tensor([5, 5])).backward()
        assert x.grad.isfinite().all()

    def test_gradcheck(self):
        head = self.head()
        x = torch.randn(4, 3, dtype=torch.float64, generator=generator(), requires_grad=True)
        assert torch.autograd.gradcheck(head, x)
        assert torch.autograd.gradcheck(lambda *p: torch.func.functional_call(
            head, dict(zip(dict(head.named_parameters()), p, strict=True)), x), tuple(head.parameters()))  # fmt: skip

    def test_one_score_is_enough_where_softmax_needs_many(self):
        """Ordered classes of a linear target: the head finds them; a linear softmax, as long trained, mostly not."""
        x = torch.randn(600, 3, generator=generator())
        labels = quantile_labels(x @ torch.tensor([1.0, -2.0, 0.5]), 20).labels
        right = []
        for model in (OrdinalHead(3, 20), nn.Linear(3, 20)):
            optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
            falling = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0, 300)
            for _ in range(300):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x), labels).backward()
                optimizer.step()
                falling.step()
            right.append((model(x).argmax(dim=1) == labels).float().mean().item())
        assert right[0] > 0.95
        assert right[1] < right[0] - 0.2

    def test_refuses_fewer_than_two_classes(self):
        with pytest.raises(ValueError, match="at least 2, got 1"):
            OrdinalHead(3, 1)
