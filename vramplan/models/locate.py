"""From what a user calls a model to its Hugging Face config: `locate`.

The order: a path that exists, a bundled checkpoint, the local Hugging Face cache, the Hub.
The last step is the only one in vramplan that uses the network, and is in hub.py.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from vramplan.errors import ConfigError, ModelNotFound, Offline, UserError, nearest
from vramplan.models import catalogue
from vramplan.models.config_files import CONFIG_NAME, config_in, read_config

Source = Literal["catalogue", "folder", "file", "cache", "hub", "dict"]

# Of a Hub id, what huggingface_hub's `validate_repo_id` (1.x) lets through.
_HUB_ID = re.compile(r"(?:\b[\w.-]{1,96}\b/)?\b[\w.-]{1,96}\b", re.ASCII)
_HUB_URL = re.compile(r"(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/([^/?#]+/[^/?#]+).*")
_CACHE_FOLDER = re.compile(r"models--(.+)")
# Endings that no checkpoint's id has, and files do.
_FILE_ENDINGS = (".json", ".safetensors", ".bin", ".pt", ".pth")


@dataclass(frozen=True, kw_only=True, slots=True)
class Located:
    """A model's config, and where it was found."""

    id: str
    """The Hub id where it is known, else the name of the folder or file, else the model_type."""
    config: dict[str, Any]
    """The plain Hugging Face config, as it is in config.json: no defaults filled in."""
    source: Source
    path: str | None = None
    """The config.json that was read; None for a bundled checkpoint or a dict."""
    published_parameters: int | None = None
    """Of a bundled checkpoint, its parameters, tied ones once (`params_meta`)."""
    note: str | None = None
    """A sentence for the user where a name was read as another than typed."""


def locate(
    model: str | os.PathLike[str] | Mapping[str, Any],
    *,
    token: str | bool | None = None,
    offline: bool | None = None,
    timeout: float = 10.0,
) -> Located:
    """The config of `model`: a Hub id or its address, a folder, a JSON file, or a dict.

    An existing path wins over an id of the same name, as in transformers' `from_pretrained`. A
    name without its organization ("Llama-3.1-8B") means the bundled checkpoint of that name, if
    it is the only one. A `os.PathLike` is only ever a path.

    `token` is passed on to huggingface_hub, which by itself finds HF_TOKEN and the stored one.
    `offline=True` keeps off the network, None leaves that to HF_HUB_OFFLINE. `timeout` is the
    seconds that the Hub has to answer, all its requests together.

    Raises ModelNotFound or one of its kinds (GatedModel, NoConfig, Offline, TimedOut), ConfigError
    for a file that can't be read as a config, and UserError for a `model` of another type.
    """
    if isinstance(model, Mapping):
        config = dict(model)
        name = config.get("_name_or_path") or config.get("model_type") or "config"
        return Located(id=str(name), config=config, source="dict")
    if not isinstance(model, (str, os.PathLike)):
        hint = "; of a transformers config, pass config.to_dict()"
        raise UserError(
            "model must be a Hub id, a path, or the dict of a config, not "
            f"{type(model).__name__}{hint if hasattr(model, 'to_dict') else ''}"
        )
    text = model.strip() if isinstance(model, str) else os.fsdecode(model)
    if not text:
        raise ModelNotFound("no model named: give a Hub id (meta-llama/Llama-3.1-8B) or a path")
    path = Path(os.path.expanduser(text))
    if _exists(path):
        return _from_path(path, text)
    if isinstance(model, os.PathLike) or is_a_path(text):
        raise ModelNotFound(f"no such file or folder: {path}{_likely_path(path)}")
    return _from_name(_without_address(text), token, offline, timeout)


def cache_folder(environ: Mapping[str, str] = os.environ) -> Path:
    """Where downloaded models lie: as `huggingface_hub.constants.HF_HUB_CACHE` (1.x) finds it.

    Worked out here because importing huggingface_hub costs more than a whole estimate.
    """
    home = environ.get("XDG_CACHE_HOME", os.path.join("~", ".cache"))
    home = environ.get("HF_HOME", os.path.join(home, "huggingface"))
    home = environ.get("HUGGINGFACE_HUB_CACHE", os.path.join(home, "hub"))
    home = environ.get("HF_HUB_CACHE", home)
    return Path(os.path.expandvars(os.path.expanduser(home)))


def _exists(path: Path) -> bool:
    try:
        path.stat()
    except PermissionError as error:
        raise ConfigError(f"{path} can't be read: {error.strerror}") from None
    except (OSError, ValueError):  # not there; too long a name; a NUL in it
        return False
    return True


def is_a_path(text: str) -> bool:
    """Whether `text` can only have meant a file or folder, though there is none."""
    return (
        text.startswith((".", "/", "~"))
        or "\\" in text
        or text.endswith(("/", *_FILE_ENDINGS))
        or (text.count("/") > 1 and not _HUB_URL.fullmatch(text))
    )


def _likely_path(path: Path) -> str:
    """The entry of the same folder that looks most like the one that is missing."""
    try:
        close = nearest(path.name, os.listdir(path.parent))
    except (OSError, ValueError):
        return f"; its folder {path.parent} is not there either"
    return f"; nearest: {path.parent / close}" if close else ""


def _from_path(path: Path, text: str) -> Located:
    if not path.is_dir():
        return _read_at(path, "" if path.name == CONFIG_NAME else path.stem, "file")
    cached = None if os.path.isfile(path / CONFIG_NAME) else _cached_config(path)
    if cached is not None:
        return _read_at(cached, "", "folder")
    try:
        return _read_at(config_in(path), "", "folder")
    except ModelNotFound as error:
        known = catalogue.load(text) or next(map(catalogue.load, catalogue.named(text)), None)
        if known is None:
            raise
        # transformers would take the folder too, so a launch would fail where an estimate passed.
        raise type(error)(
            f"{error}. (That folder stands before the model {known.id}, which is bundled: "
            "to mean the model, run this from another folder.)"
        ) from None


def _read_at(config: Path, name: str, source: Source) -> Located:
    return Located(
        id=_cached_id(config) or name or config.parent.resolve().name or "config",
        config=read_config(config),
        source=source,
        path=str(config),
    )


def _without_address(text: str) -> str:
    """The id in the address of a model's page, or `text` itself."""
    match = _HUB_URL.fullmatch(text)
    return match[1] if match else text


def _from_name(
    name: str, token: str | bool | None, offline: bool | None, timeout: float
) -> Located:
    if not _HUB_ID.fullmatch(name) or ".." in name or "--" in name:
        raise ModelNotFound(
            f"no model {name!r}: there is no such path, and a Hub id looks like "
            f"organization/name, in letters, digits, '-', '_' and '.'{_similar(name)}"
        )
    bundled = _bundled(name)
    if bundled is not None:
        return bundled
    cached = _cached_config(cache_folder() / f"models--{name.replace('/', '--')}")
    if cached is not None:
        hint = "Delete it, and it is downloaded anew."
        config = read_config(cached, hint=hint)
        return Located(id=name, config=config, source="cache", path=str(cached))
    return _from_hub(name, token, offline, timeout)


def _bundled(name: str) -> Located | None:
    """The bundled checkpoint that `name` means; raises ModelNotFound if it may mean several."""
    note = None
    if "/" not in name:
        ids = catalogue.named(name)
        if len(ids) > 1:
            raise ModelNotFound(f"{name!r} may mean any of: {', '.join(ids)}. Give one of these")
        if not ids:
            return None
        note = f"{name} was read as {ids[0]}"
        name = ids[0]
    found = catalogue.load(name)
    if found is None:
        return None
    return Located(
        id=found.id,
        config=found.config,
        source="catalogue",
        published_parameters=found.params_meta,
        note=note,
    )


def _cached_config(repository: Path) -> Path | None:
    """The config.json in a repository's folder of the local cache, at its main revision.

    The layout is huggingface_hub's: refs/main names a commit, snapshots/<commit>/ holds the files.
    Where only a pinned commit was ever downloaded there is no refs/main: then the only snapshot.
    """
    try:
        commit = (repository / "refs" / "main").read_text(encoding="ascii").strip()
        configs = [repository / "snapshots" / commit / CONFIG_NAME]
    except (OSError, ValueError):
        configs = list(repository.glob(f"snapshots/*/{CONFIG_NAME}"))
    if len(configs) == 1 and os.path.isfile(configs[0]):
        return configs[0]
    return None


def _cached_id(config: Path) -> str | None:
    """The Hub id of a config.json in the local cache's layout: models--org--name/snapshots/…"""
    parts = config.absolute().parts
    if len(parts) < 4 or parts[-3] != "snapshots":
        return None
    match = _CACHE_FOLDER.fullmatch(parts[-4])
    return match[1].replace("--", "/", 1) if match else None


def _from_hub(name: str, token: str | bool | None, offline: bool | None, timeout: float) -> Located:
    from vramplan.models import hub  # most models are found before the Hub is asked

    looked = f"it is not bundled, nor in the local cache ({cache_folder()})"
    if offline or (offline is None and hub.is_offline()):
        why = "offline=True" if offline else "HF_HUB_OFFLINE is set"
        raise Offline(
            f"no model {name!r} here: {looked}, and the Hub was not asked, as {why}"
            f"{_similar(name)}. Where there is network, `hf download {name} config.json` "
            "fetches it; or pass a config.json"
        )
    path = hub.download_config(
        name, cache=cache_folder(), token=token, timeout=timeout, similar=_similar(name)
    )
    return Located(id=name, config=read_config(path), source="hub", path=str(path))


def _similar(name: str) -> str:
    """A clause that names the bundled checkpoints most like `name`, or nothing."""
    found = catalogue.similar(name)
    return f"; nearest bundled: {', '.join(found)}" if found else ""
