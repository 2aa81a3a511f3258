"""Steps of the optimizers' own packages on the CPU, where they are installed: every storage."""

from __future__ import annotations

import gc
import importlib
import importlib.util
import weakref
from collections.abc import Iterator
from math import prod
from typing import Any

import pytest

from vramplan.memory import optimizer_steps
from vramplan.memory.optimizers import stepping
from vramplan.memory.precision import Projection
from vramplan.memory.states import Layout, Trained
from vramplan.recipe.optimizers import OPTIMIZERS

ALLOCATOR = "expandable_segments"


def real_step(name: str, shapes: dict[str, tuple[int, ...]], dtype: str) -> tuple[int, int]:
    """(peak, bytes kept) of storages that the third step of the real optimizer makes."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    facts = OPTIMIZERS[name]
    if importlib.util.find_spec(facts.package) is None:
        pytest.skip(f"{facts.package} is not installed")
    module: Any = importlib.import_module(facts.package)
    kind = getattr(module, facts.class_name.rpartition(".")[2])
    parameters = {
        n: torch.nn.Parameter(torch.randn(*shape).to(getattr(torch, dtype)))
        for n, shape in shapes.items()
    }
    groups: list[dict[str, Any]] = [{"params": list(parameters.values())}]
    if facts.low_rank:
        low = {"rank": 16, "update_proj_gap": 2, "scale": 1.0, "proj_type": "std"}
        if facts.low_rank == "random":
            low |= {"proj": "random", "scale_type": "channel"}
        groups = [
            {"params": [p for n, p in parameters.items() if "proj" not in n]},
            {"params": [p for n, p in parameters.items() if "proj" in n], **low},
        ]
    given = {"scale_parameter": False, "relative_step": False} if facts.factored else {}
    optimizer = kind(groups, lr=1e-3, **given)
    if hasattr(optimizer, "train"):
        optimizer.train()
    for _ in range(3):
        for p in parameters.values():
            p.grad = torch.randn_like(p)
        peak, kept = counted(torch, optimizer)
    return peak, kept


def tensors_of(torch: Any, optimizer: Any) -> Iterator[Any]:
    """Parameters, gradients, states and projections."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            state = optimizer.state.get(p, {})
            kept = (*state.values(), getattr(state.get("projector"), "ortho_matrix", None))
            yield from (one for one in (p, p.grad, *kept) if isinstance(one, torch.Tensor))


def counted(torch: Any, optimizer: Any) -> tuple[int, int]:
    """The same of one step, by identity of storages, in blocks of 512 bytes."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    live, known = [0, 0], {}

    def see(tensor: Any, counts: bool) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata in known:
            return
        size = known[storage._cdata] = -(-storage.nbytes() // 512) * 512
        live[0] += size * counts
        live[1] = max(live)

        def gone(key: int = storage._cdata, size: int = size) -> None:
            known.pop(key, None)
            live[0] -= size

        weakref.finalize(storage, gone)

    for known_before in tensors_of(torch, optimizer):
        see(known_before, False)
    del known_before

    class Counting(TorchDispatchMode):  # type: ignore[misc]
        def __torch_dispatch__(
            self, function: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            out = function(*args, **(kwargs or {}))
            for leaf in tree_leaves(out):
                if type(leaf) in (torch.Tensor, torch.nn.Parameter):
                    see(leaf, True)
            return out

    with Counting():
        optimizer.step()
    gc.collect()
    return live[1], live[0]


SHAPES = {
    "embed": (900, 64),
    "a.q_proj": (128, 64),
    "a.k_proj": (32, 128),
    "b.q_proj": (128, 64),
    "b.k_proj": (32, 128),
    "head": (600, 64),
    "norm": (64,),
}
REAL = [
    name
    for name, one in OPTIMIZERS.items()
    if one.package in ("galore_torch", "apollo_torch", "schedulefree")
    and one.stepping != "in_backward"
    and one.bits != 8  # its kernels need a GPU
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", REAL)
def test_steps_of_the_packages_themselves(
    name: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a CPU has not: cuSOLVER's workspace, the buffers of CUDA's sums."""
    monkeypatch.setattr(optimizer_steps, "svd_temporaries", lambda rows, columns: ())
    monkeypatch.setattr(optimizer_steps, "buffer_bytes", lambda outputs, rows: 0)
    peak, kept = real_step(name, SHAPES, dtype)
    assert kept == 0
    itemsize = 2 if dtype == "bfloat16" else 4
    trained = tuple(
        Trained(n, prod(shape), itemsize, 1, False, shape, linear="proj" in n)
        for n, shape in SHAPES.items()
    )
    facts = OPTIMIZERS[name]
    projection = Projection("all-linear", 16, facts.low_rank) if facts.low_rank else None
    gradients = sum(-(-t.numel * itemsize // 512) * 512 for t in trained)
    layout = Layout(0, 0, 0, 0, 0, 0, trained, gradients)
    expected = stepping(facts, layout, ALLOCATOR, projection).transient
    if name == "schedule_free_radam":  # its first five steps do without the second moment
        assert (peak, expected) == (0, gradients)
        return
    # A scalar here and there: norms, learning rates.
    assert peak == pytest.approx(expected, abs=4 * 512)
