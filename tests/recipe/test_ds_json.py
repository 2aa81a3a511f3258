"""What a person writes in a ds_config.json, and what hides a slip."""

from __future__ import annotations

import json

import pytest

from vramplan.errors import UserError
from vramplan.recipe.ds_json import loads


def test_comments_and_trailing_commas() -> None:
    text = """{
      // by hand
      "a": 1, # one
      /* two
         lines, "b": 3 */
      "url": "http://x/#y", "c": ["//", "/*", ",}",],
      "quote": "\\"//",
    }"""
    table = {"a": 1, "url": "http://x/#y", "c": ["//", "/*", ",}"], "quote": '"//'}
    assert loads(text, "it") == (table, True)


def test_strict_json_is_known_as_such() -> None:
    text = json.dumps({"a": ["#", ",]", 5e8], "b": None})
    assert loads(text, "it") == ({"a": ["#", ",]", 5e8], "b": None}, False)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "line 1 column 1"),
        ("[1]", "not a table"),
        ('{\n "a": 1,\n // two\n "b": ture\n}', "line 4 column 7"),
        ('{"a": 1 /* for ever', "line 1 column 9"),
        ('{"a": 1,, "b": 2}', "line 1 column 9"),
        ('{"a": {"b": 1, "c": 2, "b": 3}}', "there more than once: b"),
        ("{a: 1}", "line 1 column 2"),
    ],
)
def test_malformed(text: str, said: str) -> None:
    with pytest.raises(UserError, match=f"^it (is malformed|holds).*{said}"):
        loads(text, "it")
