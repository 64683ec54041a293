"""The experiment deciles_vs_percentiles: what it writes, what it promises, and what it refuses."""

import json
import os
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")
pytest.importorskip("typer")
pytest.importorskip("tqdm")

import torch

import dlkernels
from dlkernels.experiments import DataError, Options, cli
from dlkernels.experiments import deciles_vs_percentiles as experiment
from dlkernels.learn.deciles_vs_percentiles import folds

FIGURES = ("classes", "scores", "bands", "sweep", "luck")
TOPIC = "deciles_vs_percentiles"


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    """What one smoke run wrote."""
    out = tmp_path_factory.mktemp("run")
    assert cli.main(["run", TOPIC, "--smoke", "--out", str(out)]) == 0
    return json.loads((out / "metrics.json").read_text())


def options(tmp_path, **chosen):
    return Options(TOPIC, tmp_path, **{"form": "smoke", **chosen})


def one_fold(problem, with_target, n, number=0):
    table = problem.table(with_target)
    train, test = folds(len(table), 5, torch.Generator().manual_seed(0))[number]
    return experiment.make_fold(table, n, train, test)


def accuracy(fold, answer):
    return (answer[0] == fold.test_labels).double().mean().item()


def write_table(path, rows=100, extra=""):
    """A table whose target is x + 2 z, with a text column and blanks."""
    random = np.random.default_rng(0)
    x, z = random.normal(size=(2, rows))
    lines = [
        f"{a:.6f},{'' if n % 10 == 3 else f'{b:.6f}'},{'ab'[n % 2]},{a + 2 * b:.6f}"
        for n, (a, b) in enumerate(zip(x, z, strict=True))
    ]
    path.write_text("\n".join(["x,z,town,price", *lines]) + extra)
    return path


# -------------------------------------------------------------------------------------------------------- what it does


def test_every_question_has_every_methods_score(record):
    assert record["figures"] == [f"{name}.png" for name in FIGURES]
    found = {(s["target_among_features"], s["classes"], s["method"]): s for s in record["results"]["scores"]}
    for with_target, n in experiment.QUESTIONS:
        for method in ("always the middle", "ridge, then classes", *experiment.NETS):
            score = found[with_target, n, method]
            assert 0 <= score["accuracy"] <= score["within_one_class"] <= 1
            assert score["standard_error"] == pytest.approx(score["spread"] / score["folds"] ** 0.5)
    assert len(record["results"]["single_splits"]["10"]) == 10
    assert record["results"]["classes_that_remain"]["10"] == 10
    assert 80 < record["results"]["classes_that_remain"]["100"] < 100  # 300 whole numbers have ties
    assert found[True, 10, "ridge, then classes"]["accuracy"] > 0.9
    assert found[False, 10, "ridge, then classes"]["accuracy"] < 0.4


@pytest.mark.slow
def test_runs_are_repeatable(record, tmp_path):
    assert cli.main(["run", TOPIC, "--smoke", "--out", str(tmp_path)]) == 0
    assert json.loads((tmp_path / "metrics.json").read_text())["results"] == record["results"]


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_the_same_net_on_every_backend(backend, tmp_path):
    fold = one_fold(experiment.load(options(tmp_path)), True, 10)
    method = experiment.trained("MLP, DropNorm")
    native = method(fold, options(tmp_path))
    with dlkernels.backend(backend):
        other = method(fold, options(tmp_path))
    assert (native[0] != other[0]).double().mean() < 0.05  # rounding may decide a close call


# ---------------------------------------------------------------------------------------------------- what it promises


def test_nothing_is_learned_from_the_test_rows(tmp_path):
    """Other test rows change neither edges nor what a method says about a row."""
    problem = experiment.load(options(tmp_path, form="full"))
    table = problem.without
    train, test = folds(len(table), 5, torch.Generator().manual_seed(0))[0]
    fold = experiment.make_fold(table, 10, train, test)
    table.x[test[1:]] *= 1000
    table.y[test[1:]] += 1000
    other = experiment.make_fold(table, 10, train, test)
    assert torch.equal(fold.edges, other.edges)
    assert torch.equal(fold.x, other.x)
    assert torch.equal(fold.test_x[0], other.test_x[0])
    for name, method in experiment.methods(problem, 10, options(tmp_path)).items():
        ours, theirs = (method(f, options(tmp_path)) for f in (fold, other))
        assert ours[0][0] == theirs[0][0], name


def test_ridge_is_scikit_learns(tmp_path):
    from sklearn.linear_model import Ridge

    fold = one_fold(experiment.load(options(tmp_path, form="full")), False, 10)
    expected = Ridge(alpha=1.0).fit(fold.x.double().numpy(), fold.y.double().numpy())
    _, value = experiment.ridge(fold, options(tmp_path))
    np.testing.assert_allclose(value.numpy(), expected.predict(fold.test_x.double().numpy()), rtol=1e-5)


@pytest.mark.slow
def test_the_ordinal_net_reads_the_target_out(tmp_path):
    """Two folds with the full form's plan."""
    chosen = options(tmp_path, form="full")
    problem = experiment.load(chosen)
    for n, least in ((10, 0.92), (100, 0.45)):
        parts = [one_fold(problem, True, n, number) for number in range(2)]
        found = [accuracy(fold, experiment.trained("ordinal")(fold, chosen)) for fold in parts]
        assert np.mean(found) >= least, found


@pytest.mark.slow
def test_without_the_target_a_net_is_as_good_as_classical_methods(tmp_path):
    """Five folds, deciles: the linear net within one standard error of the best of ridge and logistic regression."""
    chosen = options(tmp_path, form="full")
    problem = experiment.load(chosen)
    parts = [one_fold(problem, False, 10, number) for number in range(5)]
    found = {
        method.__name__: np.array([accuracy(fold, method(fold, chosen)) for fold in parts])
        for method in (experiment.ridge, experiment.logistic_regression, experiment.trained("linear"))
    }
    net = found.pop("method")
    best = max(found.values(), key=np.mean)
    assert net.mean() >= best.mean() - best.std(ddof=1) / len(best) ** 0.5
    assert net.mean() > 0.15


def test_blocks_of_a_confusion_matrix_keep_every_row():
    matrix = torch.arange(49).reshape(7, 7)
    blocks = experiment._in_blocks(matrix, 3)
    assert blocks.shape == (3, 3)
    assert blocks[0, 0] == matrix[:3, :3].sum()
    assert blocks[2, 2] == matrix[6, 6]
    assert blocks.sum() == matrix.sum()


def test_ctrl_c_leaves_a_report_of_what_is_finished(tmp_path, monkeypatch):
    real, calls = experiment.evaluate, []

    def interrupting(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        real(*arguments)

    monkeypatch.setattr(experiment, "evaluate", interrupting)
    cli.main(["run", TOPIC, "--smoke", "--out", str(tmp_path)])
    record = json.loads((tmp_path / "metrics.json").read_text())
    assert record["interrupted"]
    assert record["figures"] == ["classes.png", "scores.png"]
    assert {score["classes"] for score in record["results"]["scores"]} == {10}
    assert len(record["headlines"]) == 1


# ---------------------------------------------------------------------------------------------------------- own tables


def test_own_table_with_text_and_blanks(tmp_path):
    path = write_table(tmp_path / "own.csv")
    problem = experiment.load(options(tmp_path, form="full", data=str(path)))
    assert problem.without.target_name == "price"
    assert problem.without.feature_names == ["x", "z", "town=a", "town=b"]
    assert problem.with_target.feature_names[-1] == "price"
    assert int(problem.without.x.isnan().sum()) == 10
    assert torch.equal(problem.without.rows, problem.with_target.rows)


def test_a_table_is_found_below_root_and_in_the_folder_of_the_variable(tmp_path, monkeypatch):
    (tmp_path / "tabular").mkdir()
    write_table(tmp_path / "tabular" / "own.csv")
    chosen = options(tmp_path, data="tabular/own.csv")
    assert len(experiment.load(replace(chosen, root=tmp_path)).without) == 100
    monkeypatch.setenv("DLKERNELS_DATA", str(tmp_path))
    assert len(experiment.load(chosen).without) == 100


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n" + "x,y\n" * 60, "no column of numbers"),
        ("a,b\n" + "1,2\n" * 60, "different values of 'b'"),
        ("a,b\n" + "1,2\n" * 9, "at least 50 rows"),
        ("a,b\n" + "1,1\n" * 30 + "1,2\n" * 40, "too many rows"),
        ("a,b\n" + "1,2\n" * 60 + "x,3\n", "column 'a', row 61: 'x' is not a finite number"),
        ("a,b\n" + "".join(f"t{n},{n}\n" for n in range(60)), "more than 50 different texts"),
        ("a,b\n1\n", "row 1 of the data has 1 fields"),
    ],
)
def test_a_table_that_cannot_be_used_is_one_clear_error(text, message, tmp_path, capsys):
    (tmp_path / "bad.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        experiment.load(options(tmp_path, data=str(tmp_path / "bad.csv")))
    assert cli.main(["run", TOPIC, "--data", str(tmp_path / "bad.csv"), "--out", str(tmp_path / "out")]) == 1
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_what_is_no_file_is_one_clear_error(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["run", TOPIC, "--data", "nowhere.csv"]) == 2
    assert "'nowhere.csv' is not a file; this topic needs a table" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_heavily_tied_targets_run(tmp_path, monkeypatch):
    """Six different values, as marks have: the classes that remain are reported."""
    monkeypatch.setattr(experiment, "SWEPT", {"smoke": (2,)})
    random = np.random.default_rng(0)
    lines = [f"{x:.4f},{min(8, max(3, round(5.6 + x)))}" for x in random.normal(size=200)]
    (tmp_path / "marks.csv").write_text("\n".join(["a,mark", *lines]))
    words = ["run", TOPIC, "--smoke", "--data", str(tmp_path / "marks.csv"), "--out", str(tmp_path / "out")]
    assert cli.main(words) == 0
    remain = json.loads((tmp_path / "out" / "metrics.json").read_text())["results"]["classes_that_remain"]
    assert remain["10"] <= remain["100"] <= 6


# ----------------------------------------------------------------------------------------------------------- real data


@pytest.mark.data
@pytest.mark.skipif(not os.environ.get("DLKERNELS_DATA"), reason="DLKERNELS_DATA is not set")
def test_california_housing(tmp_path):
    """One split of four fifths and one fifth of all 20,640 districts, deciles."""
    chosen = options(tmp_path, form="full", data="tabular/housing.csv.gz")
    problem = experiment.load(chosen)
    assert len(problem.without) == 20_640
    fold = one_fold(problem, False, 10)
    found = {}
    for name, method in experiment.methods(problem, 10, chosen).items():
        said, _ = method(fold, chosen)
        distance = (said - fold.test_labels).abs()
        found[name] = tuple((distance <= d).double().mean().item() for d in (0, 1))
    print(found)
    best = max(experiment.NETS, key=lambda name: found[name][0])
    assert found[best][0] >= 0.45
    assert found[best][1] >= 0.82
