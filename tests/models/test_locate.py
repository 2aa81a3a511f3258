"""`locate`, as far as it needs no network; test_hub.py goes on from there."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from vramplan.errors import ConfigError, ModelNotFound, Offline, UserError
from vramplan.models.config_files import MAX_CONFIG_SIZE, NoConfig
from vramplan.models.locate import Located, cache_folder, locate

pytestmark = pytest.mark.usefixtures("no_network", "cache")

LLAMA = "meta-llama/Llama-3.1-8B"
CONFIG = {"model_type": "llama", "hidden_size": 64}
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def write(path: Path, content: object = CONFIG) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content), "utf-8")
    return path


def message(model: Any, kind: type[Exception], **options: Any) -> str:
    with pytest.raises(kind) as caught:
        locate(model, **options)
    assert type(caught.value) is kind
    return str(caught.value)


# --- what is there: the bundled catalogue, paths, dicts ---------------------------------------


def test_a_bundled_id() -> None:
    found = locate(LLAMA)
    assert (found.id, found.source, found.path, found.note) == (LLAMA, "catalogue", None, None)
    assert found.published_parameters == 8_030_261_248
    assert found.config["hidden_size"] == 4096


def test_a_bundled_id_in_another_case_gets_its_real_one() -> None:
    assert locate("Meta-Llama/LLAMA-3.1-8b").id == LLAMA


def test_a_name_without_organization_that_is_the_only_one() -> None:
    found = locate("llama-3.1-8b")
    assert (found.id, found.note) == (LLAMA, f"llama-3.1-8b was read as {LLAMA}")


def test_a_name_that_several_organizations_have() -> None:
    text = message("Llama-2-7b-hf", ModelNotFound)
    assert "meta-llama/Llama-2-7b-hf, NousResearch/Llama-2-7b-hf" in text


@pytest.mark.parametrize(
    "address",
    [
        f"https://huggingface.co/{LLAMA}",
        f"https://huggingface.co/{LLAMA}/tree/main",
        f"hf.co/{LLAMA}?library=transformers",
        f" {LLAMA}\n",
    ],
)
def test_the_address_of_a_models_page(address: str) -> None:
    assert locate(address).id == LLAMA


def test_a_folder(tmp_path: Path) -> None:
    path = write(tmp_path / "my-tune" / "config.json")
    found = locate(tmp_path / "my-tune")
    assert found == Located(id="my-tune", config=CONFIG, source="folder", path=str(path))
    assert locate(f"{tmp_path}/my-tune/") == found


def test_the_folder_one_stands_in() -> None:
    write(Path("config.json"))
    assert locate(".").id == "work"


def test_a_file(tmp_path: Path) -> None:
    path = write(tmp_path / "my-tune" / "config.json")
    assert locate(str(path)) == Located(id="my-tune", config=CONFIG, source="file", path=str(path))
    assert locate(write(tmp_path / "wide.json")).id == "wide"


def test_a_path_from_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    write(tmp_path / "tunes" / "one" / "config.json")
    assert locate("~/tunes/one").id == "one"


def test_a_folder_of_the_local_cache_knows_its_id(cache: Path) -> None:
    snapshot = cache / "models--org--some-model" / "snapshots" / COMMIT
    write(snapshot / "config.json")
    assert locate(snapshot).id == "org/some-model"
    assert locate(cache / "models--org--some-model").id == "org/some-model"


def test_a_dict_is_copied() -> None:
    found = locate(CONFIG)
    assert found == Located(id="llama", config=CONFIG, source="dict")
    assert found.config is not CONFIG
    assert locate({"_name_or_path": "org/name"}).id == "org/name"


def test_a_config_of_images_and_text_is_left_as_it_is() -> None:
    config = {"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}}
    assert locate(config).config == config


def test_an_existing_path_wins_over_a_bundled_id() -> None:
    write(Path("openai-community/gpt2/config.json"))
    found = locate("openai-community/gpt2")
    assert (found.source, found.config) == ("folder", CONFIG)


def test_a_folder_without_config_that_hides_a_bundled_model() -> None:
    write(Path("gpt2/notes.txt"), "")
    text = message("gpt2", NoConfig)
    assert "gpt2 has no config.json; in it: notes.txt" in text
    assert "stands before the model openai-community/gpt2" in text


@pytest.mark.parametrize("model", [None, 8, ["a"]])
def test_a_model_of_another_type(model: object) -> None:
    assert type(model).__name__ in message(model, UserError)


def test_a_config_object_of_transformers_is_told_how() -> None:
    class LlamaConfig:
        def to_dict(self) -> dict[str, Any]:
            return dict(CONFIG)

    assert "LlamaConfig; of a transformers config, pass config.to_dict()" in message(
        LlamaConfig(), UserError
    )


# --- what is given in place of a config -------------------------------------------------------


@pytest.mark.parametrize("name", ["", "  "])
def test_no_name(name: str) -> None:
    assert "no model named" in message(name, ModelNotFound)


@pytest.mark.parametrize("name", ["./x", "/no/such/folder", "a/b/c", "x.json", "~/x", "a\\b"])
def test_a_path_that_is_not_there_is_not_asked_of_the_hub(name: str) -> None:
    assert message(name, ModelNotFound).startswith("no such file or folder: ")


def test_a_path_object_is_only_ever_a_path() -> None:
    assert "no such file or folder" in message(Path(LLAMA), ModelNotFound)


def test_a_missing_path_names_the_nearest() -> None:
    write(Path("tunes/llama-lora/config.json"))
    assert f"nearest: {Path('tunes/llama-lora')}" in message("./tunes/lama-lora", ModelNotFound)


@pytest.mark.parametrize("name", ["two words", "a--b", "a..b", "über/modell", "x\0y", "x" * 300])
def test_what_can_be_neither_path_nor_id(name: str) -> None:
    assert "a Hub id looks like organization/name" in message(name, ModelNotFound)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('{"a": 1,\n "b" 2}', "line 2, column 6: malformed JSON: Expecting ':' delimiter"),
        ('{"a": 1,\n "b": [1, 2', "line 2, column 12: the JSON breaks off"),
        ('{"a": "lla', "line 1, column 7: the JSON breaks off"),
        ("[1, 2]", "holds a list, where a config.json holds one object"),
        ("null", "holds null,"),
        ("3", "holds a number,"),
        (b'{"a": "\xff\xfe"}', "is not text: the byte at 7 is not utf-8"),
        (b"", "is empty"),
        (b" \n", "is empty"),
        ("[" * 200_000, "is no config"),
        ('{"a": ' + "9" * 5000 + "}", "is no config"),
        (b"GGUF\x03\0\0\0" + b"\0" * 64, "is a GGUF file"),
        (b"PK\x03\x04" + b"\0" * 64, "is a zip archive or a PyTorch checkpoint"),
        (b"\x40\x01\0\0\0\0\0\0" + b'{"__metadata__":{}}', "is a safetensors file"),
        ("version https://git-lfs.github.com/spec/v1\n", "is a git-lfs pointer"),
        ("\n<!doctype html>", "is a web page"),
        ({"weight_map": {}, "metadata": {}}, "is an index of weight files"),
        ({"dim": 4096, "n_layers": 32}, "is a params.json in the authors' original format"),
        ({"schema": 1, "recipe": {}, "model": {}}, "is a plan or an estimate of vramplan's"),
        ({"zero_optimization": {"stage": 2}}, "is a DeepSpeed config, which --deepspeed reads"),
    ],
)
def test_a_file_that_is_no_config(tmp_path: Path, content: object, expected: str) -> None:
    path = write(tmp_path / "config.json", content)
    text = message(path, ConfigError)
    assert text.startswith(str(path))
    assert expected in text


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_encodings_that_editors_and_shells_write(tmp_path: Path, encoding: str) -> None:
    path = write(tmp_path / "config.json", json.dumps(CONFIG).encode(encoding))
    assert locate(path).config == CONFIG


def test_weights_name_the_config_beside_them(tmp_path: Path) -> None:
    weights = write(tmp_path / "model.safetensors", b"\x40\0\0\0\0\0\0\0{")
    assert "Pass the model's config.json, the folder" in message(weights, ConfigError)
    config = write(tmp_path / "config.json")
    assert f"Pass {config}, which lies beside it" in message(weights, ConfigError)


def test_a_huge_file_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "huge.json"
    with path.open("wb") as file:
        file.write(b"{")
        file.truncate(2**30)  # sparse: takes no room
    start = time.perf_counter()
    assert "has 1.0 GiB: a config.json has some kilobytes" in message(path, ConfigError)
    assert time.perf_counter() - start < 2
    assert MAX_CONFIG_SIZE == 16 * 2**20


def test_no_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "config.json")

    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", refuse)  # not by chmod: root may read everything
    assert message(path, ConfigError) == f"{path} can't be read: Permission denied"
    monkeypatch.setattr(Path, "stat", refuse)
    assert message(str(path), ConfigError) == f"{path} can't be read: Permission denied"


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ([], ": it is empty"),
        (["model-Q4_K_M.gguf", "README.md"], ": it holds GGUF files"),
        (["params.json", "consolidated.00.pth"], ": params.json is the authors' original format"),
        (["model_index.json"], ": it is a diffusers pipeline"),
        (["checkpoint-500/config.json"], f", but {Path('checkpoint-500/config.json')} lies below"),
        ([f"file{i}" for i in range(9)], "; in it: file0, file1, file2, file3, file4, file5 and 3"),
    ],
)
def test_a_folder_without_config(tmp_path: Path, names: list[str], expected: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for name in names:
        write(folder / name)
    assert f"{folder} has no config.json{expected}" in message(folder, NoConfig)


def test_an_adapter_names_its_base(tmp_path: Path) -> None:
    adapter = {"peft_type": "LORA", "base_model_name_or_path": LLAMA}
    path = write(tmp_path / "out" / "adapter_config.json", adapter)
    for given in (path, path.parent):
        text = message(given, NoConfig)
        assert (
            text
            == f"{given} is a peft adapter, and no model of its own. Pass its base model: {LLAMA}"
        )
    write(path, "{")
    assert "Pass the model that it was trained on" in message(path.parent, NoConfig)


# --- the local Hugging Face cache -------------------------------------------------------------


def cached(cache: Path, name: str, content: object = CONFIG, ref: str | None = COMMIT) -> Path:
    repository = cache / f"models--{name.replace('/', '--')}"
    if ref is not None:
        write(repository / "refs" / "main", ref)
    return write(repository / "snapshots" / COMMIT / "config.json", content)


def test_the_local_cache(cache: Path) -> None:
    path = cached(cache, "org/some-model")
    assert locate("org/some-model") == Located(
        id="org/some-model", config=CONFIG, source="cache", path=str(path)
    )


def test_the_local_cache_is_read_offline(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cached(cache, "org/some-model")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert locate("org/some-model", offline=True).source == "cache"


def test_the_catalogue_comes_before_the_cache(cache: Path) -> None:
    cached(cache, LLAMA)
    assert locate(LLAMA).source == "catalogue"


def test_a_pinned_commit_alone(cache: Path) -> None:
    cached(cache, "org/pinned", ref=None)
    assert locate("org/pinned").source == "cache"


def test_of_two_commits_the_main_one(cache: Path) -> None:
    cached(cache, "org/two")
    other = cache / "models--org--two" / "snapshots" / ("f" * 40) / "config.json"
    write(other, {"model_type": "gpt2"})
    assert locate("org/two").config == CONFIG


def test_a_cache_without_the_config_is_passed_over(cache: Path) -> None:
    cached(cache, "org/empty").unlink()
    message("org/empty", Offline, offline=True)


def test_a_truncated_cached_config(cache: Path) -> None:
    path = cached(cache, "org/broken", '{"model_type":')
    text = message("org/broken", ConfigError)
    assert text.startswith(f"{path}, line 1, column 15: the JSON breaks off")
    assert text.endswith("Delete it, and it is downloaded anew.")


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, "~/.cache/huggingface/hub"),
        ({"XDG_CACHE_HOME": "/x"}, "/x/huggingface/hub"),
        ({"XDG_CACHE_HOME": "/x", "HF_HOME": "/h"}, "/h/hub"),
        ({"HF_HOME": "/h", "HUGGINGFACE_HUB_CACHE": "/old"}, "/old"),
        ({"HUGGINGFACE_HUB_CACHE": "/old", "HF_HUB_CACHE": "~/new"}, "~/new"),
    ],
)
def test_the_cache_is_where_huggingface_hub_has_it(environ: dict[str, str], expected: str) -> None:
    assert cache_folder(environ) == Path(expected).expanduser()
    code = "from huggingface_hub import constants; print(constants.HF_HUB_CACHE)"
    home = str(Path.home())
    theirs = subprocess.run(
        [sys.executable, "-c", code],
        env={"HOME": home, "USERPROFILE": home, **environ},
        check=True,
        capture_output=True,
        text=True,
    )
    assert Path(theirs.stdout.strip()) == cache_folder(environ)
