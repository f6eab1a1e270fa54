"""Who imports whom: no circle, and no arrow against the order of the rooms.

Every import counts, also one inside a function or for a type checker: all say that a file can't be understood
without another. What a package's ``__init__`` imports is counted for that file and for who asks the package
itself for a name, not for who imports one of its modules.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "spattn_tvm"

# From the ground up. A file belongs to the room with the longest name that its own starts with; rooms of one
# floor don't import each other.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("extras", "torch_private", "lasting", "file_lock", "file_reading", "bands", "target"),
    ("problem", "provenance", "placement"),
    ("cache_forms",),
    ("reference",),
    ("accuracy", "domains", "families.family", "families.space"),
    ("families.shares",),
    ("families.cpu", "families.mma", "families.hopper"),
    ("families",),
    ("families.kernel",),
    ("runtime",),
    ("build", "store"),
    ("choice", "bundle"),
    ("export", "dispatch"),
    ("launch",),
    ("ops",),
    ("cache",),
    ("offloaded",),
    ("nn",),
    ("verify", "tuning", "distributed", "integrations"),
    ("bench",),
    ("plotting", "doctor", "workflows"),
    ("__init__",),
    ("cli",),
    ("__main__",),
)


def modules_of(root: Path, package: str) -> dict[str, Path]:
    """Each module's file, by its name; a package's by the package's name."""
    found = {}
    for path in sorted((root / package).rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports_of(name: str, path: Path, modules: Mapping[str, Path]) -> set[str]:
    """The package's modules that a module's text imports."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names if alias.name in modules)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                target = f"{base}.{alias.name}"
                found.update({target} if target in modules else {base} & set(modules))
    return found - {name}


def circles(arrows: Mapping[str, Iterable[str]]) -> list[list[str]]:
    """One path along the arrows that ends where it starts, for each arrow that closes one."""
    found: list[list[str]] = []
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> None:
        if name in path:
            found.append([*path[path.index(name) :], name])
        elif name not in done:
            for target in sorted(arrows.get(name, ())):
                visit(target, [*path, name])
            done.add(name)

    for name in sorted(arrows):
        visit(name, [])
    return found


def floor_of(
    name: str, package: str = PACKAGE, floors: tuple[tuple[str, ...], ...] = FLOORS
) -> tuple[int, str]:
    """Number of a module's floor, and its room."""
    inside = name.removeprefix(package).removeprefix(".") or "__init__"
    rooms = {room: floor for floor, names in enumerate(floors) for room in names}
    able = [room for room in rooms if inside == room or inside.startswith(f"{room}.")]
    if not able:
        raise AssertionError(f"{name} is in no room of FLOORS: say where it belongs")
    room = max(able, key=len)
    return rooms[room], room


def against_the_order(
    arrows: Mapping[str, Iterable[str]], package: str = PACKAGE, floors: tuple[tuple[str, ...], ...] = FLOORS
) -> list[str]:
    """Each arrow to a floor above, or into another room of the same floor."""
    found = []
    for name, targets in arrows.items():
        floor, room = floor_of(name, package, floors)
        for target in sorted(targets):
            target_floor, target_room = floor_of(target, package, floors)
            if target_room != room and target_floor >= floor:
                found.append(f"{name} (floor {floor}) imports {target} (floor {target_floor})")
    return found


@pytest.fixture(scope="module")
def arrows() -> dict[str, set[str]]:
    modules = modules_of(ROOT, PACKAGE)
    return {name: imports_of(name, path, modules) for name, path in modules.items()}


def test_no_circle(arrows: dict[str, set[str]]) -> None:
    found = circles(arrows)
    assert not found, "\n".join(" -> ".join(circle) for circle in found)


def test_no_import_upwards(arrows: dict[str, set[str]]) -> None:
    found = against_the_order(arrows)
    assert not found, "\n".join(found)


def test_every_room_is_there(arrows: dict[str, set[str]]) -> None:
    rooms = {floor_of(name)[1] for name in arrows}
    assert {room for names in FLOORS for room in names} == rooms, "FLOORS names what is gone"


def test_only_the_registry_and_the_wing_name_a_family(arrows: dict[str, set[str]]) -> None:
    """No import of a wing from outside, and none of another wing from a wing."""
    wings = [f"{PACKAGE}.families.{wing}" for wing in ("cpu", "mma", "hopper")]
    for name, targets in arrows.items():
        for wing in wings:
            if name.startswith(wing) or name == f"{PACKAGE}.families":
                continue
            assert not [target for target in targets if target.startswith(wing)], name


def named_families(text: str, families: Iterable[str]) -> list[str]:
    """Lines that make a difference between families: a name of one (but ``"cpu"``, which is a device as
    well), or a comparison of a family with any text."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Constant) and node.value in set(families) - {"cpu"}:
            found.append(f"{node.lineno}: {node.value!r}")
        elif isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            names = {
                side.attr if isinstance(side, ast.Attribute) else getattr(side, "id", "") for side in sides
            }
            parts = [part for side in sides for part in getattr(side, "elts", [side])]
            texts = [part for part in parts if isinstance(part, ast.Constant) and isinstance(part.value, str)]
            if "family" in names and texts:
                found.append(f"{node.lineno}: {ast.unparse(node)}")
    return found


def test_no_code_outside_the_wings_knows_a_family() -> None:
    names = [path.name for path in (ROOT / PACKAGE / "families").iterdir() if path.is_dir()]
    assert {"cpu", "mma", "hopper"} <= set(names)
    for path in [*(ROOT / PACKAGE).rglob("*.py"), *(ROOT / "scripts").glob("*.py")]:
        if "families" not in path.parts:
            assert not named_families(path.read_text(encoding="utf-8"), names), path
    for text in (
        'x = {"mma": 1}',
        'if kernel.family == "cpu": pass',
        'y = family in ("a", "b") or "cpu" != family',
    ):
        assert named_families(text, names)
    assert not named_families('"""About mma."""\nkind = "cpu"\nif target.kind == "cpu": pass', names)


@pytest.mark.parametrize(
    ("texts", "circle", "upwards"),
    [
        ({"a": "", "b": "from . import a"}, [], []),
        ({"a": "def f():\n    from .b import x", "b": "import p.a"}, ["p.a -> p.b -> p.a"], ["p.a", "p.b"]),
        ({"a": "if TYPE_CHECKING:\n    from p.b import X", "b": ""}, [], ["p.a", "p.b"]),
        ({"a": "", "b": "", "c/__init__": "from .d import x", "c/d": "from ..b import y"}, [], []),
        (
            {"a": "", "b": "from .c import d", "c/__init__": "", "c/d": "from .. import b"},
            ["p.b -> p.c.d -> p.b"],
            ["p.b", "p.c.d"],
        ),
    ],
)
def test_these_tests_can_fail(
    texts: dict[str, str], circle: list[str], upwards: list[str], tmp_path: Path
) -> None:
    for name, text in {"__init__": "", **texts}.items():
        path = tmp_path / "p" / f"{name}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    modules = modules_of(tmp_path, "p")
    arrows = {name: imports_of(name, path, modules) for name, path in modules.items()}
    assert [" -> ".join(names) for names in circles(arrows)] == circle
    floors = (("a",), ("b",), ("c",), ("__init__",))
    found = against_the_order(arrows, "p", floors)
    assert len(found) == bool(upwards)
    assert all(name in found[0] for name in upwards)


def test_what_runs_imports_no_compiler() -> None:
    code = (
        f"import sys, {PACKAGE}.bundle, {PACKAGE}.dispatch, {PACKAGE}.launch, {PACKAGE}.ops.attention\n"
        "assert not {'tvm', 'xgboost'} & set(sys.modules), 'imported'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
