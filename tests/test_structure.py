"""The house rules: who may import whom, stubs that match the extension, kernels that keep to themselves."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import angle_rl
from angle_rl import _core

PACKAGE = Path(angle_rl.__file__).parent
ROOT = Path(__file__).parent.parent

# From the ground up: a file imports only what is listed above it; within one entry freely, but without a circle.
FLOORS = [
    ["_core", "_cuda", "_cuda_host"],
    ["types", "config"],
    ["presets"],
    ["checkpoint"],
    ["device"],
    ["spaces", "tensors"],
    ["schema", "replay"],
    ["fused"],
    ["ops"],
    ["acting", "models", "encoders"],
    ["function_feed"],
    ["feed"],
    ["envs"],
    ["runs"],
    ["engines"],
    ["meta"],
    ["agents"],
    ["episodes", "evaluation", "overlap", "resuming"],
    ["trainer"],
    ["task_trainer", "meta_trainer"],
    ["testing"],
    ["bench"],
    ["cli"],
]
FLOOR_OF = {name: floor for floor, names in enumerate(FLOORS) for name in names}


def own_imports(path: Path) -> set[str]:
    """Full names of the package's modules that a file imports, at any depth of nesting."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.startswith("angle_rl")}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            if node.module == "angle_rl":
                found |= {f"angle_rl.{alias.name}" for alias in node.names}
            elif node.module and node.module.startswith("angle_rl."):
                package = PACKAGE.joinpath(*node.module.split(".")[1:])
                members = {alias.name for alias in node.names if (package / f"{alias.name}.py").exists()}
                found |= {f"{node.module}.{member}" for member in members} or {node.module}
    return found


MODULES = {
    ".".join(["angle_rl", *path.relative_to(PACKAGE).with_suffix("").parts]).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
}
IMPORTS = {name: own_imports(path) for name, path in MODULES.items()}


@pytest.mark.parametrize("module", sorted(set(MODULES) - {"angle_rl", "angle_rl.__main__"}))
def test_a_file_imports_only_from_below(module):
    own = module.split(".")[1]
    assert own in FLOOR_OF, f"{module} stands on no floor"
    for imported in IMPORTS[module]:
        other = imported.split(".")[1] if "." in imported else None
        if other == "__version__":
            continue
        assert other in FLOOR_OF, f"{module} imports {imported}, which stands on no floor"
        assert FLOOR_OF[other] <= FLOOR_OF[own], f"{module} imports {imported} from above"


def test_no_imports_go_in_a_circle():
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path, module))
        if module in done or module not in IMPORTS:
            return
        for imported in IMPORTS[module] - {"angle_rl"}:
            visit(imported, (*path, module))
        done.add(module)

    for module in MODULES:
        if module != "angle_rl":
            visit(module, ())


CSRC_FLOORS = ["kernels", "core", "learner", "cuda", "bindings", "tests"]


def test_native_files_include_only_from_below():
    checked = 0
    for path in (ROOT / "csrc").rglob("*"):
        if path.suffix not in {".h", ".cpp", ".inl"} or "doctest" in path.parts:
            continue
        own = path.relative_to(ROOT / "csrc").parts[0]
        for line in path.read_text().splitlines():
            if not line.startswith("#include"):
                continue
            target = line.split()[1].strip('<>"')
            floor = target.split("/")[0]
            if floor in CSRC_FLOORS:
                assert CSRC_FLOORS.index(floor) <= CSRC_FLOORS.index(own), f"{path} includes {target} from above"
                checked += 1
            assert not target.startswith("pybind11") or own == "bindings", f"{path} knows pybind11"
            assert not target.startswith(("torch", "ATen")), f"{path} knows torch"
    assert checked > 10


@pytest.mark.parametrize("module", ["_core", "_cuda_host"])
def test_the_stub_matches_the_extension(module, tmp_path):
    name = f"angle_rl.{module}"
    subprocess.run(
        [sys.executable, "-m", "pybind11_stubgen", name, "-o", str(tmp_path), "--numpy-array-use-type-var"],
        check=True,
        capture_output=True,
    )
    committed, fresh = (
        ast.dump(ast.parse((folder / f"{module}.pyi").read_text())) for folder in (PACKAGE, tmp_path / "angle_rl")
    )
    assert committed == fresh, (
        f"python/angle_rl/{module}.pyi is stale; regenerate it with "
        f"pybind11-stubgen {name} -o python --numpy-array-use-type-var"
    )


@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm")
def test_per_isa_units_share_no_weak_symbols(tmp_path):
    """A weak symbol compiled with wide instructions could be the copy that the linker keeps for every ISA."""
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    flags = {"baseline": []}
    if "avx2" in _core.available_isas():
        flags["avx2"] = ["-mavx2", "-mfma", "-mbmi2"]
    if "avx512" in _core.available_isas():
        flags["avx512"] = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma", "-mbmi2"]
        flags["avx512_bf16"] = [*flags["avx512"], "-mavx512bf16"]
    for isa, wide in flags.items():
        unit = tmp_path / f"{isa}.o"
        source = ROOT / "csrc" / "kernels" / f"kernels_{isa}.cpp"
        command = [compiler, "-std=c++20", "-O1", "-Wno-psabi", f"-I{ROOT / 'csrc'}", *wide, "-c", str(source)]
        subprocess.run([*command, "-o", str(unit)], check=True, capture_output=True)
        symbols = subprocess.run(["nm", "--defined-only", "-C", str(unit)], check=True, capture_output=True, text=True)
        shared = [line for line in symbols.stdout.splitlines() if line.split()[1] in "WVuTDBR"]
        assert all(f"angle::{isa}::" in line for line in shared), shared


def test_no_load_path_can_run_code():
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [alias.name for alias in node.names] + [getattr(node, "module", "") or ""]
                assert not {"pickle", "dill", "cloudpickle", "shelve", "marshal"} & set(names), path
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                assert (node.value.id, node.attr) != ("torch", "load"), path
