"""What is installed: its dependencies and their bounds, its files, its command."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from itertools import chain
from pathlib import Path

import pytest

import vramplan

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
REQUIREMENT = re.compile(r"(?P<name>[A-Za-z0-9_.-]+)(?P<bound>[<>=!~][^;]*)?(;.*)?")


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text))


def bounds(requirements: list[str]) -> dict[str, str]:
    found = {}
    for requirement in requirements:
        match = REQUIREMENT.fullmatch(requirement.replace(" ", ""))
        assert match is not None, requirement
        found[normal(match["name"])] = match["bound"] or ""
    return found


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    stated = [line.partition(";")[0].strip() for line in lines if line and line[0] != "#"]
    return {normal(name): pin for name, _, pin in (line.partition("==") for line in stated)}


def test_the_light_command_needs_light_packages_only() -> None:
    assert set(bounds(PROJECT["dependencies"])) == {
        *("click", "rich", "nvidia-ml-py", "huggingface-hub", "tomli")
    }


def test_the_extras() -> None:
    extras = {name: bounds(needs) for name, needs in PROJECT["optional-dependencies"].items()}
    assert set(extras) == {"launch", "flash", "plot", "dev"}
    assert set(extras["launch"]) == {
        *("torch", "transformers", "accelerate", "peft", "bitsandbytes", "deepspeed", "datasets")
    }
    assert set(extras["flash"]) == {"flash-attn"}
    assert set(extras["plot"]) == {"matplotlib"}


def test_every_requirement_states_a_lower_bound_that_the_tested_version_meets() -> None:
    stated = [*PROJECT["dependencies"], *chain(*PROJECT["optional-dependencies"].values())]
    tested = pins()
    for name, bound in bounds(stated).items():
        assert bound.startswith(">="), f"{name}{bound}"
        if name in tested:
            assert version(tested[name]) >= version(bound), f"{name}{bound}"


def test_what_the_tests_install_is_pinned() -> None:
    needed = bounds(PROJECT["dependencies"] + PROJECT["optional-dependencies"]["dev"])
    # Python's own tomllib, wherever the pins are for.
    assert {*needed} - {*pins()} <= {"tomli"}


def test_python_bound_is_the_same_everywhere() -> None:
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]
    assert PROJECT["requires-python"] == ">=3.10"
    assert tool["ruff"]["target-version"] == "py310"
    assert tool["mypy"]["python_version"] == "3.10"


def test_the_wheel_holds_both_packages_their_data_and_nothing_else(tmp_path: Path) -> None:
    wheel = pytest.importorskip("hatchling.builders.wheel")
    builder = wheel.WheelBuilder(str(ROOT))
    (built,) = builder.build(directory=str(tmp_path), versions=["standard"])
    with zipfile.ZipFile(built) as archive:
        names = set(archive.namelist())
        (entry_points,) = (name for name in names if name.endswith("entry_points.txt"))
        assert "vramplan = vramplan.cli.main:run" in archive.read(entry_points).decode()
    assert Path(built).name.startswith(f"vramplan-{vramplan.__version__}-py3-none-any")
    assert {name.partition("/")[0] for name in names if ".dist-info/" not in name} == {
        "vramplan",
        "vramplan_launcher",
    }
    here = {
        path.relative_to(folder).as_posix()
        for folder in (ROOT, ROOT / "launcher")
        for path in folder.glob("vramplan*/**/*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {name for name in names if ".dist-info/" not in name} == here
    assert "vramplan/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_python_dash_m() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "vramplan", "--version"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        cwd=ROOT,
    )
    assert done.stdout == f"vramplan {vramplan.__version__}\n"
