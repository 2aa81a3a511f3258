"""Per rank under ZeRO: what stays on the GPU and on the host, and what a step adds for a while.

Sources: DeepSpeed 0.19.8, runtime/engine.py (_configure_distributed_model), runtime/zero/
stage_1_and_2.py (__init__, initialize_optimizer_states, setup_buckets, step), runtime/zero/
stage3.py (_create_fp32_partitions, initialize_optimizer_states, _setup_for_real_optimizer,
_prepare_fp32_grad_for_sub_group), runtime/fp16/fused_optimizer.py (FP16_Optimizer), and
ops/adam (FusedAdam, DeepSpeedCPUAdam). torch's AdamW is taken as ds_config's "AdamW": FusedAdam,
or DeepSpeedCPUAdam with offload.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

from vramplan.memory.allocator import rounded
from vramplan.memory.gathering import Gathered, gathered
from vramplan.memory.host import Host, host_of
from vramplan.memory.optimizers import FOREACH_TEMPORARIES, FP32, optimizer_tables, state_tensors
from vramplan.memory.precision import Policy
from vramplan.memory.program import Program, compile_step
from vramplan.memory.ranks import (
    Flat,
    Weight,
    flat_of,
    owned_of,
    partition,
    sub_groups,
    weights_in_order,
)
from vramplan.memory.states import Trained, layout
from vramplan.memory.values import ITEMSIZE
from vramplan.memory.zero_tape import Hooks, compile_zero
from vramplan.models.architecture import Architecture
from vramplan.recipe.deepspeed import DeepSpeed
from vramplan.recipe.optimizers import Optimizer, find_optimizer

NORM = 8  # get_norm_dtype (runtime/zero/utils.py): gradients' norms are taken in fp64
NORM_PIECE = 250_000_000  # stage3.py, _constant_buffered_norm2: elements at a time


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
    initialized_peak: int
    """deepspeed.initialize."""
    arriving: int
    """Stages 1 and 2: the partition's gradients, from the first one's reduction to the step."""
    step: int
    """The most that a step needs beyond what it starts with."""
    owned_until: int
    """Backward fills the partition from this layer on, to the first."""
    left_over: tuple[int, ...]
    """Stage 1: other ranks' oversized gradients, by layer in which they came; -1 is last."""
    norms: tuple[int, int, int]
    """Under offload (stages 1 and 2) the largest owned gradient and its copy in fp64: of those
    before the layers, in them, and behind them."""
    gathering: Gathered | None
    host: Host
    flat: Flat
    program: Program
    first: Program | None
    """Stages 0 and 1 with accumulation: a micro-batch whose gradients nothing takes away."""
    held: int
    """Gradients that are kept from one micro-batch to the next."""

    @property
    def initialized(self) -> int:
        """Bytes after deepspeed.initialize: states come with the first step."""
        return self.resident - self.states

    @property
    def resident(self) -> int:
        return self.weights + self.masters + self.states + self.buffers + self.gradients


@lru_cache(maxsize=1024)
def sharded(
    arch: Architecture,
    policy: Policy,
    optimizer: str,
    allocator: str,
    zero: DeepSpeed,
    ranks: tuple[int, int],
    accumulation: int,
) -> Sharded:
    """What a rank holds, `ranks` being its number and how many there are.

    Nothing here depends on batch or sequence.
    """
    part = _Part(arch, policy, find_optimizer(optimizer), allocator, zero, ranks, accumulation)
    if zero.stage == 3:
        return part.stage_3()
    return part.stage_1_and_2() if zero.stage else part.stage_0()


class _Part:
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
        self.list = weights_in_order(arch, policy, allocator)
        self.trained = [w for w in self.list if w.trains]
        self.flat = flat_of(self.list, self.ranks, self.rank)
        self.sizes = zero.sizes(arch.hidden_size)
        self.offload = zero.offload_optimizer is not None

    def up(self, nbytes: int) -> int:
        return rounded(nbytes, self.allocator)

    def each(self, weights: list[Weight]) -> int:
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
        """Stages 0 to 2 load on the host; quantized weights on the GPU: peft prepares them so."""
        if self.policy.quantization is None:
            return 0, 0, 0
        whole = layout(self.arch, replace(self.policy, engine=None), self.allocator)
        return whole.loaded, whole.load_peak, whole.prepare_peak

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
        )
        return compile_zero(self.arch, self.policy, hooks)

    def host(self) -> Host:
        return host_of(
            self.zero, self.list, self.flat, (self.rank, self.ranks), self.width, self.accumulation
        )

    # -- stage 0 --------------------------------------------------------------------------------
    def stage_0(self) -> Sharded:
        """FP16_Optimizer: flat weights and masters; the fp32 engine leaves all to the optimizer."""
        count = sum(w.numel for w in self.trained)
        moved = self.each(list(self.list))
        gradients = self.each(self.trained)
        if self.width == FP32:
            weights, masters, step, peak = moved, 0, 0, moved
            states = sum(self.states_of(w.numel) for w in self.trained)
            transient = sum(self.stepping(w.numel) for w in self.trained)
        else:
            weights = self.each(self.frozen()) + self.up(count * self.width)
            masters, states = self.up(count * FP32), self.states_of(count)
            transient = self.up(count * FP32) + self.stepping(count)
            # step: every gradient in fp32, then all of them flat while the 16-bit ones are there
            step = sum(self.up(w.numel * FP32) for w in self.trained) + self.up(count * FP32)
            peak = max(
                moved + gradients + self.up(count * self.width),  # clones, flattened
                weights + masters + self.up(count * FP32) + states,  # a first step of zeros
            )
        loaded, load_peak, prepared = self.loading()
        return Sharded(
            rank=self.rank,
            weights=weights,
            masters=masters,
            states=states,
            buffers=0,
            gradients=0,
            loaded=loaded,
            load_peak=load_peak,
            initialized_peak=max(peak, prepared),
            arriving=0,
            step=gradients + max(step, transient if self.width == FP32 else 0),
            owned_until=-2,
            left_over=(),
            norms=(0, 0, 0),
            gathering=None,
            host=self.host(),
            flat=self.flat,
            program=compile_step(self.arch, self.policy),
            first=compile_step(self.arch, replace(self.policy, accumulating=False))
            if self.accumulation > 1
            else None,
            held=gradients if self.accumulation > 1 else 0,
        )

    # -- stages 1 and 2 -------------------------------------------------------------------------
    def stage_1_and_2(self) -> Sharded:
        flat, width = self.flat, self.width
        frozen = self.each(self.frozen())
        whole = self.up(flat.total * width)
        weights = frozen + whole
        fp32 = self.up(flat.part * FP32)
        moved = self.each(list(self.list))
        arriving = 0 if self.offload else self.up(flat.owned * width)
        gradient = self.up(flat.part * width)  # flattened: a copy
        step = max(
            arriving + self.up(flat.largest_owned * NORM),
            arriving + gradient + (fp32 if width != FP32 else 0),
            fp32 + self.stepping(flat.part),
        )
        masters = 0 if self.offload else fp32
        peak = max(
            moved + whole,
            weights + self.up(flat.part * width) + (masters if width != FP32 else 0),
            weights + 2 * masters,
        )
        stage_1 = self.zero.stage == 1
        loaded, load_peak, prepared = self.loading()
        return Sharded(
            rank=self.rank,
            weights=weights,
            masters=masters,
            states=0 if self.offload else self.states_of(flat.part),
            buffers=self.up(flat.largest * width) if self.offload else 0,
            gradients=0,
            loaded=loaded,
            load_peak=load_peak,
            initialized_peak=max(peak, prepared),
            arriving=arriving,
            step=0 if self.offload else step,
            owned_until=flat.until,
            left_over=self.left_over() if stage_1 else (),
            norms=self.norms() if self.offload else (0, 0, 0),
            gathering=None,
            host=self.host(),
            flat=flat,
            program=self.hooked(),
            first=compile_step(self.arch, self.policy)
            if stage_1 and self.accumulation > 1
            else None,
            held=arriving if self.accumulation > 1 else 0,
        )

    def norms(self) -> tuple[int, int, int]:
        """set_norm_for_param_grad_in_gpu: of what the partition owns."""
        most = [0, 0, 0]
        for w, owned in owned_of(self.list, self.flat.part, self.rank):
            place = 0 if w.layer < 0 else 1 if w.layer < self.arch.layers else 2
            if owned:
                most[place] = max(most[place], self.up(w.nbytes) + self.up(owned * NORM))
        return most[0], most[1], most[2]

    def left_over(self) -> tuple[int, ...]:
        """Stage 1 clears other ranks' gradients only in the epilogue; small ones are in a bucket.

        Entry i: what has come when backward is in layer i - 1 (0: before the layers).
        """
        found = [0] * (self.arch.layers + 2)
        for w, owned in owned_of(self.list, self.flat.part, self.rank):
            if not owned and w.numel > self.sizes["reduce_bucket"]:
                found[w.layer + 1] += self.up(w.nbytes)
        for i in reversed(range(len(found) - 1)):
            found[i] += found[i + 1]
        return tuple(found)

    # -- stage 3 --------------------------------------------------------------------------------
    def stage_3(self) -> Sharded:
        zero, ranks, width = self.zero, self.ranks, self.width
        threshold = self.sizes["persistence_threshold"]
        parameters = [w for w in self.list if not w.packed]
        buffers = self.each([w for w in self.list if w.packed])
        persistent = 0
        if ranks > 1:
            persistent = self.each([w for w in parameters if w.numel <= threshold])
        groups = sub_groups(self.list, ranks, zero.sub_group_size)
        owned, largest = sum(groups), max(groups)
        own = self.trained[0].itemsize  # adapters stay as peft made them
        flat = 0 if zero.offload_param else self.up(owned * own)
        apart = sum(
            self.up(partition(w.numel, ranks) * w.itemsize) for w in parameters if not w.trains
        )
        if zero.offload_param:
            apart = 0
        masters = sum(self.up(n * FP32) for n in groups)  # 'cuda:0' is not torch.device: no alias
        states = sum(self.states_of(n) for n in groups)
        gradients = self.up(owned * width)
        one = self.up(largest * width)
        step = one + (self.up(largest * FP32) if width != FP32 else 0)
        most = max(partition(w.numel, ranks) for w in self.trained)
        step = max(step, self.up(largest * FP32) + self.stepping(largest), self.up(most * NORM))
        if self.policy.weight_dtype == "fp16":  # has_overflow: isinf makes |x| and a mask
            step = max(step, self.up(owned * width) + self.up(owned))
        if self.offload:
            masters = states = gradients = step = 0
        bucket = self.up(self.sizes["reduce_bucket"] * width) if zero.contiguous_gradients else 0
        loaded, load_peak = self.loading_3(parameters, buffers)
        weights = flat + apart + buffers
        peak = weights + masters
        if not self.offload:
            peak += self.up(largest * FP32)  # converted, then cloned; then a buffer of zeros
        adapters = sum(self.up(w.numel * FP32) for w in parameters if w.role == "adapter")
        return Sharded(
            rank=self.rank,
            weights=weights + persistent,
            masters=masters,
            states=states,
            buffers=bucket,
            gradients=gradients,
            loaded=loaded,
            load_peak=load_peak,
            initialized_peak=max(loaded + adapters, peak),
            arriving=0,
            step=step,
            owned_until=self.arch.layers if self.offload else -2,
            left_over=(),
            norms=self.norms_3() if self.offload else (0, 0, 0),
            gathering=self.gathering() if ranks > 1 else None,
            host=self.host(),
            flat=self.flat,
            program=self.hooked(),
            first=None,
            held=0,
        )

    def norms_3(self) -> tuple[int, int, int]:
        """partition_grads: a gradient, its partition brought back, and that in fp64, in pieces."""
        most = [0, 0, 0]
        for w in self.trained:
            place = 0 if w.layer < 0 else 1 if w.layer < self.arch.layers else 2
            part = partition(w.numel, self.ranks)
            piece = self.up(min(part, NORM_PIECE) * NORM)
            size = self.up(w.nbytes) + self.up(part * self.width) + max(piece, self.up(part * FP32))
            most[place] = max(most[place], size)
        return most[0], most[1], most[2]

    def loading_3(self, parameters: list[Weight], buffers: int) -> tuple[int, int]:
        """zero.Init partitions each weight as it is made; a tied head is made before it is tied."""
        made = [w for w in parameters if w.role != "adapter"]
        if not any(w.role == "head" for w in made):
            made += [w for w in made if w.role == "embedding"][:1]
        largest = max(self.up(w.nbytes) for w in made)
        if self.zero.offload_param:  # gathering begins with a copy of the partition
            part = max(self.up(partition(w.numel, self.ranks) * w.itemsize) for w in made)
            return buffers, buffers + largest + part
        loaded = sum(self.up(partition(w.numel, self.ranks) * w.itemsize) for w in made) + buffers
        return loaded, loaded + largest

    def gathering(self) -> Gathered:
        return gathered(
            self.list,
            self.arch.layers,
            persistent=self.sizes["persistence_threshold"],
            max_live=self.zero.stage3_max_live_parameters,
            max_reuse=self.zero.stage3_max_reuse_distance,
            checkpointing=self.policy.checkpointing,
            allocator=self.allocator,
        )
