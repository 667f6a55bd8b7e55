"""Packages that are not installed are named with the line that installs them, in the extra that pyproject.toml has."""

import re
import sys
from pathlib import Path

import pytest

from kvcal.artifacts.packages import EXTRAS, extra_of, installed, missing, require

tomllib = pytest.importorskip("tomllib")  # since Python 3.11
PYPROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
DISTRIBUTIONS = {
    **{"faiss": "faiss-cpu", "sklearn": "scikit-learn", "yaml": "PyYAML", "lm_eval": "lm-eval", "jinja2": "Jinja2"},
    **{"huggingface_hub": "transformers", "tokenizers": "transformers", "threadpoolctl": "scikit-learn"},
    **{"vl_convert": "vl-convert-python"},
}
"""Package by the name that is imported -> the distribution that has it, or that asks for it."""


@pytest.mark.parametrize(("extra", "package"), [(extra, name) for extra, names in EXTRAS.items() for name in names])
def test_an_extra_brings_what_it_is_named_for(extra, package):
    asked = {re.split(r"[<>=;\[ ]", line)[0] for line in PYPROJECT["project"]["optional-dependencies"][extra]}
    asked |= {re.split(r"[<>=;]", line)[0] for line in PYPROJECT["project"]["dependencies"]}
    assert DISTRIBUTIONS.get(package, package) in asked


def test_a_missing_package_is_named_with_its_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ImportError, match=r"^faiss is not installed, and is needed to cluster keys: pip install"):
        require("torch", "faiss", to="cluster keys")
    require("torch", "safetensors", to="do anything")


def test_modules_belong_to_their_package():
    assert extra_of("yaml.reader") == "calibrate" and extra_of("transformers.cache_utils") == "transformers"
    assert extra_of("os") is None and "pip install nothing_of_ours" in str(missing("nothing_of_ours", "do it"))


def test_a_module_that_was_put_there_counts(monkeypatch):
    monkeypatch.setitem(sys.modules, "put_there", type(sys)("put_there"))  # without a spec
    assert installed("put_there") and not installed("not_there_at_all")
