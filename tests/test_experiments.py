"""The command line and the experiments: what they write, what they refuse, and the accuracies they promise."""

import json
import os
import signal
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")
pytest.importorskip("typer")
pytest.importorskip("tqdm")

import dlkernels
from dlkernels.experiments import Options, basic_classifiers, cli, data, topics, training
from dlkernels.experiments.report import Report

needs_data = pytest.mark.skipif(not os.environ.get("DLKERNELS_DATA"), reason="DLKERNELS_DATA is not set")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Nothing is written into the repository."""
    monkeypatch.chdir(tmp_path)


def metrics(folder):
    return json.loads((Path(folder) / "metrics.json").read_text())


def options(tmp_path, **chosen):
    return Options("basic_classifiers", tmp_path, **chosen)


class TestCommandLine:
    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["run", "nonsense"], "no topic 'nonsense'; there are"),
            (["run"], "Missing argument"),
            (["run", "basic_classifiers", "--fast"], "--fast"),
            (["run", "basic_classifiers", "--seed", "x"], "seed"),
            (["run", "basic_classifiers", "--seed", "-1"], "seed"),
            (["run", "basic_classifiers", "--threads", "0"], "threads"),
            (["run", "basic_classifiers", "--quick", "--smoke"], "exclude each other"),
            (["run", "basic_classifiers", "--backend", "cudnn"], "native, reference, torch"),
            (["run", "basic_classifiers", "--device", "tpu"], "cpu, cuda or cuda:NUMBER"),
            (["run", "basic_classifiers", "--device", "cuda:99"], "CUDA devices"),
            (["run", "basic_classifiers", "--data", "nowhere"], "'nowhere' is neither a set of images"),
            (["run", "basic_classifiers", "--data", "sst2"], "'sst2' is a set of sentences"),
            (["run", "basic_classifiers", "--root", "nowhere"], "no folder nowhere"),
            (["run", "all", "--data", "mnist"], "one topic"),
            (["predict", "nonsense", "x.png"], "no topic 'nonsense'"),
            (["dance"], "dance"),
        ],
    )
    def test_a_wrong_command_line_is_one_clear_error(self, words, message, tmp_path, capsys):
        assert cli.main(words) == 2
        error = capsys.readouterr().err
        assert message in error
        assert len(error.strip().splitlines()) == 1
        assert list(tmp_path.iterdir()) == []

    def test_a_corrupt_file_is_one_clear_error_and_nothing_is_written(self, tmp_path, capsys):
        folder = tmp_path / "MNIST" / "raw"
        folder.mkdir(parents=True)
        (folder / "train-images-idx3-ubyte.gz").write_bytes(b"\x1f\x8bhalf")
        assert cli.main(["run", "basic_classifiers", "--data", "mnist", "--root", str(tmp_path)]) == 1
        error = capsys.readouterr().err
        assert "train-images-idx3-ubyte.gz" in error
        assert len(error.strip().splitlines()) == 1
        assert [path.name for path in tmp_path.iterdir()] == ["MNIST"]

    @pytest.mark.parametrize("words", [["--help"], ["run", "--help"], ["predict", "--help"]])
    def test_help(self, words, capsys):
        assert cli.main(words) == 0
        assert "Usage" in capsys.readouterr().out

    def test_topics_are_found_by_name(self):
        assert "basic_classifiers" in topics()
        assert not {"data", "training", "report", "cli"} & set(topics())


@pytest.mark.slow
@pytest.mark.parametrize("topic", topics())
def test_smoke_run_of_every_topic(topic, tmp_path, capsys):
    assert cli.main(["run", topic, "--smoke", "--seed", "1"]) == 0
    folder = tmp_path / "dlkernels-runs" / topic
    record = metrics(folder)
    assert record["topic"] == topic
    assert record["options"]["form"] == "smoke"
    assert record["options"]["seed"] == 1
    assert record["results"]
    assert record["figures"]
    assert all((folder / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" for name in record["figures"])
    assert "</html>" in (folder / "report.html").read_text()
    assert f'href="{topic}/report.html"' in (tmp_path / "dlkernels-runs" / "index.html").read_text()
    assert not [path for path in folder.rglob("*") if "unfinished" in path.name or path.name.startswith(".")]
    captured = capsys.readouterr()
    assert "report.html" in captured.out
    assert captured.err == ""  # no progress bar where there is no terminal


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """One smoke run for all that only look."""
    out = tmp_path_factory.mktemp("run")
    assert cli.main(["run", "basic_classifiers", "--smoke", "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def trained_folder(tmp_path_factory):
    """A folder with a trained CNN."""
    out = tmp_path_factory.mktemp("trained")
    problem = basic_classifiers.load(options(out, form="quick"))
    cnn, _ = basic_classifiers._twins(problem, options(out))
    result = basic_classifiers.train_network(problem, options(out, form="quick"), "CNN", cnn)
    basic_classifiers.save_model(problem, result, out / "model.pt")
    return out


class TestBasicClassifiers:
    def test_metrics(self, run_folder):
        results = metrics(run_folder)["results"]
        classifiers = results["classifiers"]
        assert list(classifiers) == ["softmax regression", "3-nearest neighbours", "MLP", "CNN"]
        assert classifiers["softmax regression"]["accuracy"] > 0.85
        assert classifiers["3-nearest neighbours"]["accuracy"] > 0.95
        assert classifiers["softmax regression"]["numbers"] == 650
        matrix = np.array(results["confusion_matrix_of_the_cnn"])
        assert matrix.trace() / matrix.sum() == pytest.approx(classifiers["CNN"]["accuracy"])

    def test_figures(self, run_folder):
        expected = ["curves", "confusion", "by_class", "mistakes", "templates", "filters", "layers"]
        assert metrics(run_folder)["figures"] == [f"{name}.png" for name in expected]

    @pytest.mark.parametrize(
        ("matrix", "text"),
        [
            (
                [[5, 2, 0], [2, 5, 1], [0, 0, 5]],
                "The most frequent: cat taken for dog, dog taken for cat, 2 times each.",
            ),
            ([[5, 3, 0], [2, 5, 1], [0, 0, 5]], "The most frequent: cat taken for dog, 3 times."),
            ([[5, 2, 2], [2, 5, 2], [0, 0, 5]], "The most frequent confusions, 4 of them, happened 2 times each."),
            ([[5, 1, 0], [1, 5, 0], [0, 0, 5]], "No confusion happened more than once."),
        ],
    )
    def test_the_commonest_confusions_are_all_that_are_as_common(self, matrix, text):
        assert basic_classifiers._commonest(torch.tensor(matrix), ("cat", "dog", "hen")) == text

    def test_the_first_steps_are_those_of_torchs_layers(self, run_folder):
        layers = metrics(run_folder)["results"]["layers"]
        ours, theirs = layers["loss"].values()
        assert len(ours) == len(theirs)
        assert ours[:3] == pytest.approx(theirs[:3], rel=1e-5)

    @pytest.mark.parametrize("backend", ["native", "reference", "torch"])
    def test_the_same_script_on_every_backend(self, backend, tmp_path):
        """Twenty steps at the learning rates with which a run begins: every backend computes the losses of torch.nn."""
        problem = basic_classifiers.load(options(tmp_path))
        plan = training.Plan(
            1, basic_classifiers.plan(len(problem.y), options(tmp_path)).batch_size, learning_rate=3e-4
        )
        examples = 20 * plan.batch_size
        losses = []
        for network in basic_classifiers._twins(problem, options(tmp_path)):
            with dlkernels.backend(backend):
                history = training.fit(
                    network, basic_classifiers.cross_entropy, (problem.x[:examples], problem.y[:examples]), plan
                )
            losses.append(history.loss)
        assert len(losses[0]) == 20
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)

    def test_runs_are_repeatable(self, run_folder, tmp_path):
        assert cli.main(["run", "basic_classifiers", "--smoke", "--out", str(tmp_path / "again")]) == 0
        first, second = metrics(run_folder)["results"], metrics(tmp_path / "again")["results"]
        assert first["layers"]["loss"] == second["layers"]["loss"]
        assert first["confusion_matrix_of_the_cnn"] == second["confusion_matrix_of_the_cnn"]

    @pytest.mark.parametrize("stop_at", [3, 40])
    def test_ctrl_c_leaves_a_usable_report_and_the_same_command_continues(
        self, stop_at, run_folder, tmp_path, monkeypatch
    ):
        """Ctrl-C in the MLP or in the CNN; continued, the run ends in the same numbers as one without a pause."""
        calls = iter(range(10**6))
        loss = basic_classifiers.cross_entropy

        def interrupting(model, x, y):
            if next(calls) == stop_at:
                signal.raise_signal(signal.SIGINT)
            return loss(model, x, y)

        with monkeypatch.context() as patch:
            patch.setattr(basic_classifiers, "cross_entropy", interrupting)
            assert cli.main(["run", "basic_classifiers", "--smoke", "--out", str(tmp_path)]) == 130
        assert metrics(tmp_path)["interrupted"] is True
        assert "This run was interrupted" in (tmp_path / "report.html").read_text()
        assert cli.main(["run", "basic_classifiers", "--smoke", "--out", str(tmp_path)]) == 0
        assert metrics(tmp_path)["results"]["layers"]["loss"] == metrics(run_folder)["results"]["layers"]["loss"]
        assert not list(tmp_path.glob("*.unfinished.pt"))

    def test_ctrl_c_outside_of_training_leaves_a_report_too(self, tmp_path, monkeypatch):
        def interrupted(problem, options):
            raise KeyboardInterrupt

        monkeypatch.setattr(basic_classifiers, "train_softmax_regression", interrupted)
        assert cli.main(["run", "basic_classifiers", "--smoke", "--out", str(tmp_path)]) == 130
        assert metrics(tmp_path)["interrupted"] is True

    def test_hostile_class_names_are_only_text(self, tmp_path):
        name = "<script>alert(1)</script> $\\frac{"
        problem = basic_classifiers.load(options(tmp_path, form="smoke"))
        problem = replace(problem, images=replace(problem.images, name=name, classes=(name,) * 10))
        cnn, _ = basic_classifiers._twins(problem, options(tmp_path))
        predicted = training.outputs(cnn, problem.test_x).argmax(dim=1)
        results = [
            basic_classifiers.train_softmax_regression(problem, options(tmp_path, form="smoke")),
            basic_classifiers.Result("CNN", 1, 1.0, predicted, training.History(), cnn),
        ]
        report = Report(options(tmp_path), name, name)
        basic_classifiers.tell(problem, results, 5, report)
        html = report.write().read_text()
        assert "<script" not in html
        assert "&lt;script&gt;" in html

    def test_own_images_in_mnists_layout(self, tmp_path):
        """Not digits, not 28 x 28, not ten classes."""
        random = np.random.default_rng(0)
        y = np.arange(160, dtype=np.uint8) % 3
        x = (random.random((160, 9, 9)) * 60).astype(np.uint8)
        for image, label in zip(x, y, strict=True):
            image[:, 3 * label : 3 * label + 3] += 150
        folder = tmp_path / "own"
        folder.mkdir()
        for part, cut in (("train", slice(0, 120)), ("t10k", slice(120, 160))):
            images = b"\0\0\x08\x03" + np.array([len(x[cut]), 9, 9], ">u4").tobytes() + x[cut].tobytes()
            (folder / f"{part}-images-idx3-ubyte").write_bytes(images)
            labels = b"\0\0\x08\x01" + np.array([len(y[cut])], ">u4").tobytes() + y[cut].tobytes()
            (folder / f"{part}-labels-idx1-ubyte").write_bytes(labels)
        assert cli.main(["run", "basic_classifiers", "--smoke", "--data", str(folder), "--out", "run"]) == 0
        accuracies = [entry["accuracy"] for entry in metrics("run")["results"]["classifiers"].values()]
        assert len(accuracies) == 4
        assert min(accuracies) > 0.9


class TestPredict:
    def picture(self, path, image, paper):
        """A test digit, 20 times as large with a margin, white on black or black on white paper."""
        image_module = pytest.importorskip("PIL.Image")
        grey = np.pad(np.kron(image / 16, np.ones((20, 20))), ((30, 30), (60, 40)))
        grey = 1 - grey if paper else grey
        image_module.fromarray((255 * grey).astype(np.uint8)).save(path)

    @pytest.mark.parametrize("paper", [False, True])
    def test_digits_are_recognised_from_files(self, paper, trained_folder, tmp_path, capsys):
        loaded = data.digits()
        right = 0
        for image, label in zip(loaded.test_x[:40], loaded.test_y[:40], strict=True):
            self.picture(tmp_path / "digit.png", image[0], paper)
            assert (
                cli.main(["predict", "basic_classifiers", str(tmp_path / "digit.png"), "--out", str(trained_folder)])
                == 0
            )
            lines = capsys.readouterr().out.splitlines()
            assert ("inverted" in lines[0]) == paper
            assert "fitted into 8 of 8 x 8 pixels" in lines[0]
            answers = [line.split() for line in lines[-10:]]
            assert sum(float(answer[1]) for answer in answers) == pytest.approx(100, abs=0.6)
            right += answers[0][0] == str(label)
        assert right >= 36

    def test_what_cannot_be_read_is_one_clear_error(self, trained_folder, tmp_path, capsys):
        image_module = pytest.importorskip("PIL.Image")
        image_module.new("L", (50, 50), 255).save(tmp_path / "blank.png")
        (tmp_path / "text.png").write_text("not an image")
        image_module.new("1", (20_000, 20_000)).save(tmp_path / "huge.png")
        for name, message in (
            ("blank.png", "an empty image"),
            ("text.png", "not a readable image"),
            ("huge.png", "too many pixels"),
            ("none.png", "missing"),
        ):
            words = ["predict", "basic_classifiers", str(tmp_path / name), "--out", str(trained_folder)]
            assert cli.main(words) == 1
            error = capsys.readouterr().err
            assert name in error
            assert message in error
            assert len(error.strip().splitlines()) == 1

    def test_without_a_trained_model_it_says_what_to_do(self, capsys):
        assert cli.main(["predict", "basic_classifiers", "x.png"]) == 1
        assert "Run `dlkernels run basic_classifiers` first" in capsys.readouterr().err

    def test_photographs_turned_by_their_exif_tag_and_16_bit_scans(self, trained_folder, tmp_path):
        """Both are prepared as the plain picture is."""
        image_module = pytest.importorskip("PIL.Image")
        state = basic_classifiers.load_model(trained_folder / "model.pt")
        self.picture(tmp_path / "plain.png", data.digits().test_x[0][0], paper=True)
        plain = image_module.open(tmp_path / "plain.png")
        exif = image_module.Exif()
        exif[0x0112] = 6  # orientation: what is shown is the stored picture, turned by 90 degrees clockwise
        plain.transpose(image_module.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
        image_module.fromarray(np.asarray(plain).astype(np.uint16) * 257).save(tmp_path / "deep.png")
        expected, _ = basic_classifiers.prepare(tmp_path / "plain.png", state)
        for name in ("turned.png", "deep.png"):
            image, _ = basic_classifiers.prepare(tmp_path / name, state)
            np.testing.assert_allclose(image, expected, atol=1e-6)

    def test_transparent_paper_is_white(self, trained_folder, tmp_path):
        image_module = pytest.importorskip("PIL.Image")
        picture = np.zeros((40, 40, 4), dtype=np.uint8)
        picture[5:35, 18:24, 3] = 255  # an opaque black stroke on nothing
        image_module.fromarray(picture).save(tmp_path / "one.png")
        state = basic_classifiers.load_model(trained_folder / "model.pt")
        image, steps = basic_classifiers.prepare(tmp_path / "one.png", state)
        assert image.shape == (1, 8, 8)
        assert any("inverted" in step for step in steps)
        assert image[0, :, 3:5].min() > 0.5
        assert image[0, :, 0].max() == 0


@pytest.mark.slow
def test_under_torchrun_one_process_writes_and_prints(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "dlkernels"]
    words = ["run", "basic_classifiers", "--smoke", "--out", "pair"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *words], env=environment, capture_output=True, text=True, timeout=300, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("report.html") == 1
    record = metrics(tmp_path / "pair")
    assert record["machine"]["processes"] == 2
    assert cli.main(["run", "basic_classifiers", "--smoke", "--out", str(tmp_path / "one")]) == 0
    ours = [metrics(tmp_path / name)["results"]["layers"]["loss"]["dlkernels.Conv2d"] for name in ("one", "pair")]
    assert ours[1][:5] == pytest.approx(ours[0][:5], rel=1e-4)


def digits_accuracy(seed, tmp_path):
    """Test accuracy of the full form's CNN on the digits."""
    chosen = options(tmp_path, seed=seed)
    problem = basic_classifiers.load(chosen)
    cnn, _ = basic_classifiers._twins(problem, chosen)
    result = basic_classifiers.train_network(problem, chosen, "CNN", cnn)
    return (result.predicted == problem.test_y).double().mean().item()


@pytest.mark.slow
def test_the_cnn_reads_the_digits(tmp_path):
    assert digits_accuracy(0, tmp_path) >= 0.98


@pytest.mark.data
def test_the_cnn_reads_the_digits_from_five_seeds(tmp_path):
    accuracies = [digits_accuracy(seed, tmp_path) for seed in range(5)]
    print(accuracies)
    assert statistics.mean(accuracies) >= 0.985, accuracies


@pytest.mark.data
@needs_data
def test_mnist_in_full(tmp_path):
    """All 60,000 images, three epochs."""
    assert cli.main(["run", "basic_classifiers", "--data", "mnist", "--out", str(tmp_path)]) == 0
    classifiers = metrics(tmp_path)["results"]["classifiers"]
    print({name: entry["accuracy"] for name, entry in classifiers.items()})
    assert classifiers["softmax regression"]["accuracy"] >= 0.92
    assert classifiers["3-nearest neighbours"]["accuracy"] >= 0.965
    assert classifiers["CNN"]["accuracy"] >= 0.99


@pytest.mark.data
@needs_data
@pytest.mark.parametrize("name", ["fashion-mnist", "cifar10"])
def test_quick_form_on_other_real_images(name, tmp_path):
    assert cli.main(["run", "basic_classifiers", "--data", name, "--quick", "--out", str(tmp_path)]) == 0
    record = metrics(tmp_path)
    assert "Shortened" in record["data"]
    least = {"fashion-mnist": 0.75, "cifar10": 0.3}[name]
    assert record["results"]["classifiers"]["CNN"]["accuracy"] > least
