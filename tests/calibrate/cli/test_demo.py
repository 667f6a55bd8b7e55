import json

from click.testing import CliRunner

from kvcal.artifacts import load
from kvcal.calibrate.cli import cli, demo


def test_demo_goes_the_whole_road_and_recognises_its_own_work(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "NUM_TOKENS", 8192)  # 131072 takes a minute
    monkeypatch.setattr(demo, "PROMPTS", {"prefix": 256, "continuation": 8, "windows": 2, "episodes": 2})
    people = CliRunner().invoke(cli, ["demo", "--output", str(tmp_path / "demo")])
    assert people.exit_code == 0 and "rank@90" in people.stdout and str(tmp_path / "demo") in people.stdout
    assert "MB a step" in people.stdout and "already calibrated" not in people.stderr
    before = load(tmp_path / "demo").content_hash
    result = CliRunner().invoke(cli, ["demo", "--output", str(tmp_path / "demo"), "--json"])
    assert result.exit_code == 0 and "already calibrated" in result.stderr, result.output
    found = json.loads(result.stdout)
    artifact = load(tmp_path / "demo")
    assert set(artifact.stages) == {"moments", "pca", "score", "reservoir", "codebook", "clusters"}
    assert found["artifact"]["content_hash"] == artifact.content_hash == before
    assert {"README.md", "rank.png", "clusters.png", "quality.png"} <= {
        path.name for path in (tmp_path / "demo").iterdir()
    }
    # Loki's finding: keys lie in fewer dimensions before the rotary embedding than after it.
    assert found["ranks"]["model"]["key_pre"] < found["ranks"]["model"]["key_post"] < 64
    full, loki, spectral = found["results"]
    assert [row["method"] for row in found["results"]] == ["full", "loki", "spectral"]
    assert spectral["bytes_per_step"] < loki["bytes_per_step"] < full["bytes_per_step"]
    text, asked = found["side_by_side"]
    assert len(text["continuations"]) == 3 and asked["prompt"].startswith("\nWhat is the code of")
    whole, *compressed = asked["continuations"]
    assert whole["text"].strip().isdigit()
    assert all(each["bytes_per_step"] < whole["bytes_per_step"] for each in compressed)
