"""The house: artifacts and kernels below, runtime on them, calibrate on top; and what each may import."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "src" / "kvcal"
STDLIB = sys.stdlib_module_names | {"__future__"}
ON_A_CPU = {"numba", "numpy", "llvmlite"}
"""What kernels in numba import, which nothing imports before one is chosen."""
ROOMS = {
    "artifacts": ({"torch", "safetensors"}, set()),
    "kernels": ({"torch", "triton", *ON_A_CPU}, set()),
    "runtime": ({"torch", "typing_extensions", "safetensors", "huggingface_hub"}, {"artifacts", "kernels"}),
}
CLA = ROOT / "runtime" / "cla"
WITH_TRANSFORMERS = {
    *(ROOT / "runtime" / "integration").rglob("*.py"),
    *(CLA / f"{name}.py" for name in ("checkpoint", "projections")),
}
"""Everything else of the runtime serves any engine, but for these files."""
VLLM = ROOT / "runtime" / "engines" / "vllm"
WITH_VLLM = {VLLM / f"{name}.py" for name in ("plugin", "engine", "backend", "cpu", "cuda")}

UPWARDS = {ROOT / "artifacts" / "pretrained.py"}
"""Names that belong to an artifact for its users, of what the rooms above do."""


def imports(path):
    """(absolute top-level names, rooms of kvcal) that a file imports, wherever in it."""
    names, rooms = set(), set()
    depth = len(path.relative_to(ROOT).parts) - 1  # folders between the root and the file
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module.split(".")[0])
        elif isinstance(node, ast.ImportFrom) and node.level > depth:
            rooms |= {node.module.split(".")[0]} if node.module else {alias.name for alias in node.names}
    return names, rooms


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_what_it_may(room):
    packages, below = ROOMS[room]
    for path in {*(ROOT / room).rglob("*.py")} - UPWARDS:
        names, rooms = imports(path)
        allowed = STDLIB | packages | ({"transformers"} if path in WITH_TRANSFORMERS else set())
        allowed |= {"vllm"} if path in WITH_VLLM else set()
        assert names <= allowed, path
        assert rooms <= below, path


def test_numba_is_asked_for_where_its_kernels_are_and_nowhere_else():
    for path in (ROOT / "kernels").rglob("*.py"):
        if path.parent.name != "cpu" and not path.name.startswith(("cpu", "launch")):
            assert not imports(path)[0] & ON_A_CPU, path


def test_memory_knows_no_method():
    for path in (ROOT / "runtime" / "kv").glob("*.py"):
        nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
        names = {part for node in nodes for part in (node.module or "").split(".")}
        assert "methods" not in names | {alias.name for node in nodes for alias in node.names}, path


def test_the_reader_of_imports_sees_relative_ones():
    assert imports(ROOT / "runtime" / "loading.py")[1] == {"artifacts"}
    assert imports(ROOT / "calibrate" / "cli" / "verify.py")[1] == {"artifacts", "runtime"}


def test_the_command_line_is_calibrates_top_floor():
    for path in (ROOT / "calibrate").rglob("*.py"):
        if ROOT / "calibrate" / "cli" in path.parents:
            continue
        tree = ast.parse(path.read_text())
        modules = [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        names = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
        assert "click" not in {*modules, *names}, path
        assert path.name == "__main__.py" or not any(module.startswith("cli") for module in modules), path


def test_kernels_is_not_a_regular_package():
    """It would shadow Hugging Face's package of the same name."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("kvcal.artifacts", ["transformers", "datasets", "faiss", "sklearn", "click"]),
        ("kvcal.runtime", ["transformers", "datasets", "faiss", "sklearn", "click", "matplotlib", "huggingface_hub"]),
        *((f"kvcal.runtime.cla.{name}", ["transformers"]) for name in ("sharing_map", "method", "file")),
        ("kvcal.calibrate", ["transformers", "datasets", "faiss", "sklearn", "click", "matplotlib", "altair"]),
        ("kvcal.calibrate.models.listing", ["transformers", "datasets", "faiss", "sklearn", "gguf", "matplotlib"]),
        ("kvcal.calibrate.cli.group", ["transformers", "datasets", "faiss", "sklearn", "matplotlib", "vl_convert"]),
        ("kvcal.calibrate.reports.gathered", ["transformers", "datasets", "faiss", "sklearn", "matplotlib", "altair"]),
        ("kvcal.calibrate.cli.report", ["transformers", "datasets", "matplotlib", "altair", "vl_convert", "jinja2"]),
    ],
)
def test_importing_a_room_loads_nothing_heavy(module, absent):
    script = f"import sys, {module}; print([name for name in {absent!r} if name in sys.modules])"
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
