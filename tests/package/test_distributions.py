"""The wheel and the sdist, built, installed where nothing of the repository is, and used."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "kvcal"
DEMO = {f"kvcal/calibrate/builtin/demo_model/{name}" for name in ("config.json", "model.safetensors", "tokenizer.json")}
HARMLESS = ("byte-compiling is disabled", "no previously-included files matching")
"""What setuptools says where Python is told to write no bytecode, and where there is none to leave out."""

USE = """
import sys, warnings
warnings.simplefilter("error", UserWarning)
import kvcal
from kvcal.calibrate import calibrate, load_model
assert kvcal.__file__.startswith(sys.prefix), kvcal.__file__
artifact = kvcal.load("made")
loaded = load_model("demo")
inputs = loaded.tokenizer("def load(", return_tensors="pt")
with kvcal.compress(loaded.model, artifact, method="loki", keep=4):
    out = loaded.model.generate(**inputs, max_new_tokens=4, do_sample=False)
print(out.shape[1] - inputs["input_ids"].shape[1], repr(artifact))
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder with both, the wheel made from the sdist; what was said while they were built."""
    pytest.importorskip("build")
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, done.stdout + done.stderr


def test_they_are_built_without_a_warning(built):
    lines = [line for line in built[1].splitlines() if "warning" in line.lower() or "deprecat" in line.lower()]
    assert [line for line in lines if not any(part in line for part in HARMLESS)] == []


def test_the_sdist_has_tests_and_docs_and_no_litter(built):
    (path,) = built[0].glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
        assert not [member.name for member in archive.getmembers() if member.issym() or member.islnk()]
    assert {"pyproject.toml", "README.md", "CHANGELOG.md", "LICENSE", "Makefile", "constraints.txt"} <= names
    assert {"tests/package/test_distributions.py", "docs/format.md", "src/kvcal/runtime/decode.py"} <= names
    assert not [name for name in names if name.endswith((".pyc", ".partial")) or "__pycache__" in name]


def test_the_wheel_has_every_module_and_nothing_else(built):
    (path,) = built[0].glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    rooms = [SOURCE, *(SOURCE / room for room in ("artifacts", "calibrate", "kernels", "runtime"))]
    modules = {f for room in rooms for f in (room.glob("*.py") if room == SOURCE else room.rglob("*.py"))}
    assert {name for name in names if name.endswith(".py")} == {
        f"kvcal/{module.relative_to(SOURCE).as_posix()}" for module in modules
    }
    assert names >= {
        "kvcal/py.typed",
        *DEMO,
        *(f"kvcal/calibrate/reports/page.{end}" for end in ("css", "html.j2", "js")),
    }
    assert {name.partition("/")[0] for name in names} == {"kvcal"}


def test_the_wheel_is_installed_and_used(built, tmp_path):
    (wheel,) = built[0].glob("*.whl")
    environment = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    python, programs = environment / "bin" / "python", environment / "bin"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*pip, str(wheel)], check=True)
    # What kvcal depends on, by a path: an editable install of kvcal there is a .pth file, which is not followed.
    where = subprocess.run(
        [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], capture_output=True, text=True
    ).stdout.strip()
    Path(where, "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")

    (tmp_path / "text.txt").write_text("".join(f"the square of {n} is {n * n}\n" for n in range(400)))
    options = ["--num-tokens", "1024", "--seq-len", "128", "--output", "made"]
    for command in (
        [programs / "kvcal", "--version"],
        [programs / "calibrate", "pca", "--model", "demo", "--data", "text.txt", *options],
        [python, "-m", "kvcal", "verify", "made"],
        [programs / "kvcal", "report", "made"],
    ):
        done = subprocess.run(list(map(str, command)), cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    used = subprocess.run([str(python), "-c", USE], cwd=tmp_path, capture_output=True, text=True)
    assert used.returncode == 0, used.stderr
    assert used.stdout.startswith("4 Artifact(of demo")
