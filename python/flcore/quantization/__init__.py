"""Weights in 2, 3, 4 and 8 bits: schemes, the tensor class, quantisers, files, loaders."""

from flcore.quantization._files import load_weights, save_weights
from flcore.quantization._load_blocks import (
    from_bitsandbytes_nf4,
    from_ggml_q4_0,
    from_onnx_matmul_nbits,
)
from flcore.quantization._load_words import (
    from_autoawq,
    from_gptq,
    gptq_order,
    gptq_zero_offset,
)
from flcore.quantization._model import LayerReport, ModelReport, quantize_model
from flcore.quantization._nested import from_ggml_q4_k, from_nvfp4, quantize_nvfp4
from flcore.quantization._scheme import Scheme
from flcore.quantization._tensor import QuantizedTensor, quantize

__all__ = [
    "LayerReport",
    "ModelReport",
    "QuantizedTensor",
    "Scheme",
    "from_autoawq",
    "from_bitsandbytes_nf4",
    "from_ggml_q4_0",
    "from_ggml_q4_k",
    "from_gptq",
    "from_nvfp4",
    "from_onnx_matmul_nbits",
    "gptq_order",
    "gptq_zero_offset",
    "load_weights",
    "quantize",
    "quantize_model",
    "quantize_nvfp4",
    "save_weights",
]
