"""The trace: a run's real code on fake tensors, every storage counted as it is born and freed.

`trace(config, recipe)` builds the transformers model, peft's adapters and the optimizer as the
launcher would, without a GPU and without memory for weights, and runs training steps as
transformers' `Trainer` does. It needs torch, transformers, peft and accelerate, on any machine.
"""

from __future__ import annotations

from vramplan_launcher.trace.counting import Counter, Phase, Storage
from vramplan_launcher.trace.scaling import trace_deep
from vramplan_launcher.trace.steps import Trace, trace

__all__ = ["Counter", "Phase", "Storage", "Trace", "trace", "trace_deep"]
