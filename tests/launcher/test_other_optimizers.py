"""Optimizers of packages that are installed for them alone: arguments, and what is said."""

from __future__ import annotations

import importlib.util

import pytest
from vramplan_launcher.job import Job
from vramplan_launcher.needs import check_installed
from vramplan_launcher.trace import api

from vramplan.errors import IllegalRecipe, UserError
from vramplan.recipe.optimizers import INSTALLED_AS, LIBRARIES, OPTIMIZERS
from vramplan.recipe.recipe import Recipe


def test_every_package_has_the_name_it_is_installed_by() -> None:
    assert {*INSTALLED_AS, *LIBRARIES} == {one.package for one in OPTIMIZERS.values()}


@pytest.mark.parametrize("package", INSTALLED_AS)
def test_a_missing_package_is_named(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name = next(n for n, one in OPTIMIZERS.items() if one.package == package)
    found = importlib.util.find_spec("json")
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda asked, *_: None if asked == package else found
    )
    with pytest.raises(UserError, match=f"pip install {INSTALLED_AS[package]}$"):
        check_installed(Job(model="gpt2", recipe=Recipe(optimizer=name)))


def test_a_trace_refuses_them() -> None:
    with pytest.raises(IllegalRecipe, match="'lomo' in a trace"):
        api.check_installed(Recipe(optimizer="lomo"))


def test_the_projection_is_handed_on() -> None:
    build = pytest.importorskip("vramplan_launcher.build")
    recipe = Recipe(optimizer="galore_adamw", optim_target_modules=("attn", "mlp"), optim_rank=64)
    values = build.recipe_arguments(recipe)
    assert values["optim_target_modules"] == ["attn", "mlp"]
    assert values["optim_args"] == "rank=64"
    every = build.recipe_arguments(Recipe(optimizer="apollo_adamw"))
    assert every["optim_target_modules"] == "all-linear"
    assert "optim_args" not in build.recipe_arguments(Recipe())
