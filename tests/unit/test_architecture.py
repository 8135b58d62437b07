"""The rules of the house, read from the source with `ast`: each is shown to catch a small violation first."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
GROUND = {
    "errors", "arrays", "geometry", "spec", "rng", "config", "configuration", "blas", "timeline", "gpu", "bounded",
}  # fmt: skip

# Which rooms a room may import, besides itself and the ground floor. The two towers, ops-nn and plan-comm, meet in
# parallel and nowhere below.
MAY_IMPORT: dict[str, set[str]] = {
    "ground": set(),
    "kernels": set(),
    "ops": {"kernels"},
    "nn": {"kernels", "ops"},
    "plan": set(),
    "comm": {"plan"},
    "data": set(),
    "parallel": {"ops", "nn", "plan", "comm"},
    "train": {"ops", "nn", "plan", "comm", "data", "parallel"},
    "analysis": {"ops", "nn", "plan", "comm", "data", "parallel", "train"},
    "report": {"ops", "nn", "plan", "comm", "data", "parallel", "train"},
    "cli": {"kernels", "ops", "nn", "plan", "comm", "data", "parallel", "train", "analysis", "report"},
}
# Seconds of start-up on every rank of a shared file system, for something that one rank or one command needs.
HEAVY = {"tqdm", "matplotlib", "PIL", "tensorboardX", "tomli_w", "torch", "onnx", "cupy", "jinja2"}
COLLECTIVES = {
    "allreduce", "allgather", "reduce_scatter", "barrier", "broadcast", "broadcast_obj", "gather_obj", "agree",
    "agreeing", "offset_to_root", "write_trace",
    "sum_over_ranks", "train_step", "wait_gradients", "publish", "average_statistics", "bcast", "Bcast", "Barrier",
    "Allreduce", "Allgather", "gather", "scatter", "Split", "Split_type", "Dup",
}  # fmt: skip
TOP_LEVEL = ("hpcnn", "kernels", "scripts", "slurm", "docs", "tests", ".ci")
MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_ARCHITECTURE_LINES, MAX_TEMPLATE_LINES = 400, 60, 150, 40

Check = Callable[[str, ast.Module], Iterator[str]]


def room_of(module: str) -> str:
    """Return the room of a dotted module name; `hpcnn` itself is on the ground floor, `hpcnn.__main__` in cli."""
    parts = module.split(".")
    if parts[1:2] == ["__main__"]:
        return "cli"
    return "ground" if len(parts) == 1 or parts[1] in GROUND or parts[1].startswith("__") else parts[1]


def imports(module: str, nodes: Iterator[ast.AST]) -> Iterator[str]:
    """Yield the absolute name of everything that the nodes import."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(module.split(".")[: -node.level]) + "." if node.level else ""
            source = (base + (node.module or "")).strip(".")
            yield from (f"{source}.{alias.name}" for alias in node.names)


def check_layers(module: str, tree: ast.Module) -> Iterator[str]:
    room = room_of(module)
    if room not in MAY_IMPORT:
        yield f"{module}: there is no room '{room}' in the house"
        return
    for name in imports(module, ast.walk(tree)):
        if name.split(".")[0] == "hpcnn" and room_of(name) not in MAY_IMPORT[room] | {room, "ground"}:
            yield f"{module}: {room} must not import {name}"


def check_mpi_import(module: str, tree: ast.Module) -> Iterator[str]:
    if room_of(module) != "comm":
        for name in imports(module, ast.walk(tree)):
            if name.split(".")[0] == "mpi4py":
                yield f"{module}: only hpcnn.comm imports mpi4py"


def top_level_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """Yield the nodes that run when the module is imported; what only a type checker sees is not among them."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        yield node
        yield from top_level_nodes(node)


def check_heavy_imports(module: str, tree: ast.Module) -> Iterator[str]:
    for name in imports(module, top_level_nodes(tree)):
        if name.split(".")[0] in HEAVY:
            yield f"{module}: {name} must be imported inside the function that uses it"


def check_output(module: str, tree: ast.Module) -> Iterator[str]:
    if room_of(module) == "cli":
        return
    for node in ast.walk(tree):
        called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
        raised = ast.unparse(node.exc) if isinstance(node, ast.Raise) and node.exc else ""
        if called in {"print", "sys.exit", "exit", "quit"} or raised.startswith("SystemExit"):
            yield f"{module}:{node.lineno}: {called or raised} belongs to hpcnn.cli"


def check_function_lengths(module: str, tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            documented = ast.get_docstring(node) is not None
            lines = node.end_lineno - node.lineno + 1
            if documented:
                lines -= node.body[0].end_lineno - node.body[0].lineno + 1
            if lines > MAX_FUNCTION_LINES:
                yield f"{module}: {node.name} has {lines} lines besides its docstring, more than {MAX_FUNCTION_LINES}"


def chooses_ranks(test: ast.AST) -> bool:
    """Return whether a condition compares a rank with a number."""
    for node in ast.walk(test):
        if isinstance(node, ast.Compare) and any(isinstance(side, ast.Constant) for side in node.comparators):
            name = node.left.attr if isinstance(node.left, ast.Attribute) else getattr(node.left, "id", "")
            if name == "rank":
                return True
    return False


def check_collectives(module: str, tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if not isinstance(node, ast.If) or not chooses_ranks(node.test):
            continue
        for call in (call for line in node.body + node.orelse for call in ast.walk(line) if isinstance(call, ast.Call)):
            name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
            if name in COLLECTIVES:
                yield f"{module}:{call.lineno}: {name} is collective and must not depend on the rank"


CHECKS: tuple[Check, ...] = (
    check_layers,
    check_mpi_import,
    check_heavy_imports,
    check_output,
    check_function_lengths,
    check_collectives,
)


def modules() -> list[tuple[str, Path]]:
    """Return the dotted name and file of every module of the package."""
    found = []
    for path in sorted((ROOT / "hpcnn").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found.append((".".join(parts[:-1] if parts[-1] == "__init__" else parts), path))
    return found


def too_long(text: str, limit: int) -> bool:
    return len(text.splitlines()) > limit


@pytest.mark.parametrize(
    ("check", "module", "source"),
    [
        (check_layers, "hpcnn.nn.conv", "from hpcnn.comm.world import World"),
        (check_layers, "hpcnn.nn.conv", "from hpcnn import comm"),
        (check_layers, "hpcnn.nn.conv", "from ..plan import schedules"),
        (check_layers, "hpcnn.ops.conv2d", "def f():\n    import hpcnn.nn.conv"),
        (check_layers, "hpcnn.comm.engine", "from hpcnn.ops import add_forward"),
        (check_layers, "hpcnn.spec", "from hpcnn.plan.layout import Layout"),
        (check_layers, "hpcnn.data.loader", "from hpcnn.comm import world"),
        (check_layers, "hpcnn.analysis.x", "from hpcnn.report import plots"),
        (check_layers, "hpcnn.train.loop", "from hpcnn.cli.main import entry"),
        (check_layers, "hpcnn.attic.old", "import numpy"),
        (check_mpi_import, "hpcnn.train.loop", "from mpi4py import MPI"),
        (check_mpi_import, "hpcnn.cli.main", "def f():\n    import mpi4py.MPI"),
        (check_heavy_imports, "hpcnn.train.log", "import tqdm"),
        (check_heavy_imports, "hpcnn.data.importer", "try:\n    from PIL import Image\nexcept ImportError:\n    pass"),
        (check_heavy_imports, "hpcnn.data.importer", "class A:\n    import torch"),
        (check_output, "hpcnn.train.loop", "def f():\n    print('loss')"),
        (check_output, "hpcnn.train.loop", "import sys\nsys.exit(1)"),
        (check_output, "hpcnn.comm.world", "raise SystemExit(1)"),
        (check_function_lengths, "hpcnn.nn.conv", "def f():\n" + "    x = 1\n" * MAX_FUNCTION_LINES),
        (check_collectives, "hpcnn.train.loop", "if world.rank == 0:\n    for x in y:\n        world.agree(None)"),
        (check_collectives, "hpcnn.train.loop", "if a and rank != 0:\n    pass\nelse:\n    allreduce(comm, x)"),
    ],
)
def test_rule_catches_a_violation(check: Check, module: str, source: str) -> None:
    assert len(list(check(module, ast.parse(source)))) == 1


@pytest.mark.parametrize(
    ("check", "module", "source"),
    [
        (check_layers, "hpcnn.parallel.program", "from hpcnn.nn import conv\nfrom hpcnn.comm import world"),
        (check_layers, "hpcnn.cli.main", "from hpcnn import __version__, config"),
        (check_layers, "hpcnn.ops.cpu.conv2d", "from . import im2col\nfrom hpcnn import arrays"),
        (check_layers, "hpcnn.__main__", "from hpcnn.cli.main import entry"),
        (check_mpi_import, "hpcnn.comm.world", "from mpi4py import MPI"),
        (check_heavy_imports, "hpcnn.train.log", "def f():\n    import tqdm"),
        (check_output, "hpcnn.cli.main", "print('x')"),
        (
            check_collectives,
            "hpcnn.train.loop",
            "if world.rank == 0:\n    write()\nif world.size > 1:\n    world.agree(x)",
        ),
        (check_function_lengths, "hpcnn.a", "def f():\n    '''" + "x\n" * 80 + "'''\n    return 1"),
    ],
)
def test_rule_lets_the_allowed_pass(check: Check, module: str, source: str) -> None:
    assert [] == list(check(module, ast.parse(source)))


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_every_module_keeps_the_rule(check: Check) -> None:
    found = [line for name, path in modules() for line in check(name, ast.parse(path.read_text()))]
    assert found == []


def test_every_folder_of_modules_is_a_package() -> None:
    folders = {path.parent for _, path in modules()}
    assert [] == sorted(str(folder) for folder in folders if not (folder / "__init__.py").is_file())


def test_no_file_is_longer_than_its_limit() -> None:
    assert too_long("x\n" * (MAX_FILE_LINES + 1), MAX_FILE_LINES)
    assert not too_long("x\n" * MAX_FILE_LINES, MAX_FILE_LINES)
    limits = {path: MAX_FILE_LINES for top in ("hpcnn", "tests", "scripts") for path in (ROOT / top).rglob("*.py")}
    limits |= {ROOT / "ARCHITECTURE.md": MAX_ARCHITECTURE_LINES}
    limits |= dict.fromkeys((ROOT / "slurm").glob("*.sbatch"), MAX_TEMPLATE_LINES)
    assert len(limits) > 20
    assert [] == [str(path) for path, limit in limits.items() if too_long(path.read_text(), limit)]


@pytest.mark.parametrize("name", TOP_LEVEL)
def test_the_house_has_its_folders(name: str) -> None:
    assert (ROOT / name).is_dir()


def test_continuous_integration_runs_the_test_script_and_nothing_else() -> None:
    lines = [line for line in (ROOT / ".ci" / "run").read_text().splitlines() if line and not line.startswith("#")]
    assert len(lines) == 1
    assert "scripts/test.sh" in lines[0]


def test_templates_name_no_user_paths() -> None:
    for path in (ROOT / "slurm").iterdir():
        text = path.read_text()
        assert not any(word in text for word in ("/home/", "/users/", "/scratch/", "/lustre/")), path
