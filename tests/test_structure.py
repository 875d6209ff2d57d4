"""Rules of the repository's structure."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

import consistency
from conftest import ROOT

PACKAGE = ROOT / "src" / "consistency"
FLOORS = [
    ["errors", "tensors", "pixels", "latents", "schedules", "grids", "preconditioning", "averaging", "randomness", "networks"],
    ["processes", "solvers", "pairs", "distances", "weightings", "denoiser", "tangents", "augmentation", "derivatives", "flow_pairs"],
    ["steps", "samplers", "editing", "flow_samplers"],
    ["objectives", "trigflow", "average_velocity", "shortcuts"],
]  # fmt: skip
CORE = {name: number for number, names in enumerate(FLOORS, start=1) for name in names}
FRAMEWORKS = ("lightning", "hydra", "omegaconf", "wandb", "torchmetrics", "torchvision", "numpy")


def modules() -> dict[str, Path]:
    return {
        ".".join(p.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): p
        for p in PACKAGE.rglob("*.py")
    }


def imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            if node.module == "consistency":
                names |= {f"consistency.{alias.name}" for alias in node.names}
    return names


CORE_MODULES = sorted(name for name in modules() if name.split(".")[0] in CORE)


@pytest.mark.parametrize("name", CORE_MODULES)
def test_the_core_imports_only_torch_jaxtyping_and_lower_floors(name: str) -> None:
    for imported in imports(modules()[name]):
        top = imported.split(".")[0]
        if top == "consistency":
            other = imported.removeprefix("consistency.").split(".")[0]
            assert other in CORE or imported == "consistency", (name, imported)
            assert CORE.get(other, 0) <= CORE[name.split(".")[0]], (name, imported)
        else:
            assert top in ("torch", "jaxtyping") or top in sys.stdlib_module_names, (name, imported)


def test_the_core_runs_without_the_frameworks() -> None:
    names = [f"consistency.{name}" for name in CORE_MODULES]
    code = f"""
import sys
for framework in {FRAMEWORKS!r}:
    sys.modules[framework] = None
import importlib
for name in {names!r}:
    importlib.import_module(name)
"""
    # numpy is torch's own optional import and stays
    code = code.replace(", 'numpy'", "")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_importing_the_package_imports_neither_torch_nor_hydra() -> None:
    code = (
        "import sys, consistency; assert 'torch' not in sys.modules and 'hydra' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_imports_are_acyclic() -> None:
    graph = {
        f"consistency.{name}": {i for i in imports(path) if i.startswith("consistency.")}
        for name, path in modules().items()
    }
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join([*path, name])
        if name not in done:
            for other in graph.get(name, set()):
                visit(other, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_no_code_branches_on_a_mode() -> None:
    modes = {p.stem for p in (ROOT / "conf" / "mode").glob("*.yaml")}
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Compare | ast.MatchValue):  # tuples of `in` and `case` too
                compared = {c.value for c in ast.walk(node) if isinstance(c, ast.Constant)}
                assert not compared & modes, (path, node.lineno)


ROOMS = ("runtime", "inference", "checkpoints", "data", "evaluation", "training", "commands")
VERBS = {p.stem for p in (ROOT / "src").glob("*.py")}


def test_every_module_of_the_shell_is_in_a_room() -> None:
    folders = {p.parent.name for p in PACKAGE.rglob("*.py")} - {"consistency", "callbacks"}
    assert folders == {*ROOMS, "networks"}
    assert {p.stem for p in PACKAGE.glob("*.py")} == {*CORE, "__init__", "__main__"} - {"networks"}
    assert len(list((PACKAGE / "runtime").glob("[!_]*.py"))) <= 8
    for verb in VERBS:
        assert (PACKAGE / "commands" / f"{verb}.py").is_file(), verb
        assert (ROOT / "conf" / f"{verb}.yaml").is_file(), verb


def test_nothing_imports_commands_and_no_command_imports_a_command() -> None:
    """The package itself is excepted: its `compose` and `train` are the commands in Python."""
    for name, path in modules().items():
        for imported in imports(path):
            room, _, module = imported.removeprefix("consistency.").partition(".")
            if room == "commands" and name != "__init__":
                assert name.startswith("commands"), (name, imported)
                assert module not in VERBS, (name, imported)


@pytest.mark.parametrize("room", ["inference", "checkpoints"])
def test_inference_and_checkpoints_import_neither_lightning_nor_hydra(room: str) -> None:
    for name, path in modules().items():
        if name.startswith(f"{room}."):
            tops = {imported.split(".")[0] for imported in imports(path)}
            assert not tops & {"lightning", "hydra", "torchmetrics", "wandb"}, name


def test_functions_have_at_most_50_lines_and_files_400() -> None:
    for name, path in modules().items():
        text = path.read_text()
        assert len(text.splitlines()) <= 400, name
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                constructor = node.name == "__init__" and name.startswith("networks.")
                assert constructor or node.end_lineno - node.lineno < 50, (name, node.name)


@pytest.mark.parametrize("name", CORE_MODULES)
def test_files_of_the_method_have_at_most_350_lines(name: str) -> None:
    assert len(modules()[name].read_text().splitlines()) <= 350


def test_no_module_is_called_utils() -> None:
    for path in (ROOT / "src").rglob("*"):
        assert path.stem not in ("utils", "helpers", "common", "misc"), path


def test_the_map_names_every_module() -> None:
    picture = consistency.__doc__ or ""
    for name in modules():
        if name and not name.endswith("__init__"):
            assert re.search(rf"\b{re.escape(name.split('.')[-1])}\b", picture), name
    for verb in (ROOT / "src").glob("*.py"):
        assert verb.name in picture, verb.name


def test_conda_installs_what_the_project_declares() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    python = next(d for d in environment["dependencies"] if str(d).startswith("python"))
    assert python == f"python{declared['requires-python']}"
    assert "pip" in environment["dependencies"]
    assert {"pip": ["-e ."]} in environment["dependencies"]


def test_the_lock_pins_every_package_by_hash_without_addresses() -> None:
    text = (ROOT / "requirements.lock").read_text()
    assert "://" not in text
    pinned = set(re.findall(r"^([a-z0-9._-]+)==", text, re.M))
    blocks = re.split(r"^(?=[a-z0-9])", text, flags=re.M)[1:]
    assert all("--hash=sha256:" in block for block in blocks)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    declared = [
        *project["project"]["dependencies"],
        *(d for extra in project["project"]["optional-dependencies"].values() for d in extra),
        *project["dependency-groups"]["dev"],
    ]
    for requirement in declared:
        assert re.split(r"[<>=!~\[ ;]", requirement)[0].lower() in pinned, requirement
    assert {"streaming", "sweeps", "demo"} <= set(project["project"]["optional-dependencies"])
    lightning = next(d for d in declared if d.startswith("lightning"))
    assert re.fullmatch(r"lightning>=2\.(\d+)\.\d+,<2\.(\d+)", lightning)


def test_only_the_package_is_packaged() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"] == ["src/consistency"]


def test_make_lists_every_target() -> None:
    done = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, check=True)
    listed = set(re.findall(r"^make (\S+)", done.stdout, re.M))
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.M)
    assert phony is not None
    assert listed == set(phony[1].split())
