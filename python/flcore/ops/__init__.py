"""Stateless functions with explicit buffers, one module a stem; `variant=` names the backend."""

from flcore.ops._combine_rows import combine_rows
from flcore.ops._combine_step import combine_step
from flcore.ops._control_step import Controlled, control_step
from flcore.ops._local_prepared import LocalStep
from flcore.ops._local_shift import (
    global_norm,
    global_norm_rows,
    sam_shift,
    sam_shift_rows,
    shift,
    shift_rows,
)
from flcore.ops._round_end import round_end, round_end_rows
from flcore.ops._step import Noise, Step, Stepped
from flcore.ops.act_quant import QuantizedActivation, quantize_activation
from flcore.ops.combine import combine
from flcore.ops.gram import gram
from flcore.ops.local_step import local_step, local_step_rows
from flcore.ops.mask import dequantize_sum, mask_add, modular_sum
from flcore.ops.moments import Moments, accumulate_moments, affine, moments, moments_each
from flcore.ops.perp_grad import perp_grad
from flcore.ops.qembedding import qembedding, qembedding_grad
from flcore.ops.qmatmul import qmatmul
from flcore.ops.qmatmul_dx import qmatmul_dx
from flcore.ops.qmatmul_int8 import qmatmul_int8
from flcore.ops.rng import random_bits, random_normal, random_uniform
from flcore.ops.select import select
from flcore.ops.stablemax import (
    log_stablemax,
    log_stablemax_backward,
    stablemax,
    stablemax_backward,
)

__all__ = [
    "Controlled",
    "LocalStep",
    "Moments",
    "Noise",
    "QuantizedActivation",
    "Step",
    "Stepped",
    "accumulate_moments",
    "affine",
    "combine",
    "combine_rows",
    "combine_step",
    "control_step",
    "dequantize_sum",
    "global_norm",
    "global_norm_rows",
    "gram",
    "local_step",
    "local_step_rows",
    "log_stablemax",
    "log_stablemax_backward",
    "mask_add",
    "modular_sum",
    "moments",
    "moments_each",
    "perp_grad",
    "qembedding",
    "qembedding_grad",
    "qmatmul",
    "qmatmul_dx",
    "qmatmul_int8",
    "quantize_activation",
    "random_bits",
    "random_normal",
    "random_uniform",
    "round_end",
    "round_end_rows",
    "sam_shift",
    "sam_shift_rows",
    "select",
    "shift",
    "shift_rows",
    "stablemax",
    "stablemax_backward",
]
