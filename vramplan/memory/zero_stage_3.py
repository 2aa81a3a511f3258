"""Stage 3: partitions of weights as well, gathered where they are used.

Source: DeepSpeed 0.19.8, runtime/zero/stage3.py (_create_fp32_partitions,
initialize_optimizer_states, _setup_for_real_optimizer, _prepare_fp32_grad_for_sub_group,
partition_grads, _constant_buffered_norm2), runtime/zero/partition_parameters.py (zero.Init).
"""

from __future__ import annotations

from vramplan.memory.gathering import Gathered, always_whole, gathered
from vramplan.memory.optimizer_states import FP32
from vramplan.memory.ranks import Weight, partition, sub_groups
from vramplan.memory.zero_extras import extras_of
from vramplan.memory.zero_part import NORM, Part, Run, Sharded
from vramplan.recipe.deepspeed import SYS_MAXSIZE

NORM_PIECE = 250_000_000  # _constant_buffered_norm2: elements at a time


def stage_3(part: Part) -> Sharded:
    parameters = [w for w in part.list if not w.packed]
    buffers = part.each([w for w in part.list if w.packed])
    groups = sub_groups(part.list, part.ranks, part.zero.sub_group_size)
    owned, largest = sum(groups), max(groups)
    flat, apart = _partitions(part, parameters, owned)
    masters = sum(part.up(n * FP32) for n in groups)  # 'cuda:0' is not torch.device: no alias
    states = sum(part.states_of(n) for n in groups)
    gradients = part.up(owned * part.width)
    step = _step(part, owned, largest)
    if part.offload:
        masters = states = gradients = step = 0
    bucket = part.sizes["reduce_bucket"] if part.zero.contiguous_gradients else 0
    loaded, load_peak, prepared = part.loading()
    if part.policy.quantization is None:
        loaded, load_peak = _loading(part, parameters, buffers)
        prepared = loaded + sum(part.up(w.numel * FP32) for w in parameters if w.role == "adapter")
    weights, persistent = flat + apart + buffers, _persistent(part)
    peak = weights + masters
    if not part.offload:
        peak += part.up(largest * FP32)  # converted, then cloned; then a buffer of zeros
    resident = weights + persistent + masters + part.up(bucket * part.width) + gradients
    run, whole = _run(part)
    return Sharded(
        rank=part.rank,
        weights=weights + persistent,
        masters=masters,
        states=states,
        buffers=part.up(bucket * part.width),
        gradients=gradients,
        loaded=loaded,
        load_peak=load_peak,
        initialized=resident,
        initialized_peak=max(prepared, peak),
        arriving=0,
        step=step,
        host=part.host(),
        flat=part.flat,
        last=run,
        gathered=whole.loss if whole is not None else 0,
        contexts=whole.graph if whole is not None else 0,
    )


def _partitions(part: Part, parameters: list[Weight], owned: int) -> tuple[int, int]:
    """Of trained weights, in one flat tensor; of frozen ones, each by itself."""
    if part.zero.offload_param:
        return 0, 0
    flat = part.up(owned * part.trained[0].itemsize)  # adapters can be fp32 beside 16-bit weights
    frozen = [w for w in parameters if not w.trains]
    return flat, sum(part.up(partition(w.numel, part.ranks) * w.itemsize) for w in frozen)


def _persistent(part: Part) -> int:
    """Weights that stay whole; one rank has all of them whole anyway, where they are on its GPU."""
    if part.ranks == 1 and not part.zero.offload_param:
        return 0
    always = always_whole(part.list, part.sizes["persistence_threshold"], _kept(part))
    return part.each(w for i, w in enumerate(part.list) if i in always and not w.packed)


def _kept(part: Part) -> int:
    """How many elements may stay whole: Init._update_persist_config divides by the ranks."""
    limit = part.zero.stage3_model_persistence_threshold
    return limit if limit == SYS_MAXSIZE else limit // part.ranks


def _step(part: Part, owned: int, largest: int) -> int:
    """A sub-group's gradients and their fp32; before that norms in fp64, and fp16's overflow."""
    one = part.up(largest * part.width)
    step = one + (part.up(largest * FP32) if part.width != FP32 else 0)
    most = max(partition(w.numel, part.ranks) for w in part.trained)
    step = max(step, part.up(largest * FP32) + part.stepping(largest), part.up(most * NORM))
    if part.policy.weight_dtype == "fp16":  # has_overflow: isinf makes |x| and a mask
        step = max(step, part.up(owned * part.width) + part.up(owned))
    return step


def _loading(part: Part, parameters: list[Weight], buffers: int) -> tuple[int, int]:
    """zero.Init partitions each weight as it is made; a tied head is made before it is tied."""
    made = [w for w in parameters if w.role != "adapter"]
    if not any(w.role == "head" for w in made):
        made += [w for w in made if w.role == "embedding"][:1]
    largest = max(part.up(w.nbytes) for w in made)
    parts = [part.up(partition(w.numel, part.ranks) * w.itemsize) for w in made]
    if part.zero.offload_param:  # gathering begins with a copy of the partition
        return buffers, buffers + largest + max(parts)
    return sum(parts) + buffers, sum(parts) + buffers + largest


def _run(part: Part) -> tuple[Run, Gathered | None]:
    """The tape with gathered weights, and when they are."""
    program = part.hooked()
    whole = _gathering(part) if part.ranks > 1 or part.zero.offload_param else None
    norms = _norms(part) if part.offload else (0, 0, 0)

    def within(phase: str, place: int | str) -> int:
        if whole is None:
            return 0
        if place == "end of the graph":
            return whole.graph
        return whole.at(phase, "loss" if place == "autocast exit" else place)

    def after(phase: str, place: int | str) -> int:
        left = within(phase, place)
        if phase == "forward" or place in ("loss", "end of the graph"):
            return left
        if place == "head":
            left = whole.behind if whole is not None else 0
            return left + norms[2]
        return left + norms[0 if place == "inputs" else 1]

    return Run(program, extras_of(program, within, after)), whole


def _gathering(part: Part) -> Gathered:
    zero, sizes = part.zero, part.sizes
    limits = (
        zero.stage3_max_live_parameters,
        zero.stage3_max_reuse_distance,
        sizes["prefetch_bucket"],
    )
    return gathered(
        part.arch,
        part.policy,
        part.allocator,
        sizes["persistence_threshold"],
        limits,
        _kept(part),
        not zero.memory_efficient_linear,
    )


def _norms(part: Part) -> tuple[int, int, int]:
    """partition_grads: a gradient, its partition brought back, and that in fp64, in pieces; of
    those before the layers, in them, and behind them."""
    most = [0, 0, 0]
    for w in part.trained:
        place = 0 if w.layer < 0 else 1 if w.layer < part.arch.layers else 2
        own = partition(w.numel, part.ranks)
        piece = part.up(min(own, NORM_PIECE) * NORM)
        size = part.up(w.nbytes) + part.up(own * part.width) + max(piece, part.up(own * FP32))
        most[place] = max(most[place], size)
    return most[0], most[1], most[2]
