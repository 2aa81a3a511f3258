"""Fetching from the Hub, without network: huggingface_hub itself, over a transport of our own."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants, errors

from vramplan.errors import GatedModel, ModelNotFound, Offline, TimedOut
from vramplan.models import hub
from vramplan.models.config_files import NoConfig
from vramplan.models.locate import locate

# huggingface_hub 1.0's; before, it spoke through requests.
httpx = pytest.importorskip("httpx")
pytestmark = pytest.mark.usefixtures("no_network", "cache")

LLAMA = "meta-llama/Llama-3.1-8B"
CONFIG = {"model_type": "llama", "hidden_size": 64}
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def message(model: Any, kind: type[Exception], **options: Any) -> str:
    with pytest.raises(kind) as caught:
        locate(model, **options)
    assert type(caught.value) is kind
    return str(caught.value)


Answer = Callable[[httpx.Request], httpx.Response]


@pytest.fixture
def answer(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Answer], list[httpx.Request]]]:
    """Makes huggingface_hub itself speak to a function instead of the network."""

    def install(function: Answer) -> list[httpx.Request]:
        asked: list[httpx.Request] = []

        def handler(request: httpx.Request) -> httpx.Response:
            asked.append(request)
            return function(request)

        huggingface_hub.set_client_factory(
            lambda: httpx.Client(transport=httpx.MockTransport(handler))
        )
        return asked

    yield install
    from huggingface_hub.utils._http import default_client_factory

    huggingface_hub.set_client_factory(default_client_factory)


def serve(files: dict[str, object]) -> Answer:
    def function(request: httpx.Request) -> httpx.Response:
        name = request.url.path.rpartition("/")[2]
        if name not in files:
            headers = {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}
            return httpx.Response(404, headers=headers)
        body = json.dumps(files[name]).encode()
        headers = {"X-Repo-Commit": COMMIT, "ETag": '"abc"', "Content-Length": str(len(body))}
        return httpx.Response(200, headers=headers, content=body)

    return function


def refuse(status: int, **headers: str) -> Answer:
    return lambda request: httpx.Response(
        status, headers={name.replace("_", "-"): value for name, value in headers.items()}
    )


def fail(error: type[httpx.TransportError]) -> Answer:
    def function(request: httpx.Request) -> httpx.Response:
        raise error("it failed", request=request)

    return function


def test_the_hub(answer: Any, cache: Path) -> None:
    asked = answer(serve({"config.json": CONFIG}))
    found = locate("org/remote", token="hf_secret")
    assert (found.id, found.source, found.config) == ("org/remote", "hub", CONFIG)
    assert str(asked[0].url) == "https://huggingface.co/org/remote/resolve/main/config.json"
    assert asked[0].headers["authorization"] == "Bearer hf_secret"
    assert found.path is not None
    assert Path(found.path).is_relative_to(cache)
    asked.clear()
    assert locate("org/remote").source == "cache"
    assert asked == []


def test_the_token_of_the_environment(answer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_mine")
    asked = answer(serve({"config.json": CONFIG}))
    locate("org/remote")
    assert asked[0].headers["authorization"] == "Bearer hf_mine"


def test_the_hub_leaves_the_terminal_alone(answer: Any, capfd: pytest.CaptureFixture[str]) -> None:
    answer(serve({"config.json": CONFIG}))
    locate("org/remote")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("status", [401, 403])
def test_gated(answer: Any, status: int) -> None:
    answer(refuse(status, X_Error_Code="GatedRepo", X_Error_Message="Access is restricted"))
    text = message("org/gated", GatedModel)
    assert "org/gated is gated" in text
    assert "Accept it at https://huggingface.co/org/gated, then `hf auth login`" in text


@pytest.mark.parametrize(("status", "code"), [(404, "RepoNotFound"), (401, "")])
def test_missing_or_private(answer: Any, status: int, code: str) -> None:
    answer(refuse(status, X_Error_Code=code))
    text = message("meta-lama/Llama-3.1-8B", ModelNotFound)
    assert "no model 'meta-lama/Llama-3.1-8B'" in text
    assert f"nearest bundled: {LLAMA}" in text
    assert "hf auth login" in text


def test_no_config_on_the_hub(answer: Any) -> None:
    asked = answer(serve({"model-Q4_K_M.gguf": {}}))
    assert "is on the Hub, but has no config.json: repositories of GGUF" in message(
        "org/model-GGUF", NoConfig
    )
    assert {request.url.path.rpartition("/")[2] for request in asked} == {
        "config.json",
        "adapter_config.json",
    }


def test_an_adapter_on_the_hub_names_its_base(answer: Any) -> None:
    answer(serve({"adapter_config.json": {"base_model_name_or_path": LLAMA}}))
    assert message("org/lora", NoConfig) == (
        f"org/lora is a peft adapter, and no model of its own. Pass its base model: {LLAMA}"
    )


def test_a_repository_without_any_commit(answer: Any) -> None:
    answer(refuse(404, X_Error_Code="RevisionNotFound"))
    message("org/new", NoConfig)


@pytest.mark.parametrize("error", [httpx.ConnectTimeout, httpx.ReadTimeout])
def test_a_request_that_times_out(answer: Any, error: type[httpx.TransportError]) -> None:
    asked = answer(fail(error))
    text = message("org/slow", TimedOut, timeout=3)
    assert len(asked) == 1
    assert "did not answer within 3 s about org/slow" in text
    assert "HF_HUB_ETAG_TIMEOUT" in text


@pytest.mark.parametrize("error", [httpx.ConnectError, httpx.ProxyError, httpx.ReadError])
def test_no_way_to_the_hub(answer: Any, error: type[httpx.TransportError]) -> None:
    asked = answer(fail(error))
    text = message("meta-llama/Llama-3.1-9B", Offline)
    assert len(asked) == 1  # no retries: an answer at once
    assert "the Hub can't be reached (it failed)" in text
    assert f"bundled: {LLAMA}" in text


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_hub_that_is_down(answer: Any, status: int) -> None:
    asked = answer(refuse(status))
    assert f"(HTTP {status}). Try again" in message("org/model", Offline)
    assert len(asked) == 1


def test_a_token_that_is_refused(answer: Any) -> None:
    answer(refuse(401, X_Error_Message="Invalid credentials in Authorization header"))
    assert "refuses org/model (HTTP 401): the token is missing, expired" in message(
        "org/model", GatedModel
    )


def test_a_disabled_repository(answer: Any) -> None:
    answer(refuse(451, X_Error_Message="Access to this resource is disabled."))
    assert "the Hub refuses org/model (HTTP 451" in message("org/model", ModelNotFound)


def test_an_answer_that_is_no_hubs(answer: Any) -> None:
    """A captive portal, say: HTTP 200, and none of the Hub's headers."""
    answer(lambda request: httpx.Response(200, content=b"<html>Log in to the hotel"))
    assert "does not seem to be served by a Hugging Face Hub" in message("org/model", ModelNotFound)


@pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_offline_by_the_environment(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, "yes")
    text = message("meta-llama/Llama-3.1-9B", Offline)
    assert "HF_HUB_OFFLINE is set" in text
    assert f"bundled: {LLAMA}" in text
    assert "`hf download meta-llama/Llama-3.1-9B config.json`" in text


def test_offline_by_argument(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "download_config", None)
    assert "as offline=True" in message("org/model", Offline, offline=True)


def test_offline_as_the_library_says_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # as `import` found it, or set in code
    assert "HF_HUB_OFFLINE" in message("org/model", Offline)


def stand_in(monkeypatch: pytest.MonkeyPatch, function: Callable[..., str]) -> None:
    """Puts `function` in the place of what downloads, and lets the request before it pass."""
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", lambda *args, **kwargs: None)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", function)


def test_the_timeout_is_over_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retries, name look-ups and slow bodies are none of the library's own timeout."""
    release = threading.Event()

    def hang(*args: object, **kwargs: object) -> str:
        release.wait(10)
        raise OSError

    stand_in(monkeypatch, hang)
    start = time.perf_counter()
    assert "within 0.05 s" in message("org/slow", TimedOut, timeout=0.05)
    assert time.perf_counter() - start < 5
    release.set()
    for thread in threading.enumerate():
        if thread.name == "vramplan-hub":
            thread.join(10)


def test_the_environment_can_raise_the_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float] = []

    def record(*args: object, etag_timeout: float, **kwargs: object) -> str:
        seen.append(etag_timeout)
        raise errors.LocalEntryNotFoundError("not here")

    stand_in(monkeypatch, record)
    message("org/model", Offline)
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 60)
    message("org/model", Offline)
    assert seen == [10.0, 60]


def test_a_cache_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*args: object, **kwargs: object) -> str:
        raise PermissionError(13, "Permission denied", "/cache")

    stand_in(monkeypatch, denied)
    text = message("org/model", ModelNotFound)
    assert "the local cache can't be written" in text
    assert "Set HF_HOME" in text


def test_a_failure_that_nobody_foresaw_is_still_a_sentence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def break_down(*args: object, **kwargs: object) -> str:
        raise RuntimeError("Data processing error:\nCAS service\n")

    stand_in(monkeypatch, break_down)
    text = message("org/model", ModelNotFound)
    assert "org/model can't be fetched (RuntimeError: Data processing error:)" in text


def test_without_huggingface_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert "`pip install huggingface_hub`" in message("org/model", ModelNotFound)


def test_what_is_here_is_found_without_huggingface_hub(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    code = (
        "import sys\n"
        "from vramplan.models.locate import locate\n"
        f"locate({LLAMA!r}), locate({str(tmp_path)!r})\n"
        "assert not {'huggingface_hub', 'httpx', 'requests', 'difflib'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
