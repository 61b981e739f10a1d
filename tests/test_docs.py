"""Every block of code in the documentation's pages runs, from top to bottom of a page, in a folder with a few images.

Blocks marked ```python share one namespace, blocks marked ```bash run with this Python's programs first on the PATH, all
in one folder, which holds photos/ (train and val, two classes), shards/ (train-000.tar …, val-000.tar) and photo.jpg.
`docs_shim` makes networks and recipes small. A block with `no-run` behind its language only has to be rare. Of README,
whose other block installs, the one in Python runs, and its commands have the options that it names.
"""

import importlib.util
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
import typer
from torch.utils import cpp_extension

from vggfast import cli, switches

ROOT = Path(__file__).parents[1]
PAGES = [
    page
    for name in ("guide", "train", "evaluate", "features", "numerics")
    if (page := ROOT / "docs" / f"{name}.md").exists()
]
BLOCK = re.compile(r"^```(python|bash)([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NEEDED = ("torchvision", "mlxtend", "tensorboard", "lpips", "timm")

RUN_BLOCKS = """
import json, subprocess, sys
namespace = {"__name__": "__main__"}
for language, line, code in json.load(sys.stdin):
    print(f"==== {language} block at line {line}", flush=True)
    if language == "bash":
        subprocess.run(["bash", "-euo", "pipefail", "-c", code], check=True)
    else:
        exec(compile("\\n" * line + code, sys.argv[1], "exec"), namespace)
print("==== all ran")
"""


def blocks(page: Path) -> list[tuple[str, int, str]]:
    """(language, line of the fence, code) of each block that is to run."""
    text = page.read_text()
    return [
        (match[1], text.count("\n", 0, match.start()) + 1, match[3])
        for match in BLOCK.finditer(text)
        if "no-run" not in match[2]
    ]


def run_blocks(page: str, to_run: list[tuple[str, int, str]], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run the blocks of `page` one after the other in `folder`, on small networks."""
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": f"{ROOT / 'tests' / 'docs_shim'}{os.pathsep}{ROOT}",
        "MPLBACKEND": "Agg",
    }
    return subprocess.run(
        [sys.executable, "-c", RUN_BLOCKS, page],
        input=json.dumps(to_run), cwd=folder, env=environment, capture_output=True, text=True, timeout=1200,
    )  # fmt: skip


def prepare(folder: Path) -> None:
    """Write the images that the pages speak of."""
    from PIL import Image

    def photo() -> Image.Image:
        return Image.fromarray(torch.randint(0, 256, (60, 80, 3), dtype=torch.uint8).numpy())

    photo().save(folder / "photo.jpg")
    for part, count in (("train", 6), ("val", 2)):
        for name in ("cat", "dog"):
            (folder / "photos" / part / name).mkdir(parents=True)
            for number in range(count):
                photo().save(folder / "photos" / part / name / f"{number}.jpg")
    (folder / "shards").mkdir()
    for name in ("train-000", "train-001", "train-002", "train-003", "val-000"):
        with tarfile.open(folder / "shards" / f"{name}.tar", "w") as tar:
            for number in range(4):
                jpeg = io.BytesIO()
                photo().save(jpeg, "JPEG")
                for suffix, content in (("jpg", jpeg.getvalue()), ("cls", str(number % 2).encode())):
                    member = tarfile.TarInfo(f"{name}-{number}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_block_of_a_page_runs(page, tmp_path):
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        pytest.skip(f"the pages use {', '.join(missing)}, which is not installed")
    to_run = blocks(page)
    assert len(to_run) >= 2
    assert len(BLOCK.findall(page.read_text())) - len(to_run) <= 2  # `no-run` is for what cannot run anywhere
    prepare(tmp_path)
    done = run_blocks(str(page), to_run, tmp_path)
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    assert done.stdout.endswith("==== all ran\n")


def test_a_block_that_fails_is_noticed(tmp_path):
    """The runner itself: an exception in Python and a failing command in the middle of a script both count."""
    for block in (["python", 1, "1 / 0"], ["bash", 1, "false\ntrue"]):
        done = subprocess.run(
            [sys.executable, "-c", RUN_BLOCKS, "page.md"], input=json.dumps([block]), capture_output=True, text=True
        )
        assert done.returncode != 0
        assert "all ran" not in done.stdout


def test_the_guides_op_in_cpp_is_one(tmp_path):
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    (block,) = re.findall(r"^```cpp\n(.*?)^```$", (ROOT / "docs/guide.md").read_text(), re.MULTILINE | re.DOTALL)
    (tmp_path / "op.cpp").write_text(block)
    (flag,) = re.findall(r"`(-DTORCH_TARGET_VERSION=0x[0-9a-f]+)`", (ROOT / "docs/guide.md").read_text())
    includes = [f"-isystem{path}" for path in cpp_extension.include_paths()]
    libraries = [f"-L{path}" for path in cpp_extension.library_paths()]
    command = ["g++", "-std=c++17", "-shared", "-fPIC", flag, *includes, "op.cpp", "-o", "op.so", *libraries]
    subprocess.run([*command, "-ltorch_cpu", "-ltorch"], cwd=tmp_path, check=True)
    torch.ops.load_library(tmp_path / "op.so")
    x = torch.tensor([[-1.0, 2.0], [math.nan, -0.0]]).T
    torch.testing.assert_close(torch.ops.example.relu_of(x), torch.relu(x), equal_nan=True, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="x: expected float32, got Double"):
        torch.ops.example.relu_of(x.double())


def test_readmes_python_block_runs(tmp_path):
    if importlib.util.find_spec("torchvision") is None:
        pytest.skip("README uses torchvision, which is not installed")
    [(language, line, code)] = [block for block in blocks(ROOT / "README.md") if block[0] == "python"]
    batches = "import torch; batches = [(torch.rand(1, 3, 224, 224), torch.tensor([3]))]"
    done = run_blocks("README.md", [("python", 1, batches), (language, line, code)], tmp_path)
    assert done.returncode == 0, done.stderr
    assert "13 of 13 convolutions run on fused kernels" in done.stdout


def test_the_commands_that_readme_names_have_these_options():
    commands = typer.main.get_command(cli.app).commands
    named = re.findall(r"`vggfast (\w+)([^`]*)`", (ROOT / "README.md").read_text())
    assert {name for name, _ in named} == set(commands)
    for name, options in named:
        known = {option for parameter in commands[name].params for option in parameter.opts}
        assert set(re.findall(r"--[\w-]+", options)) <= known, f"{name}{options}"


def test_the_table_of_switches_has_every_plan():
    table = dict(
        re.findall(r"^\| `(VGGFAST_\w+)` \|[^|]*\|([^|]*)\|$", (ROOT / "docs/numerics.md").read_text(), re.MULTILINE)
    )
    assert tuple(re.findall(r"`(\w+)`", table["VGGFAST_CUDA_PLAN"])) == switches.CUDA_PLANS
