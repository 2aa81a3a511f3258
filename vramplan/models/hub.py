"""Fetching a config.json from the Hugging Face Hub: the one place in vramplan with network.

huggingface_hub does it, imported only here and only then. What it raises becomes one of
vramplan's own errors, each with the next step.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from vramplan.errors import GatedModel, ModelNotFound, Offline, TimedOut
from vramplan.models.config_files import (
    ADAPTER_CONFIG_NAME,
    CONFIG_NAME,
    NoConfig,
    raise_adapter,
    read_adapter,
)

_TRUE = {"1", "ON", "YES", "TRUE"}
# By name, because which HTTP library raises them depends on huggingface_hub's version: httpx
# from 1.0 on, requests before.
_TIMEOUTS = {"TimeoutError", "TimeoutException", "Timeout"}
_UNREACHABLE = {"ConnectionError", "TransportError", "OfflineModeIsEnabled"}

_OR_A_FILE = "or pass a config.json, or the folder that holds one"


def is_offline() -> bool:
    """Whether the environment keeps huggingface_hub (1.x, `constants.HF_HUB_OFFLINE`) offline."""
    value = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or ""
    return value.upper() in _TRUE


def download_config(
    model_id: str, *, cache: Path, token: str | bool | None, timeout: float, similar: str = ""
) -> Path:
    """The config.json of `model_id`, fetched from the Hub into the local cache.

    `timeout` is in seconds, over all requests; HF_HUB_ETAG_TIMEOUT can raise it. `similar` is a
    clause on models of like names, for the message where there is no such model.

    Raises GatedModel, NoConfig, Offline, TimedOut, or ModelNotFound for anything else.
    """
    try:
        import huggingface_hub
        from huggingface_hub import constants
    except ImportError:
        raise ModelNotFound(
            f"no model {model_id!r} here, and huggingface_hub is not installed: "
            f"`pip install huggingface_hub`, {_OR_A_FILE}{similar}"
        ) from None
    if constants.HF_HUB_ETAG_TIMEOUT != constants.DEFAULT_ETAG_TIMEOUT:
        timeout = max(timeout, constants.HF_HUB_ETAG_TIMEOUT)

    def fetch(name: str) -> Path:
        with _quiet():
            # One request without retries first: hf_hub_download tries for half a minute before it
            # says that there is no network.
            url = huggingface_hub.hf_hub_url(model_id, name)
            huggingface_hub.get_hf_file_metadata(url, token=token, timeout=timeout)
            return Path(
                huggingface_hub.hf_hub_download(
                    model_id, name, cache_dir=str(cache), token=token, etag_timeout=timeout
                )
            )

    try:
        return _within(timeout, lambda: fetch(CONFIG_NAME))
    except Exception as error:
        page = f"{constants.ENDPOINT}/{model_id}"
        failure = _explain(model_id, error, cache, timeout, page, similar)
        if isinstance(failure, NoConfig):
            _name_the_base(model_id, lambda: _within(timeout, lambda: fetch(ADAPTER_CONFIG_NAME)))
        raise failure from error


def _name_the_base(model_id: str, fetch_adapter: Callable[[], Path]) -> None:
    """Raise the better message where a repository without config.json is a peft adapter's."""
    try:
        adapter = fetch_adapter()
    except Exception:  # no adapter, or the network went: the first message stands
        return
    raise_adapter(model_id, read_adapter(adapter))


def _within(seconds: float, work: Callable[[], Path]) -> Path:
    """What `work` returns or raises, or TimeoutError after `seconds`.

    The library's own timeouts are for each read of each request, and it retries: together they
    can last minutes. The thread is a daemon, so it holds up nobody's exit.
    """
    done: list[Path] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            done.append(work())
        except BaseException as error:  # raised again, in the caller's thread
            failed.append(error)

    thread = threading.Thread(target=run, name="vramplan-hub", daemon=True)
    thread.start()
    thread.join(seconds)
    if failed:
        raise failed[0]
    if not done:
        raise TimeoutError
    return done[0]


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps huggingface_hub's progress bar and its warnings about retries off the terminal."""
    import logging

    from huggingface_hub.utils.tqdm import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    bars = not are_progress_bars_disabled()
    logger.setLevel(logging.ERROR)
    if bars:
        disable_progress_bars()
    try:
        yield
    finally:
        logger.setLevel(level)
        if bars:
            enable_progress_bars()


def _explain(
    model_id: str, error: Exception, cache: Path, timeout: float, page: str, similar: str
) -> ModelNotFound:
    """The error of vramplan's that `error`, raised by huggingface_hub, amounts to."""
    from huggingface_hub import errors

    # Of what the library wraps (LocalEntryNotFoundError "from" a timeout), the reason counts.
    if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    names = {kind.__name__ for kind in type(error).__mro__}
    if isinstance(error, errors.GatedRepoError):
        return GatedModel(
            f"{model_id} is gated: its files are for those who accepted its licence. Accept it at "
            f"{page}, then `hf auth login` or set HF_TOKEN; {_OR_A_FILE}"
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return ModelNotFound(
            f"no model {model_id!r}: not bundled, not in the local cache, and the Hub knows none "
            f"that you may see{similar}. Check the spelling; for a private one, `hf auth login` "
            f"or set HF_TOKEN; {_OR_A_FILE}"
        )
    if isinstance(error, errors.LocalEntryNotFoundError):
        return Offline(f"{model_id} is not in the local cache ({cache}): {_first_line(error)}")
    if isinstance(error, (errors.EntryNotFoundError, errors.RevisionNotFoundError)):
        return NoConfig(
            f"{model_id} is on the Hub, but has no config.json: repositories of GGUF files and of "
            "authors' original formats don't. Give the id of the model that it was made from, "
            f"{_OR_A_FILE}"
        )
    if names & _TIMEOUTS:
        return TimedOut(
            f"the Hub did not answer within {timeout:g} s about {model_id}. Try again, with "
            f"HF_HUB_ETAG_TIMEOUT set to more seconds where the network is slow; {_OR_A_FILE}"
        )
    if names & _UNREACHABLE:
        return Offline(
            f"no model {model_id!r} here, and the Hub can't be reached ({_first_line(error)})"
            f"{similar}. Check the network, a proxy, and HF_HUB_OFFLINE; {_OR_A_FILE}"
        )
    if isinstance(error, errors.HfHubHTTPError):
        return _refused(model_id, error, page)
    if isinstance(error, PermissionError):
        return ModelNotFound(
            f"the local cache can't be written: {error}. Set HF_HOME to a folder that can; "
            f"{_OR_A_FILE}"
        )
    return ModelNotFound(
        f"{model_id} can't be fetched ({type(error).__name__}: {_first_line(error)}); {_OR_A_FILE}"
    )


def _refused(model_id: str, error: Exception, page: str) -> ModelNotFound:
    """For an answer of the Hub that huggingface_hub has no class of its own for."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        return GatedModel(
            f"the Hub refuses {model_id} (HTTP {status}): the token is missing, expired, or may "
            f"not read {page}. Give one with `hf auth login` or in HF_TOKEN; {_OR_A_FILE}"
        )
    if status == 429 or (status is not None and status >= 500):
        return Offline(
            f"the Hub can't answer about {model_id} now (HTTP {status}). Try again in some "
            f"minutes; {_OR_A_FILE}"
        )
    return ModelNotFound(
        f"the Hub refuses {model_id} (HTTP {status}: {_first_line(error)}); {_OR_A_FILE}"
    )


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__
