"""Interrupted uptrainings end where uninterrupted ones do, bit for bit."""

import json

import pytest
import torch
from architectures import build
from cla_samples import STEPS, train, with_dropout

from kvcal.artifacts import KvcalError
from kvcal.calibrate.cla import start


class Stop(Exception):
    pass


def stop_after(steps):
    def progress(done, total, loss):
        if done == steps:
            raise Stop

    return progress


def folder_of(beside):
    return beside.with_name(f"{beside.name}.uptraining")


def tensors_of(beside):
    (path,) = folder_of(beside).glob("state-*.safetensors")
    return path


@pytest.mark.parametrize("pool", ["mean", "fitted"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("what", ["shared", "all"])
def test_resumed_training_gives_the_same_bits(tmp_path, what, dtype, pool, monkeypatch):
    settings = {"train": what, "pool": pool}
    straight = train(with_dropout().to(dtype), **settings)
    with pytest.raises(Stop):
        train(with_dropout().to(dtype), tmp_path / "a", **settings, checkpoint_every=2, progress=stop_after(5))
    assert tensors_of(tmp_path / "a").name.startswith("state-4.")
    monkeypatch.setattr(start, "fit_projections", None)  # a checkpoint needs no fit
    resumed = train(with_dropout().to(dtype), tmp_path / "a", **settings, resume=True)
    assert resumed.history == straight.history and resumed.settings == straight.settings
    assert resumed.weights.keys() == straight.weights.keys()
    assert all(torch.equal(resumed.weights[name], weight) for name, weight in straight.weights.items())


def interrupted(beside):
    with pytest.raises(Stop):
        train(build("llama"), beside, checkpoint_every=2, progress=stop_after(3))
    return folder_of(beside)


@pytest.mark.parametrize("every", [1, 4, 100])
def test_a_finished_training_is_there_for_what_comes_after_it(tmp_path, every):
    finished = train(build("llama"), tmp_path / "a", checkpoint_every=every)
    assert len(json.loads((folder_of(tmp_path / "a") / "state.json").read_text())["body"]["history"]) == STEPS
    again = train(build("llama"), tmp_path / "a", resume=True, progress=stop_after(STEPS + 1))
    assert again.history == finished.history
    assert all(torch.equal(again.weights[name], weight) for name, weight in finished.weights.items())


def test_one_state_is_kept(tmp_path):
    folder = interrupted(tmp_path / "a")
    kept = tensors_of(tmp_path / "a")
    assert kept.name.startswith("state-2.")
    assert sorted(path.name for path in folder.iterdir()) == sorted(["lock", kept.name, "state.json"])


def test_an_interrupted_run_is_neither_overwritten_nor_mixed_up(tmp_path):
    interrupted(tmp_path / "a")
    with pytest.raises(KvcalError, match="add --resume"):
        train(build("llama"), tmp_path / "a")
    for other in ({"lr": 1e-3}, {"seed": 1}, {"steps": STEPS + 1}, {"pool": "first"}, {"distill": 0.5}):
        with pytest.raises(KvcalError, match="another model, text or settings"):
            train(build("llama"), tmp_path / "a", resume=True, **other)
    with pytest.raises(KvcalError, match="another model, text or settings"):
        train(build("llama", seed=1), tmp_path / "a", resume=True)


@pytest.mark.parametrize("damage", ["json", "tensors", "missing", "shape", "bit"])
def test_a_damaged_state_is_said_in_one_line(tmp_path, damage):
    folder = interrupted(tmp_path / "a")
    state = folder / "state.json"
    if damage == "json":
        state.write_text(state.read_text()[:-5])
    elif damage == "bit":  # which leaves it a number
        path = tensors_of(tmp_path / "a")
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    elif damage == "missing":
        tensors_of(tmp_path / "a").unlink()
    elif damage == "tensors":
        tensors_of(tmp_path / "a").write_bytes(b"no tensors")
    else:
        body = json.loads(state.read_text())
        del body["body"]["history"]
        state.write_text(json.dumps(body))
    with pytest.raises(KvcalError, match=r"damaged.*remove the folder") as error:
        train(build("llama"), tmp_path / "a", resume=True)
    assert "\n" not in str(error.value)


def test_a_diverged_training_keeps_its_last_checkpoint(tmp_path):
    of = build("llama")

    def poison(done, total, loss):
        if done == 3:  # after the checkpoint of step 2
            with torch.no_grad():
                of.get_parameter("model.layers.0.self_attn.k_proj.weight").fill_(torch.nan)

    with pytest.raises(KvcalError, match=r"nan at step 4 of 6.*checkpoint in .*a\.uptraining is of an earlier step"):
        train(of, tmp_path / "a", checkpoint_every=2, progress=poison)
    assert tensors_of(tmp_path / "a").name.startswith("state-2.")


def test_without_a_place_there_are_no_checkpoints(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train(build("llama"), checkpoint_every=1)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_said_and_the_previous_state_survives(tmp_path, monkeypatch):
    from kvcal.artifacts import workplace

    def full(tensors, path):
        raise OSError(28, "No space left on device")

    interrupted(tmp_path / "a")
    monkeypatch.setattr(workplace, "save_file", full)
    with pytest.raises(KvcalError, match="free some space"):
        train(build("llama"), tmp_path / "a", checkpoint_every=2, resume=True)
    monkeypatch.undo()
    resumed, straight = train(build("llama"), tmp_path / "a", resume=True), train(build("llama"))
    assert resumed.history == straight.history
