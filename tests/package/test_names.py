"""What a stranger finds under the one name: `kvcal`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import kvcal
import kvcal.calibrate
import kvcal.runtime
import kvcal.runtime.cla
import kvcal.runtime.integration
from kvcal.artifacts import MissingPackageError

PACKAGES = [kvcal, kvcal.artifacts, kvcal.runtime, kvcal.runtime.cla, kvcal.runtime.integration, kvcal.calibrate]


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)
def test_every_name_that_is_shown_is_there(package):
    assert set(dir(package)) >= set(package.__all__)
    for name in dir(package):
        assert getattr(package, name) is not None


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)
def test_other_names_are_not(package):
    with pytest.raises(AttributeError, match=f"module '{package.__name__}' has no attribute 'nothing'"):
        package.nothing  # noqa: B018


def test_names_mean_the_same_wherever_they_are_shown():
    from kvcal.runtime import compress, decode, load

    assert (kvcal.compress, kvcal.decode, kvcal.load) == (compress, decode, load)
    assert kvcal.Artifact.from_pretrained.__doc__.startswith("`kvcal.load`")


def test_the_runtime_shows_what_decoding_needs_and_no_more():
    errors = {"KvcalError", "ArtifactError", "MismatchError", "MissingPackageError"}
    names = {"load", "compress", "decode", "CompressedCache", "Sampler", "METHODS", "check_model", "Artifact"}
    assert set(dir(kvcal.runtime)) == names | errors


def test_importing_kvcal_imports_nothing_else():
    script = "import sys, json, kvcal; print(json.dumps([kvcal.__version__, 'torch' in sys.modules, dir(kvcal)]))"
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    version, torch_is_imported, names = json.loads(out.stdout)
    assert version == kvcal.__version__ and not torch_is_imported and "load" in names


def test_the_version_is_the_installed_ones():
    from importlib.metadata import version

    assert version("kvcal") == kvcal.__version__


def test_a_name_that_needs_a_missing_package_says_how_to_install_it():
    script = "import sys; sys.modules['transformers'] = None; from kvcal.runtime import compress"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stderr.splitlines()[-1] == (
        "kvcal.artifacts.errors.MissingPackageError: transformers is not installed, and is needed to use "
        "kvcal.runtime.compress: pip install 'kvcal[transformers]'"
    )
    assert issubclass(MissingPackageError, (ImportError, kvcal.KvcalError))


@pytest.mark.parametrize("program", ["kvcal", "calibrate", "module"])
def test_all_programs_are_one(program):
    here = Path(sys.executable).parent
    command = [sys.executable, "-m", "kvcal"] if program == "module" else [str(here / program)]
    done = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith(kvcal.__version__)
    listed = subprocess.run([*command, "models", "--json"], capture_output=True, text=True, check=True)
    assert "demo" in listed.stdout


SNIPPET = """
import torch
import kvcal
from kvcal.calibrate import calibrate, plan
from kvcal.runtime import compress
from kvcal.runtime.cla import load_cla

artifact, ids = kvcal.load("x"), torch.zeros(1, 1)
reveal_type(artifact)
reveal_type(artifact.save_pretrained("y"))
reveal_type(calibrate("demo", "text/", num_tokens=4096))
reveal_type(load_cla("z"))
with compress(None, artifact, method="spectral", rank={"0-1": 32, "2-": 0.5}, bits=4, dense_layers=1):
    pass
with compress(None, artifact, method="loki", kep=0.25):
    pass
kvcal.decode(None, ids, artifact, "loki", max_new_tokens=1, rank=[0.25, 32], bits="four")
calibrate("demo", "text/", tokens=4096)
kvcal.nothing
kvcal.runtime.nothing
"""
"""Lines that end in an error are listed below with their line number."""


def test_a_type_checker_follows_the_installed_package(tmp_path):
    (tmp_path / "use.py").write_text(SNIPPET)
    cache = Path(__file__).parents[2] / ".mypy_cache"
    command = [sys.executable, "-m", "mypy", "--cache-dir", str(cache), "--python-executable", sys.executable, "use.py"]
    environment = {name: value for name, value in os.environ.items() if name != "MYPYPATH"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("use.py:") and "defined in" not in line]
    found = {}
    for line in lines:
        _, number, rest = line.split(":", 2)
        found.setdefault(int(number), rest.strip())
    assert found.pop(9) == 'note: Revealed type is "kvcal.artifacts.artifact.Artifact"'
    assert found.pop(10) == 'note: Revealed type is "kvcal.artifacts.artifact.Artifact"'
    assert found.pop(11) == 'note: Revealed type is "kvcal.artifacts.artifact.Artifact"'
    assert found.pop(12).startswith("note: Revealed type is ")
    assert 'Unexpected keyword argument "kep" for "compress"' in found.pop(15)
    assert '"bits" to "decode" has incompatible type "str"' in found.pop(17)
    assert 'Unexpected keyword argument "tokens" for "calibrate"' in found.pop(18)
    assert 'has no attribute "nothing"' in found.pop(19)
    assert 'has no attribute "nothing"' in found.pop(20)
    assert not found
