"""The command line, `python -m vggfast` or `vggfast`: info, explain, bench, train, evaluate, predict. Thin: options in, the library's answer out."""

import errno
import io
import json
import os
import platform
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from rich.console import Console
from rich.table import Table

import vggfast
import vggfast.models
import vggfast.recipes.commands
from vggfast import _C, cuda_plan, switches
from vggfast.bench import machine
from vggfast.recipes import RecipeError
from vggfast.recipes.config import MODELS, ModelName

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
CORES = machine.cores()
NO_OUTPUT = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EPIPE)

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
console = Console(soft_wrap=True)


def main() -> None:
    """Run the command line; the console script `vggfast` calls this."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # as Python has it where the stream was closed before the start
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a path's bytes that are no UTF-8 are shown as \\udce9
    try:
        _run_and_flush()
    except OSError as error:
        if error.filename is not None or error.errno not in NO_OUTPUT:
            raise
        # What is still buffered would fail again when Python ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):  # who reads no further wants no message
            typer.echo(f"error: the output cannot be written: {error.strerror}", err=True)
        sys.exit(1)


def _run_and_flush() -> None:
    try:
        app(prog_name="vggfast")
    finally:
        sys.stdout.flush()


@contextmanager
def errors_for_users() -> Iterator[None]:
    """Turn a RecipeError into its message and exit status 2, without a traceback."""
    try:
        yield
    except RecipeError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
    except PermissionError as error:
        typer.echo(
            f"error: {error.filename or error}: permission denied; choose another, or have it made readable", err=True
        )
        raise typer.Exit(2) from None
    except OSError as error:
        if error.filename is None:  # the output's, or none that a path has to do with
            raise
        typer.echo(f"error: {error.filename}: {error.strerror}; choose another path", err=True)
        raise typer.Exit(2) from None


@app.callback()
def check_environment() -> None:
    """VGG on fused Conv3x3 + bias + ReLU + MaxPool kernels."""
    with errors_for_users():
        try:
            switches.cpu_isa(), switches.conv_algo(), switches.cuda_plan()
        except ValueError as error:  # an environment variable has a value that is none of its switch's
            raise RecipeError(str(error)) from error


@app.command()
def info(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Show what was built, which instruction set and GPU are used, and why."""
    facts = collect_info()
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
        return
    table = Table(show_header=False)
    for name, value in facts.items():
        shown = ", ".join(value) if isinstance(value, list) else str(value)
        table.add_row(name.replace("_", " "), shown or "none")
    Console(width=None if console.is_terminal else 120).print(table)


def collect_info() -> dict[str, Any]:
    """What `info` shows, ready for JSON: versions, the build, the CPU kernels in use, GPUs."""
    build = dict(_C.build_info())
    forced = "" if os.environ.get("VGGFAST_CPU_ISA") in (None, "", "auto") else "forced by VGGFAST_CPU_ISA"
    devices = [
        f"{torch.cuda.get_device_name(index)}, compute capability {'.'.join(map(str, torch.cuda.get_device_capability(index)))}"
        for index in range(torch.cuda.device_count())
    ]
    return {
        "vggfast": build.pop("version"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cuda_kernels": build.pop("cuda") or "not in this build",
        "cuda_plan": switches.cuda_plan(),
        "cuda_plan_reason": _cuda_plan_reason(),
        **{f"built_with_{name}": str(value) for name, value in build.items()},
        "cpu_isa": switches.cpu_isa(),
        "cpu_isa_reason": forced or switches.why_not_cpu() or "the widest of those this CPU runs",
        "cpu_isas": list(switches.cpu_isas()),
        "conv_algo": switches.conv_algo(),
        "conv_algo_reason": "VGGFAST_CONV_ALGO" if os.environ.get("VGGFAST_CONV_ALGO") else "the default",
        "threads": torch.get_num_threads(),
        "cuda_of_torch": torch.version.cuda or "none: a CPU build",
        "cuda_devices": devices,
    }


def _cuda_plan_reason() -> str:
    if obstacle := cuda_plan.build_obstacle() or (cuda_plan.gpu_of(0).obstacle if torch.cuda.is_available() else ""):
        return obstacle
    if os.environ.get("VGGFAST_CUDA_PLAN"):
        return "VGGFAST_CUDA_PLAN"
    return "the default; VGGFAST_CUDA_PLAN=sm80 or sm90 turns on kernels that no GPU has proven yet"


@app.command()
def explain(
    model: Annotated[ModelName, typer.Argument(help="The model, randomly initialised.")],
    batch: Annotated[int, typer.Option(min=1, help="Images.")] = 1,
    size: Annotated[int, typer.Option(min=32, help="Height and width of the images.")] = 224,
    in_channels: Annotated[int, typer.Option(min=1, help="Channels of the images.")] = 3,
    dtype: Annotated[Literal["fp32", "bf16", "fp16", "fp64"], typer.Option(help="Of images and weights.")] = "fp32",
    batch_norm: Annotated[bool, typer.Option("--batch-norm", help="The variant with BatchNorm.")] = False,
    channels_last: Annotated[bool, typer.Option("--channels-last", help="Images in channels_last memory.")] = False,
    train: Annotated[bool, typer.Option("--train", help="In training mode, where BatchNorm cannot be folded.")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    gpu: Annotated[
        str | None,
        typer.Option(
            help="The plan of a GPU of this compute capability and number of SMs, as 8.0,108. Needs a build with nvcc, but no GPU."
        ),
    ] = None,
    roofline: Annotated[
        bool,
        typer.Option(
            "--roofline",
            help="Predict each layer's time on a Hopper GPU from bytes and operations. Needs a build with nvcc, but no GPU.",
        ),
    ] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw the network into this file: PNG, PDF or SVG.")] = None,
    measure: Annotated[bool, typer.Option("--measure", help="With --plot: measure each layer's time here.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show which kernel each layer of MODEL takes, and why not a faster one."""
    from vggfast.recipes.train import choose_device

    with errors_for_users():
        place = choose_device(device)
        name = f"{model}_bn" if batch_norm and not model.endswith("_bn") else model
        if name not in MODELS:
            raise RecipeError(f"{model} has no variant with BatchNorm: expected one of {', '.join(MODELS)}")
        _check_plot(plot, measure)
    network = (
        getattr(vggfast.models, name)(in_channels=in_channels, init_weights=False).to(place, DTYPES[dtype]).train(train)
    )
    layout = torch.channels_last if channels_last else torch.contiguous_format
    with errors_for_users():
        try:
            x = torch.zeros(batch, in_channels, size, size, device=place, dtype=DTYPES[dtype]).to(memory_format=layout)
        except (RuntimeError, MemoryError) as error:
            reason, shape = str(error).splitlines()[0], f"{batch} x {in_channels} x {size} x {size}"
            raise RecipeError(f"{shape} in {dtype}: too large for memory ({reason})") from error
    asked_by = "--roofline" if roofline and gpu is None else "--gpu"
    if roofline:
        gpu = gpu or "9.0,132"
        switches.set_cuda_plan("sm90patch" if switches.cuda_plan() == "sm90patch" else "sm90")
    try:
        explanation = vggfast.explain(network, x, gpu=gpu)
    except ValueError as error:  # gpu is not of its form, or the build has no kernels for any
        typer.echo(f"error: {re.sub('^gpu:', f'{asked_by}:', str(error))}", err=True)
        raise typer.Exit(2) from None
    with errors_for_users():
        if plot is not None:
            title = f"{name}, {batch} × {in_channels} × {size} × {size}, {dtype}"
            _draw(explanation, plot, title, (network, x) if measure else None)
    if roofline:
        _print_roofline(explanation, as_json)
        return
    # A file, or grep, gets one line a layer.
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    typer.echo(json.dumps(explanation.to_dict(), indent=2) if as_json else explanation.text(width))


def _check_plot(plot: Path | None, measure: bool) -> None:
    """Before anything is measured: what is known to end without a picture."""
    if measure and plot is None:
        raise RecipeError("--measure: expected --plot FILE beside it; the times are drawn")
    if plot is not None and not plot.parent.is_dir():
        wrong = "is no folder" if plot.parent.exists() else "does not exist"
        raise RecipeError(
            f"--plot: expected a file in a folder that is there, {plot.parent} {wrong}. Make it, or choose another"
        )


def _draw(explanation: vggfast.Explanation, path: Path, title: str, measured: tuple[Any, torch.Tensor] | None) -> None:
    from vggfast import explain_plot

    if measured and explanation.gpu is not None:
        raise RecipeError("--measure: expected the device of the model, got --gpu; leave one of them out")
    seconds = explain_plot.measure(*measured) if measured else None
    try:
        explain_plot.draw(explanation, path, title, seconds)
    except (ValueError, OSError) as error:
        raise RecipeError(f"--plot: {error}") from error


def _print_roofline(explanation: vggfast.Explanation, as_json: bool) -> None:
    from dataclasses import asdict

    from vggfast.roofline import Ceilings, predict, table

    ceilings = Ceilings(sms=explanation.gpu.sm_count) if explanation.gpu else Ceilings()
    predictions = predict(explanation, ceilings)
    rows = [asdict(p) | {"us": p.us, "bound": p.bound} for p in predictions]
    typer.echo(
        json.dumps({"ceilings": asdict(ceilings), "rows": rows}, indent=2) if as_json else table(predictions, ceilings)
    )


@app.command()
def bench(
    model: Annotated[Literal["vgg11", "vgg13", "vgg16", "vgg19"], typer.Option(help="The network.")] = "vgg16",
    batch: Annotated[int, typer.Option(min=1, help="Images at a time.")] = 8,
    dtype: Annotated[Literal["fp32", "bf16"], typer.Option(help="With --train, bf16 is autocast.")] = "fp32",
    against: Annotated[
        str | None,
        typer.Option(
            help="Rivals, with commas: torch, compile, onnxruntime, openvino, ncnn; on a GPU also cudagraph, cudnn, jax."
        ),
    ] = None,
    threads: Annotated[int, typer.Option(min=1, max=CORES, help="CPU threads of every contender.")] = min(2, CORES),
    layers: Annotated[bool, typer.Option("--layers", help="VGG16's convolutions one by one.")] = False,
    train: Annotated[bool, typer.Option("--train", help="A training step; with --layers the gradients too.")] = False,
    memory: Annotated[bool, typer.Option("--memory", help="Peak memory and saved activations too.")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the results to this file.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw pictures into this folder.")] = None,
) -> None:
    r"""Compare speed with other runtimes: checked first, interleaved rounds, equal threads, each rival in its own process.

    Rivals that are not installed are named, with what brings them.
    """
    from vggfast.bench import BenchError
    from vggfast.bench.command import bench as measure
    from vggfast.bench.command import chosen_groups
    from vggfast.recipes.train import choose_device

    rivals = against.replace(" ", "").split(",") if against else None
    with errors_for_users():
        place: Any = choose_device(device).type
        try:
            groups = chosen_groups(model, batch, dtype, place, threads, rivals, layers, train, memory)
            data = measure(groups, threads, Console(width=None if console.is_terminal else 150), json_file, plot)
        except BenchError as error:
            raise RecipeError(str(error)) from error
    if any(
        c["label"] == "vggfast" and c.keys() & {"failed", "refused"} for g in data["groups"] for c in g["contenders"]
    ):
        raise typer.Exit(1)


for _command in (vggfast.recipes.commands.train, vggfast.recipes.commands.evaluate, vggfast.recipes.commands.predict):
    app.command()(errors_for_users()(_command))
