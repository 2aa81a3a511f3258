"""The optimizers that `optim` of transformers' TrainingArguments names, as facts about their state.

Names: `OptimizerNames` in transformers 5.17, training_args.py. What each name builds: the handlers
of transformers 5.17, trainer_optimizer.py. State tensors: torch.optim of torch 2.13, `Adafactor` in
transformers 5.17, optimization.py, and `init_state` in bitsandbytes 0.50, optim/optimizer.py and
optim/ademamix.py.

Only facts here, no bytes: what they cost is reckoned where memory is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vramplan.errors import IllegalRecipe, UnknownName

Package = Literal["torch", "transformers", "bitsandbytes"]
Stepping = Literal["fused", "foreach", "per_parameter"]

# bitsandbytes 0.50, optim/optimizer.py: `init_state` keeps a tensor of fewer elements in 32 bits.
BNB_MIN_8BIT_ELEMENTS = 4096
# ... and one fp32 absmax stands for this many elements of one 8-bit state.
BNB_BLOCK_ELEMENTS = 256
# ... `get_state_buffer`: a paged optimizer keeps the states of smaller tensors on the GPU.
BNB_MIN_PAGED_ELEMENTS = 100_000
# ... `fill_qmap`: a signed and an unsigned fp32 table of 256 values, shared by all tensors.
BNB_CODE_TABLE_ELEMENTS = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class Optimizer:
    """One value of `optim`: what it keeps for a parameter, where, and how it steps."""

    name: str
    """The `optim` value, as transformers spells it."""
    algorithm: str
    """adamw, adafactor, sgd, adagrad, rmsprop, lion or ademamix."""
    package: Package
    """The package whose code holds the state."""
    class_name: str
    """The class that transformers instantiates."""
    states: int
    """State tensors as large as the parameter. AdEMAMix has three: its first state is doubled."""
    bits: Literal[8, 32] | None = None
    """Bits of a state's element; None where the state takes the dtype of the parameter."""
    factored: bool = False
    """Adafactor: a parameter of two or more dimensions keeps one vector per axis instead."""
    paged: bool = False
    """States live in CUDA managed memory, outside torch's counters (tensors of 100,000 or more)."""
    stepping: Stepping = "foreach"
    """fused: one kernel, no temporaries; foreach: temporaries the size of all parameters;
    per_parameter: temporaries of the largest parameter."""
    step_on_gpu: bool = False
    """A scalar fp32 step counter a parameter lies on the GPU (else on the host, or is an int)."""
    state_at_init: bool = False
    """The state is there from the optimizer's making (torch's Adagrad), not from the first step."""

    @property
    def quantized_states(self) -> int:
        """States that carry fp32 absmax values, one a block of 256; 0 unless `bits` is 8."""
        return self.states if self.bits == 8 else 0

    @property
    def embeddings_in_32_bits(self) -> bool:
        """Whether `nn.Embedding` weights keep 32-bit states though `bits` is 8.

        transformers 5.17, Trainer.create_optimizer registers that override for every optimizer of
        bitsandbytes with optim_bits=8.
        """
        return self.package == "bitsandbytes" and self.bits == 8

    @property
    def refuses_bf16_gradients(self) -> bool:
        """Whether 32-bit states can't be stepped with bf16 gradients.

        bitsandbytes 0.50, backends/cuda/ops.py, `str2optimizer32bit`: no bf16 kernel for rmsprop.
        """
        return self.package == "bitsandbytes" and self.algorithm == "rmsprop"


def _bnb(name: str, algorithm: str) -> Optimizer:
    """As `_get_bitsandbytes_optimizer` in trainer_optimizer.py reads a name."""
    class_name, states = _BNB_CLASSES[algorithm]
    return Optimizer(
        name=name,
        algorithm=algorithm,
        package="bitsandbytes",
        class_name=f"bitsandbytes.optim.{class_name}",
        states=states,
        bits=8 if "8bit" in name else 32,
        paged=name.startswith("paged_"),
        stepping="per_parameter",
    )


_BNB_CLASSES = {
    "adamw": ("AdamW", 2),
    "ademamix": ("AdEMAMix", 3),
    "lion": ("Lion", 1),
    "rmsprop": ("RMSprop", 1),
}

_ALL = (
    Optimizer(
        name="adamw_torch_fused",
        algorithm="adamw",
        package="torch",
        class_name="torch.optim.AdamW",
        states=2,
        stepping="fused",
        step_on_gpu=True,
    ),
    Optimizer(
        name="adamw_torch",
        algorithm="adamw",
        package="torch",
        class_name="torch.optim.AdamW",
        states=2,
    ),
    Optimizer(
        name="adafactor",
        algorithm="adafactor",
        package="transformers",
        class_name="transformers.optimization.Adafactor",
        # beta1 is None: no first moment. A vector keeps one state as large as itself.
        states=1,
        # The state follows `grad.float()`, whatever the parameter's dtype.
        bits=32,
        factored=True,
        stepping="per_parameter",
    ),
    # Trainer passes no momentum unless `optim_args` does: plain SGD has no state at all.
    Optimizer(name="sgd", algorithm="sgd", package="torch", class_name="torch.optim.SGD", states=0),
    Optimizer(
        name="adagrad",
        algorithm="adagrad",
        package="torch",
        class_name="torch.optim.Adagrad",
        states=1,
        state_at_init=True,
    ),
    # Neither momentum nor centered unless `optim_args` says so: the square average alone.
    Optimizer(
        name="rmsprop",
        algorithm="rmsprop",
        package="torch",
        class_name="torch.optim.RMSprop",
        states=1,
    ),
    _bnb("adamw_bnb_8bit", "adamw"),
    _bnb("adamw_8bit", "adamw"),
    _bnb("paged_adamw_32bit", "adamw"),
    _bnb("paged_adamw_8bit", "adamw"),
    _bnb("ademamix", "ademamix"),
    _bnb("ademamix_8bit", "ademamix"),
    _bnb("paged_ademamix_32bit", "ademamix"),
    _bnb("paged_ademamix_8bit", "ademamix"),
    _bnb("lion_32bit", "lion"),
    _bnb("lion_8bit", "lion"),
    _bnb("paged_lion_32bit", "lion"),
    _bnb("paged_lion_8bit", "lion"),
    _bnb("rmsprop_bnb", "rmsprop"),
    _bnb("rmsprop_bnb_32bit", "rmsprop"),
    _bnb("rmsprop_bnb_8bit", "rmsprop"),
)

OPTIMIZERS: dict[str, Optimizer] = {optimizer.name: optimizer for optimizer in _ALL}
"""Every `optim` value whose memory vramplan models, by name."""

NOT_MODELLED: dict[str, tuple[str, str]] = {
    "adamw_torch_xla": ("torch_xla", "adamw_torch_fused"),
    "adamw_torch_npu_fused": ("torch_npu", "adamw_torch_fused"),
    "adamw_anyprecision": ("torchdistx", "adamw_torch"),
    "adamw_torch_4bit": ("torchao", "adamw_8bit"),
    "adamw_torch_8bit": ("torchao", "adamw_8bit"),
    "galore_adamw": ("galore_torch", "adamw_torch"),
    "galore_adamw_8bit": ("galore_torch", "adamw_8bit"),
    "galore_adafactor": ("galore_torch", "adafactor"),
    "galore_adamw_layerwise": ("galore_torch", "adamw_torch"),
    "galore_adamw_8bit_layerwise": ("galore_torch", "adamw_8bit"),
    "galore_adafactor_layerwise": ("galore_torch", "adafactor"),
    "lomo": ("lomo_optim", "sgd"),
    "adalomo": ("lomo_optim", "adafactor"),
    "grokadamw": ("grokadamw", "adamw_torch"),
    "schedule_free_radam": ("schedulefree", "adamw_torch"),
    "schedule_free_adamw": ("schedulefree", "adamw_torch"),
    "schedule_free_sgd": ("schedulefree", "sgd"),
    "apollo_adamw": ("apollo_torch", "adamw_torch"),
    "apollo_adamw_layerwise": ("apollo_torch", "adamw_torch"),
    "stable_adamw": ("torch-optimi", "adamw_torch"),
}
"""The rest of transformers' names: the package each needs, and the nearest one modelled."""


def find_optimizer(name: str) -> Optimizer:
    """The optimizer that `optim=name` builds.

    Raises UnknownName if transformers has no such name, and IllegalRecipe if it offers it through a
    package whose memory is not modelled.
    """
    found = OPTIMIZERS.get(name)
    if found is not None:
        return found
    if name in NOT_MODELLED:
        package, closest = NOT_MODELLED[name]
        raise IllegalRecipe(
            f"optimizer {name!r} is offered by transformers through the package {package}; "
            f"vramplan does not model its memory yet. Closest modelled: {closest!r}"
        )
    paged = "bitsandbytes pages the states of adamw, ademamix and lion only."
    raise UnknownName(
        "optimizer", name, OPTIMIZERS, hint=paged if name.startswith("paged_") else ""
    )
