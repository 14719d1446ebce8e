"""What an import of the package brings in, and which modules may import which."""

from __future__ import annotations

import ast
import importlib
import json
import sys

import pytest
from processes import ROOT, run

import deeplock_kernels

PACKAGE = ROOT / "deeplock_kernels"
FRAMEWORKS = {"torch", "tensorflow", "jax", "jaxlib", "onnx", "onnxruntime", "keras", "flax"}
COMPILERS = {"numba", "llvmlite"}

# A fresh import


def imported_by(program):
    output = run(f"{program}\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))")
    return set(json.loads(output))


def test_the_import_brings_in_nothing_heavy():
    found = imported_by("import deeplock_kernels") - imported_by("import importlib, typing")
    assert {name for name in found if name.startswith("deeplock_kernels")} == {"deeplock_kernels"}
    roots = {name.partition(".")[0] for name in found}
    assert roots <= {"deeplock_kernels", *sys.stdlib_module_names}
    assert "threading" not in roots


def test_the_public_names_bring_in_neither_numba_nor_a_framework():
    found = imported_by("import deeplock_kernels as d\n[getattr(d, name) for name in d.__all__]")
    assert {name.partition(".")[0] for name in found} & (COMPILERS | FRAMEWORKS) == set()


def test_a_lock_imports_no_framework():
    program = """
import deeplock_kernels as deeplock
deeplock.lock(bytes(10), deeplock.CounterSchedule(bytes(16), bytes(16)))
"""
    assert {name.partition(".")[0] for name in imported_by(program)} & FRAMEWORKS == set()


def test_the_import_starts_no_thread_and_writes_nothing(tmp_path):
    program = """
import os, sys
import deeplock_kernels
[getattr(deeplock_kernels, name) for name in deeplock_kernels.__all__]
import threading
print(threading.active_count(), os.listdir(sys.argv[1]))
"""
    variables = {"HOME": tmp_path, "XDG_CACHE_HOME": tmp_path, "DEEPLOCK_CACHE_DIR": tmp_path / "cache"}
    assert run(program, tmp_path, PYTHONDONTWRITEBYTECODE=1, **variables) == "1 []\n"


@pytest.mark.parametrize("name", deeplock_kernels.__all__)
def test_every_public_name_is_there(name):
    value = getattr(deeplock_kernels, name)
    assert value is getattr(deeplock_kernels, name)
    assert name in dir(deeplock_kernels)
    module = importlib.import_module(deeplock_kernels._HOME_BY_NAME.get(name, "deeplock_kernels"))
    assert value is getattr(module, name)


def test_the_list_of_public_names():
    assert deeplock_kernels.__all__ == ["__version__", *sorted(deeplock_kernels.__all__[1:])]
    assert len(set(deeplock_kernels.__all__)) == len(deeplock_kernels.__all__)
    expected = {"lock", "unlock", "substitute", "MasterKey", "CounterSchedule", "ExpansionSchedule", "tiers"}
    assert expected <= set(deeplock_kernels.__all__)
    namespace = {}
    exec("from deeplock_kernels import *", namespace)
    assert set(deeplock_kernels.__all__) <= set(namespace)


def test_each_name_can_be_imported_first():
    program = """
import sys
from multiprocessing import get_context
import deeplock_kernels
def first(name):
    assert name == "__version__" or name not in vars(deeplock_kernels)
    exec(f"from deeplock_kernels import {name}")
for name in deeplock_kernels.__all__:
    process = get_context("fork").Process(target=first, args=(name,))
    process.start()
    process.join()
    assert process.exitcode == 0, name
"""
    assert run(program) == ""


def test_dir_lists_names_that_nobody_asked_for_yet():
    program = "import deeplock_kernels; print(set(deeplock_kernels.__all__) <= set(dir(deeplock_kernels)))"
    assert run(program) == "True\n"


@pytest.mark.parametrize("name", ["unknown", "Lock", "errors_", "__path", ""])
def test_an_unknown_name(name):
    with pytest.raises(AttributeError, match=r"^module 'deeplock_kernels' has no attribute "):
        getattr(deeplock_kernels, name)
    assert not hasattr(deeplock_kernels, name)


def test_an_unknown_name_in_an_import():
    with pytest.raises(ImportError, match="unknown"):
        from deeplock_kernels import unknown  # noqa: F401


def test_a_type_checker_sees_the_same_names():
    """What a type checker reads under TYPE_CHECKING is what `__getattr__` gives."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    assert ast.unparse(block.test) == "TYPE_CHECKING"
    seen = {}
    for statement in block.body:
        assert isinstance(statement, ast.ImportFrom)
        seen |= {alias.name: statement.module for alias in statement.names}
    assert set(seen) == set(deeplock_kernels.__all__) - {"__version__"}
    for name, module in seen.items():
        assert getattr(importlib.import_module(module), name) is getattr(deeplock_kernels, name)


# Floors: an import only ever points down

FLOORS = [
    {"cli", "demo", "measure", "__main__"},
    {"frameworks", "checkpoints", "jit"},
    {"rekeying", "tensors", "named_lock", "pieces", "header", "native"},
    {"locking"},
    {"schedules"},
    {"transform"},
    {"runtime"},
    {"kernels"},
    {"simd"},
    {"sboxes", "properties", "keys", "passphrases", "key_sources", "key_wrapping", "files", "buffers", "errors", "reference"},
]
FLOOR = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}


def imports_of(path):
    """Yield what a module imports, with the names it takes, and whether on its own import."""
    tree = ast.parse(path.read_text())
    at_import = set()

    def walk(node):
        at_import.add(node)
        for child in ast.iter_child_nodes(node):
            later = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            checking = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
            if not later and not checking:
                walk(child)

    walk(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, [], node in at_import
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: imports name the package in full"
            yield node.module, [alias.name for alias in node.names], node in at_import
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            text = ast.unparse(node.args[0]).removeprefix("f").strip("'\"")
            yield text, [], node in at_import


def rooms_of(path):
    """Yield the rooms of the package that a module imports from ("" for the package itself), with the whole names."""
    for module, names, at_import in imports_of(path):
        if module == "deeplock_kernels":
            for name in names or [""]:
                name = "" if name == "__version__" else name  # the one thing that the package itself holds
                assert name in MODULES or name == "", f"{path.name}: {name} is to be imported from where it lives"
                yield name, f"deeplock_kernels.{name}".rstrip("."), at_import
        elif module.startswith("deeplock_kernels."):
            yield module.split(".")[1].split("{")[0], module, at_import


INSIDE = [name for name in MODULES if name != "__init__"]


@pytest.mark.parametrize("name", INSIDE)
def test_imports_point_down(name):
    room = name.partition(".")[0]
    assert room in FLOOR, f"{room} is new: give it a floor"
    for other, module, _ in rooms_of(MODULES[name]):
        if other == "":
            assert FLOOR[room] == 0, f"{name} imports the whole package"
            continue
        assert other in FLOOR, f"{other} is new: give it a floor"
        assert FLOOR[room] <= FLOOR[other], f"{name} imports {module}, which lies above it"


def test_rooms_of_a_floor_do_not_import_each_other_in_circles():
    ways = {room: set() for room in FLOOR}
    for name in INSIDE:
        room = name.partition(".")[0]
        ways[room] |= {other for other, _, _ in rooms_of(MODULES[name])} - {room, ""}
    reached = {room: set(others) for room, others in ways.items()}
    for _ in FLOOR:
        for others in reached.values():
            others |= set().union(*(reached[other] for other in others))
    assert [room for room, others in reached.items() if room in others] == []


def test_only_the_self_test_reads_the_oracle_and_the_oracle_reads_nothing():
    readers = [name for name in INSIDE if any(room == "reference" for room, _, _ in rooms_of(MODULES[name]))]
    assert set(readers) <= {"runtime.selftest"}
    assert list(rooms_of(MODULES["reference"])) == []


@pytest.mark.parametrize("name", list(MODULES))
def test_compilers_are_imported_by_kernels_or_when_they_are_needed(name):
    found = [(module.partition(".")[0], at_import) for module, _, at_import in imports_of(MODULES[name])]
    if name in ("jit", "frameworks.xla"):
        return  # each is imported by who compiles something of their own
    if name.partition(".")[0] not in ("kernels", "simd"):
        assert [root for root, at_import in found if root in COMPILERS and at_import] == []
    if name != "kernels.signatures":
        return
    assert COMPILERS.isdisjoint(root for root, _ in found)


@pytest.mark.parametrize("name", list(MODULES))
def test_frameworks_are_imported_only_when_they_are_needed(name):
    if name.partition(".")[0] == "frameworks" and name != "frameworks":
        return  # each is imported by who uses that framework
    found = [module.partition(".")[0] for module, _, at_import in imports_of(MODULES[name]) if at_import]
    assert FRAMEWORKS.isdisjoint(found)


def test_every_file_is_looked_at():
    assert {"__init__", "locking", "runtime.pool", "runtime", "kernels.portable", "simd.vectors"} <= set(MODULES)
    found = {other for name in INSIDE for other, _, _ in rooms_of(MODULES[name])}
    assert {"errors", "runtime", "transform", "kernels", "sboxes"} <= found


@pytest.mark.parametrize(
    ("module", "message"),
    [
        ("None", "JAX is not installed; pip install 'deeplock-kernels[jax]'"),
        ("types.SimpleNamespace(__version__='0.4.38', __version_info__=(0, 4, 38))", "got JAX 0.4.38, accepted is 0.5 or"),
    ],
)
def test_jax_that_is_absent_or_too_old(module, message):
    program = f"""
import sys, types
sys.modules["jax"] = {module}
try:
    import deeplock_kernels.frameworks.jax
except ImportError as error:
    print(error)
"""
    assert run(program).startswith(f"deeplock_kernels.frameworks.jax: {message}")
