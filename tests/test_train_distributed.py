"""Training under torchrun: two processes make the steps of one, and a killed run goes on with any number of them."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_train import deterministic
from test_train_options import Float64
from torch import nn

import vggfast
from vggfast.models import cfgs
from vggfast.recipes import checkpoint
from vggfast.recipes import data as datasets
from vggfast.recipes.config import TrainConfig
from vggfast.recipes.distributed import Processes
from vggfast.recipes.train import Listener, Result, Trainer, fit

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def double_fit(output: Path, *, listener: Listener | None = None, resume: bool = False, **settings) -> Result:
    """A short run in float64, with BatchNorm, dropout, pieces, an average, and a last batch that is short."""
    config = TrainConfig.recipe(
        "mnist",
        output=str(output),
        **{"epochs": 2, "limit": 90, "batch_size": 40, "accumulate": 2, "lr": 0.02, "ema": 0.5, **settings},
    )
    return fit(config, model=Float64(), listener=listener, resume=resume)


def torchrun(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run Python code that may use this file's names in two processes."""
    prelude = f"import sys; sys.path[:0] = [{str(Path(__file__).parent)!r}, {str(ROOT)!r}]; sys.argv[0] = 'x'\n"
    folder = Path(str(arguments[0]))
    (folder / "script.py").write_text(
        f"{prelude}from test_train_distributed import *\ntorch.set_num_threads(1)\n{script}"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, str(folder / "script.py"), *map(str, arguments)],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600,
    )  # fmt: skip


WHOLE_AND_RESUMED = """
from test_train import StopAt
folder = Path(sys.argv[1])
torch.distributed.init_process_group("gloo")
whole = double_fit(folder / "whole")
for stop in (StopAt(0, 2), StopAt(1, 1)):
    try:
        double_fit(folder / str(stop.at[0]), listener=stop, save_every=1)
    except KeyboardInterrupt:
        pass
    resumed = double_fit(folder / str(stop.at[0]), resume=True, save_every=1)
    assert [*map(deterministic, resumed.history)] == [*map(deterministic, whole.history)]
    for ours, theirs in zip(resumed.model.state_dict().values(), whole.model.state_dict().values()):
        assert torch.equal(ours, theirs)
if torch.distributed.get_rank() == 0:
    print(json.dumps([*map(deterministic, whole.history)]))
torch.distributed.destroy_process_group()
"""


def test_two_processes_make_the_steps_of_one_and_resume_with_the_same_bits(tmp_path):
    done = torchrun(WHOLE_AND_RESUMED, tmp_path)
    assert done.returncode == 0, done.stderr
    # The pieces of one process hold what those of two hold together: BatchNorm sees the same images.
    one = double_fit(tmp_path / "one")
    for ours, theirs in zip(map(deterministic, one.history), json.loads(done.stdout), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-6)  # the sums of losses are float32
    states = [checkpoint.load(tmp_path / name / "checkpoint.pt") for name in ("one", "whole")]
    for kind in ("model", "average"):
        for name, expected in states[0][kind].items():
            torch.testing.assert_close(states[1][kind][name], expected, rtol=1e-9, atol=1e-11, msg=f"{kind} {name}")
    assert sorted(path.name for path in (tmp_path / "whole").iterdir()) == [
        "checkpoint.pt", "curve.png", "metrics.csv", "model.safetensors",
    ]  # fmt: skip


def test_sums_of_another_number_of_processes_are_added_up_once(tmp_path):
    config = TrainConfig.recipe("fake", output=str(tmp_path), limit=4, batch_size=4, device="cpu")
    data = datasets.load("fake", size=32, batch_size=4, seed=0, limit=4)
    trainer = Trainer(config, data, torch.device("cpu"), nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10)))
    trainer.sums += torch.tensor([1.5, 2, 3, 4])
    trainer.save()
    restored = []
    for rank in range(3):
        trainer.processes = Processes(rank, 3)
        trainer.sums.zero_()
        trainer.restore(tmp_path / "checkpoint.pt")
        restored.append(trainer.sums.tolist())
    assert restored == [[1.5, 2, 3, 4], [0] * 4, [0] * 4]


KILL_ONE = """
class Kill(Listener):
    def step(self, trainer, loss):
        if (trainer.epoch, trainer.step, trainer.processes.rank) == (1, 2, 1):
            os.kill(os.getpid(), signal.SIGKILL)
double_fit(Path(sys.argv[1]) / "killed", listener=Kill(), save_every=1)
"""


def test_a_process_killed_ends_the_run_which_goes_on_with_one_process(tmp_path):
    killed = torchrun(KILL_ONE, tmp_path)
    assert killed.returncode != 0
    assert f"Signal {signal.SIGKILL.value} (SIGKILL)" in killed.stderr
    progress = checkpoint.load(tmp_path / "killed" / "checkpoint.pt")["progress"]
    assert (progress["epoch"], progress["step"]) == (1, 1)  # of step 2 no checkpoint was written
    whole, resumed = double_fit(tmp_path / "whole"), double_fit(tmp_path / "killed", resume=True, save_every=1)
    for ours, theirs in zip(map(deterministic, resumed.history), map(deterministic, whole.history), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-6)
    for name, expected in whole.model.state_dict().items():
        torch.testing.assert_close(resumed.model.state_dict()[name], expected, rtol=1e-9, atol=1e-11)


def float32_fit(output: Path, accumulate: int = 1) -> Result:
    """Four steps in float32 on the digits: VGG11's convolutions, with fewer units behind them."""
    torch.manual_seed(0)
    with torch.device("meta"):
        model = vggfast.VGG(nn.Identity(), init_weights=False)
    model.features = vggfast.make_layers(cfgs["A"], in_channels=1)
    model.classifier = nn.Sequential(nn.Linear(512 * 7 * 7, 64), nn.ReLU(True), nn.Dropout(), nn.Linear(64, 10))
    settings = {"epochs": 2, "limit": 32, "batch_size": 16, "accumulate": accumulate, "device": "cpu"}
    return fit(TrainConfig.recipe("digits", model="vgg11", output=str(output), **settings), model=model)


FLOAT32 = """
double_fit(Path(sys.argv[1]) / "before", epochs=1)  # a program may train more than once
result = float32_fit(Path(sys.argv[1]) / "two")
if os.environ["RANK"] == "0":
    print(json.dumps([*map(deterministic, result.history)]))
"""


def test_two_processes_in_float32_give_the_bits_of_one_that_takes_the_same_pieces(tmp_path):
    """Only the order of a sum could differ, and a sum of two has none. With batches in one piece other sizes go through other
    kernels, which differ by 5e-6 at most in a layer; the loss curve is the same to that."""
    done = torchrun(FLOAT32, tmp_path)
    assert done.returncode == 0, done.stderr
    two = json.loads(done.stdout)
    pieces, whole = float32_fit(tmp_path / "pieces", accumulate=2), float32_fit(tmp_path / "whole")
    states = [checkpoint.load(tmp_path / name / "checkpoint.pt")["model"] for name in ("two", "pieces")]
    assert all(torch.equal(states[0][name], expected) for name, expected in states[1].items())
    for row, same, other in zip(
        two, map(deterministic, pieces.history), map(deterministic, whole.history), strict=True
    ):
        assert row == pytest.approx(same, rel=2**-23)  # losses of the held-out images are added up in float32
        assert row == pytest.approx(other, rel=5e-6)
