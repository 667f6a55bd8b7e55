import fcntl
import os
import resource
import signal

import pytest
import torch
from forked import forked
from samples import artifact

from kvcal.artifacts import ArtifactError, KvcalError, Stage, load, save


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def cluster_like(seed=0):
    """A small valid stage `clusters` for the sample artifact."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(2):
        prefix = f"layers.{layer}"
        for name, shape in {"centroids": (2, 3, 4), "value_mean": (2, 3, 3), "curve.radius": (2, 2)}.items():
            tensors[f"{prefix}.{name}"] = torch.randn(shape, generator=generator)
        for name in ("radius_mean", "radius_p95", "radius_max"):
            tensors[f"{prefix}.{name}"] = torch.rand(2, 3, generator=generator)
        tensors[f"{prefix}.sizes"] = torch.full((2, 3), 2)
        tensors[f"{prefix}.curve.counts"] = torch.tensor([1, 2])
        for name in ("curve.query_norm_max", "curve.query_norm_p99"):
            tensors[f"{prefix}.{name}"] = torch.rand(2, generator=generator)
        for name in (
            "inertia",
            "silhouette",
            *(f"warm_start.{s}_inertia" for s in ("calibrated", "plusplus", "random")),
        ):
            tensors[f"{prefix}.{name}"] = torch.rand(2, generator=generator, dtype=torch.float64)
        for start in ("calibrated", "plusplus", "random"):
            tensors[f"{prefix}.warm_start.{start}_iterations"] = torch.tensor([3, 4])
    return Stage(tensors, {"seed": seed})


def test_what_is_saved_is_what_is_loaded(tmp_path):
    original = artifact()
    loaded = load(save(original, tmp_path / "a").folder)
    assert (loaded.model, loaded.layers, loaded.data, loaded.settings, loaded.versions) == (
        original.model,
        original.layers,
        original.data,
        original.settings,
        original.versions,
    )
    for name, stage in original.stages.items():
        assert set(loaded.stages[name].tensors) == set(stage.tensors)
        for tensor, expected in stage.tensors.items():
            found = loaded.stages[name].tensors[tensor]
            assert found.dtype == expected.dtype and torch.equal(found, expected)


def test_asking_for_what_is_not_there_lists_what_is(tmp_path):
    found = save(artifact(), tmp_path / "a")
    with pytest.raises(ArtifactError, match=r"no stage 'clusters'.*moments, pca, reservoir, score.*calibrate cluster"):
        found.tensor("clusters", 0, "sizes")
    with pytest.raises(ArtifactError, match="no layer 2, it has 2"):
        found.tensor("pca", 2, "key_post.mean")
    with pytest.raises(ArtifactError, match=r"no tensor 'nope' in stage score .*post.key_map"):
        found.tensor("score", 0, "nope")


def test_same_artifact_same_bytes(tmp_path):
    save(artifact(), tmp_path / "a")
    save(artifact(), tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_content_hash_depends_on_tensors_and_settings(tmp_path):
    hashes = {save(artifact(seed), tmp_path / str(seed)).content_hash for seed in (0, 1)}
    assert len(hashes) == 2


def test_adding_and_replacing_a_stage_leaves_the_others_and_no_litter(tmp_path):
    saved = save(artifact(), tmp_path / "a")
    before = contents(tmp_path / "a")
    first = save(saved.with_stage("clusters", cluster_like(0)), tmp_path / "a")
    second = save(first.with_stage("clusters", cluster_like(1)), tmp_path / "a")
    after = contents(tmp_path / "a")
    clusters = [name for name in after if name.startswith("clusters.")]
    assert len(clusters) == 1
    assert {name: after[name] for name in before if name != "manifest.json"} == {
        name: data for name, data in before.items() if name != "manifest.json"
    }
    assert set(after) == {*before, *clusters}
    assert second.stages["clusters"].settings == {"seed": 1}


def test_an_existing_folder_of_something_else_is_refused_and_kept(tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "important.txt").write_text("keep me")
    with pytest.raises(ArtifactError, match="already exists"):
        save(artifact(), tmp_path / "notes")
    assert contents(tmp_path / "notes") == {"important.txt": b"keep me"}


def test_an_existing_artifact_is_not_overwritten_by_another(tmp_path):
    save(artifact(0), tmp_path / "a")
    before = contents(tmp_path / "a")
    with pytest.raises(ArtifactError, match="already exists"):
        save(artifact(1), tmp_path / "a")
    assert contents(tmp_path / "a") == before


def test_an_empty_folder_is_taken(tmp_path):
    (tmp_path / "a").mkdir()
    save(artifact(), tmp_path / "a")
    assert load(tmp_path / "a").name.endswith("a")


def test_a_stage_that_another_writer_added_meanwhile_is_not_lost(tmp_path):
    saved = save(artifact(), tmp_path / "a")
    save(saved.with_stage("clusters", cluster_like(0)), tmp_path / "a")
    with pytest.raises(ArtifactError, match="changed meanwhile"):
        save(saved.with_stage("score", saved.stages["score"]), tmp_path / "a")
    assert "clusters" in load(tmp_path / "a").stages


def test_what_a_killed_process_left_is_removed(tmp_path):
    """What a living one has it has locked; what only looks like a workplace is somebody's."""
    for name in (f".kvcal-{'0' * 16}", f".kvcal-{'1' * 16}", ".kvcal-notes"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "part").write_text("half")
    alive = os.open(tmp_path / f".kvcal-{'1' * 16}", os.O_RDONLY)
    fcntl.flock(alive, fcntl.LOCK_EX)
    save(artifact(), tmp_path / "a")
    os.close(alive)
    assert {path.name for path in tmp_path.iterdir()} == {"a", f".kvcal-{'1' * 16}", ".kvcal-notes"}


@pytest.fixture
def tiny_disk():
    """Files beyond 2 kB cannot be written: what a full disk does to a writer, without one."""
    previous = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2048, previous[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, previous)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_leaves_no_half_artifact(tmp_path, tiny_disk):
    with pytest.raises(KvcalError, match="cannot be written"):
        save(artifact(), tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_the_old_artifact_intact(tmp_path, request):
    saved = save(artifact(), tmp_path / "a")
    before = contents(tmp_path / "a")
    request.getfixturevalue("tiny_disk")
    with pytest.raises(KvcalError, match="cannot be written"):
        save(saved.with_stage("clusters", cluster_like()), tmp_path / "a")
    assert contents(tmp_path / "a") == before


@pytest.mark.parametrize("after", [0, 1, 2])
def test_killed_in_the_middle_of_an_update_an_artifact_loads(tmp_path, monkeypatch, after):
    """SIGKILL before each rename: of the stage's file, of the manifest, which is the commit, and of the card."""
    saved = save(artifact(), tmp_path / "a")
    real, renames = os.rename, []

    def rename(*args, **more):
        if len(renames) == after:
            os.kill(os.getpid(), signal.SIGKILL)
        renames.append(args)
        real(*args, **more)

    def update():
        changed = {name: tensor + 1 for name, tensor in saved.stages["score"].tensors.items()}
        save(saved.with_stage("score", Stage(changed)), tmp_path / "a", {"README.md": b"x"})

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", rename)
        assert forked(update) == -signal.SIGKILL
    found = load(tmp_path / "a")
    assert (found.content_hash == saved.content_hash) == (after < 2)
    before, now = saved.tensor("pca", 0, "key_post.mean"), found.tensor("pca", 0, "key_post.mean")
    assert torch.equal(before, now)
    # and the next update goes through, and removes what the killed one left
    save(load(tmp_path / "a").with_stage("clusters", cluster_like()), tmp_path / "a")
    assert not list((tmp_path / "a").glob(".*"))
