"""`python -m vggfast info | explain | train`: what they print, and how they say no."""

import contextlib
import fcntl
import io
import json
import os
import re
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console
from rich.text import Text
from safetensors.torch import load_file
from test_train import tiny_model
from test_train_images import write_images
from typer.testing import CliRunner, Result

import vggfast.models
from vggfast import _C, cli, explanation
from vggfast.recipes import train as training
from vggfast.recipes.progress import ProgressBar

ROOT = Path(__file__).parents[1]


def run(*arguments: object) -> Result:
    """The command line in this process; stdout and stderr apart."""
    return CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1"}).invoke(cli.app, list(map(str, arguments)))


@pytest.fixture
def tiny(monkeypatch):
    """Train a model of 14 thousand parameters in place of a VGG's 129 million."""
    monkeypatch.setattr(training, "build_model", lambda name, data: tiny_model(data.in_channels))


def assert_one_message(result: Result, *parts: str) -> None:
    """Exit status 2, `parts` in the message on stderr, no traceback."""
    assert result.exit_code == 2, result.output
    assert isinstance(result.exception, SystemExit)
    assert "Traceback" not in result.output
    for part in parts:
        assert part in result.stderr


@pytest.mark.parametrize("arguments", [["info"], ["info", "--json"], ["explain", "vgg11", "--size", "32"]])
def test_a_full_disk_and_a_reader_that_left_are_no_tracebacks(arguments):
    command = [sys.executable, "-m", "vggfast", *arguments]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (1, "error: the output cannot be written: No space left on device\n")
    theirs, ours = os.pipe()
    os.close(theirs)
    done = subprocess.run(command, cwd=ROOT, stdout=ours, stderr=subprocess.PIPE, text=True, timeout=300)
    os.close(ours)
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
@pytest.mark.parametrize("command", ["info", "explain vgg11 --size 32", "train --data nowhere"])
def test_a_stream_that_is_closed_at_the_start_is_written_to_by_nobody(command, closed, tmp_path):
    """Python has no sys.stdout then, but None."""
    script = f"{shlex.quote(sys.executable)} -m vggfast {command} {closed}"
    done = subprocess.run(script, shell=True, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == (2 if "nowhere" in command else 0), done.stderr
    assert "Traceback" not in done.stderr


def test_importing_the_library_leaves_the_recipes_and_their_packages_alone():
    heavy = ["typer", "rich", "matplotlib", "sklearn", "vggfast.recipes", "vggfast.cli"]
    script = f"import sys, vggfast; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "[]", done.stderr


def test_what_a_help_has_in_brackets_is_shown():
    """rich takes words in brackets for markup, and leaves them out."""
    assert "[default: runs/<data>]" in run("train", "--help").stdout


def test_the_help_of_train_says_what_its_options_apply_to():
    shown = " ".join(re.sub("[│\n]", " ", run("train", "--help").stdout).split())
    assert "at most so many images of each part" in shown
    assert "digits, mnist and fake keep their model, size and augmentation" in shown


def test_a_benchmark_with_more_threads_than_there_are_cpus_is_refused():
    result = run("bench", "--threads", "99999")
    assert result.exit_code == 2
    assert "--threads" in result.stderr
    assert "Invalid value" in result.stderr


# ---- info ----------------------------------------------------------------------------------------------------------


def test_info_as_json_is_what_the_library_says():
    facts = json.loads(run("info", "--json").stdout)
    assert facts["vggfast"] == _C.build_info()["version"]
    assert facts["torch"] == torch.__version__
    assert facts["cpu_isa"] == _C.cpu_isa()
    assert facts["cpu_isas"] == list(_C.cpu_isas())
    assert facts["threads"] == torch.get_num_threads()
    assert facts["cuda_devices"] == [] or torch.cuda.is_available()


def test_info_as_a_table_has_every_fact():
    shown = run("info").stdout
    for name, value in cli.collect_info().items():
        assert name.replace("_", " ") in shown
        assert (", ".join(value) if isinstance(value, list) else str(value)) in shown


def test_info_says_that_an_isa_was_forced():
    environment = os.environ | {"VGGFAST_CPU_ISA": "baseline", "VGGFAST_CONV_ALGO": "direct"}
    command = [sys.executable, "-m", "vggfast", "info", "--json"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    facts = json.loads(done.stdout)
    assert (facts["cpu_isa"], facts["cpu_isa_reason"]) == ("baseline", "forced by VGGFAST_CPU_ISA")
    assert (facts["conv_algo"], facts["conv_algo_reason"]) == ("direct", "VGGFAST_CONV_ALGO")


@pytest.mark.parametrize("name", ["VGGFAST_CPU_ISA", "VGGFAST_CONV_ALGO"])
def test_a_variable_with_a_wrong_value_is_reported(name):
    command = [sys.executable, "-m", "vggfast", "info"]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {name: "sse9"}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith(f"error: {name}: expected auto")
    assert done.stderr.count("\n") == 1


# ---- explain -------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_vgg(monkeypatch):
    """`explain`'s models without their 120 million parameters of fully connected layers."""

    def build(in_channels: int, init_weights: bool, batch_norm: bool = False) -> torch.nn.Module:
        return vggfast.models.make_layers([8, "M", 16, "M"], batch_norm=batch_norm, in_channels=in_channels)

    monkeypatch.setattr(vggfast.models, "vgg11", build)
    monkeypatch.setattr(vggfast.models, "vgg11_bn", lambda **arguments: build(**arguments, batch_norm=True))


def test_explain_prints_a_row_for_each_layer(small_vgg):
    shown = run("explain", "vgg11", "--size", 32, "--batch", 2).stdout
    assert "2x3x32x32" in shown
    assert "2 of 2 convolutions run on fused kernels." in shown


def test_explain_fits_a_terminal():
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 90, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    command = [sys.executable, "-m", "vggfast", "explain", "vgg11", "--size", "32"]
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=theirs) as process:
        os.close(theirs)
        shown = b""
        with contextlib.suppress(OSError):  # which is how a terminal says that nobody writes any more
            while piece := os.read(ours, 4096):
                shown += piece
        assert process.wait(timeout=300) == 0
    os.close(ours)
    lines = shown.decode().splitlines()
    assert max(map(len, lines)) <= 90
    assert lines[-1] == "8 of 8 convolutions run on fused kernels."


@pytest.mark.parametrize(
    ("options", "shape", "dtype", "fused"),
    [
        (["--dtype", "bf16", "--batch", 2, "--size", 48], [2, 3, 48, 48], "bfloat16", 2),
        (["--dtype", "fp64"], [1, 3, 224, 224], "float64", 0),
        (["--in-channels", 1, "--size", 32, "--channels-last", "--batch-norm"], [1, 1, 32, 32], "float32", 2),
        (["--batch-norm", "--train", "--size", 32], [1, 3, 32, 32], "float32", 2),
    ],
)
def test_explain_as_json(small_vgg, options, shape, dtype, fused):
    explanation = json.loads(run("explain", "vgg11", "--json", "--device", "cpu", *options).stdout)
    first = explanation["rows"][0]
    assert (first["input"], first["dtype"]) == (shape, dtype)
    assert (explanation["convolutions"], explanation["fused_convolutions"]) == (2, fused)
    in_one_run = "BatchNorm" in first["layers"]
    assert in_one_run == ("--batch-norm" in options and "--train" not in options)


def test_explain_rejects_what_it_does_not_know():
    assert_one_message(run("explain", "vgg12"), "vgg12", "vgg11")
    assert_one_message(run("explain", "vgg16", "--dtype", "fp8"), "--dtype", "fp8", "bf16")
    assert_one_message(run("explain", "vgg16c", "--batch-norm"), "vgg16c has no variant with BatchNorm")
    assert_one_message(run("explain", "vgg11", "--batch", 10**9), "1000000000 x 3 x 224 x 224", "too large for memory")
    assert_one_message(run("explain", "vgg16", "--device", "tpu"), "expected auto, cpu, cuda or cuda:N, got 'tpu'")


def test_explain_names_the_option_that_needs_a_build_with_nvcc_and_how_to_get_one(small_vgg, monkeypatch):
    monkeypatch.setattr(explanation, "build_obstacle", lambda: "this build has no CUDA kernels")
    for option, given in (("--gpu", ["--gpu", "8.0,108"]), ("--roofline", ["--roofline"])):
        done = run("explain", "vgg11", "--size", 32, *given)
        assert_one_message(done, f"error: {option}: this build has no CUDA kernels. Install anew", "CUDA_HOME")
    assert run("explain", "--help").stdout.count("Needs a build with nvcc, but no GPU") == 2


# ---- train ---------------------------------------------------------------------------------------------------------

QUICK = ("--epochs", 2, "--limit", 64, "--batch-size", 32, "--threads", 1, "--lr", 0.05)


def test_train_reports_and_resumes(tiny, tmp_path):
    whole = run("train", "--data", "digits", "--output", tmp_path / "whole", *QUICK)
    assert whole.exit_code == 0, whole.output
    assert "64 images to train on, 64 held out, 10 classes" in whole.stdout
    assert "epoch 2/2: loss " in whole.stdout
    assert "test accuracy " in whole.stdout
    assert f"learning curve: {tmp_path / 'whole' / 'curve.png'}" in whole.stdout
    assert "\x1b" not in whole.stdout  # no control codes where the output is no terminal

    class Stop(training.Listener):
        def step(self, trainer, loss):
            if trainer.epoch == 1:
                raise KeyboardInterrupt

    config = training.TrainConfig.recipe(
        "digits", output=str(tmp_path / "half"), epochs=2, limit=64, batch_size=32, threads=1, lr=0.05
    )
    with pytest.raises(KeyboardInterrupt):
        training.fit(config, listener=Stop())
    resumed = run("train", "--output", tmp_path / "half", "--resume")
    assert resumed.exit_code == 0, resumed.output
    assert "resumed after epoch 1, step 0" in resumed.stdout
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("half", "whole"))
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_train_shows_its_progress_on_a_terminal(tmp_path):
    terminal = io.StringIO()
    console = Console(file=terminal, force_terminal=True, width=120)
    config = training.TrainConfig.recipe("fake", output=str(tmp_path), epochs=2, limit=64, batch_size=32)
    with ProgressBar(console) as bar:
        training.fit(config, model=tiny_model(3), listener=bar)
    frames = Text.from_ansi(terminal.getvalue()).plain
    assert re.search(r"epoch 2/2 ━+ +100 % +loss \d\.\d{4} +\d+ images/s +left 0:00:\d\d", frames)


def test_paths_with_brackets_are_shown_as_they_are(tiny, tmp_path):
    """rich takes words in brackets for markup."""
    output = tmp_path / "out [lr=0.1] [/old]"
    shown = run("train", "--data", "fake", "--limit", 32, "--epochs", 1, "--output", output).stdout.replace("\n", "")
    assert f"weights:        {output}/model.safetensors" in shown


def test_a_folder_that_may_not_be_entered_is_an_error(tiny, tmp_path, monkeypatch):
    def refuse(self, *arguments):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "is_dir", refuse)  # root may enter all
    assert_one_message(run("train", "--data", tmp_path), str(tmp_path), "permission denied")


def test_train_says_no_in_one_message(tiny, tmp_path):
    out = tmp_path / "run"
    assert run("train", "--output", out, *QUICK).exit_code == 0
    assert_one_message(run("train", "--output", out, *QUICK), "--resume", "--overwrite")
    assert_one_message(run("train", "--output", out, "--resume", "--overwrite"), "expected --resume", "got both")
    assert_one_message(run("train", "--output", out, "--resume", "--lr", 0.1), "--lr 0.05", "--lr 0.1")
    assert_one_message(run("train", "--output", out, "--resume", "--data", "fake"), "--data digits", "--data fake")
    assert_one_message(run("train", "--output", tmp_path / "new", "--resume"), "no checkpoint to resume from")
    assert_one_message(run("train", "--output", out / "metrics.csv" / "x"), "cannot write", "Choose another --output")
    assert_one_message(run("train", "--output", tmp_path / "new", "--amp", "fp8"), "--amp", "fp8", "bf16")
    assert_one_message(run("train", "--output", tmp_path / "new", "--model", "vgg12"), "--model", "vgg12")
    assert_one_message(run("train", "--output", tmp_path / "new", "--device", "tpu"), "expected auto, cpu", "'tpu'")
    assert_one_message(run("train", "--data", ""), "--data: expected digits", "got nothing")
    assert_one_message(run("train", "--output", tmp_path / "new", "--seed", 2**64), "seed: expected less than 2^63")
    for command in (("train", "--output", tmp_path / "new"), ("predict", "x.png", "--weights", out)):
        assert_one_message(run(*command, "--threads", 10**9), "--threads", "less than or equal to 1024")
    long = "x" * 300
    assert_one_message(run("train", "--output", tmp_path / long), f"{long}: File name too long; choose another")
    assert_one_message(run("train", "--data", tmp_path / long, "--output", tmp_path / "new"), "File name too long")
    (tmp_path / "circle").symlink_to("circle")
    assert_one_message(run("train", "--output", tmp_path / "circle" / "run"), "circle", "Choose another --output")
    assert_one_message(run("train", "--data", tmp_path / "circle", "--output", tmp_path / "new"), "no data folder")
    (out / "checkpoint.pt").write_bytes(b"PK")
    assert_one_message(run("train", "--output", out, "--resume"), "cannot be read as a checkpoint", "--overwrite")
    (out / "checkpoint.pt").unlink()
    assert_one_message(run("train", "--output", out, *QUICK), "model.safetensors exists", "Replace it with --overwrite")


def test_train_names_and_counts_images_that_cannot_be_read(tiny, tmp_path):
    pytest.importorskip("torchvision")
    write_images(tmp_path / "data", {"cat": 6, "dog": 6})
    (tmp_path / "data" / "dog" / "1.png").write_bytes(b"")
    options = ("--epochs", 2, "--size", 32, "--batch-size", 4)
    done = run("train", "--data", tmp_path / "data", "--output", tmp_path / "run", *options)
    assert done.exit_code == 0, done.output
    assert (
        done.stdout.count(f"{tmp_path / 'data' / 'dog' / '1.png'} cannot be read as an image and is skipped (empty)")
        == 1
    )
    assert "unreadable images skipped in the last epoch: 1" in done.stdout
    assert_one_message(
        run("train", "--output", tmp_path / "run", "--resume", "--recipe", "modern"), "leave out --recipe"
    )


def test_train_without_its_data_says_so(tmp_path):
    pytest.importorskip("torchvision")
    missing = run("train", "--data", tmp_path / "nowhere", "--output", tmp_path / "run")
    assert_one_message(missing, f"no data folder {tmp_path / 'nowhere'}", "expected 'digits'", "Check --data")


def test_a_run_that_cannot_start_leaves_no_empty_folder(tiny, tmp_path):
    missing = ("train", "--data", "digits", "--val", tmp_path / "nowhere")
    assert_one_message(run(*missing, "--output", tmp_path / "runs" / "new"), "leave out --val")
    assert not (tmp_path / "runs").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "note").touch()
    for output in ("mine", "runs/new"):
        assert_one_message(run(*missing, "--output", tmp_path / output), "leave out --val")
    assert (tmp_path / "mine").is_dir()
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["note"]


def test_train_a_real_vgg(tmp_path):
    """The whole command, in a process of its own, on one of the paper's networks."""
    options = ("--data", "fake", "--model", "vgg11", "--limit", 8, "--batch-size", 4, "--threads", 1, "--epochs", 1)
    command = [sys.executable, "-m", "vggfast", "train", *map(str, options), "--output", str(tmp_path / "run")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "vgg11: 128,807,306 parameters, on fake: 8 images to train on" in done.stdout
    assert (tmp_path / "run" / "model.safetensors").stat().st_size > 4 * 128_807_306
    shutil.rmtree(tmp_path / "run")  # 1.5 GB that pytest would keep


@pytest.mark.parametrize("saved", [False, True])
def test_ctrl_c_ends_a_run_with_the_way_to_go_on_where_there_is_one(tmp_path, saved):
    output = tmp_path / "a run"
    # A shell's background jobs ignore SIGINT and their children inherit it; a terminal's do not.
    script = f"""
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.path[:0] = [{str(ROOT / "tests")!r}]
from test_cli import *
training.build_model = lambda name, data: tiny_model(data.in_channels)
cli.main()
"""
    command = [sys.executable, "-c", script, "train", "--output", str(output), "--epochs", "1000", "--threads", "1"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert "1,438 images to train on" in process.stdout.readline()
        while saved and not (output / "checkpoint.pt").exists():
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=300)
    assert process.returncode == 130, stderr
    way = f"go on with: vggfast train --output '{output}' --resume" if saved else "it had saved nothing yet"
    assert stderr == f"interrupted; {way}\n"
