"""What README's table compares: its lines, each with the groups of results and the rivals that it is about."""

from __future__ import annotations

from dataclasses import dataclass

from vggfast.bench.contenders import VGGFAST
from vggfast.bench.layers import VGG16_LAYERS
from vggfast.bench.networks import BATCH_NORM, SMALL

OURS = VGGFAST.name
TORCH = "torch channels_last"
TORCHS = (TORCH, "torch NCHW")  # its layouts


@dataclass(frozen=True)
class Row:
    """One line of the table. ``groups`` are summed up, round by round; the rival of the smallest ratio is compared with."""

    what: str
    groups: tuple[str, ...]
    rivals: tuple[str, ...]
    field: str = "seconds"  # or "saved_bytes", "peak_bytes"


def layer_groups(task: str, batch: int, dtype: str) -> tuple[str, ...]:
    """The groups of all layers that have the task."""
    chosen = [layer for layer in VGG16_LAYERS if layer.has(task)]
    return tuple(f"{layer.name} {task} {dtype} batch {batch}" for layer in chosen)


COMPILED = (*TORCHS, "torch.compile")
CPU_ROWS = [
    Row("inference, float32, batch 8", ("vgg16 inference fp32 batch 8",), (*COMPILED, "onnxruntime", "openvino")),
    Row("inference, float32, batch 8, against bfloat16", ("vgg16 inference fp32 batch 8",), ("openvino bf16",)),
    Row(
        "inference, float32, batch 1", ("vgg16 inference fp32 batch 1",), (*COMPILED, "onnxruntime", "openvino", "ncnn")
    ),
    Row(
        "inference, float32, batch 1, against half precision",
        ("vgg16 inference fp32 batch 1",),
        ("ncnn half", "ncnn bf16", "openvino bf16"),
    ),
    Row("inference, bfloat16, batch 8", ("vgg16 inference bf16 batch 8",), (*COMPILED, "openvino")),
    Row(
        "inference, bfloat16, batch 1",
        ("vgg16 inference bf16 batch 1",),
        (*COMPILED, "openvino", "ncnn half", "ncnn bf16"),
    ),
    Row("the 13 convolutions, float32, batch 1", layer_groups("forward", 1, "fp32"), TORCHS),
    Row("the 13 convolutions, float32, batch 8", layer_groups("forward", 8, "fp32"), TORCHS),
    Row("their input gradients, float32, batch 8", layer_groups("grad_input", 8, "fp32"), TORCHS),
    Row("their filter gradients, float32, batch 8", layer_groups("grad_weight", 8, "fp32"), TORCHS),
    Row("training step, float32, batch 8", ("vgg16 training fp32 batch 8",), COMPILED),
    Row("training step, bfloat16 autocast, batch 8", ("vgg16 training bf16 batch 8",), COMPILED),
    Row("training step with BatchNorm, float32, batch 8", (f"{BATCH_NORM} training fp32 batch 8",), COMPILED),
    Row("images of 32×32, inference, float32, batch 128", (f"{SMALL} inference fp32 batch 128",), COMPILED),
    Row("images of 32×32, training step, float32, batch 128", (f"{SMALL} training fp32 batch 128",), COMPILED),
    *[
        Row(
            f"LPIPS with its gradient, float32, batch {batch}",
            (f"vgg16 lpips fp32 batch {batch}",),
            (*COMPILED, "lpips package"),
        )
        for batch in (1, 8)
    ],
    Row("features and Gram matrices, float32, batch 8", ("vgg16 perceptual fp32 batch 8",), COMPILED),
    Row(
        "saved activations, float32 training, batch 8",
        ("memory: vgg16 training fp32 batch 8",),
        COMPILED,
        "saved_bytes",
    ),
    Row(
        "saved activations with BatchNorm, float32 training, batch 8",
        (f"memory: {BATCH_NORM} training fp32 batch 8",),
        COMPILED,
        "saved_bytes",
    ),
    Row("peak memory, float32 training, batch 8", ("memory: vgg16 training fp32 batch 8",), COMPILED, "peak_bytes"),
    Row(
        "saved for LPIPS's gradient, float32, batch 8",
        ("memory: vgg16 lpips fp32 batch 8",),
        (*COMPILED, "lpips package"),
        "saved_bytes",
    ),
    Row(
        "peak memory of LPIPS, float32, batch 8",
        ("memory: vgg16 lpips fp32 batch 8",),
        (*COMPILED, "lpips package"),
        "peak_bytes",
    ),
]
_GPU_RIVALS = (*COMPILED, "torch.compile max-autotune", "torch CUDA graph", "jax")
GPU_ROWS = [
    *[
        Row(f"inference, bfloat16, batch {batch}", (f"vgg16 inference bf16 batch {batch}",), _GPU_RIVALS)
        for batch in (1, 32, 256)
    ],
    *[
        Row(f"training step, bfloat16 autocast, batch {batch}", (f"vgg16 training bf16 batch {batch}",), _GPU_RIVALS)
        for batch in (32, 256)
    ],
    *[
        Row(f"{what}, bfloat16, batch {batch}", layer_groups(task, batch, "bf16"), (TORCH, "cudnn_convolution_relu", "jax"))
        for what, task in (
            ("the 13 convolutions", "forward"), ("their input gradients", "grad_input"), ("their filter gradients", "grad_weight"),
        )
        for batch in (1, 32, 256)
    ],
    *[
        Row(f"saved activations, training, batch {batch}", (f"memory: vgg16 training bf16 batch {batch}",), COMPILED, "saved_bytes")
        for batch in (32, 256)
    ],
]  # fmt: skip
