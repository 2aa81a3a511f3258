"""What an optimizer's step holds while it goes from parameter to parameter.

Each step is told as its code runs: which variable is bound to a tensor of which size, and when. A
variable keeps its tensor until it is bound anew, so that the last parameter's are there while the
next one's are made. States are not told here: they stay (optimizer_states.py).

Sources: galore-torch 1.0, adamw.py, adamw8bit.py, adafactor.py, galore_projector.py; apollo-torch
1.0.3, apollo.py, random_projector.py; lomo-optim 0.1.1, lomo.py, adalomo.py; grokadamw 0.1.2;
transformers 5.17, optimization.py (Adafactor.step); torchao 0.18, adam.py; torch 2.11,
aten/src/ATen/native/cuda/linalg/BatchLinearAlgebraLib.cpp (svd_cusolver).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, Protocol

from vramplan.memory.allocator import rounded
from vramplan.memory.reduction import buffer_bytes
from vramplan.memory.states import Trained
from vramplan.recipe.optimizers import TORCHAO_BLOCK_ELEMENTS, torchao_quantizes

FP32 = 4
INT64 = 8


class LowRank(NamedTuple):
    """The projection of one parameter's gradient, rows x columns, to a lower rank."""

    rows: int
    columns: int
    rank: int

    @property
    def right(self) -> bool:
        """Whether the columns are projected (`std` projects the shorter side)."""
        return self.rows >= self.columns

    @property
    def numel(self) -> int:
        """Of the projected gradient."""
        return self.rank * (self.rows if self.right else self.columns)

    @property
    def matrix(self) -> int:
        """Elements of the projection."""
        return self.rank * (self.columns if self.right else self.rows)

    @property
    def shape(self) -> tuple[int, int]:
        return (self.rows, self.rank) if self.right else (self.rank, self.columns)


class Frame(Protocol):
    """A step's variables."""

    def let(self, **tensors: int) -> None:
        """One statement: the new tensors are there before the old ones of these names go.

        Sizes in bytes; 0 binds a name to what was there before.
        """

    def beside(self, *tensors: int) -> None:
        """Temporaries of one expression."""

    def drop(self, *names: str) -> None:
        """What a function returned from had bound."""

    def free_gradient(self, nbytes: int) -> None:
        """`p.grad` is bound to something else: what it was is let go."""

    def hold(self, nbytes: int) -> None:
        """A tensor that stays until zero_grad."""


Step = Callable[[Frame, Trained, "LowRank | None"], None]


class Counted:
    """A frame that counts: live bytes beyond those at the step's start, the most, and the largest
    single tensor."""

    def __init__(self, allocator: str) -> None:
        self.allocator = allocator
        self.live = self.peak = self.largest = 0
        self.bound: dict[str, int] = {}

    def let(self, **tensors: int) -> None:
        sizes = {name: rounded(nbytes, self.allocator) for name, nbytes in tensors.items()}
        self._rise(*sizes.values())
        self.drop(*sizes)
        self.bound.update(sizes)

    def beside(self, *tensors: int) -> None:
        sizes = [rounded(nbytes, self.allocator) for nbytes in tensors]
        self._rise(*sizes)
        self.live -= sum(sizes)

    def drop(self, *names: str) -> None:
        for name in names:
            self.live -= self.bound.pop(name, 0)

    def free_gradient(self, nbytes: int) -> None:
        self.live -= rounded(nbytes, self.allocator)

    def hold(self, nbytes: int) -> None:
        self._rise(rounded(nbytes, self.allocator))

    def _rise(self, *sizes: int) -> None:
        self.live += sum(sizes)
        self.peak = max(self.peak, self.live)
        self.largest = max((self.largest, *sizes))


def counted(step: Step, order: Iterable[tuple[Trained, LowRank | None]], allocator: str) -> Counted:
    """A step through parameters in this order."""
    frame = Counted(allocator)
    for t, low in order:
        step(frame, t, low)
    return frame


def in_order(trained: Sequence[Trained]) -> list[Trained]:
    """Parameters as a model lists them, of the layers that are alike the first two.

    A third has the second's neighbours.
    """
    repeated = [k for k, t in enumerate(trained) if t.count > 1]
    if not repeated:
        return list(trained)
    first, last = repeated[0], repeated[-1] + 1
    layers = trained[first:last]
    again = [t for t in layers if t.count > 1]
    return [*trained[:first], *layers, *again, *trained[last:]]


# --- GaLore and APOLLO ----------------------------------------------------------------------------


def _svd(f: Frame, low: LowRank, itemsize: int) -> None:
    """GaLoreProjector.get_orthogonal_matrix: its variables go when it returns.

    torch.linalg.svd copies its argument, and has cuSOLVER's workspace besides.
    """
    full, k = low.rows * low.columns * FP32, min(low.rows, low.columns)
    f.let(matrix=full if itemsize < FP32 else 0)
    f.let(U=low.rows * k * FP32, s=k * FP32, Vh=k * low.columns * FP32)
    f.beside(*svd_temporaries(low.rows, low.columns))
    f.beside(low.rank * low.rank * FP32, _product(low))
    f.let(product=_product(low))
    f.let(fresh=low.matrix * itemsize if itemsize < FP32 else 0)
    f.drop("matrix", "U", "s", "Vh", "product", "fresh")


def _product(low: LowRank) -> int:
    """U or Vh times the singular values: a local variable of no further use."""
    return low.rank * (low.rows if low.right else low.columns) * FP32


def svd_temporaries(rows: int, columns: int) -> tuple[int, int]:
    """torch.linalg.svd's copy of the matrix, and the workspace of cuSOLVER's gesvdj."""
    return rows * columns * FP32, FP32 * gesvdj_workspace(rows, columns)


def gesvdj_workspace(rows: int, columns: int) -> int:
    """Elements that cusolverDnSgesvdj_bufferSize asks for (economy size, with vectors).

    cuSOLVER is closed: this is its answer, fitted to 270 shapes of 16 to 128256 rows (cuSOLVER
    12.0, CUDA 13.0, H100). Tall matrices are factored first (QR), wide ones transposed.
    """
    m, n = max(rows, columns), min(rows, columns)
    blocks = -(-n // 32)
    jacobi = 65 * 32 * blocks + 4 * blocks**2 + 32 * -(-blocks // 32) + 1024
    if m == n:
        return 2 * n * n + jacobi
    tall = m * n + n * n + 256 * m + 514 * n + 65_792
    tall = max(tall, 786_432 + n + 32)
    return max(tall, 3 * n * n + jacobi) if rows > columns else tall + m * n


def _random(f: Frame, low: LowRank, itemsize: int) -> None:
    """GradientProjector.get_orthogonal_matrix."""
    wide = low.matrix * FP32
    f.let(matrix=low.rows * low.columns * FP32 if itemsize < FP32 else 0)
    f.let(randn=wide)
    f.let(proj=wide)
    f.drop("randn")
    if itemsize < FP32:
        f.let(proj=low.matrix * itemsize)
    f.drop("matrix", "proj")


def galore_adamw(f: Frame, t: Trained, low: LowRank | None) -> None:
    """AdamW.step; a step that renews the projections."""
    full = t.numel * t.itemsize
    state = low.numel * t.itemsize if low else full
    f.let(grad=0)
    if low:
        _svd(f, low, t.itemsize)
        f.let(grad=state)
    f.let(denom=state)
    f.let(norm_grad=state)
    if low:
        _project_back(f, "norm_grad", full)


def _project_back(f: Frame, name: str, full: int) -> None:
    """`full_rank_grad * self.scale`: the product of matrices, and its scaled copy."""
    f.let(full_rank_grad=full)
    f.let(**{name: full})
    f.drop("full_rank_grad")


def galore_adamw_8bit(f: Frame, t: Trained, low: LowRank | None) -> None:
    """AdamW8bit.step: weight and gradient are replaced by projected ones for the kernel's call.

    The weight is copied first and the copy is the weight from then on. The gradient stays
    projected, so that a step ends with fewer bytes than it began.
    """
    if low is None:
        return
    full, state = t.numel * t.itemsize, low.numel * t.itemsize
    _svd(f, low, t.itemsize)
    f.let(grad=0)
    f.hold(state)
    f.let(saved_data=full)
    f.let(data=state)
    f.drop("saved_data")  # the weight that was
    f.free_gradient(full)
    f.beside(full, full)  # project_back
    f.drop("data")


def adafactor(f: Frame, t: Trained, low: LowRank | None) -> None:
    """Adafactor.step of transformers, and of galore-torch: fp32 whatever the parameter's dtype."""
    copies, full = t.itemsize < FP32, t.numel * FP32
    f.let(grad=0)
    f.let(grad=full if copies else 0)
    size, shape = full, t.shape
    if low:
        _svd(f, low, FP32)
        size, shape = low.numel * FP32, low.shape
        f.let(grad=size)
    f.let(p_data_fp32=0)
    f.let(p_data_fp32=full if copies else 0)
    _factored_update(f, size, shape)
    if low:
        _project_back(f, "update", full)
    f.beside(full)  # -update


def _factored_update(f: Frame, size: int, shape: tuple[int, ...]) -> None:
    """`(grad**2) + eps`, its means, and the update made from them."""
    f.let(square=size)
    f.let(update=size)
    f.drop("square")
    if len(shape) > 1:
        rows = size // FP32 // shape[-1]
        f.beside(buffer_bytes(shape[-1], rows))  # update.mean(dim=-2)
        f.let(r_factor=rows * FP32, c_factor=size // FP32 // shape[-2] * FP32)
    f.let(update=size)
    f.drop("r_factor", "c_factor")


def apollo_adamw(f: Frame, t: Trained, low: LowRank | None) -> None:
    """AdamW.step of apollo-torch: low-rank moments scale the gradient itself, channel by channel.

    The limiter on the gradient's growth copies it once more.
    """
    full = t.numel * t.itemsize
    state = low.numel * t.itemsize if low else full
    f.let(grad=0)
    if low:
        _random(f, low, t.itemsize)
        f.let(grad=state)
    f.let(denom=state)
    f.let(norm_grad=state)
    if low:
        f.let(grad_scaling_factor=max(low.rows, low.columns) * t.itemsize)
        f.let(scaled_grad=full)
        f.let(scaled_grad_norm=t.itemsize)
        f.let(scaled_grad=full)
        f.drop("norm_grad")


# --- torchao --------------------------------------------------------------------------------------


def torchao(f: Frame, t: Trained, bits: int) -> None:
    """single_param_adam as torch 2.11's Inductor compiles it.

    A block's largest value is needed before its codes are, so both moments are written in fp32,
    with a scale a block; packing two 4-bit codes makes it write int64 codes too. What is not
    quantized is one kernel, without temporaries. In the first step Inductor times variants of its
    kernels with a buffer as large as the L2 cache (50 MiB of an H100), but then later parameters
    have no states yet.
    """
    if not torchao_quantizes(t.numel):
        return
    scale = t.numel // TORCHAO_BLOCK_ELEMENTS * FP32
    moments = (scale, scale, t.numel * FP32, t.numel * FP32)
    codes = (t.numel * INT64, t.numel * INT64) if bits == 4 else ()
    f.beside(*moments, *codes)


def adamw_torch_8bit(f: Frame, t: Trained, low: LowRank | None) -> None:
    torchao(f, t, 8)


def adamw_torch_4bit(f: Frame, t: Trained, low: LowRank | None) -> None:
    torchao(f, t, 4)


# --- GrokAdamW, LOMO, AdaLomo ---------------------------------------------------------------------


def grokadamw(f: Frame, t: Trained, low: LowRank | None) -> None:
    """GrokAdamW._update_group: states come from the host and go back."""
    size = t.numel * t.itemsize
    f.let(exp_avg=size, exp_avg_sq=size)
    f.let(grok_ema=size)
    f.let(scaled=size)
    f.let(grok_grad=size)
    f.drop("scaled")
    f.beside(size)  # exp_avg_sq.sqrt()


def lomo(f: Frame, t: Trained, low: LowRank | None) -> None:
    """Lomo.fuse_update: gradient and weight in fp32, the gradient let go between the two."""
    copy = t.numel * FP32 if t.itemsize < FP32 else 0
    f.let(grad_fp32=copy)
    if copy:
        f.free_gradient(t.numel * t.itemsize)
    f.let(p_fp32=copy)


def adalomo(f: Frame, t: Trained, low: LowRank | None) -> None:
    """AdaLomo.fuse_update."""
    copy = t.numel * FP32 if t.itemsize < FP32 else 0
    f.let(grad_fp32=copy)
    if copy:
        f.free_gradient(t.numel * t.itemsize)
    _factored_update(f, t.numel * FP32, t.shape)
    f.let(p_fp32=copy)


STEPS: dict[str, Step] = {
    "adafactor": adafactor,
    "adamw_torch_8bit": adamw_torch_8bit,
    "adamw_torch_4bit": adamw_torch_4bit,
    "galore_adamw": galore_adamw,
    "galore_adamw_8bit": galore_adamw_8bit,
    "galore_adafactor": adafactor,
    "galore_adamw_layerwise": galore_adamw,
    "galore_adamw_8bit_layerwise": galore_adamw_8bit,
    "apollo_adamw": apollo_adamw,
    "apollo_adamw_layerwise": apollo_adamw,
    "grokadamw": grokadamw,
    "lomo": lomo,
    "adalomo": adalomo,
}
"""By `optim`; the others need nothing, or a multiple of all gradients (optimizers.py)."""
