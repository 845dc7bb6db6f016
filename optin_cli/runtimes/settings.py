"""What `export` writes. Without torch: the command line makes its options from it."""

from __future__ import annotations

from dataclasses import dataclass, field

FLOAT32, FLOAT16, INT8 = "float32", "float16", "int8"
ONNX, OPENVINO, TORCH = "onnx", "openvino", "torch"


@dataclass(frozen=True)
class ExportSettings:
    """What is written."""

    to: str = field(metadata={"metavar": "onnx|openvino|torch", "help": "What runs the file."})
    fp16: bool = field(default=False, metadata={"help": "Weights and activations in float16."})
    int8: bool = field(
        default=False,
        metadata={"help": "Products in int8; layers that would cost much quality stay in float32."},
    )
    max_error: float = field(
        default=0.1,
        metadata={
            "metavar": "SHARE",
            "panel": "Calibration",
            "help": "Of int8: how far outputs may move, as a share of their spread over the data.",
        },
    )
    opset: int | None = field(
        default=None, metadata={"panel": "Output", "least": 1, "help": "Operator set of ONNX."}
    )
    cache: bool = field(
        default=False,
        metadata={"help": "Of a decoder: read and give keys and values, to generate token by token (ONNX)."},
    )

    @property
    def precision(self) -> str:
        return FLOAT16 if self.fp16 else INT8 if self.int8 else FLOAT32
