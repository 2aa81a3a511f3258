from __future__ import annotations

import pytest

from vramplan.errors import IllegalRecipe, InvalidValue, UnknownName
from vramplan.recipe.deepspeed import DeepSpeed
from vramplan.recipe.optimizers import (
    BNB_BLOCK_ELEMENTS,
    BNB_CODE_TABLE_ELEMENTS,
    BNB_MIN_8BIT_ELEMENTS,
    BNB_MIN_PAGED_ELEMENTS,
    LIBRARIES,
    OPTIMIZERS,
    REFUSED,
    find_optimizer,
)
from vramplan.recipe.recipe import Recipe

TORCH_NAMES = ["adamw_torch_fused", "adamw_torch", "sgd", "adagrad", "rmsprop"]
BNB_NAMES = [name for name, one in OPTIMIZERS.items() if one.package == "bitsandbytes"]


@pytest.mark.parametrize(
    ("name", "states", "bits", "paged"),
    [
        ("adamw_torch_fused", 2, None, False),
        ("adamw_torch", 2, None, False),
        ("sgd", 0, None, False),
        ("adagrad", 1, None, False),
        ("rmsprop", 1, None, False),
        ("adafactor", 1, 32, False),
        ("adamw_bnb_8bit", 2, 8, False),
        ("adamw_8bit", 2, 8, False),
        ("paged_adamw_8bit", 2, 8, True),
        ("paged_adamw_32bit", 2, 32, True),
        ("ademamix", 3, 32, False),
        ("ademamix_8bit", 3, 8, False),
        ("paged_ademamix_32bit", 3, 32, True),
        ("paged_ademamix_8bit", 3, 8, True),
        ("lion_32bit", 1, 32, False),
        ("lion_8bit", 1, 8, False),
        ("paged_lion_32bit", 1, 32, True),
        ("paged_lion_8bit", 1, 8, True),
        ("rmsprop_bnb", 1, 32, False),
        ("rmsprop_bnb_32bit", 1, 32, False),
        ("rmsprop_bnb_8bit", 1, 8, False),
        ("adamw_torch_8bit", 2, 8, False),
        ("adamw_torch_4bit", 2, 4, False),
        ("galore_adamw", 2, None, False),
        ("galore_adamw_8bit", 2, 8, False),
        ("galore_adafactor", 1, 32, False),
        ("galore_adamw_layerwise", 2, None, False),
        ("galore_adamw_8bit_layerwise", 2, 8, False),
        ("apollo_adamw", 2, None, False),
        ("apollo_adamw_layerwise", 2, None, False),
        ("lomo", 0, None, False),
        ("adalomo", 1, 32, False),
        ("grokadamw", 3, None, False),
        ("schedule_free_radam", 2, None, False),
        ("schedule_free_adamw", 2, None, False),
        ("schedule_free_sgd", 1, None, False),
        ("stable_adamw", 2, None, False),
    ],
)
def test_states(name: str, states: int, bits: int | None, paged: bool) -> None:
    optimizer = find_optimizer(name)
    assert optimizer.name == name
    assert (optimizer.states, optimizer.bits, optimizer.paged) == (states, bits, paged)
    assert optimizer.quantized_states == (states if bits in (4, 8) else 0)
    # Trainer registers that override by the class's name, "bitsandbytes..." alone.
    assert optimizer.embeddings_in_32_bits == (bits == 8 and name in BNB_NAMES)


def test_the_table_above_is_the_whole_table() -> None:
    marks = test_states.pytestmark  # type: ignore[attr-defined]
    assert {values[0] for values in marks[0].args[1]} == set(OPTIMIZERS)


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_cuda_gpu_runs_says_why(name: str) -> None:
    reason, closest = REFUSED[name]
    assert closest in OPTIMIZERS
    with pytest.raises(IllegalRecipe) as caught:
        find_optimizer(name)
    assert str(caught.value) == f"optimizer {name!r}: {reason}. Use {closest!r}"


ELSEWHERE = [name for name, one in OPTIMIZERS.items() if one.package not in LIBRARIES]
IN_BACKWARD = [name for name, one in OPTIMIZERS.items() if one.stepping == "in_backward"]


def test_what_steps_in_backward() -> None:
    assert [
        *("galore_adamw_layerwise", "galore_adamw_8bit_layerwise", "apollo_adamw_layerwise"),
        *("lomo", "adalomo"),
    ] == IN_BACKWARD


@pytest.mark.parametrize("name", ELSEWHERE)
def test_other_packages_are_not_for_deepspeed(name: str) -> None:
    with pytest.raises(IllegalRecipe, match=f"{name!r} with deepspeed"):
        Recipe(optimizer=name, deepspeed=DeepSpeed(stage=2))


@pytest.mark.parametrize("name", IN_BACKWARD)
def test_what_stepping_in_backward_excludes(name: str) -> None:
    with pytest.raises(IllegalRecipe, match="world_size 2"):
        Recipe(optimizer=name, world_size=2)
    accumulating = {"optimizer": name, "gradient_accumulation_steps": 2}
    scaled = {"optimizer": name, "dtype": "fp32", "mixed_precision": "fp16"}
    if name.endswith("_layerwise"):
        plain = name.removesuffix("_layerwise")
        with pytest.raises(IllegalRecipe, match=f"Use 1, or optimizer {plain!r}"):
            Recipe(**accumulating)
        assert Recipe(**scaled)
    else:  # LOMO steps after every micro-batch, and says nothing
        assert Recipe(**accumulating)
        with pytest.raises(IllegalRecipe, match="LOMO's learning rate"):
            Recipe(**scaled)


def test_the_projection_is_checked() -> None:
    recipe = Recipe(optimizer="galore_adamw", optim_target_modules=["mlp", "attn"], optim_rank=64)
    assert recipe.optim_target_modules == ("attn", "mlp")
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    with pytest.raises(InvalidValue, match="optim_rank is 0"):
        Recipe(optim_rank=0)
    with pytest.raises(InvalidValue, match="optim_target_modules"):
        Recipe(optim_target_modules=())


def test_what_transformers_does_not_offer() -> None:
    with pytest.raises(UnknownName) as caught:
        find_optimizer("paged_rmsprop_8bit")
    assert "bitsandbytes pages the states of adamw, ademamix and lion only." in str(caught.value)
    with pytest.raises(UnknownName, match="nearest: 'paged_adamw_32bit'"):
        find_optimizer("paged_adamw")
    with pytest.raises(UnknownName, match="nearest: 'lion_32bit'"):
        find_optimizer("lion")


# Against the libraries themselves, where they are installed.


def test_the_names_are_those_of_transformers() -> None:
    training_args = pytest.importorskip("transformers.training_args")
    names = {str(name.value) for name in training_args.OptimizerNames}
    assert {*OPTIMIZERS, *REFUSED} == names
    assert set(OPTIMIZERS) & set(REFUSED) == set()


def built(name: str, *, rows: int, columns: int = 128) -> tuple[object, object]:
    """The optimizer that transformers builds for a bf16 matrix, and the matrix, after a step."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("bitsandbytes")
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(optim=name, use_cpu=True, report_to="none")
    cls, kwargs = Trainer.get_optimizer_cls_and_kwargs(arguments)
    weight = torch.nn.Parameter(torch.zeros(rows, columns, dtype=torch.bfloat16))
    optimizer = cls([weight], **kwargs)
    assert f"{cls.__module__}.{cls.__name__}".startswith(OPTIMIZERS[name].package)
    assert cls.__name__ == OPTIMIZERS[name].class_name.rpartition(".")[2]
    return optimizer, weight


@pytest.mark.parametrize("name", [*TORCH_NAMES, "adafactor"])
def test_states_in_torch_and_transformers(name: str) -> None:
    torch = pytest.importorskip("torch")
    optimizer, weight = built(name, rows=64)
    facts = OPTIMIZERS[name]
    assert bool(optimizer.state) == facts.state_at_init  # type: ignore[attr-defined]
    weight.grad = torch.ones_like(weight)  # type: ignore[attr-defined,call-overload]
    optimizer.step()  # type: ignore[attr-defined]
    state = optimizer.state[weight]  # type: ignore[attr-defined]
    tensors = {
        key: value for key, value in state.items() if torch.is_tensor(value) and value.dim() > 0
    }
    if facts.factored:
        # One fp32 value a row and one a column, and no first moment.
        assert {key: tuple(value.shape) for key, value in tensors.items()} == {
            "exp_avg_sq_row": (64,),
            "exp_avg_sq_col": (128,),
        }
        assert {value.dtype for value in tensors.values()} == {torch.float32}
        return
    assert [tuple(value.shape) for value in tensors.values()] == [(64, 128)] * facts.states
    assert {value.dtype for value in tensors.values()} <= {torch.bfloat16}
    if facts.step_on_gpu:
        assert optimizer.defaults["fused"]  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", BNB_NAMES)
def test_states_in_bitsandbytes(name: str) -> None:
    torch = pytest.importorskip("torch")
    facts = OPTIMIZERS[name]
    optimizer, weight = built(name, rows=64)
    assert optimizer.args.optim_bits == facts.bits  # type: ignore[attr-defined]
    assert optimizer.is_paged == facts.paged  # type: ignore[attr-defined]
    optimizer.is_paged = False  # type: ignore[attr-defined]  # managed memory needs a GPU
    optimizer.init_state(optimizer.param_groups[0], weight, 0, 0)  # type: ignore[attr-defined]
    state = optimizer.state[weight]  # type: ignore[attr-defined]

    elements = 64 * 128
    dtype = torch.uint8 if facts.bits == 8 else torch.float32
    kept = [value for key, value in state.items() if key.startswith("state")]
    assert sum(value.numel() for value in kept) == facts.states * elements
    assert {value.dtype for value in kept} == {dtype}
    scales = [value.numel() for key, value in state.items() if key.startswith("absmax")]
    assert sum(scales) == facts.quantized_states * elements // BNB_BLOCK_ELEMENTS
    tables = [value for key, value in state.items() if key.startswith("qmap")]
    assert {value.numel() for value in tables} <= {BNB_CODE_TABLE_ELEMENTS}


def test_bitsandbytes_keeps_small_tensors_in_32_bits() -> None:
    torch = pytest.importorskip("torch")
    for elements, dtype in (
        (BNB_MIN_8BIT_ELEMENTS - 1, torch.float32),
        (BNB_MIN_8BIT_ELEMENTS, torch.uint8),
    ):
        optimizer, weight = built("adamw_8bit", rows=1, columns=elements)
        optimizer.init_state(optimizer.param_groups[0], weight, 0, 0)  # type: ignore[attr-defined]
        assert optimizer.state[weight]["state1"].dtype == dtype  # type: ignore[attr-defined]


def test_bitsandbytes_pages_large_tensors_only() -> None:
    pytest.importorskip("torch")
    optimizer_module = pytest.importorskip("bitsandbytes.optim.optimizer")
    import inspect

    source = inspect.getsource(optimizer_module.Optimizer8bit.get_state_buffer)
    assert f"p.numel() < {BNB_MIN_PAGED_ELEMENTS:.0e}".replace("+0", "") in source
