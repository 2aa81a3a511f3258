"""Who runs: module names for the counter, forward and backward; and libraries kept quiet."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from vramplan_launcher.trace.build import layers_of
from vramplan_launcher.trace.counting import Counter


def name_modules(model: Any, counter: Counter, stack: list[str]) -> None:
    """Tells the counter which module is running; `stack` holds their names, innermost last."""

    def before(name: str) -> Any:
        def hook(module: nn.Module, args: Any) -> None:
            stack.append(name)
            counter.module = name

        return hook

    def after(module: nn.Module, args: Any, out: Any) -> None:
        if len(stack) > 1:
            stack.pop()
        counter.module = stack[-1]

    for name, module in model.named_modules():
        module.register_forward_pre_hook(before(name))
        module.register_forward_hook(after, always_call=True)
    if counter.events is not None:
        _name_backward(model, counter, stack)


def _name_backward(model: Any, counter: Counter, stack: list[str]) -> None:
    """Tells the counter whose backward begins: the layer whose output's gradient arrives.

    What a layer makes anew for its backward (checkpointing) is activations again.
    """

    def watch(name: str) -> Any:
        def arrived(grad: torch.Tensor) -> None:
            counter.module = stack[0] = name

        def hook(module: nn.Module, args: Any, out: Any) -> None:
            first = out[0] if isinstance(out, (tuple, list)) else out
            recomputed = torch._C._current_autograd_node() is not None
            if isinstance(first, torch.Tensor) and first.requires_grad and not recomputed:
                first.register_hook(arrived)

        return hook

    def recomputes(category: str) -> Any:
        def hook(*_: Any) -> None:
            if torch._C._current_autograd_node() is not None:
                counter.category = category

        return hook

    for name in layers_of(model):
        layer = model.get_submodule(name)
        layer.register_forward_hook(watch(name))
        layer.register_forward_pre_hook(recomputes("activation"))
        layer.register_forward_hook(recomputes("gradient"), always_call=True)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Libraries' warnings about a run that never happens are of no use to anyone."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """While open, the libraries log nothing: what fails is raised."""
    names = ("transformers", "bitsandbytes", "peft", "torch._subclasses.fake_tensor")
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
