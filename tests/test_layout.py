"""The shape of the repository: what must stay true of folders, imports and README."""

import ast
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from tests.support.launching import launch_environment
from tests.support.rooms import FLOORS, PACKAGE, arrows, drawn_picture, picture

ROOT = Path(__file__).parents[1]
# A package may import those that stand after it.
ORDER = ["tensorlm", "fold_parallel", "tensor_attention"]
FOLDERS = {
    "tensorlm": ROOT / "tensorlm",
    "fold_parallel": ROOT / "parallel/fold_parallel",
    "tensor_attention": ROOT / "kernels/tensor_attention",
}


@pytest.mark.parametrize("folder", ["kernels", "parallel", "launcher", "configs", "slurm", "tests"])
def test_root_folders_are_not_packages(folder: str) -> None:
    # A top-level package `kernels` would stand in for Hugging Face's own.
    assert not (ROOT / folder / "__init__.py").exists()


@pytest.mark.parametrize("package", ORDER)
def test_imports_run_one_way(package: str) -> None:
    forbidden = set(ORDER[: ORDER.index(package)])
    for path in FOLDERS[package].rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            assert not forbidden & {name.split(".")[0] for name in names}, path


def test_rooms_import_only_from_floors_below() -> None:
    floor_of = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
    rooms = {path.stem for path in PACKAGE.glob("[!_]*") if path.suffix in ("", ".py")}
    assert rooms == floor_of.keys()
    assert len(rooms) <= 12
    found = arrows()
    assert {room for room, _ in found} == floor_of.keys() - {"runtime", "batch"}
    assert [(a, b) for a, b in sorted(found) if floor_of[b] >= floor_of[a]] == []


def test_the_picture_of_the_rooms_is_that_of_the_imports() -> None:
    assert drawn_picture() == picture()  # else: python -m tests.support.rooms


def test_the_ground_needs_torch_and_tqdm_only() -> None:
    allowed = {*sys.stdlib_module_names, "tensorlm", "torch", "tqdm", "mpi4py"}  # under mpirun
    used = {
        name.split(".")[0]
        for path in (ROOT / "tensorlm/runtime").glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Import) or (isinstance(node, ast.ImportFrom) and not node.level)
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
        )
    }
    assert used <= allowed


STARTS = """
import gc, importlib, pkgutil, sys

gc.disable()  # a quarter of the time
# Transformers' models take seconds: only what uses them imports them.
models = ("transformers.modeling_utils", "transformers.models.llama.modeling_llama", "deepspeed")
for module in (
    "evaluation.launch", "evaluation.compare",
    "hf.import_folder", "hf.export_folder", "hf.write_config",
):
    importlib.import_module(f"tensorlm.{module}")
    assert not [name for name in models if name in sys.modules], module
for room in ("hf", "evaluation", "checkpoint", "data", "model", "plan"):
    package = importlib.import_module(f"tensorlm.{room}")
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        importlib.import_module(module.name)
assert "deepspeed" not in sys.modules
# From the repository's root, where a folder could stand in for a package of theirs.
from transformers import LlamaForCausalLM
"""


def test_rooms_import_neither_models_nor_deepspeed_before_they_use_them() -> None:
    subprocess.run([sys.executable, "-c", STARTS], cwd=ROOT, env=launch_environment(), check=True)


def test_only_the_engine_imports_deepspeed() -> None:
    users = [
        path.relative_to(ROOT).as_posix()
        for folder in ("tensorlm", "kernels", "parallel", "launcher")
        for path in (ROOT / folder).rglob("*.py")
        if re.search(r"^\s*(import|from) deepspeed", path.read_text(), re.MULTILINE)
    ]
    assert users == ["tensorlm/train/engine.py"]


def test_files_that_the_readme_names_exist() -> None:
    text = (ROOT / "README.md").read_text()
    folders = "launcher|configs|docs|kernels|slurm|tests|tensorlm"
    named = set(re.findall(rf"\b(?:{folders})/[\w/]+\.\w+", text))
    assert len(named) > 5
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_demo_in_the_readme_is_that_of_the_configuration() -> None:
    steps = tomllib.loads((ROOT / "configs/demo.toml").read_text())["train"]["steps"]
    assert f"runs/demo/train/step-{steps:08d}" in (ROOT / "README.md").read_text()


def build_wheel(project: Path, folder: Path) -> Path:
    # With the installed setuptools: a build of its own would download and install one more.
    command = [
        sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet",
        "-w", str(folder),
    ]  # fmt: skip
    subprocess.run([*command, str(project)], check=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


def test_wheel_holds_the_three_packages_and_nothing_generic(tmp_path: Path) -> None:
    wheel = build_wheel(ROOT, tmp_path)
    listing = subprocess.run(
        [sys.executable, "-m", "zipfile", "-l", str(wheel)], capture_output=True, text=True
    ).stdout
    tops = {line.split("/")[0] for line in listing.splitlines()[1:]}
    tops = {top for top in tops if not top.endswith(".dist-info")}
    assert tops == set(ORDER)


# What the operator may import beside the standard library: torch and what torch brings.
OPERATOR_ALONE = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("tensorlm", "fold_parallel", "deepspeed", "transformers"):
            raise ImportError(name)

sys.meta_path.insert(0, Refuse())
sys.path.insert(0, sys.argv[1])
import tensor_attention, torch
assert tensor_attention.__file__.startswith(sys.argv[1])
q, k, v = (torch.randn(1, 20, heads, 8) for heads in (4, 2, 2))
assert tensor_attention.tensor_attention(q, k, v, [4]).shape == q.shape
"""


def test_the_operator_installs_alone(tmp_path: Path) -> None:
    # A copy, so that the build leaves nothing in the source tree.
    source = tmp_path / "kernels"
    shutil.copytree(ROOT / "kernels", source)
    wheel = build_wheel(source, tmp_path)
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
        tops = {name.split("/")[0] for name in archive.namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"tensor_attention"}
    command = [sys.executable, "-c", OPERATOR_ALONE, str(tmp_path / "site")]
    subprocess.run(command, cwd=tmp_path, check=True)
