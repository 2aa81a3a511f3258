"""The optimizers that `optim` of transformers' TrainingArguments names, as facts about their state.

Names: `OptimizerNames` in transformers 5.17, training_args.py. What each name builds: the handlers
of transformers 5.17, trainer_optimizer.py. State tensors: torch.optim of torch 2.13, `Adafactor` in
transformers 5.17, optimization.py, `init_state` in bitsandbytes 0.50, optim/optimizer.py and
optim/ademamix.py, and the third-party packages in _ELSEWHERE, each with its version.

Only facts here, no bytes: what they cost is reckoned where memory is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from vramplan.errors import IllegalRecipe, UnknownName

Package = Literal[
    "torch",
    "transformers",
    "bitsandbytes",
    "torchao",
    "galore_torch",
    "apollo_torch",
    "lomo_optim",
    "grokadamw",
    "schedulefree",
    "optimi",
]
Stepping = Literal["fused", "foreach", "per_parameter", "in_backward"]
LIBRARIES = ("torch", "transformers", "bitsandbytes")
"""The packages that every `launch` has; the others are installed for their optimizer alone."""

INSTALLED_AS = {
    "torchao": "torchao",
    "galore_torch": "galore-torch",
    "apollo_torch": "apollo-torch",
    "lomo_optim": "lomo-optim",
    "grokadamw": "grokadamw",
    "schedulefree": "schedulefree",
    "optimi": "torch-optimi",
}
"""The others, by the names under which PyPI has them."""

# bitsandbytes 0.50, optim/optimizer.py: `init_state` keeps a tensor of fewer elements in 32 bits.
BNB_MIN_8BIT_ELEMENTS = 4096
# ... and one fp32 absmax stands for this many elements of one 8-bit state.
BNB_BLOCK_ELEMENTS = 256
# ... `get_state_buffer`: a paged optimizer keeps the states of smaller tensors on the GPU.
BNB_MIN_PAGED_ELEMENTS = 100_000
# ... `fill_qmap`: a signed and an unsigned fp32 table of 256 values, shared by all tensors.
BNB_CODE_TABLE_ELEMENTS = 256
# torchao 0.18, optim/adam.py, _new_buffer: fewer elements, or no whole blocks, are not quantized.
TORCHAO_MIN_ELEMENTS = 4096
# transformers 5.17, _get_torchao_optimizer: the block of both, unless `optim_args` names another.
TORCHAO_BLOCK_ELEMENTS = 256


def torchao_quantizes(numel: int) -> bool:
    """Whether torchao's optimizers quantize the states of a parameter of so many elements."""
    return numel >= TORCHAO_MIN_ELEMENTS and numel % TORCHAO_BLOCK_ELEMENTS == 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Optimizer:
    """One value of `optim`: what it keeps for a parameter, where, and how it steps."""

    name: str
    """The `optim` value, as transformers spells it."""
    algorithm: str
    """adamw, adafactor, sgd, adagrad, rmsprop, lion, ademamix, or one of _ELSEWHERE's own."""
    package: Package
    """The package, as it is imported, whose code holds the state."""
    class_name: str
    """The class that transformers instantiates."""
    states: int
    """State tensors as large as the parameter. AdEMAMix has three: its first state is doubled."""
    bits: Literal[4, 8, 32] | None = None
    """Bits of a state's element; None where the state takes the dtype of the parameter."""
    factored: bool = False
    """Adafactor: a parameter of two or more dimensions keeps one vector per axis instead."""
    paged: bool = False
    """States live in CUDA managed memory, outside torch's counters (tensors of 100,000 or more)."""
    stepping: Stepping = "foreach"
    """fused: one kernel, no temporaries; foreach: temporaries the size of all parameters;
    per_parameter: temporaries of the largest parameter; in_backward: the same, as soon as backward
    has a parameter's gradient, which is let go then."""
    step_on_gpu: bool = False
    """A scalar fp32 step counter a parameter lies on the GPU (else on the host, or is an int)."""
    state_at_init: bool = False
    """The state is there from the optimizer's making (torch's Adagrad), not from the first step."""
    low_rank: Literal["svd", "random"] | None = None
    """How the gradients of `optim_target_modules` are projected to `optim_rank` before states."""
    compensated: bool = False
    """A 16-bit parameter has a Kahan compensation besides, as large as itself."""
    states_of_frozen: bool = False
    """Parameters that are not trained have states as well."""
    on_host: bool = False
    """States lie in (pageable) host memory; a step moves them to the GPU and back."""

    @property
    def quantized_states(self) -> int:
        """States that carry fp32 absmax values, one a block of 256; 0 unless `bits` is 4 or 8."""
        return self.states if self.bits in (4, 8) else 0

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


def _elsewhere(
    name: str, algorithm: str, package: Package, class_name: str, **facts: Any
) -> Optimizer:
    return Optimizer(
        name=name,
        algorithm=algorithm,
        package=package,
        class_name=f"{package}.{class_name}",
        **{"states": 2, "stepping": "per_parameter", **facts},
    )


def _galore(name: str, algorithm: str, class_name: str, **facts: Any) -> Optimizer:
    return _elsewhere(name, algorithm, "galore_torch", class_name, low_rank="svd", **facts)


def _apollo(name: str, **facts: Any) -> Optimizer:
    return _elsewhere(name, "adamw", "apollo_torch", "APOLLOAdamW", low_rank="random", **facts)


def _lomo(name: str, class_name: str, **facts: Any) -> Optimizer:
    return _elsewhere(name, name, "lomo_optim", class_name, **facts, **_IN_BACKWARD)


def _schedule_free(name: str, class_name: str, states: int) -> Optimizer:
    return _elsewhere(name, name, "schedulefree", class_name, states=states, stepping="foreach")


_IN_BACKWARD: Any = {"stepping": "in_backward"}
_FACTORED: Any = {"states": 1, "bits": 32, "factored": True}

_ELSEWHERE = (
    # torchao 0.18, optim/adam.py. A step of each parameter is compiled (torch.compile).
    _elsewhere("adamw_torch_8bit", "adamw", "torchao", "optim.AdamW8bit", bits=8),
    _elsewhere("adamw_torch_4bit", "adamw", "torchao", "optim.AdamW4bit", bits=4),
    # galore-torch 1.0. Its 8-bit AdamW is bitsandbytes' Optimizer2State.
    _galore("galore_adamw", "adamw", "GaLoreAdamW"),
    _galore("galore_adamw_8bit", "adamw", "GaLoreAdamW8bit", bits=8),
    _galore("galore_adafactor", "adafactor", "GaLoreAdafactor", **_FACTORED),
    _galore("galore_adamw_layerwise", "adamw", "GaLoreAdamW", **_IN_BACKWARD),
    _galore("galore_adamw_8bit_layerwise", "adamw", "GaLoreAdamW8bit", bits=8, **_IN_BACKWARD),
    # apollo-torch 1.0.3, apollo.py
    _apollo("apollo_adamw"),
    _apollo("apollo_adamw_layerwise", **_IN_BACKWARD),
    # lomo-optim 0.1.1, lomo.py and adalomo.py: accelerate's backward is theirs (lomo_backward).
    _lomo("lomo", "Lomo", states=0),
    _lomo("adalomo", "AdaLomo", state_at_init=True, states_of_frozen=True, **_FACTORED),
    # grokadamw 0.1.2, grokadamw.py: two moments and an average of gradients.
    _elsewhere("grokadamw", "grokadamw", "grokadamw", "GrokAdamW", states=3, on_host=True),
    # schedulefree 1.4.1: z, a copy of the weights, and but for SGD the second moment.
    _schedule_free("schedule_free_radam", "RAdamScheduleFree", 2),
    _schedule_free("schedule_free_adamw", "AdamWScheduleFree", 2),
    _schedule_free("schedule_free_sgd", "SGDScheduleFree", 1),
    # torch-optimi 0.3.3, stableadamw.py; Triton kernels, which come with torch for CUDA.
    _elsewhere(
        "stable_adamw", "stable_adamw", "optimi", "StableAdamW", compensated=True, stepping="fused"
    ),
)

OPTIMIZERS: dict[str, Optimizer] = {one.name: one for one in (*_ALL, *_ELSEWHERE)}
"""Every `optim` value whose memory vramplan models, by name."""

REFUSED: dict[str, tuple[str, str]] = {
    "adamw_torch_xla": (
        "it is torch_xla's, for TPUs and other XLA devices: no CUDA GPU runs it",
        "adamw_torch_fused",
    ),
    "adamw_torch_npu_fused": (
        "it is torch_npu's, for Ascend NPUs: no CUDA GPU runs it",
        "adamw_torch_fused",
    ),
    "adamw_anyprecision": (
        "it needs torchdistx, whose release 0.2 (2022) is for torch 1.12 and which PyPI "
        "does not have",
        "adamw_torch",
    ),
    "galore_adafactor_layerwise": (
        "transformers 5.17 (_get_galore_optimizer) gives it a learning rate and leaves "
        'relative_step on, which galore-torch refuses ("Cannot combine manual `lr` and '
        '`relative_step=True` options")',
        "galore_adafactor",
    ),
}
"""The rest of transformers' names: why none of them runs on a CUDA GPU, and the nearest that does.
"""


def find_optimizer(name: str) -> Optimizer:
    """The optimizer that `optim=name` builds.

    Raises UnknownName if transformers has no such name, and IllegalRecipe if what it builds does
    not run on a CUDA GPU.
    """
    found = OPTIMIZERS.get(name)
    if found is not None:
        return found
    if name in REFUSED:
        reason, closest = REFUSED[name]
        raise IllegalRecipe(f"optimizer {name!r}: {reason}. Use {closest!r}")
    paged = "bitsandbytes pages the states of adamw, ademamix and lion only."
    raise UnknownName(
        "optimizer", name, OPTIMIZERS, hint=paged if name.startswith("paged_") else ""
    )
