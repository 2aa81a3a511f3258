"""What an optimizer costs: states, what a step needs while it runs, and what it lets go.

Sources: torch.optim of torch 2.11-2.13 (`_multi_tensor_*`, `_fused_*`), and those of
optimizer_states.py and optimizer_steps.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from vramplan.errors import IllegalRecipe, UnknownName
from vramplan.memory.allocator import rounded
from vramplan.memory.optimizer_states import optimizer_tables, state_tensors
from vramplan.memory.optimizer_steps import STEPS, LowRank, counted, in_order
from vramplan.memory.precision import Projection
from vramplan.memory.states import Layout, Trained
from vramplan.recipe.optimizers import Optimizer

# Temporaries as large as all parameters that a foreach step makes besides updating in place.
# adam.py: exp_avg_sq_sqrt; rmsprop.py: avg; adagrad.py: std and numerator; sgd.py: none.
# schedulefree 1.4.1: denom, of RAdam from the sixth step on.
FOREACH_TEMPORARIES = {
    "adamw": 1,
    "rmsprop": 1,
    "adagrad": 2,
    "sgd": 0,
    "schedule_free_adamw": 1,
    "schedule_free_radam": 1,
    "schedule_free_sgd": 0,
}


class Stepping(NamedTuple):
    """Bytes of an optimizer."""

    states: int
    """On the GPU's counters from the first step on."""
    managed: int
    """In CUDA managed memory: not counted by torch, moved to the host under pressure."""
    transient: int
    """While a step runs, beyond weights, gradients and states."""
    largest: int = 0
    """The largest single temporary of a step that goes parameter by parameter."""
    host: int = 0
    """States in host memory."""
    released: int = 0
    """Gradients that are let go before the step ends."""
    in_backward: bool = False
    """Backward steps, and leaves no gradients."""


def stepping(
    optimizer: Optimizer,
    layout: Layout,
    allocator: str,
    projection: Projection | None = None,
    frozen: Sequence[Trained] = (),
) -> Stepping:
    """What `optimizer` costs for the trained parameters of `layout`.

    `projection`: of an optimizer that has one; `frozen`: the parameters that are not trained.
    Raises UnknownName if targets name no linear, and IllegalRecipe for parameters that the
    optimizer can't step.
    """
    if optimizer.algorithm == "adalomo":
        _check_dimensions(layout.trained)
    lows = projections(layout.trained, projection)
    states = managed = 0
    for t, tensors in states_of(optimizer, layout, projection, frozen):
        for nbytes, paged in tensors:
            if paged:
                managed += t.count * nbytes
            else:
                states += t.count * rounded(nbytes, allocator)
    in_backward = optimizer.stepping == "in_backward"
    transient, largest = _transient(optimizer, layout, allocator, lows)
    return Stepping(
        states=states + optimizer_tables(optimizer),
        managed=managed,
        transient=0 if in_backward else transient,
        largest=largest,
        host=_on_host(optimizer, layout),
        released=0 if in_backward else _released(optimizer, allocator, lows),
        in_backward=in_backward,
    )


def projections(
    trained: Sequence[Trained], projection: Projection | None
) -> dict[Trained, LowRank]:
    """The parameters whose gradients are projected.

    transformers 5.17, _setup_low_rank_optimizer: weights of nn.Linear that the targets name.
    Raises UnknownName if the targets name none, and IllegalRecipe if there are none to name.
    """
    if projection is None:
        return {}
    found = {}
    for t in trained:
        if t.linear and projection.names(t.module):
            rows, columns = t.shape
            rank = projection.rank
            if projection.kind == "svd":
                rank = min(rank, rows, columns)
            found[t] = LowRank(rows, columns, rank)
    if not found:
        linear = {t.module.rpartition(".")[2] for t in trained if t.linear}
        if not linear:  # GPT-2: its matrices are Conv1D
            raise IllegalRecipe(
                "GaLore and APOLLO with this model: they project weights of nn.Linear, and none "
                "that is trained here is one. Use another optimizer"
            )
        raise UnknownName("optim_target_modules", projection.targets, sorted(linear))
    return found


def _check_dimensions(trained: Sequence[Trained]) -> None:
    # lomo-optim 0.1.1, adalomo.py: exp_avg_sq_row has shape[0] elements, the means to be added
    # have shape[:-1].
    for t in trained:
        if len(t.shape) > 2:
            raise IllegalRecipe(
                f"optimizer 'adalomo' with {t.name}: it steps vectors and matrices only, and this "
                f"one has {len(t.shape)} dimensions. Use 'lomo' or 'adafactor'"
            )


def states_of(
    optimizer: Optimizer, layout: Layout, projection: Projection | None, frozen: Sequence[Trained]
) -> Iterator[tuple[Trained, list[tuple[int, bool]]]]:
    """(bytes, whether paged) of the states of every parameter that has some."""
    lows = projections(layout.trained, projection)
    for t in (*layout.trained, *(frozen if optimizer.states_of_frozen else ())):
        yield t, list(state_tensors(optimizer, t, lows.get(t)))


def _on_host(optimizer: Optimizer, layout: Layout) -> int:
    if not optimizer.on_host:
        return 0
    return optimizer.states * sum(t.count * t.numel * t.itemsize for t in layout.trained)


def _released(optimizer: Optimizer, allocator: str, lows: dict[Trained, LowRank]) -> int:
    """GaLore's 8-bit AdamW leaves projected gradients behind."""
    if optimizer.package != "galore_torch" or optimizer.bits != 8:
        return 0
    return sum(
        t.count
        * (rounded(t.numel * t.itemsize, allocator) - rounded(low.numel * t.itemsize, allocator))
        for t, low in lows.items()
    )


def _transient(
    optimizer: Optimizer, layout: Layout, allocator: str, lows: dict[Trained, LowRank]
) -> tuple[int, int]:
    """Bytes of a step beyond states, and of its largest single tensor where it goes parameter by
    parameter."""
    step = STEPS.get(optimizer.name)
    if step is not None:
        order = [(t, lows.get(t)) for t in _order(layout.trained, lows)]
        frame = counted(step, order, allocator)
        return frame.peak, frame.largest
    if optimizer.stepping != "foreach":
        return 0, 0
    return FOREACH_TEMPORARIES[optimizer.algorithm] * layout.gradients, 0


def _order(trained: Sequence[Trained], lows: dict[Trained, LowRank]) -> list[Trained]:
    """The optimizer's groups: projected parameters last, else those without weight decay.

    Trainer.create_optimizer puts biases (experts' have two dimensions) and norms into a second
    group.
    """
    light = (t for t in trained if len(t.shape) < 2 or t.name.endswith("bias"))
    later = [t for t in trained if t in lows] if lows else list(light)
    return in_order([t for t in trained if t not in later]) + in_order(later)
