"""Traces kept on disk, so that asking again is instant and needs no torch.

A trace follows from the model's config (and its own code, where it has some), the recipe, the
card's compute capability, the versions of the libraries and the tracer's own code: these make its
name. Where the libraries are not installed, the newest trace of that config and recipe is taken.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from vramplan.recipe.recipe import Recipe

LIBRARIES = ("torch", "transformers", "accelerate", "peft", "bitsandbytes")


class Key(NamedTuple):
    """Names of a trace's file: of what was asked, and of the versions it was made with."""

    subject: str
    libraries: str
    installed: bool


def folder(environ: Mapping[str, str] = os.environ) -> Path:
    """Where traces lie: the system's place for caches, `XDG_CACHE_HOME` before it."""
    if environ.get("XDG_CACHE_HOME"):
        return Path(environ["XDG_CACHE_HOME"]) / "vramplan" / "traces"
    if sys.platform == "win32" and environ.get("LOCALAPPDATA"):
        return Path(environ["LOCALAPPDATA"]) / "vramplan" / "traces"
    return Path.home() / ".cache" / "vramplan" / "traces"


def versions() -> dict[str, str]:
    """Of the libraries that a trace runs, those that are installed; imports none of them."""
    out = {}
    for name in LIBRARIES:
        try:
            out[name] = version(name)
        except PackageNotFoundError:
            continue
    return out


def key(config: Mapping[str, Any], recipe: Recipe, capability: str, code: str | None) -> Key:
    """The name under which a trace is kept."""
    asked = {
        "config": {k: v for k, v in config.items() if k != "_name_or_path"},
        "recipe": recipe.to_dict(),
        "compute_capability": capability,
        "code": _digest_of(code),
    }
    here = versions()
    libraries = _digest({**here, "tracer": _digest_of(str(Path(__file__).parent))})
    return Key(_digest(asked), libraries, {"torch", "transformers"} <= {*here})


def read(key: Key) -> dict[str, Any] | None:
    """The trace of that name; a file that can't be read counts as none."""
    wanted = [folder() / f"{key.subject}-{key.libraries}.json"]
    if not key.installed:
        wanted = sorted(folder().glob(f"{key.subject}-*.json"), key=_age)
    for path in wanted:
        try:
            held: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        return held
    return None


def write(key: Key, held: Mapping[str, Any]) -> None:
    """Keeps a trace; where there is no place to write, it is not kept."""
    path = folder() / f"{key.subject}-{key.libraries}.json"
    part = path.with_suffix(f".{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(held), encoding="utf-8")
        part.replace(path)
    except OSError:
        part.unlink(missing_ok=True)


def _age(path: Path) -> float:
    """Newest first."""
    try:
        return -path.stat().st_mtime
    except OSError:
        return 0.0


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def _digest_of(code: str | None) -> str | None:
    """Of the Python files of a folder."""
    if code is None:
        return None
    hashed = hashlib.sha256()
    for path in sorted(Path(code).glob("*.py")):
        hashed.update(path.name.encode() + b"\0" + path.read_bytes())
    return hashed.hexdigest()[:24]
