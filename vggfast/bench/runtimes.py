"""Contenders that run a file: ONNX Runtime, OpenVINO, ncnn. Their packages come with the extra ``bench``."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vggfast.bench import BenchError, cases
from vggfast.bench.cases import BUFFERS, Case
from vggfast.bench.contenders import Runner

# Files by name, made on demand by `export`; the value is what a contender's builder finds in `files`.
FILES = {"onnxruntime": "onnx", "openvino": "onnx", "ncnn": "ncnn"}


def export(kind: str, case: Case, weights: Path, folder: Path) -> Path:
    """Write the network of ``case`` with ``weights`` as ``kind``, "onnx" (any batch) or "ncnn" (one image); return the file."""
    if kind == "onnx":
        return _export_onnx(case, weights, folder / "network.onnx")
    return _export_ncnn(case, weights, folder)


def _export_onnx(case: Case, weights: Path, path: Path) -> Path:
    net = cases.plain_network(cases.network(case, weights).eval())
    x = torch.zeros(2, 3, case.size, case.size)  # with 1 the exporter would fix the batch
    batch = torch.export.Dim("batch")
    torch.onnx.export(
        net, (x,), path, dynamo=True, input_names=["images"], output_names=["scores"],
        dynamic_shapes=({0: batch},), external_data=True, verbose=False,
    )  # fmt: skip
    return path


def _export_ncnn(case: Case, weights: Path, folder: Path) -> Path:
    import pnnx

    net = cases.plain_network(cases.network(case, weights).eval())
    with torch.no_grad():
        jit: Any = torch.jit
        jit.trace(net, torch.zeros(1, 3, case.size, case.size)).save(folder / "network.pt")
    command = [str(pnnx.EXEC_PATH), "network.pt", f"inputshape=[1,3,{case.size},{case.size}]", "fp16=0"]
    command += ["pnnxbin=/dev/null", "pnnxonnx=/dev/null"]  # half a gigabyte each, of no use here
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    path = folder / "network.ncnn.param"
    (folder / "network.pt").unlink()
    if done.returncode or not path.exists():
        raise BenchError(f"pnnx: expected {path.name}, got status {done.returncode}: {done.stderr[-400:]}")
    return path


def _scores(result: Any) -> dict[str, torch.Tensor]:
    return {"scores": torch.as_tensor(result).reshape(-1, torch.as_tensor(result).shape[-1]).float()}


def _arrays(case: Case) -> list[Any]:
    return [cases.images(case, i).numpy() for i in range(BUFFERS)]


def build_onnxruntime(case: Case, files: dict[str, str]) -> Runner:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = case.threads, 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.add_free_dimension_override_by_name("batch", case.batch)
    # Its threads spin while it runs, which is fastest, and stop when it is done, so that they do not disturb the others.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = ort.InferenceSession(files["onnx"], options, providers=["CPUExecutionProvider"])
    arrays = _arrays(case)

    def run(buffer: int) -> Any:
        return session.run(None, {"images": arrays[buffer]})[0]

    return Runner(run, _scores, "CPU provider, all graph optimisations, spinning threads", version=ort.__version__)


def build_openvino(case: Case, files: dict[str, str]) -> Runner:
    import openvino as ov

    core = ov.Core()
    model = core.read_model(files["onnx"])
    model.reshape([case.batch, 3, case.size, case.size])
    precision = {"fp32": "f32", "bf16": "bf16"}[case.dtype]
    config = {
        "INFERENCE_NUM_THREADS": case.threads,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": precision,
    }
    request = core.compile_model(model, "CPU", config).create_infer_request()
    arrays = _arrays(case)

    def run(buffer: int) -> Any:
        return request.infer({0: arrays[buffer]}, share_inputs=True, share_outputs=True)[0]

    setting = f"latency hint, one stream, inference precision {precision}"
    return Runner(run, _scores, setting, version=ov.__version__.split("-")[0])


NCNN_STORAGE = {"fp32": "float16 off", "half": "default options: float16 weights", "bf16": "bfloat16 storage"}


def build_ncnn(case: Case, files: dict[str, str], storage: str = "fp32") -> Runner:
    """``half`` leaves ncnn's defaults, with which it keeps the fully connected layers' weights in float16; ``bf16`` has it keep
    weights and activations in bfloat16, which is faster where the CPU multiplies these."""
    import ncnn

    net = ncnn.Net()
    net.opt.num_threads = case.threads
    if storage == "fp32":
        net.opt.use_fp16_packed = net.opt.use_fp16_storage = net.opt.use_fp16_arithmetic = False
    net.opt.use_bf16_storage = storage == "bf16"
    param = Path(files["ncnn"])
    if net.load_param(os.fspath(param)) or net.load_model(os.fspath(param.with_suffix(".bin"))):
        raise BenchError(f"ncnn: expected to load {param}, got an error")
    mats = [
        ncnn.Mat(array[0]).clone() for array in _arrays(case)
    ]  # the clone owns its memory, the Mat borrows the array's

    def run(buffer: int) -> Any:
        extractor = net.create_extractor()
        extractor.input("in0", mats[buffer])
        return np.array(extractor.extract("out0")[1])  # a copy: the extractor's memory goes with it

    def outputs(result: Any) -> dict[str, torch.Tensor]:
        return {"scores": torch.from_numpy(result).reshape(1, -1)}

    setting = f"converted by pnnx, {NCNN_STORAGE[storage]}"
    return Runner(run, outputs, setting, version=ncnn.__version__)
