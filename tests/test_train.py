"""The training recipe: what it learns, what it leaves behind, how exactly it resumes, how it says no."""

import csv
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from vggfast.models import make_layers
from vggfast.recipes import RecipeError, checkpoint
from vggfast.recipes import data as datasets
from vggfast.recipes.config import MODELS, TrainConfig
from vggfast.recipes.train import Epoch, Listener, Result, Trainer, choose_device, fit

ROOT = Path(__file__).parents[1]


def tiny_model(in_channels: int = 1) -> nn.Module:
    """VGG in small: the same kinds of layers, 14 thousand parameters; always the same ones."""
    torch.manual_seed(0)
    features = make_layers([8, "M", 16, "M", 32, "M"], batch_norm=True, in_channels=in_channels)
    return nn.Sequential(features, nn.Flatten(), nn.Linear(32 * 4 * 4, 16), nn.ReLU(), nn.Dropout(), nn.Linear(16, 10))


def tiny_fit(output: Path, *, resume: bool = False, overwrite: bool = False, listener=None, **settings) -> Result:
    tiny = {"data": "digits", "output": str(output), "epochs": 2, "limit": 96, "batch_size": 32, "lr": 0.05}
    config = TrainConfig.recipe(**{**tiny, **settings})
    return fit(config, resume=resume, overwrite=overwrite, model=tiny_model(), listener=listener)


def run_script(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run Python code that may use this file's names, in a process of its own."""
    prelude = f"import sys; sys.path[:0] = [{str(Path(__file__).parent)!r}]; from test_train import *\n"
    return subprocess.run(
        [sys.executable, "-c", prelude + script, *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )


def assert_same_weights(a: Path, b: Path) -> None:
    left, right = load_file(a), load_file(b)
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name


class StopAt(Listener):
    """Leaves by an exception after a step, as Ctrl-C does."""

    def __init__(self, epoch: int, step: int) -> None:
        self.at = epoch, step

    def step(self, trainer: Trainer, loss: float) -> None:
        if (trainer.epoch, trainer.step) == self.at:
            raise KeyboardInterrupt


@pytest.fixture(autouse=True)
def _one_thread():
    """Runs are compared bit for bit, which holds for equal numbers of threads only. conftest.py restores the number."""
    torch.set_num_threads(1)


# ---- the run and its files -----------------------------------------------------------------------------------------


def test_a_tiny_model_learns_the_digits_and_leaves_its_files(tmp_path):
    # What four epochs reach depends on the seed, and by rounding on the machine: 0.69 to 0.93 of the first five seeds, 0.91 or more of this one.
    result = tiny_fit(tmp_path / "run", epochs=4, limit=None, batch_size=64, seed=2)
    assert result.test_accuracy > 0.85
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "checkpoint.pt",
        "curve.png",
        "metrics.csv",
        "model.safetensors",
    ]
    with result.metrics.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["epoch"]) for row in rows] == [1, 2, 3, 4]
    assert float(rows[-1]["test_accuracy"]) == result.test_accuracy
    assert float(rows[-1]["train_loss"]) < float(rows[0]["train_loss"])

    from PIL import Image  # matplotlib's own dependency

    with Image.open(result.curve) as picture:
        assert picture.size == (1200, 480)
        assert len(set(picture.convert("L").tobytes())) > 50  # something is drawn

    with safe_open(result.weights, "pt") as file:
        assert file.metadata()["model"] == '"Sequential"'  # the model that was given, not the recipe's
        assert file.metadata()["in_channels"] == "1"
    model = tiny_model()
    model.load_state_dict(load_file(result.weights))
    data = datasets.load("digits", size=32, batch_size=64, seed=0)
    with torch.no_grad():
        correct = sum((model.eval()(x).argmax(1) == y).sum().item() for x, y in data.test_batches())
    assert correct / data.test_size == result.test_accuracy


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(tmp_path):
    runs = [tiny_fit(tmp_path / str(number), epochs=1, seed=seed) for number, seed in enumerate((1, 1, 2))]
    assert_same_weights(runs[0].weights, runs[1].weights)
    with pytest.raises(AssertionError):
        assert_same_weights(runs[0].weights, runs[2].weights)


def test_files_can_be_read_by_others(tmp_path):
    before = os.umask(0o022)
    try:
        tiny_fit(tmp_path, epochs=1)
    finally:
        os.umask(before)
    assert {path.name: oct(path.stat().st_mode & 0o777) for path in tmp_path.iterdir()} == dict.fromkeys(
        ("checkpoint.pt", "curve.png", "metrics.csv", "model.safetensors"), "0o644"
    )


# ---- resuming ------------------------------------------------------------------------------------------------------


EVERYTHING = {
    "accumulate": 3, "ema": 0.9, "schedule": "plateau", "patience": 0, "gradient_checkpointing": True,
    "augment": "affine", "label_smoothing": 0.1, "epochs": 3,
}  # fmt: skip


@pytest.mark.parametrize("settings", [{}, {"amp": "bf16"}, {"amp": "fp16"}, EVERYTHING, {"data": "mnist"}])
def test_resuming_after_an_epoch_or_within_one_ends_with_the_same_bits(tmp_path, settings):
    whole = tiny_fit(tmp_path / "whole", **settings)
    for name, stop, save in (("epoch", (1, 1), {}), ("step", (1, 3), {"save_every": 2})):
        with pytest.raises(KeyboardInterrupt):
            tiny_fit(tmp_path / name, listener=StopAt(*stop), **settings, **save)
        resumed = tiny_fit(tmp_path / name, resume=True, **settings, **save)
        assert_same_weights(whole.weights, resumed.weights)
        assert [deterministic(row) for row in resumed.history] == [deterministic(row) for row in whole.history]


def deterministic(row: Epoch) -> tuple[float, ...]:
    return row.epoch, row.train_loss, row.train_accuracy, row.test_loss, row.test_accuracy, row.learning_rate


def test_a_finished_run_resumes_to_its_own_result(tmp_path):
    first = tiny_fit(tmp_path)
    again = tiny_fit(tmp_path, resume=True)
    assert again.history == first.history
    assert_same_weights(first.weights, again.weights)


KILL_IN_EPOCH = """
class Kill(Listener):
    def step(self, trainer, loss):
        if (trainer.epoch, trainer.step) == (1, 2):
            os.kill(os.getpid(), signal.SIGKILL)
torch.set_num_threads(1)
tiny_fit(Path(sys.argv[1]), listener=Kill())
"""

KILL_IN_CHECKPOINT = """
saves = []
def save_half(state, path, save=torch.save):
    save(state, path)
    saves.append(path)
    if len(saves) == 2:
        os.truncate(path, os.path.getsize(path) // 2)
        os.kill(os.getpid(), signal.SIGKILL)
torch.save = save_half
torch.set_num_threads(1)
tiny_fit(Path(sys.argv[1]))
"""


@pytest.mark.parametrize("script", [KILL_IN_EPOCH, KILL_IN_CHECKPOINT], ids=["in an epoch", "in a checkpoint"])
def test_killed_at_any_moment_it_loses_an_epoch_at_most(tmp_path, script):
    killed = run_script(script, tmp_path / "killed")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert checkpoint.load(tmp_path / "killed" / "checkpoint.pt")["progress"]["epoch"] == 1
    resumed = tiny_fit(tmp_path / "killed", resume=True)
    assert_same_weights(tiny_fit(tmp_path / "whole").weights, resumed.weights)
    assert len(list((tmp_path / "killed").iterdir())) == 4  # half-written leftovers are gone
    theirs = tmp_path / "killed" / f".checkpoint.pt.{os.getppid()}.tmp"  # of a run that lives
    theirs.mkdir()
    tiny_fit(tmp_path / "killed", overwrite=True, epochs=1)
    assert theirs.exists()


KILL_IN_WEIGHTS = """
from vggfast import checkpoint_files
def save_half(tensors, path, about):
    (Path(path).parent / ".tmpAbCdEf").write_bytes(b"half")  # as safetensors does, before it renames
    os.kill(os.getpid(), signal.SIGKILL)
checkpoint_files.save_file = save_half
torch.set_num_threads(1)
tiny_fit(Path(sys.argv[1]))
"""


def test_killed_while_it_writes_weights_it_leaves_nothing_that_stays(tmp_path):
    killed = run_script(KILL_IN_WEIGHTS, tmp_path / "killed")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert list((tmp_path / "killed").rglob(".tmp*"))
    tiny_fit(tmp_path / "killed", resume=True)
    assert len(list((tmp_path / "killed").iterdir())) == 4
    assert not list((tmp_path / "killed").rglob(".*"))


def test_what_is_said_comes_before_the_recipe():
    assert TrainConfig.recipe("digits") == TrainConfig()
    plain = TrainConfig.recipe("digits", model="vgg11", epochs=3)
    assert plain.lr > TrainConfig().lr  # a network without BatchNorm needs it
    assert plain.epochs == 3
    assert TrainConfig.recipe("photos/cats/").output == "runs/cats"
    assert TrainConfig.recipe("photos/cats/{000..003}.tar").output == "runs/cats"
    assert TrainConfig.recipe("photos", size=64, output="x").size == 64


def test_resumed_settings_are_those_of_the_run(tmp_path):
    tiny_fit(tmp_path, lr=0.03, seed=7)
    config = TrainConfig.resumed(str(tmp_path), threads=2)
    assert (config.lr, config.seed, config.limit, config.threads) == (0.03, 7, 96, 2)


# ---- errors --------------------------------------------------------------------------------------------------------


def test_an_existing_checkpoint_is_never_overwritten_unasked(tmp_path):
    first = tiny_fit(tmp_path, epochs=1)
    before = first.checkpoint.read_bytes()
    with pytest.raises(RecipeError, match=r"--resume.*--overwrite"):
        tiny_fit(tmp_path, epochs=1)
    assert first.checkpoint.read_bytes() == before
    tiny_fit(tmp_path, epochs=1, seed=9, overwrite=True)
    assert first.checkpoint.read_bytes() != before


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[content.index(checkpoint.load(path)["model"]["5.bias"].numpy().tobytes())] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("not a checkpoint"),
    "one bit": flip_a_bit,
    "something else": lambda path: torch.save({"weights": torch.zeros(3)}, path),
    "a tensor": lambda path: torch.save(torch.zeros(3), path),
    "code": lambda path: torch.save(os.getcwd, path),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_checkpoint_is_reported(tmp_path, damage):
    path = tiny_fit(tmp_path, epochs=1).checkpoint
    damage(path)
    with pytest.raises(RecipeError, match=r"checkpoint\.pt (cannot be read as|is not) a checkpoint.*--overwrite"):
        tiny_fit(tmp_path, epochs=1, resume=True)


def test_resuming_without_a_checkpoint_is_reported(tmp_path):
    with pytest.raises(RecipeError, match=r"no checkpoint to resume from: expected the file .*Leave out --resume"):
        tiny_fit(tmp_path, resume=True)


def test_a_checkpoint_of_another_run_is_reported(tmp_path):
    tiny_fit(tmp_path, epochs=1)
    with pytest.raises(RecipeError, match=r"was written with --lr 0.05, this run has --lr 0.01"):
        tiny_fit(tmp_path, epochs=1, lr=0.01, resume=True)
    with pytest.raises(RecipeError, match="with --model vgg11_bn, this run has --model vgg16"):
        tiny_fit(tmp_path, epochs=1, model="vgg16", resume=True)
    config = TrainConfig.resumed(str(tmp_path))
    wider = nn.Sequential(*tiny_model()[:-1], nn.Linear(16, 11))
    with pytest.raises(RecipeError, match=r"another architecture: 5\.weight: expected \(11, 16\), got \(10, 16\)"):
        fit(config, resume=True, model=wider)


def test_a_full_disk_leaves_the_last_checkpoint_intact(tmp_path):
    tiny_fit(tmp_path, epochs=1)
    before = (tmp_path / "checkpoint.pt").read_bytes()
    full = run_script(
        """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))  # bytes a file may have; SIGXFSZ is ignored by Python
try:
    tiny_fit(Path(sys.argv[1]), epochs=1, seed=3, overwrite=True)
except RecipeError as error:
    print(error)
""",
        tmp_path,
    )
    assert full.stdout.startswith(f"cannot write {tmp_path / 'checkpoint.pt'} ("), full.stderr
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
    assert not list(tmp_path.glob(".*"))


def test_an_output_folder_that_cannot_be_made_is_reported(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RecipeError, match=r"cannot write to the output folder .*Choose another --output"):
        tiny_fit(tmp_path / "file" / "run")


def test_a_diverging_run_is_reported(tmp_path):
    with pytest.raises(RecipeError, match=r"the loss became (nan|inf) in step \d+ of epoch 1: .*below 1e\+30"):
        tiny_fit(tmp_path, lr=1e30)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": 0}, "epochs: expected at least 1, got 0"),
        ({"size": 31}, "size: expected at least 32, got 31"),
        ({"model": "vgg12"}, f"model: expected one of {', '.join(MODELS)}, got 'vgg12'"),
        ({"amp": "fp8"}, "amp: expected one of none, bf16, fp16, got 'fp8'"),
        ({"lr": float("nan")}, "lr: expected a finite number >= 0, got nan"),
    ],
)
def test_bad_settings_are_reported(settings, message):
    with pytest.raises(RecipeError) as caught:
        TrainConfig(**settings)
    assert str(caught.value) == message


def test_unknown_and_absent_devices_are_reported(monkeypatch):
    for name in ("cpuu", "meta"):
        with pytest.raises(RecipeError, match=f"device: expected auto, cpu, cuda or cuda:N, got '{name}'"):
            choose_device(name)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert choose_device("cuda:0") == torch.device("cuda:0")
    with pytest.raises(RecipeError, match=r"device cuda:1: torch .* sees 1 CUDA devices. Use --device cpu"):
        choose_device("cuda:1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == torch.device("cpu")
