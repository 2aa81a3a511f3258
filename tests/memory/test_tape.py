"""The tape's lifetimes: what autograd shares, adds in place, recomputes, and caches."""

from __future__ import annotations

import pytest

from vramplan.memory.graph import Graph
from vramplan.memory.precision import Policy
from vramplan.memory.tape import ALONE, Tape, holders
from vramplan.memory.values import Parameter, Size, Value

N = Size(1000)
FP32 = 1000 * 4


def graph(**policy: object) -> Graph:
    return Graph(Policy(**{"dtype": "fp32", "autocast": None, **policy}))  # type: ignore[arg-type]


def trained(g: Graph, name: str = "w", size: Size = N) -> Value:
    return g.leaf(g.shared.setdefault(name, Parameter(name, size, "fp32", True)))


def live(g: Tape) -> int:
    return sum(g.sizes[e if e >= 0 else ~e][0] * (1 if e >= 0 else -1) for e in g.events)


def births(g: Graph, y: Value) -> list[int]:
    """Bytes of the storages that the backward of y's mean makes, the root's scalar left out."""
    loss = y.mean(1000)
    del y
    start = len(g.events)
    g.backward(loss)
    return [g.sizes[e][0] for e in g.events[start:] if e >= 0][1:]


def test_a_storage_lives_as_long_as_its_holders() -> None:
    g = graph()
    x = g.new(N, "fp32")
    view = x.alias()
    del x
    assert live(g) == FP32
    del view
    assert live(g) == 0
    assert g.events == [0, ~0]


def test_sizes_are_monomials() -> None:
    assert Size(3, 1, 2).at(5, 7) == 3 * 5 * 7**2
    assert Size(6, 1, 1).times(4).per(8) == Size(3, 1, 1)
    with pytest.raises(AssertionError):
        Size(3).per(2)


def test_nothing_is_saved_without_gradients() -> None:
    g = graph()
    x = g.new(N, "fp32")
    y = x * x
    assert y.node is None
    del x
    assert live(g) == FP32


def test_mul_saves_the_other_side() -> None:
    g = graph()
    w = trained(g)
    x = g.new(N, "fp32")
    y = w * x
    del x
    assert live(g) == 2 * FP32  # the product, and x for w's gradient
    g.backward(y)
    del y
    grad = g.shared["w"].grad
    assert grad is not None
    assert live(g) == FP32  # the gradient alone


def test_add_hands_one_gradient_to_both_sides() -> None:
    g = graph()
    a, b = trained(g, "a"), trained(g, "b")
    y = a + b
    born = births(g, y)
    # The mean's gradient alone: both parameters steal it.
    assert born == [FP32]
    assert g.shared["a"].grad.storage is g.shared["b"].grad.storage  # type: ignore[union-attr]


def test_gradients_are_added_in_place() -> None:
    g = graph()
    x = trained(g) * 2.0
    y = (x * 3.0) + (x * 5.0)
    del x
    # Of the mean, of each product, of the first scaling: the products' sum needs no storage.
    assert births(g, y) == [FP32] * 4


def test_a_view_is_not_added_into() -> None:
    g = graph()
    size = Size(10 * 100)
    x = trained(g, "x", size) * 1.0
    weights = [g.leaf(Parameter(n, Size(100), "fp32", False)) for n in "ab"]
    outs = [g.dense(x, w, None, 10, 10) for w in weights]
    y = outs[0] + outs[1]
    del x, outs
    # Of the mean; two of linears, which are views; their sum out of place; the scaling's.
    assert births(g, y) == [FP32] * 5


def test_dropped_intermediates_keep_only_what_is_saved() -> None:
    g = graph()
    x = trained(g) * 1.0
    y = x.silu()  # saves its input
    z = y.tanh()  # saves its output
    del x, y
    # silu's input and tanh's output; tanh's input is free
    assert live(g) == 2 * FP32
    assert z.size == N


def block(x: Value) -> Value:
    for _ in range(4):
        x = x.silu()
    return x


def test_checkpointing_keeps_the_input_alone() -> None:
    g = graph()
    x = trained(g) * 1.0
    y = g.checkpoint(block, x)
    del x
    assert live(g) == 2 * FP32  # input, output
    start = len(g.events)
    g.backward(y)
    assert len([e for e in g.events[start:] if e >= 0]) == 1 + 3 + 4 + 1


def test_recomputation_stops_early() -> None:
    """Four activations save their inputs: the last one's output is never computed again."""
    g = graph()
    x = trained(g) * 1.0
    y = g.checkpoint(block, x)
    before = len(g.sizes)
    g.backward(y)
    forward_again = 3
    root, activations, scaling = 1, 4, 1
    assert len(g.sizes) - before == root + forward_again + activations + scaling


def test_autocast_copies_a_trained_weight_once() -> None:
    g = graph(autocast="bf16")
    w = trained(g)
    first, second = g.lower(w), g.lower(w)
    assert first.storage is second.storage
    assert live(g) == 2 * 1000
    del first, second
    assert live(g) == 2 * 1000  # the cache holds it
    g.clear_autocast_cache()
    assert live(g) == 0


def test_autocast_copies_a_frozen_weight_each_time() -> None:
    g = graph(autocast="bf16")
    frozen = g.leaf(Parameter("w", N, "fp32", False))
    first, second = g.lower(frozen), g.lower(frozen)
    assert first.storage is not second.storage
    assert live(g) == 2 * 2 * 1000


def test_a_gradient_takes_its_inputs_dtype() -> None:
    """validate_outputs: a bf16 input behind an fp32 product is sent a bf16 gradient."""
    g = graph()
    w = trained(g)
    y = g.to(w, "bf16") * g.new(N, "fp32")
    # Of the mean, of the product, that cast to bf16, of the copy.
    assert births(g, y) == [4000, 4000, 2000, 4000]


def test_a_second_micro_batch_adds_to_the_gradient_in_place() -> None:
    g = graph()
    for _ in range(2):
        y = trained(g) * 1.0
        g.backward(y)
        del y
    assert live(g) == FP32


def test_minus_negates_the_second_gradient() -> None:
    g = graph()
    a, b = trained(g, "a"), trained(g, "b")
    # Of the mean, which `a` steals; a negated copy for `b`.
    assert births(g, a - b) == [FP32, FP32]
    assert g.shared["a"].grad.storage is not g.shared["b"].grad.storage  # type: ignore[union-attr]


def test_minus_sums_what_was_broadcast() -> None:
    g = graph()
    a, b = trained(g, "a"), trained(g, "b", Size(10))
    # Of the mean; negated in the size of the difference, then summed to b's ten.
    assert births(g, a - b) == [FP32, FP32, 10 * 4]


def test_a_storage_held_twice_is_not_alone() -> None:
    g = graph()
    x = g.new(N, "fp32")
    assert holders(x) == ALONE
    view = x.alias()
    assert holders(x) == ALONE + 1
    del view
    assert holders(x) == ALONE
