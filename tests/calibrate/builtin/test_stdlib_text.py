import sysconfig
from pathlib import Path

import pytest

from kvcal.calibrate.builtin.stdlib_text import docstrings, documents, is_held_out


@pytest.fixture(scope="module")
def splits():
    return {split: list(documents(split)) for split in ("train", "heldout")}


def test_the_splits_share_no_file_not_even_through_docstrings(splits):
    files = {split: {name.removesuffix("#docstrings") for name, _ in found} for split, found in splits.items()}
    assert files["train"].isdisjoint(files["heldout"])
    assert all(is_held_out(name) for name in files["heldout"])


def test_about_one_file_in_ten_is_held_out(splits):
    held_out, train = len(splits["heldout"]), len(splits["train"])
    assert 0.06 < held_out / (held_out + train) < 0.15


def test_it_is_megabytes_of_source_docstrings_and_topics(splits):
    everything = splits["train"] + splits["heldout"]
    assert sum(len(text) for _, text in everything) > 8_000_000
    assert sum(len(text) for name, text in everything if name.endswith("#docstrings")) > 1_000_000
    assert sum(len(text) for name, text in everything if name.startswith("topics/")) > 300_000


def test_it_holds_no_tests_and_nothing_of_this_machine(splits):
    names = {name for found in splits.values() for name, _ in found}
    assert "json/decoder.py" in names
    assert not any(part in name.split("/") for name in names for part in ("test", "tests", "site-packages"))
    assert not any(name.startswith(("config-", "_sysconfigdata")) for name in names)
    home = str(Path(sysconfig.get_path("stdlib")).parent)
    assert not any(home in name for name in names)


def test_order_depends_on_names_only(splits):
    assert list(documents("heldout")) == splits["heldout"]
    with pytest.raises(ValueError, match="expected one of train, heldout"):
        next(documents("test"))


def test_docstrings_of_modules_classes_and_functions():
    source = (
        '"""Module."""\nx = """not one"""\nclass A:\n    """Class."""\n    async def f(self):\n        """Method."""\n'
    )
    assert docstrings(source) == "Module.\n\nClass.\n\nMethod."
    assert docstrings("def broken(:") == ""
