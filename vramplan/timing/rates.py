"""What a card and its host achieve: the pace of kernels, and what launching them costs.

The shares and seconds here were measured by micro-benchmarks on an NVIDIA H200 (SXM, 700 W, driver
580, 16 cores of an Intel Xeon; torch 2.11, CUDA 13.0, bitsandbytes 0.50.2) on 2026-11-22, each for
itself; docs/timing.md has them in a table. Another card has its own peaks and, for want of a
measurement, the same shares of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from vramplan.hardware.gpu import Gpu

US = 1e-6


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Seconds, and figures a second, of one card."""

    products: Mapping[str, float]
    """FLOP/s of matrix products, by dtype."""
    product: float
    """Seconds that a product takes beside its FLOPs, with the gap before it."""
    skinny: float
    """Bytes a second of products that have too little to compute (an adapter's, a head's)."""
    grouped: bool
    """One kernel multiplies all experts (torch's grouped_mm, bf16 on sm_90)."""
    attention: Mapping[str, Mapping[int, float]]
    """FLOP/s of fused attention in long sequences: by direction and head size, padded."""
    efficient: Mapping[str, float]
    """The same of the memory-efficient kernel, by dtype."""
    bandwidth: float
    """Bytes a second of pointwise kernels on contiguous tensors of one dtype."""
    elements: float
    """Elements a second of those that compute an address for each."""
    kernel: float
    """Seconds that a pointwise kernel takes beside its work, with the gap before it."""
    dequantize: float
    """Elements a second of a 4-bit weight."""
    integers: float
    """Operations a second of int8 products."""
    several: Mapping[int, float]
    """Bytes a second of kernels that go through many tensors (multi_tensor_apply: norms, optimizer
    steps), by bytes an element."""
    updates: Mapping[str, float]
    """Elements a second of optimizers whose step computes more than it moves."""
    host: float
    """How many times as long as in HOST the machine's host takes."""


# --- shares of a card's peaks -------------------------------------------------------------------

PRODUCTS = {"bf16": 0.79, "fp16": 0.76, "fp32": 0.76}
"""780 TFLOP/s of 989 in bf16, 751 in fp16; 51 of 66.9 in fp32 (no TF32), for 2048 rows and more."""
PRODUCT = 4.4 * US
SKINNY = 0.68
"""Of the memory's bandwidth: 3.3 TB/s of 4.8, adapters of rank 8 to 64 and 8192 rows."""
CUDNN = {
    "forward": {64: 0.475, 128: 0.667, 256: 0.495},
    "backward": {64: 0.455, 128: 0.597, 256: 0.394},
}
"""cuDNN's attention: 470, 660, 490 TFLOP/s forward where the sequence is long."""
FLASH = {
    "forward": {64: 0.55, 128: 0.65, 256: 0.50},
    "backward": {64: 0.45, 128: 0.55, 256: 0.35},
}
"""FlashAttention-2 elsewhere: up to 73 % of an A100's peak forward, 63 % backward (Dao 2023,
arXiv:2307.08691, figures 4 to 6), less for small heads."""
FLASH_ON_HOPPER = 0.40
"""FlashAttention-2 reaches 35 to 40 % of an H100's peak (Shah et al. 2024, arXiv:2407.08608)."""
BEFORE_AMPERE = 0.30
"""Volta and Turing have no flash kernel: the memory-efficient one takes its place."""
EFFICIENT = {"fp32": 0.45, "bf16": 0.30, "fp16": 0.30}
"""24 to 38 TFLOP/s of 66.9 in fp32."""
BANDWIDTH = 0.90
"""4.3 of 4.8 TB/s."""
ELEMENTS = 0.0051
"""Elements a FLOP of the vector units: 340e9/s of 66.9e12."""
KERNEL = 2.6 * US
DEQUANTIZE = 0.185
"""Elements a byte of the memory's bandwidth: 890e9/s of 4.8e12."""
INTEGERS = 0.90
"""Of the fp16 peak, which is half the int8 peak: 895e12 operations/s."""
SEVERAL = {2: 0.55, 4: 0.72}
UPDATES = {"adamw 8": 31e9, "lion 8": 49e9, "adamw 32": 69e9, "adafactor": 26e9}
"""Elements a second on a card of UPDATES_AT fp32 FLOP/s (1.24e9 parameters in bf16)."""
UPDATES_AT = 66.9e12

# --- the host -----------------------------------------------------------------------------------

HOST: Mapping[str, float] = {
    "op": 13.5 * US,
    "view": 4 * US,
    "kernel": 4 * US,
    "linear": 8 * US,
    "adapter": 144 * US,
    "layer": 128 * US,
    "dequantize": 145 * US,
    "dequantize backward": 110 * US,
    "dequantize once": 100 * US,
    "dequantize once backward": 65 * US,
    "int8": 480 * US,
    "int8 backward": 108 * US,
    "grouped product": 26 * US,
    "node": 9 * US,
    "grad": 12.4 * US,
    "gradient": 6 * US,
    "hook": 21 * US,
    "checkpoint": 90 * US,
    "forward": 630 * US,
    "backward": 470 * US,
}
"""Seconds of the thread that launches, by kind of work (vramplan.timing.work, HOST_WORK): fitted to
sixteen runs of a 16-layer model so small that the card always waits. A saved tensor ("hook") under
checkpointing to all runs of three machines with checkpointing (2026-11-28): twice what the small
model alone had said, and the same on each of the machines. Scales that are not quantized
("dequantize once") save bitsandbytes two calls: 53 to 76 us by themselves, on a host 1.4 times as
slow (2026-11-28)."""
HOST_PACE = {"h100-80gb": 1.37}
"""A host belongs to a machine, not to a card; what was measured is kept with the card it came with.
Two machines with one H100 SXM took 1.4 (3 runs, 2026-11-22) and 1.32 times (11 runs, 2026-11-28)
as long as those with an H200; one with four of them, all busy, 1.6 times (72 runs)."""
MODULE, GATHERED = 0.10e-3, 1.9e-3
"""ZeRO-3's hooks: around a module's call or its backward; and for a tensor that a micro-batch
gathers, releases and reduces. Fitted to four runs of 1B to 13B models on two and four H100
(2026-11-28), that machine's pace taken out."""
ENGINE_TENSOR = 0.2e-3
"""A trained tensor in a step of DeepSpeed's engine, stages 1 and 2: four runs, likewise."""
HOST_EXPERT = 25 * US
"""An expert's own product, where no kernel multiplies all of them."""
MICRO_BATCH = 1.0e-3
"""Trainer's training_step beside the model: inputs, train(), the loss."""
MICRO_BATCH_TENSOR, MICRO_BATCH_ADAPTED = 4 * US, 20 * US
"""More for every trained tensor, and for every adapted module that train() walks through."""
STEP = 0.6e-3
STEP_TENSOR, STEP_ADAPTED = 12 * US, 40 * US
"""Before an update's first kernel: gradients are collected and clipped."""
STEPPED_TENSOR, STEPPED_ADAPTED = 5 * US, 12 * US
"""After its last one: zero_grad, the scheduler."""
PAGEABLE = 13e9
"""Bytes a second of pageable host memory (9 to the card, 17 back)."""
UPDATE_TENSOR = {
    "fused": 8 * US,
    "foreach": 14 * US,
    "per_parameter": 45 * US,
    "in_backward": 45 * US,
    "python": 300 * US,
}
"""Launching a parameter's update: "python" is a loop of pointwise kernels, as Adafactor's."""

A_CARD = (125e12, 31e12, 900e9)
"""fp16 FLOP/s, fp32 FLOP/s and bytes/s where nothing but a card's memory is known."""


@lru_cache(maxsize=256)
def rates_of(gpu: Gpu, flash: bool = False) -> Rates:
    """The rates of a card; where its peaks aren't known, those of A_CARD. `flash`: attention is the
    flash-attn package's."""
    fp16, fp32 = gpu.fp16 or A_CARD[0], gpu.fp32 or A_CARD[1]
    bf16 = gpu.bf16 or (fp16 if gpu.supports_bf16 else fp32)
    bandwidth = gpu.bandwidth or A_CARD[2]
    return Rates(
        products={
            "bf16": PRODUCTS["bf16"] * bf16,
            "fp16": PRODUCTS["fp16"] * fp16,
            "fp32": PRODUCTS["fp32"] * fp32,
        },
        product=PRODUCT,
        skinny=SKINNY * bandwidth,
        grouped=gpu.compute_capability == "9.0",
        attention=_attention(gpu, fp16, flash),
        efficient={
            "fp32": EFFICIENT["fp32"] * fp32,
            "bf16": EFFICIENT["bf16"] * bf16,
            "fp16": EFFICIENT["fp16"] * fp16,
        },
        bandwidth=BANDWIDTH * bandwidth,
        elements=ELEMENTS * fp32,
        kernel=KERNEL,
        dequantize=DEQUANTIZE * bandwidth,
        integers=INTEGERS * fp16,
        several={width: share * bandwidth for width, share in SEVERAL.items()},
        updates={name: pace * fp32 / UPDATES_AT for name, pace in UPDATES.items()},
        host=HOST_PACE.get(gpu.id, 1.0),
    )


def _attention(gpu: Gpu, fp16: float, flash: bool) -> dict[str, dict[int, float]]:
    hopper = gpu.arch == "hopper"
    shares = CUDNN if hopper and not flash else FLASH
    factor = 1.0
    if hopper and flash:
        factor = FLASH_ON_HOPPER / FLASH["forward"][128]
    if gpu.arch in ("volta", "turing"):
        factor = BEFORE_AMPERE / FLASH["forward"][128]
    return {
        direction: {size: factor * share * fp16 for size, share in table.items()}
        for direction, table in shares.items()
    }
