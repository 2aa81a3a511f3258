"""The policy under which a description runs: dtypes, autocast, quantization, adapters."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Policy:
    """What of a recipe shapes the tape; batch, sequence and optimizer do not."""

    dtype: str = "bf16"
    autocast: str | None = "bf16"
    quantization: str | None = None
    double_quant: bool = True
    compute_dtype: str = "bf16"
    rank: int | None = None
    lora_dropout: float = 0.0
    adapter_dtype: str = "fp32"
    targets: tuple[str, ...] | str | None = None
    attention: str = "sdpa"
    checkpointing: bool = False
    single_sequence: bool = False  # batch 1: merging batch and heads needs no copy
    accumulating: bool = False  # gradients of an earlier micro-batch are there already
    beyond_window: bool = False  # sequence longer than the sliding window

    @property
    def weight_dtype(self) -> str:
        """prepare_model_for_kbit_training upcasts all that is not quantized to fp32 (peft)."""
        return "fp32" if self.quantization else self.dtype

    @property
    def trains_base(self) -> bool:
        return self.rank is None

    def adapts(self, name: str) -> bool:
        """peft's rule: the name is a target or ends with .target; all-linear takes every linear."""
        if self.rank is None or self.targets is None:
            return False
        if self.targets == "all-linear":
            return True
        return any(name == t or name.endswith("." + t) for t in self.targets)
