"""The rooms of DESIGN: who may import whom, what `bitgen --help` loads, and who may print."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import bitgen_cli

PACKAGE = Path(bitgen_cli.__file__).parent

BASE = {"errors", "report", "files", "config", "place"}
MAY_IMPORT = {
    "__main__": {"app", "errors"},
    "app": {"commands", "console", "examples", "files", "errors", "place"},
    "commands": {"commands", "presets", "console", "runs", "errors", "place"},
    "console": {"console", "report", "place"},
    "examples": set(),
    "surface": {"app"},
    "presets": {"config", "config_keys", "files", "errors"},
    "config_keys": {"config", "errors"},
    "config": set(),
    "report": set(),
    "files": {"errors"},
    "errors": set(),
    "place": set(),
    "runs": {"runs", "engine", "demo", "presets", "config_keys", *BASE},
    "engine": {"engine", "demo", *BASE},
    "demo": {"demo"},
}
"""Room to the rooms it may import, anywhere in a module; the package itself holds only the version."""

ENGINE_ORDER = {
    "scales": set(),
    "bits": {"scales"},
    "pyramid": {"bits", "scales"},
    "convolution": set(),
    "group_norm": set(),
    "autoencoder": {"convolution", "group_norm"},
    "bands": {"autoencoder", "convolution", "group_norm"},
    "active_bits": set(),
    "tokenizer": {"autoencoder", "bands", "active_bits", "pyramid", "scales"},
    "layers": {"scales"},
    "transformer": {"layers", "scales"},
    "pruning": {"bits", "scales"},
    "editing": {"pyramid", "scales"},
    "refine": {"transformer", "layers", "active_bits", "pyramid", "bits", "scales"},
    "sampling": {
        "transformer", "tokenizer", "active_bits", "editing", "pruning", "refine", "pyramid", "bits", "scales",
    },
}
"""The walk of a picture through the engine: each module to the engine modules it may import."""

EXTRAS = ("matplotlib", "tensorboard", "torch.utils.tensorboard", "torchao", "wandb")
"""What is installed on demand, and must be missed by nobody who does not ask for it."""

HEAVY = ("torch", "transformers", "numpy", "PIL", "pydantic", "safetensors", "tokenizers")


def modules() -> dict[str, Path]:
    """Dotted names below the package, and their files."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = path
    return found


def statements(tree: ast.AST, *, bodies: bool) -> Iterator[ast.AST]:
    """All statements that run, without those for type checkers; those inside functions if `bodies`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not bodies:
            continue
        yield node
        yield from statements(node, bodies=bodies)


def imports(path: Path, *, bodies: bool = True) -> set[str]:
    """The modules of this package that a file imports, as dotted names below it."""
    known = modules()
    found = set()
    for node in statements(ast.parse(path.read_text(encoding="utf-8")), bodies=bodies):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            if name.split(".")[0] == "bitgen_cli":
                inside = name.removeprefix("bitgen_cli").removeprefix(".")
                while inside and inside not in known:
                    inside = inside.rpartition(".")[0]
                found.add(inside)
    return found - {""}


def room(module: str) -> str:
    return module.split(".")[0]


def test_every_module_has_a_room_and_every_room_modules() -> None:
    assert {room(name) for name in modules() if name} == set(MAY_IMPORT)


@pytest.mark.parametrize("name", sorted(name for name in modules() if name))
def test_rooms_import_only_what_they_may(name: str) -> None:
    foreign = {other for other in imports(modules()[name]) if room(other) not in MAY_IMPORT[room(name)]}
    assert not foreign - ({name} if room(name) == name else set())


def test_the_engine_takes_pictures_of_the_demo_world_in_one_place() -> None:
    users = {
        name for name, path in modules().items() if room(name) == "engine" and "demo.world" in imports(path)
    }
    assert users == {"engine.sources"}


@pytest.mark.parametrize("name", sorted(ENGINE_ORDER))
def test_the_walk_through_the_engine_has_one_direction(name: str) -> None:
    inside = {
        other.removeprefix("engine.") for other in imports(modules()[f"engine.{name}"]) if "engine." in other
    }
    assert inside <= ENGINE_ORDER[name]


def test_no_module_needs_itself() -> None:
    graph = {name: imports(path) - {name} for name, path in modules().items()}
    done: set[str] = set()

    def visit(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, " -> ".join((*way, name))
        if name not in done:
            for other in graph[name]:
                visit(other, (*way, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_commands_import_what_they_run_inside_their_bodies() -> None:
    surface = [path for name, path in modules().items() if room(name) in ("app", "commands")]
    at_once = {room(other) for path in surface for other in imports(path, bodies=False)}
    assert at_once == {"commands", "errors", "examples", "place"}


@pytest.mark.parametrize(
    "name", sorted(name for name in modules() if room(name) in ("engine", "runs", "demo"))
)
def test_nothing_below_the_command_surface_prints(name: str) -> None:
    tree = ast.parse(modules()[name].read_text(encoding="utf-8"))
    calls = [ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)]
    assert "print" not in calls


def test_extras_are_imported_only_where_they_are_asked_for() -> None:
    for name, path in modules().items():
        found = set()
        for node in statements(ast.parse(path.read_text(encoding="utf-8")), bodies=False):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                found.add(str(node.module))
        assert not [module for module in found if module.startswith(EXTRAS)], name


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["sample", "--help"], ["train", "--help"]])
def test_help_loads_nothing_heavy(arguments: list[str]) -> None:
    program = (
        "import sys; from bitgen_cli.__main__ import main; code = main(sys.argv[1:]); "
        f"print(code, *(name for name in {HEAVY} if name in sys.modules), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True
    )
    assert done.stdout
    assert done.stderr.split() == ["0"]
