"""A rank's part under ZeRO: what all stages have in common, and what a stage has to say of it.

Sources: DeepSpeed 0.19.8, runtime/engine.py (_configure_distributed_model), ops/adam (FusedAdam,
DeepSpeedCPUAdam). torch's AdamW is taken as ds_config's "AdamW": FusedAdam, or DeepSpeedCPUAdam
with offload.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple

from vramplan.memory.allocator import rounded
from vramplan.memory.host import Host, host_of
from vramplan.memory.optimizer_states import FP32, optimizer_tables, state_tensors
from vramplan.memory.optimizers import FOREACH_TEMPORARIES
from vramplan.memory.precision import Policy
from vramplan.memory.program import Program
from vramplan.memory.ranks import (
    Flat,
    Weight,
    dealt,
    flat_of,
    groups_of,
    owned_of,
    partitioned,
    weights_in_order,
)
from vramplan.memory.states import Trained, layout
from vramplan.memory.values import ITEMSIZE
from vramplan.memory.zero_extras import Extra
from vramplan.memory.zero_tape import Hooks, compile_zero
from vramplan.models.architecture import Architecture
from vramplan.recipe.deepspeed import DeepSpeed
from vramplan.recipe.optimizers import Optimizer

NORM = 8  # get_norm_dtype (runtime/zero/utils.py): gradients' norms are taken in fp64


class Run(NamedTuple):
    """A micro-batch: its tape, what ZeRO adds to each section, and what it finds."""

    program: Program
    extras: tuple[Extra, ...]
    held: int = 0
    """Gradients of earlier micro-batches, and buckets that they left."""


class Sharded(NamedTuple):
    """Bytes of one rank."""

    rank: int
    weights: int
    """Weights and buffers that stay: whole ones, or stage 3's partitions and persistent ones."""
    masters: int
    states: int
    buffers: int
    """Stage 3's reduce bucket; the copy of the largest gradient under offload."""
    gradients: int
    """Stage 3's flat gradient partition."""
    loaded: int
    load_peak: int
    """from_pretrained."""
    initialized: int
    """After deepspeed.initialize; stages 1 to 3 make the optimizer's states in the first step."""
    initialized_peak: int
    arriving: int
    """Gradients that the step finds, beyond the flat partition: stages 0 to 2."""
    step: int
    """The most that a step needs beyond what stays."""
    host: Host
    flat: Flat
    last: Run
    """The micro-batch at whose end is the step."""
    others: tuple[Run, ...] = ()
    """With accumulation, those before it that can be higher."""
    gathered: int = 0
    """Stage 3: weights that are whole at forward's end."""
    contexts: int = 0
    """Stage 3: of these, packed ones that stay until the loss is let go."""

    @property
    def resident(self) -> int:
        return self.weights + self.masters + self.states + self.buffers + self.gradients


class Part:
    """A rank's part, reckoned once."""

    def __init__(
        self,
        arch: Architecture,
        policy: Policy,
        optimizer: Optimizer,
        allocator: str,
        zero: DeepSpeed,
        ranks: tuple[int, int],
        accumulation: int,
    ) -> None:
        self.arch, self.policy, self.optimizer = arch, policy, optimizer
        self.allocator, self.zero = allocator, zero
        self.rank, self.ranks = ranks
        self.accumulation = accumulation
        self.width = ITEMSIZE[policy.weight_dtype]
        how = partitioned if zero.stage == 3 else weights_in_order
        self.list = how(arch, policy, allocator)
        self.trained = [w for w in self.list if w.trains]
        self.groups = groups_of(self.list, not self.fused)
        if zero.round_robin_gradients and zero.stage in (1, 2):
            self.groups = [dealt(group, self.ranks) for group in self.groups]
        self.owned = list(owned_of(self.groups, self.ranks, self.rank, self.alignment))
        self.flat = flat_of(self.groups, self.ranks, self.owned, self.alignment)
        self.sizes = zero.sizes(arch.hidden_size)
        self.offload = zero.offload_optimizer is not None

    @property
    def alignment(self) -> int:
        """Elements to whose multiple each parameter is padded in the flat buffer."""
        return 16 // self.width if self.zero.parameter_alignment else 1

    def up(self, nbytes: int) -> int:
        return rounded(nbytes, self.allocator)

    def each(self, weights: Iterable[Weight]) -> int:
        return sum(self.up(w.nbytes) for w in weights)

    def frozen(self) -> list[Weight]:
        return [w for w in self.list if not w.trains]

    def states_of(self, numel: int) -> int:
        """The optimizer's states of a flat fp32 tensor."""
        flat = Trained("flat", numel, FP32, 1, False, (numel,))
        sizes = [n for n, paged in state_tensors(self.optimizer, flat) if not paged]
        states = sum(self.up(n) for n in sizes if n > FP32 or not self.fused)
        if self.optimizer.package == "bitsandbytes" and self.optimizer.bits == 8:
            states += optimizer_tables(self.optimizer)
        return states

    @property
    def fused(self) -> bool:
        """DeepSpeed's own Adam, which keeps its step count on the host and needs no temporary."""
        return self.optimizer.package == "torch" and self.optimizer.algorithm == "adamw"

    def stepping(self, numel: int) -> int:
        """What the optimizer itself needs while it steps a flat fp32 tensor."""
        if self.optimizer.factored:  # (grad ** 2) + eps, and the update
            return 2 * self.up(numel * FP32)
        if self.fused or self.optimizer.stepping != "foreach":
            return 0
        return FOREACH_TEMPORARIES[self.optimizer.algorithm] * self.up(numel * FP32)

    def loading(self) -> tuple[int, int, int]:
        """Stages 0 to 2 load on the host; quantized weights on the GPU: peft prepares them so,
        and the engine then casts one after the other of those that are not quantized."""
        if self.policy.quantization is None:
            return 0, 0, 0
        whole = layout(self.arch, replace(self.policy, engine=None), self.allocator)
        cast = max(self.up(w.numel * self.width) for w in self.list if not w.packed)
        return whole.loaded, whole.load_peak, max(whole.prepare_peak, whole.weights + cast)

    def hooked(self) -> Program:
        hooks = Hooks(
            stage=self.zero.stage,
            bucket=self.sizes["reduce_bucket"],
            overlap=self.zero.overlap_comm,
            contiguous=self.zero.contiguous_gradients or self.offload,
            offload=self.offload,
            several=self.ranks > 1,
            scattered=self.zero.reduce_scatter
            and self.zero.stage < 3
            and self.sizes["reduce_bucket"] > self.flat.part,
            efficient_linear=self.zero.memory_efficient_linear,
        )
        return compile_zero(self.arch, self.policy, hooks)

    def host(self) -> Host:
        own = [w.nbytes for w, n in self.owned if n]
        return host_of(
            self.zero, self.list, self.flat, self.ranks, self.width, self.accumulation, own
        )


def nothing(phase: str, place: int | str) -> int:
    """Of an extra: none."""
    return 0
