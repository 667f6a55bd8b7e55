"""`make check-fast` begins with the tests of what was changed."""

import time
from pathlib import Path

import fast


def names(*files):
    return [path.relative_to(fast.TESTS).as_posix() for path in fast.needed(map(Path, files))]


def test_the_test_of_a_module_comes_first_then_its_importers_then_its_folder():
    found = names("artifacts/shown.py")
    assert found[: len(fast.ALWAYS) + 1] == sorted([*fast.ALWAYS, "artifacts/test_shown.py"], key=str)
    assert found.index("artifacts/test_shown.py") < found.index("artifacts/test_folder.py")


def test_importers_are_found_through_helpers_of_the_tests():
    assert "calibrate/test_publish.py" in names("tests/stand_in_hub.py")  # imports it
    through = names("calibrate/one_pass.py")  # tests/compressed.py imports it, and this test imports that
    assert "runtime/integration/test_generate.py" in through and "runtime/test_typed.py" not in through


def test_a_changed_test_and_a_changed_page_are_tested():
    assert "runtime/test_typed.py" in names("tests/runtime/test_typed.py")
    assert "docs/test_readme.py" in names("docs/methods.md") and "docs/test_examples.py" in names("examples/serve.py")
    assert "package/test_names.py" in names("pyproject.toml")
    assert "package/test_names.py" in names("src/kvcal/__init__.py")
    assert "benchmarks/test_pages.py" in names("benchmarks/pages.py")
    assert "calibrate/reports/test_browser.py" in names("calibrate/reports/page.css")
    assert names("LICENSE") == sorted(fast.ALWAYS)


def test_every_chosen_file_is_there():
    everything = [*fast._git("ls-files")]
    assert all(path.is_file() for path in fast.needed(map(Path, everything)))


def test_no_test_begins_when_the_time_is_over(monkeypatch):
    monkeypatch.setattr(fast, "SECONDS", -1)
    clock = fast.Clock()
    assert clock.pytest_runtest_protocol(None) and clock.left_out == 1
    monkeypatch.setattr(fast, "SECONDS", 60)
    assert fast.Clock().pytest_runtest_protocol(None) is None and time.monotonic() < fast.Clock().end
