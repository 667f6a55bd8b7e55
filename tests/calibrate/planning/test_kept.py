"""The file of measurements: what goes in comes out, and what is of something else does not."""

from __future__ import annotations

import json
import math

import pytest

from kvcal.calibrate.planning.kept import Kept, beside, is_kept
from kvcal.calibrate.planning.points import Point

OF = {"weights_sha256": "1" * 64, "batch_size": 8, "tasks": ("a", "b")}
POINT = Point({"method": "loki", "keep": 1 / 3}, 0.1, 0.2, math.pi, (0.3, 0.4), (0.5,))


@pytest.fixture
def path(tmp_path):
    made = Kept(OF, beside(tmp_path / "plan.json"))
    made.add(3, [POINT])
    made.divergence["key"] = [1 / 7]
    made.checked.append({"method": "full"})
    made.write()
    return made.path


def test_numbers_come_back_as_they_were(path):
    assert path.name == "plan.measured.json" and is_kept(path)
    found, replaced = Kept.open(OF, path)
    assert not replaced and found.points == {3: {next(iter(found.points[3])): POINT}}
    assert found.divergence == {"key": [1 / 7]} and found.checked == [{"method": "full"}]
    assert found.of_layer(3, [POINT.setting]) == [POINT]
    other = {"method": "loki", "keep": 0.5}
    assert found.missing(3, [POINT.setting, other]) == [other] and found.missing(2, [other]) == [other]


def test_a_count_is_not_a_fraction():
    kept = Kept()
    kept.add(0, [Point({"method": "loki", "keep": 1.0}, 1.0, 0.0, 0.0, ())])
    assert kept.missing(0, [{"keep": 1.0, "method": "loki"}]) == [] and kept.missing(0, [{"method": "loki", "keep": 1}])


@pytest.mark.parametrize(
    "edit",
    [
        lambda body: body["of"].update(batch_size=4),
        lambda body: body.update(format=2),
        lambda body: body.pop("points"),
        lambda body: body.update(points=[]),
        lambda body: body["points"]["3"][0].pop("loss"),
        lambda body: body["points"]["3"][0].update(spin=1),
        lambda body: body["points"].update(x=[]),
        lambda body: body.update(divergence=3),
        lambda body: body.update(divergence={"key": ["x"]}),
        lambda body: body.update(checked=[3]),
    ],
)
def test_what_is_of_something_else_or_damaged_is_measured_again(path, edit):
    body = json.loads(path.read_text())
    edit(body)
    path.write_text(json.dumps(body))
    found, replaced = Kept.open(OF, path)
    assert replaced and (found.points, found.divergence, found.checked) == ({}, {}, [])


def test_no_file_and_no_json(tmp_path, path):
    found, replaced = Kept.open(OF, tmp_path / "none")
    assert not replaced and found.points == {}
    path.write_bytes(b"\xff[")
    assert Kept.open(OF, path)[1] and not is_kept(path)


def test_without_a_path_nothing_is_written():
    Kept().write()
