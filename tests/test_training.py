"""The training loop: schedule, clipping, autocast, checkpoint and resume, Ctrl-C, and several processes."""

import json
import os
import signal
import subprocess
import sys
import threading

import pytest
import torch
from torch import nn

pytest.importorskip("tqdm")

from dlkernels.experiments import DataError, training
from dlkernels.experiments.training import Checkpoint, Plan, fit, learning_rate, outputs


def problem(examples=40):
    x = torch.randn(examples, 5)
    return x, (x[:, 0] > x[:, 1]).long()


def network(dropout=0.3):
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Dropout(dropout), nn.Linear(16, 2))


def loss(model, x, y):
    return nn.functional.cross_entropy(model(x), y)


def jitter(x):
    return x + 0.01 * torch.randn_like(x)


PLAN = Plan(epochs=4, batch_size=8, learning_rate=0.02, seed=5)


def equal(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


class StopAfter:
    """A loss that sends Ctrl-C to this very process at a step."""

    def __init__(self, step):
        self.left = step

    def __call__(self, model, x, y):
        self.left -= 1
        if self.left == 0:
            signal.raise_signal(signal.SIGINT)
        return loss(model, x, y)


def test_it_learns_and_tells_every_step():
    model = network(dropout=0)
    x, y = problem(400)

    def evaluate(network):
        return {"accuracy": (outputs(network, x).argmax(1) == y).double().mean().item()}

    history = fit(model, loss, (x, y), PLAN, evaluate=evaluate)
    assert len(history.loss) == len(history.seconds) == len(history.gradient_norm) == 4 * 50
    assert len(history.epochs) == 4
    assert history.epochs[-1]["accuracy"] > 0.95
    assert not history.interrupted


def test_every_epoch_has_every_example_once_in_another_order():
    x = torch.arange(24.0)[:, None]
    seen = []

    def remember(model, batch):
        seen.extend(batch[:, 0].tolist())
        return model(batch).mean()

    fit(nn.Linear(1, 1), remember, (x,), Plan(epochs=2, batch_size=8))
    first, second = seen[:24], seen[24:]
    assert sorted(first) == sorted(second) == list(range(24))
    assert first != second


def test_an_incomplete_batch_is_left_out():
    assert len(fit(network(), loss, problem(19), Plan(epochs=2, batch_size=8)).loss) == 4


def test_more_per_batch_than_there_is():
    with pytest.raises(ValueError, match=r"a batch of 8 .* only 5 examples"):
        fit(network(), loss, problem(5), Plan(epochs=1, batch_size=8))


def test_the_learning_rate_rises_and_falls():
    plan = Plan(epochs=1, learning_rate=2.0, warmup=0.25)
    rates = [learning_rate(plan, step, 100) for step in range(100)]
    assert rates[:25] == sorted(rates[:25])
    assert rates[25] == max(rates) == 2.0
    assert rates[25:] == sorted(rates[25:], reverse=True)
    assert 0 < rates[0] < 0.1
    assert 0 < rates[99] < 0.01
    assert learning_rate(Plan(epochs=1, warmup=0.0), 0, 1) == Plan(epochs=1).learning_rate


def test_the_gradient_is_clipped():
    """One step of a loss with a huge gradient, seen by an optimiser state: AdamW's first moment is 0.1 g."""
    model = nn.Linear(1, 1, bias=False)
    seen = []
    hook = torch.optim.AdamW.step

    def step(self, *args, **kwargs):
        seen.append(model.weight.grad.norm().item())
        return hook(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", step)
        history = fit(model, lambda m, x: 1e4 * m(x).mean(), (torch.ones(4, 1),), Plan(epochs=1, batch_size=4))
    assert history.gradient_norm[0] == pytest.approx(1e4)
    assert seen[0] == pytest.approx(1.0, rel=1e-3)


def test_autocast_computes_in_its_dtype_and_keeps_float32_weights():
    dtypes = []

    def spy(model, x, y):
        logits = model(x)
        dtypes.append(logits.dtype)
        return nn.functional.cross_entropy(logits, y)

    model = network()
    fit(model, spy, problem(), Plan(epochs=1, batch_size=8, autocast=torch.bfloat16))
    assert set(dtypes) == {torch.bfloat16}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_the_same_seed_gives_the_same_bits_and_another_seed_others():
    models, histories = [], []
    for seed in (5, 5, 6):
        models.append(network())
        histories.append(fit(models[-1], loss, problem_of(0), Plan(epochs=2, batch_size=8, seed=seed), augment=jitter))
        torch.rand(3)  # what others drew in between does not matter
    assert equal(models[0], models[1])
    assert histories[0].loss == histories[1].loss
    assert not equal(models[0], models[2])


def problem_of(seed):
    torch.manual_seed(seed)
    return problem()


class TestResume:
    @pytest.mark.parametrize("stop_at", [1, 3, 5, 10, 13, 19])
    def test_a_resumed_run_is_an_uninterrupted_one_bit_for_bit(self, tmp_path, stop_at):
        """With dropout, augmentation, momentum: in the middle of an epoch, at its end, and one step before the end."""
        data = problem_of(1)
        whole = network()
        expected = fit(whole, loss, data, PLAN, evaluate=lambda m: {"first": m[0].weight[0, 0].item()}, augment=jitter)

        file = Checkpoint(tmp_path / "unfinished.pt", "this run")
        options = {"evaluate": lambda m: {"first": m[0].weight[0, 0].item()}, "augment": jitter, "checkpoint": file}
        first = fit(network(), StopAfter(stop_at), data, PLAN, **options)
        assert first.interrupted
        assert len(first.loss) == stop_at
        torch.rand(11)
        resumed = network()
        nn.init.zeros_(resumed[0].weight)  # must come from the file
        second = fit(resumed, loss, data, PLAN, **options)
        assert equal(whole, resumed)
        assert second.loss == expected.loss
        assert second.gradient_norm == expected.gradient_norm
        assert second.epochs == expected.epochs
        assert not second.interrupted
        assert list(tmp_path.iterdir()) == []  # nothing left to continue

    def test_a_run_that_was_killed_continues_from_its_last_epoch(self, tmp_path):
        data = problem_of(1)
        whole = network()
        fit(whole, loss, data, PLAN)
        calls = iter(range(100))

        def killed(model, x, y):
            if next(calls) == 12:
                raise RuntimeError("power cut")
            return loss(model, x, y)

        file = Checkpoint(tmp_path / "unfinished.pt", "this run")
        with pytest.raises(RuntimeError, match="power cut"):
            fit(network(), killed, data, PLAN, checkpoint=file)
        resumed = network()
        assert len(fit(resumed, loss, data, PLAN, checkpoint=file).loss) == 20
        assert equal(whole, resumed)

    def test_another_run_does_not_continue_it(self, tmp_path):
        data = problem_of(1)
        path = tmp_path / "unfinished.pt"
        fit(network(), StopAfter(3), data, PLAN, checkpoint=Checkpoint(path, "one"))
        fresh, other = network(), network()
        fit(fresh, loss, data, PLAN)
        fit(other, loss, data, PLAN, checkpoint=Checkpoint(path, "another"))
        assert equal(fresh, other)

    @pytest.mark.parametrize("content", [b"", b"not a checkpoint", "half"])
    def test_a_broken_checkpoint_is_named(self, tmp_path, content):
        path = tmp_path / "unfinished.pt"
        fit(network(), StopAfter(3), problem(), PLAN, checkpoint=Checkpoint(path, "x"))
        path.write_bytes(path.read_bytes()[:1000] if content == "half" else content)
        with pytest.raises(DataError, match=r"unfinished\.pt: not a readable checkpoint\. Delete it"):
            fit(network(), loss, problem(), PLAN, checkpoint=Checkpoint(path, "x"))


class TestCtrlC:
    @pytest.fixture(autouse=True)
    def as_in_the_foreground(self):
        """A shell starts background jobs with SIGINT ignored, and Python then installs no handler."""
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        yield
        signal.signal(signal.SIGINT, before)

    def test_a_second_one_interrupts_at_once_and_the_handler_is_put_back(self):
        before = signal.getsignal(signal.SIGINT)

        def twice(model, x, y):  # to this thread: two sent to the process may reach another one, and count as one
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            return loss(model, x, y)

        with pytest.raises(KeyboardInterrupt):
            fit(network(), twice, problem(), PLAN)
        assert signal.getsignal(signal.SIGINT) is before
        fit(network(), StopAfter(2), problem(), PLAN)
        assert signal.getsignal(signal.SIGINT) is before

    def test_after_the_last_step_nothing_was_interrupted(self):
        assert not fit(network(), StopAfter(20), problem(), PLAN).interrupted

    def test_training_in_another_thread_works(self):
        histories = []
        thread = threading.Thread(target=lambda: histories.append(fit(network(), loss, problem(), PLAN)))
        thread.start()
        thread.join()
        assert len(histories[0].loss) == 20


def test_no_progress_bar_where_there_is_no_terminal(capfd):
    fit(network(), loss, problem(), PLAN)
    assert capfd.readouterr() == ("", "")


def test_outputs_are_those_of_evaluation_and_need_no_gradient():
    model = network(dropout=0.9)
    x, _ = problem(11)
    first = outputs(model, x, batch_size=4)
    torch.testing.assert_close(first, outputs(model, x))
    assert not first.requires_grad


def test_alone_this_is_the_only_process():
    assert (training.world(), training.rank()) == (1, 0)
    with training.distributed("cpu") as device:
        assert device == "cpu"


SCRIPT = """
import json, torch
from pathlib import Path
from torch import nn
from dlkernels.experiments import training
from dlkernels.learn.basic_classifiers import SmallCNN
torch.manual_seed(3)
x, y = torch.rand(96, 1, 8, 8), torch.arange(96) % 10
model = SmallCNN(1, 8, 10, width=4)
with training.distributed("cpu"):
    plan = training.Plan(epochs=3, batch_size=16, seed=2)
    history = training.fit(model, lambda m, x, y: nn.functional.cross_entropy(m(x), y), (x, y), plan,
                           augment=lambda x: x + 0.1 * torch.randn_like(x))
    training.say(json.dumps([training.world(), history.loss, history.gradient_norm]))
threads = [(task / "comm").read_text() for task in Path("/proc/self/task").glob("*")]
assert not any("gloo" in name for name in threads), threads  # one left could abort the process at its end
"""


@pytest.mark.slow
def test_two_processes_give_the_loss_curve_of_one(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    printed = []
    for command in ([sys.executable], launch):
        done = subprocess.run(
            [*command, str(script)], env=environment, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, done.stderr
        printed.append(json.loads(done.stdout))
    (one, loss_one, norm_one), (two, loss_two, norm_two) = printed
    assert (one, two) == (1, 2)
    assert len(loss_one) == 18
    assert loss_two == pytest.approx(loss_one, rel=1e-4)
    assert norm_two == pytest.approx(norm_one, rel=1e-2)
