"""What importing vramplan costs, which way its rooms import, and which of its names are public."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import vramplan

ROOT = Path(__file__).parents[1]
CORE = ROOT / "vramplan"

HEAVY = {"torch", "transformers", "accelerate", "peft", "bitsandbytes", "numpy", "huggingface_hub"}
NO_GPU = {"pynvml"}
# Parts of the standard library that a command that opens no connection has no use for.
SLOW_STANDARD = {"asyncio", "ssl", "http", "urllib.request", "email", "multiprocessing", "sqlite3"}

# A room may import those before it, and itself; hardware stands beside models and recipe.
MAY_IMPORT = {
    "errors": set(),
    "units": {"errors"},
    "models": {"errors", "units"},
    "hardware": {"errors", "units"},
    "recipe": {"errors", "units", "models"},
    "memory": {"errors", "units", "models", "hardware", "recipe"},
    "timing": {"errors", "units", "models", "hardware", "recipe", "memory"},
    "planner": {"errors", "units", "models", "hardware", "recipe", "memory", "timing"},
    "reports": {"errors", "units", "models", "hardware", "recipe", "memory", "timing", "planner"},
    "cli": {
        *("errors", "units", "models", "hardware", "recipe"),
        *("memory", "timing", "planner", "reports"),
    },
}
# Third-party packages that may be imported at the top of a module, by room.
EAGER = {"cli": {"click"}}
LAZY = {
    *("click", "matplotlib", "rich", "pynvml", "huggingface_hub", "tomli", "yaml"),
    "vramplan_launcher",
}


def imported_by(code: str, *arguments: str) -> set[str]:
    """The modules that a fresh interpreter has loaded after `code`, and had not before it."""
    report = "import sys; print('LOADED', *sorted(set(sys.modules) - before))"
    program = f"import sys, atexit; before = set(sys.modules)\natexit.register(exec, {report!r}, "
    done = subprocess.run(
        [sys.executable, "-c", f"{program}globals())\n{code}", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'launcher'}"},
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("LOADED ")]
    assert lines, done.stderr
    return set(lines[-1].split()[1:])


def run_command(*arguments: str) -> set[str]:
    return imported_by(
        "from vramplan.cli.main import main\nsys.exit(main(sys.argv[1:]))", *arguments
    )


def packages(modules: set[str]) -> set[str]:
    """The top-level packages among `modules` that are not Python's own."""
    return {name.partition(".")[0] for name in modules} - set(sys.stdlib_module_names)


def test_import_vramplan_loads_vramplan_alone() -> None:
    loaded = imported_by("import vramplan")
    assert loaded & {name for name in loaded if name.startswith("vramplan")} == {"vramplan"}
    assert packages(loaded) == {"vramplan"}
    assert loaded & SLOW_STANDARD == set()


def test_public_names_load_nothing_else() -> None:
    code = "import vramplan\nfor name in vramplan.__all__: getattr(vramplan, name)"
    assert packages(imported_by(code)) <= {"vramplan"}


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_help_loads_click_and_no_command(option: str) -> None:
    loaded = run_command(option)
    assert packages(loaded) <= {"vramplan", "click", "colorama"}  # colorama: click on Windows
    assert {name for name in loaded if name.startswith("vramplan.")} == {
        "vramplan.cli",
        "vramplan.cli.main",
        "vramplan.errors",
    }


@pytest.mark.parametrize("form", [[], ["--json"]], ids=["text", "json"])
def test_estimate_loads_nothing_heavy(form: list[str]) -> None:
    loaded = run_command("estimate", "meta-llama/Llama-3.1-8B", "--gpu", "24GB", *form)
    assert "vramplan.memory.estimate" in loaded
    allowed = {"vramplan", "click", "colorama", "rich", "pygments", "markdown_it", "mdurl"}
    if sys.version_info < (3, 11):
        allowed.add("tomli")
    assert packages(loaded) <= allowed
    assert loaded & (HEAVY | NO_GPU | SLOW_STANDARD) == set()


def test_the_collector_of_imports_sees_imports() -> None:
    assert packages(imported_by("import rich.console")) >= {"rich"}


def rooms() -> Iterator[tuple[str, Path, ast.Module]]:
    for path in sorted(CORE.rglob("*.py")):
        room = path.relative_to(CORE).parts[0].removesuffix(".py")
        if room not in ("__init__", "__main__"):
            yield room, path, ast.parse(path.read_text(encoding="utf-8"), str(path))


def imports(tree: ast.AST, *, deferred: bool = False) -> Iterator[tuple[str, bool]]:
    """(module, whether it is imported only when a function runs or a type is checked)."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, deferred) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in line {node.lineno}"
            assert node.module is not None
            yield node.module, deferred
            # `from vramplan import recipe` imports a room as well.
            if node.module == "vramplan":
                yield from ((f"vramplan.{alias.name}", deferred) for alias in node.names)
        else:
            inner = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            typing_only = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
            yield from imports(node, deferred=deferred or inner or typing_only)


def test_rooms_import_one_way() -> None:
    wrong = []
    for room, path, tree in rooms():
        assert room in MAY_IMPORT, f"{path}: give the new room its place in MAY_IMPORT"
        for module, _ in imports(tree):
            parts = module.split(".")
            if parts[0] != "vramplan" or len(parts) == 1 or parts[1] == "__version__":
                continue
            if parts[1] != room and parts[1] not in MAY_IMPORT[room]:
                wrong.append(f"{path.relative_to(ROOT)} imports {module}")
    assert wrong == []


def test_other_packages_are_imported_where_they_are_used() -> None:
    wrong = []
    for room, path, tree in rooms():
        for module, deferred in imports(tree):
            package = module.partition(".")[0]
            if package in sys.stdlib_module_names or package in ("vramplan", "tomllib"):
                continue
            allowed = package in EAGER.get(room, set()) or (deferred and package in LAZY)
            if not allowed:
                wrong.append(f"{path.relative_to(ROOT)} imports {module}")
    assert wrong == []


def test_the_launcher_is_reached_from_commands_only() -> None:
    reaching = {
        room
        for room, _, tree in rooms()
        for module, _ in imports(tree)
        if module.partition(".")[0] == "vramplan_launcher"
    }
    assert reaching <= {"cli"}


def test_all_is_what_is_public() -> None:
    public = {name for name in vars(vramplan) if not name.startswith("_")}
    # What importing sub-modules leaves behind, and what the module says of itself.
    modules = {path.stem for path in CORE.iterdir() if path.is_dir() or path.suffix == ".py"}
    extra = public - set(vramplan.__all__) - modules - {"annotations", "TYPE_CHECKING"}
    assert extra == set()
    assert vramplan.__all__ == sorted(vramplan.__all__)
    assert set(vramplan.__all__) == {*vramplan._HOMES, "__version__"}


@pytest.mark.parametrize("name", vramplan.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(vramplan, name) is not None
    assert name in dir(vramplan)


def test_public_errors_are_all_errors() -> None:
    from vramplan import errors

    defined = {
        name
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, errors.VramplanError)
    }
    assert defined <= set(vramplan.__all__)


def test_the_type_checker_sees_the_same_names() -> None:
    tree = ast.parse((CORE / "__init__.py").read_text(encoding="utf-8"))
    seen = {
        alias.name: node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("vramplan")
        for alias in node.names
    }
    assert seen == vramplan._HOMES


def test_an_unknown_name_is_no_attribute() -> None:
    with pytest.raises(AttributeError, match="no attribute 'estimat'"):
        _ = vramplan.estimat  # type: ignore[attr-defined]
