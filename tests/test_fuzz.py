"""Whatever is written where a stranger can write: a result or one of our named errors. Bounded, the same every time.

`make fuzz` looks further, guided by coverage. KVCAL_FUZZ_EXAMPLES=10000 gives these tests a larger budget.
"""

from __future__ import annotations

import copy
import json
import os
from typing import Any

import pytest
from fuzz_targets import TARGETS, refusal, seeds
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

EXAMPLES = int(os.environ.get("KVCAL_FUZZ_EXAMPLES", 0))


def bounded(examples: int) -> Any:
    slow = [HealthCheck.too_slow, HealthCheck.data_too_large]
    same = {"derandomize": not EXAMPLES, "database": None, "deadline": None}
    return settings(max_examples=EXAMPLES or examples, suppress_health_check=slow, **same)


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([10**30, -1, 0, 1.5, 1e308, float("nan"), float("inf"), "\ud800", "\x1b[2J\n", "../x", ""])
    | st.floats()
    | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Of every value in a JSON document, except of the document itself."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, item in items for place in ((*path, key), *places(item, (*path, key)))]


def changed(document: Any, place: tuple[Any, ...], new: Any, how: str) -> Any:
    document = copy.deepcopy(document)
    inside = document
    for key in place[:-1]:
        inside = inside[key]
    if how == "remove":
        del inside[place[-1]]
    elif how == "add" and isinstance(inside, dict):
        inside[str(new)[:20]] = new
    else:
        inside[place[-1]] = new
    return document


@bounded(200)
@given(st.data())
def test_a_manifest_with_anything_in_any_place(data: st.DataObject) -> None:
    document = json.loads(seeds("manifest")[0])
    for _ in range(data.draw(st.integers(1, 2))):
        place = data.draw(st.sampled_from(places(document)))
        document = changed(document, place, data.draw(JSON), data.draw(st.sampled_from(["set", "remove", "add"])))
    refusal("manifest", json.dumps(document).encode())


@bounded(200)
@given(st.data())
def test_a_stage_file_with_anything_in_its_header(data: st.DataObject) -> None:
    (whole,) = seeds("stage_file")
    size = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + size])
    place = data.draw(st.sampled_from(places(header)))
    new = json.dumps(changed(header, place, data.draw(JSON), data.draw(st.sampled_from(["set", "remove", "add"]))))
    stated = data.draw(st.sampled_from([len(new), len(new) - 1, len(new) + 1, 0, 2**63, 2**64 - 1]))
    refusal("stage_file", stated.to_bytes(8, "little") + new.encode() + whole[8 + size :])


@bounded(100)
@given(st.data())
def test_a_recipe_with_anything_in_any_place(data: st.DataObject) -> None:
    import yaml

    document = yaml.safe_load(seeds("recipe")[0])
    place = data.draw(st.sampled_from(places(document)))
    document = changed(document, place, data.draw(JSON), data.draw(st.sampled_from(["set", "remove", "add"])))
    refusal("recipe", yaml.dump(document).encode("utf-8", "surrogatepass"))


WORDS = "stdlib a.txt set plain train org/name * ** [ ] ? : @ / ~ ~x . é wikitext .json".split()  # noqa: SIM905
WORDS += ["\0", "\n", " ", "\udc80", "a" * 300]


@bounded(100)
@given(st.lists(st.sampled_from(WORDS) | st.text(max_size=3), max_size=8).map("".join))
def test_any_specification_of_text(spec: str) -> None:
    refusal("data_spec", spec.encode("utf-8", "surrogatepass"))


@pytest.mark.parametrize("target", TARGETS)
@bounded(60)
@given(st.data())
def test_any_bytes_and_bytes_changed_anywhere(target: str, data: st.DataObject) -> None:
    if data.draw(st.integers(0, 4)) == 0:
        refusal(target, data.draw(st.binary(max_size=60)))
        return
    whole = bytearray(data.draw(st.sampled_from(seeds(target))))
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, len(whole)))
        whole[start : start + data.draw(st.integers(0, 4))] = data.draw(st.binary(max_size=4))
    refusal(target, bytes(whole))


@pytest.mark.parametrize("target", TARGETS)
def test_the_seeds_are_taken(target: str) -> None:
    """Otherwise every input would be refused at the first check, and nothing behind it be tried."""
    assert any(refusal(target, seed) is None for seed in seeds(target))
