from __future__ import annotations

import pickle

import pytest

from vramplan import errors
from vramplan.errors import InvalidValue, UnknownName, UserError, VramplanError, nearest

NAMES = ("adamw_torch_fused", "adamw_torch", "ademamix", "lion_32bit", "paged_adamw_32bit")


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("adamv", "adamw_torch_fused"),  # not "ademamix", though the whole of it is more alike
        ("adamw_troch", "adamw_torch"),
        ("ADAMW-TORCH", "adamw_torch"),  # case and separators do not matter
        ("lion", "lion_32bit"),  # a beginning
        ("paged_adamw", "paged_adamw_32bit"),
        ("zzz", None),
        ("", None),
        (17, None),
    ],
)
def test_nearest(typed: object, meant: str | None) -> None:
    assert nearest(typed, NAMES) == meant


def test_nearest_of_nothing() -> None:
    assert nearest("adamw", ()) is None


def test_unknown_name_says_thing_value_allowed_and_nearest() -> None:
    error = UnknownName("dtype", "bf61", ("fp32", "bf16", "fp16"), hint="Turing has no bf16.")
    assert str(error) == (
        "unknown dtype 'bf61': allowed are fp32, bf16, fp16; nearest: 'bf16'. Turing has no bf16."
    )
    assert (error.thing, error.value, error.nearest) == ("dtype", "bf61", "bf16")


def test_unknown_name_takes_the_callers_word_for_the_nearest() -> None:
    error = UnknownName("quantization", "4bit", ("int8", "nf4"), closest="nf4")
    assert error.nearest == "nf4"
    assert str(error) == "unknown quantization '4bit': allowed are int8, nf4; nearest: 'nf4'"


def test_unknown_name_cuts_a_long_list() -> None:
    names = [f"card-{number}" for number in range(60)]
    assert str(UnknownName("GPU", "card-7x", names)) == (
        "unknown GPU 'card-7x': it is none of the 60 known ones; nearest: 'card-7'"
    )


def test_unknown_name_with_nothing_alike() -> None:
    assert str(UnknownName("dtype", "?", ("fp32",))) == "unknown dtype '?': allowed are fp32"


def test_invalid_value() -> None:
    error = InvalidValue("batch_size", 0, "an integer of at least 1", hint="Try 1.")
    assert str(error) == "batch_size is 0: it must be an integer of at least 1. Try 1."


def test_the_tree_is_as_the_docstring_draws_it() -> None:
    for name in ("UnknownName", "InvalidValue", "ConfigError", "IllegalRecipe", "ModelNotFound"):
        assert getattr(errors, name).__bases__ == (UserError,)
    for name in ("GatedModel", "Offline", "TimedOut"):
        assert getattr(errors, name).__bases__ == (errors.ModelNotFound,)
    defined = [
        name
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, VramplanError)
    ]
    assert errors.__doc__ is not None
    assert [name for name in defined if name not in errors.__doc__] == []


def test_exit_code_and_value_error() -> None:
    assert VramplanError("x").exit_code == 2
    assert issubclass(UserError, ValueError)
    assert not issubclass(VramplanError, ValueError)


@pytest.mark.parametrize(
    "error",
    [
        UnknownName("dtype", "4bit", ("fp32", "bf16"), "a hint", "bf16"),
        InvalidValue("batch_size", 0, "an integer of at least 1", "a hint"),
    ],
)
def test_errors_survive_another_process(error: UserError) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert str(copy) == str(error)
    assert vars(copy) == vars(error)
