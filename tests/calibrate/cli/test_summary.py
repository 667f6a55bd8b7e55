"""What `inspect` says of an artifact."""

from __future__ import annotations

from samples import artifact as sample

from kvcal.artifacts import save
from kvcal.calibrate.cli.summary import artifact_summary, print_summary

LOSSES = {"first_losses": {"loss": 3.0, "kl": 2.0}, "last_losses": {"loss": 1.5, "kl": 0.5}}


def shown(uptraining: dict[str, object], tmp_path, capsys) -> str:
    made = save(sample(), tmp_path / "a")
    summary = artifact_summary(made)
    summary["stages"] = {"cla": {"bytes": 1, "tensors": 1, "settings": {"uptraining": uptraining}}}
    print_summary(summary)
    return str(capsys.readouterr().out)


def test_one_training(tmp_path, capsys) -> None:
    first = {"steps": 100, **LOSSES}
    assert "100 steps (loss 3.000 → 1.500, kl 2.000 → 0.500)" in shown(first, tmp_path, capsys)


def test_trainings_are_added_up_and_the_last_one_s_losses_told(tmp_path, capsys) -> None:
    fitted = {"steps": 0, "first_losses": {}, "last_losses": {}}
    second = {"steps": 250, **LOSSES, "earlier": {"steps": 100, **LOSSES, "earlier": fitted}}
    assert "350 steps in 2 trainings (the last 250: loss 3.000 → 1.500" in shown(second, tmp_path, capsys)


def test_a_fit_has_no_steps(tmp_path, capsys) -> None:
    assert "fitted, no steps" in shown({"steps": 0, "first_losses": {}, "last_losses": {}}, tmp_path, capsys)
