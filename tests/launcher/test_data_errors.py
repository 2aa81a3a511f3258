"""Data that is broken or missing: one sentence that names the file, the row and the column."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("datasets")

from transformers import PreTrainedTokenizerFast
from vramplan_launcher.data import DataSpec, load_data

from vramplan.errors import InvalidValue, UnknownName, UserError

ROOT = Path(__file__).parents[2]


def tokenizer(**options: Any) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers

    made = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "a": 2, "b": 3}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="<unk>", **{"eos_token": "</s>", **options}
    )


def load(path: Path | str, folder: Path, **options: Any) -> Any:
    spec = {k: v for k, v in options.items() if k in DataSpec.__dataclass_fields__}
    given = {k: v for k, v in options.items() if k not in spec}
    tokens = given.pop("tokens", tokenizer())
    chosen = {"seq_len": 2, "seed": 0, "vocab_size": 4, "cache": folder / "cache", **given}
    return load_data(DataSpec(source=str(path), **spec), tokens, **chosen)


BROKEN = {
    "json": ("a.jsonl", '{"text": "a"}\n\n{"text": b}\n', "line 3 is no JSON: Expecting value"),
    "cut": ("a.jsonl", '{"text": "a"}\n{"text": "b', "line 2 is no JSON: Unterminated string"),
    "array in lines": ("a.jsonl", '{"text": "a"}\n[1]\n', "line 2 is a JSON list, not an object"),
    "no object": ("a.jsonl", '{"text": "a"}\n"b"\n', "line 2 is a JSON str, not an object"),
    "latin-1": ("a.jsonl", b'{"text": "a"}\n{"text": "caf\xe9"}\n', "line 2 is not UTF-8"),
    "latin-1 csv": ("a.csv", b"text\ncaf\xe9\n", "it is not UTF-8"),
    "csv": ("a.csv", "text,n\na,1\nb,2,3\n", "Expected 2 fields in line 3, saw 3"),
    "parquet": ("a.parquet", "no", "not read as parquet: Parquet file size is 2 bytes"),
    "empty": ("a.jsonl", "", "is empty"),
    "number": ("a.jsonl", '{"text": "a"}\n{"text": 5}\n', "row 2, column 'text' holds 5, not text"),
    "list": ("a.jsonl", '{"text": "a"}\n{"text": ["b"]}\n', "row 2, column 'text' holds \\['b'\\]"),
    "messages": (
        "a.jsonl",
        '{"messages": [{"role": "user", "content": "a"}]}\n{"messages": "a"}\n',
        "row 2, column 'messages' holds 'a', not a list of messages",
    ),
    "message": (
        "a.jsonl",
        '{"messages": [{"role": "user", "content": "a"}, {"from": "gpt", "value": "b"}]}\n',
        "row 1, column 'messages': message 2 is {'from': 'gpt', 'value': 'b'}",
    ),
    "nothing said": (
        "a.jsonl",
        '{"messages": [{"role": "user", "content": "a"}]}\n'
        '{"messages": [{"role": "user", "contents": "b"}]}\n',
        'row 2, column \'messages\': message 1 is .*, not an object with "role" and "content"',
    ),
    "no parts": (
        "a.jsonl",
        '{"messages": [{"role": "user", "content": ["a"]}]}\n',
        "row 1, column 'messages': message 1 is .*, not an object with",
    ),
    "columns": ("a.jsonl", '{"txt": "a"}\n', "no column text, .* its columns are txt"),
    "template": (
        "a.jsonl",
        '{"messages": [{"role": "boss", "content": "a"}]}\n',
        "row 1, column 'messages': the chat template refuses the conversation: no boss here",
    ),
    "ids": ("a.jsonl", '{"text": "a"}\n{"text": "a b"}\n', "row 2: the tokenizer made token 3"),
}
STRICT = "{% if messages[0].role == 'boss' %}{{ raise_exception('no boss here') }}{% endif %}a"


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_broken_is_named(
    tmp_path: Path, case: str, caplog: pytest.LogCaptureFixture
) -> None:
    name, text, said = BROKEN[case]
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    tokens = tokenizer()
    tokens.chat_template = STRICT
    with caplog.at_level(logging.ERROR), pytest.raises(UserError, match=said) as caught:
        load(path, tmp_path, tokens=tokens, vocab_size=3 if case == "ids" else 4)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caplog.records == []  # nothing is told twice


def test_a_missing_file_is_no_dataset(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").touch()
    with pytest.raises(UserError, match="no data file .*trian.jsonl'; nearest: 'train.jsonl'"):
        load(tmp_path / "trian.jsonl", tmp_path)
    with pytest.raises(UserError, match="there is no folder"):
        load(tmp_path / "no" / "train.jsonl", tmp_path)
    (tmp_path / "train.txt").write_text("a")
    with pytest.raises(UserError, match="Say its format: json, csv, parquet"):
        load(tmp_path / "train.txt", tmp_path)


def test_a_folder_of_files(tmp_path: Path) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    with pytest.raises(UserError, match="dataset .*rows.*"):
        load(folder, tmp_path)
    (folder / "train.jsonl").write_text('{"text": "a"}\n')
    (folder / "test.jsonl").write_text('{"text": "b"}\n')
    made = load(folder, tmp_path, eval_split="test")
    assert made.train[0]["input_ids"].tolist() == [2, 1]
    assert made.evaluation[0]["input_ids"].tolist() == [3, 1]
    with pytest.raises(UserError, match="Unknown split .tst.*'train', 'test'"):
        load(folder, tmp_path, split="tst")
    assert {entry.name for entry in folder.iterdir()} == {"train.jsonl", "test.jsonl"}


def test_an_unknown_split_of_a_folder(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    DatasetDict({"train": Dataset.from_dict({"text": ["a"]})}).save_to_disk(tmp_path / "d")
    with pytest.raises(UnknownName, match="unknown split .* 'trian': allowed are train; nearest"):
        load(tmp_path / "d", tmp_path, split="trian")


def test_a_named_column_that_is_not_there(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"body": "a"}\n')
    with pytest.raises(UnknownName, match="'bodi': allowed are body; nearest: 'body'"):
        load(path, tmp_path, text_column="bodi")
    assert len(load(path, tmp_path, text_column="body").train) == 1


def test_a_tokenizer_without_a_chat_template(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"messages": [{"role": "user", "content": "a"}]}\n')
    with pytest.raises(UserError, match="the tokenizer has no chat template: .* Give a template"):
        load(path, tmp_path)


def test_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="needs the model's tokenizer"):
        load(tmp_path / "a.jsonl", tmp_path, tokens=None)


def test_too_little_for_one_step(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in ("a", "b", "")))
    (tmp_path / "one.jsonl").write_text('{"text": "a"}\n')
    assert len(load(path, tmp_path, at_least=2).train) == 2
    said = "makes 2 sequences of 2 tokens .1 of 3 rows had nothing to learn., and one step takes 3"
    with pytest.raises(UserError, match=said):
        load(path, tmp_path, at_least=3)
    with pytest.raises(UserError, match="makes 0 sequences of 64 tokens.* or --no-packing"):
        load(path, tmp_path, seq_len=64)
    with pytest.raises(UserError, match="evaluation data .* fills no sequence of 4 tokens"):
        load(path, tmp_path, seq_len=4, eval_split=str(tmp_path / "one.jsonl"))
    with pytest.raises(UserError, match="too few rows .1. to hold any back"):
        load(tmp_path / "one.jsonl", tmp_path, eval_split=0.5)
    with pytest.raises(UserError, match="no evaluation file 'validation'"):
        load(path, tmp_path, eval_split="validation")


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    path, taken = tmp_path / "a.jsonl", tmp_path / "taken"
    path.write_text('{"text": "a"}\n')
    taken.write_text("a file where a folder is wanted")
    with pytest.raises(UserError, match="Not a directory|File exists") as caught:
        load(path, tmp_path, cache=taken)
    assert str(taken) in str(caught.value)


def test_a_tokenizer_without_eos_is_told_of(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a b"}\n')
    notes = load(path, tmp_path, tokens=tokenizer(eos_token=None)).notes
    assert "the tokenizer has no EOS token: nothing marks where a row ends" in notes


def test_a_dataset_of_the_hub_without_a_network(tmp_path: Path) -> None:
    # In a process of its own: the library reads its offline switch once, when imported.
    program = (
        "from vramplan_launcher.data import DataSpec, load_data\n"
        "try: load_data(DataSpec(source='some/data'), object(), seq_len=2, seed=0, vocab_size=4)\n"
        "except ValueError as error: print(type(error).__name__, error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={
            **os.environ,
            "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'launcher'}",
            "HF_HOME": str(tmp_path),
            "HF_HUB_OFFLINE": "1",
        },
    )
    assert "UserError dataset 'some/data' is not in the local cache" in done.stdout, done.stderr
    assert "If a file is meant, check its path" in done.stdout


SPECS = {
    "format": ({"source": "a.txt", "format": "xml"}, UnknownName, "unknown data format 'xml'"),
    "share": ({"source": "a.csv", "eval_split": 1.0}, InvalidValue, "above 0 and below 1"),
    "limit": ({"source": "a.csv", "limit": 0}, InvalidValue, "at least 1"),
    "two": (
        {"source": "a.csv", "text_column": "a", "messages_column": "b"},
        UserError,
        "text_column and messages_column: a row is one or the other",
    ),
    "mask": ({"source": "a.csv", "padding_mask": True}, UserError, "have no padding"),
    "synthetic": ({"text_column": "a"}, UserError, "text_column without a source of data"),
    "split": ({"eval_split": "test"}, UserError, "eval_split without a source of data"),
}


@pytest.mark.parametrize("case", SPECS)
def test_specs_that_cannot_be(case: str) -> None:
    fields, error, said = SPECS[case]
    with pytest.raises(error, match=said):
        DataSpec.from_dict(fields)


def test_a_spec_is_plain_data_and_light() -> None:
    spec = DataSpec(source="a.csv", eval_split=0.1, packing=False)
    assert DataSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    with pytest.raises(UnknownName, match="unknown data field 'text'"):
        DataSpec.from_dict({"text": "a"})
    program = (
        "import sys; import vramplan_launcher.data, vramplan_launcher.command\n"
        "import vramplan_launcher.failures\n"
        "print({'torch', 'datasets', 'transformers', 'numpy'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'launcher'}"},
    )
    assert done.stdout == "set()\n"
