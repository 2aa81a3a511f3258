from __future__ import annotations

import json
from pathlib import Path

import pytest

from vramplan.errors import IllegalRecipe, InvalidValue, UnknownName, UserError
from vramplan.recipe import LoRA, Recipe
from vramplan.recipe.files import read_recipe, write_recipe

RECIPE = Recipe(quantization="nf4", lora=LoRA(rank=8, target_modules=["q_proj"]), batch_size=4)


def test_there_and_back(tmp_path: Path) -> None:
    path = write_recipe(RECIPE, tmp_path / "recipe.json")
    assert read_recipe(path) == read_recipe(str(path)) == RECIPE
    assert path.read_text(encoding="utf-8").endswith("}\n")


def test_an_existing_file_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "recipe.json"
    path.write_text("mine", encoding="utf-8")
    with pytest.raises(UserError, match="exists already, and is not overwritten unasked"):
        write_recipe(RECIPE, path)
    assert path.read_text(encoding="utf-8") == "mine"
    write_recipe(RECIPE, path, overwrite=True)
    assert read_recipe(path) == RECIPE


def test_toml(tmp_path: Path) -> None:
    path = tmp_path / "recipe.TOML"
    path.write_text(
        'quantization = "nf4"\nbatch_size = 4\n[lora]\nrank = 8\ntarget_modules = ["q_proj"]\n',
        encoding="utf-8",
    )
    assert read_recipe(path) == RECIPE


def test_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "recipe.json"
    path.write_text('{"batch_size": 2}', encoding="utf-8-sig")
    assert read_recipe(path).batch_size == 2


@pytest.mark.parametrize(
    ("name", "text", "error", "message"),
    [
        ("r.json", '{"batch_size": 2', UserError, r"r\.json' is malformed: .*line 1"),
        ("r.toml", "batch_size = 1 2", UserError, r"r\.toml' is malformed: .*line 1"),
        ("r.json", "[1]", UserError, r"holds \[1\], not a table"),
        ("r.json", '{"batch": 2}', UnknownName, "unknown recipe field 'batch'"),
        ("r.json", '{"batch_size": 0}', InvalidValue, "batch_size is 0"),
        ("r.json", '{"quantization": "int8"}', IllegalRecipe, "full fine-tuning"),
        ("r.yaml", "batch_size: 2", InvalidValue, r"a \.json or \.toml file"),
    ],
)
def test_read_refuses(
    tmp_path: Path, name: str, text: str, error: type[UserError], message: str
) -> None:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    with pytest.raises(error, match=message):
        read_recipe(path)


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    path.write_bytes(b"\xff\xfe{")
    with pytest.raises(UserError, match="is malformed"):
        read_recipe(path)


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="can't read recipe file .*No such file"):
        read_recipe(tmp_path / "r.json")
    with pytest.raises(UserError, match="can't write recipe file .*No such file"):
        write_recipe(RECIPE, tmp_path / "none" / "r.json")


def test_only_json_is_written(tmp_path: Path) -> None:
    with pytest.raises(InvalidValue, match="a .json file"):
        write_recipe(RECIPE, tmp_path / "r.toml")


def test_what_is_written_is_the_recipe(tmp_path: Path) -> None:
    text = write_recipe(RECIPE, tmp_path / "r.json").read_text(encoding="utf-8")
    assert json.loads(text) == RECIPE.to_dict()
