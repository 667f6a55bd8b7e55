"""`evaluate` and `cluster` in several processes: what one process finds, also after a kill."""

import json
import random
import shutil
import signal

import pytest
from ranks import start

SETTINGS = ("--method", "loki,streaming", "--keep", ".5,16", "--prefix", 48, "--continuation", 8, "--windows", 3)
SETTINGS += ("--tasks", "perplexity,passkey", "--lengths", 64, "--episodes", 3, "--batch-size", 2)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    rng = random.Random(0)
    words = [f"{a}{b}{c}{d}" for a in "bdfg" for b in "aei" for c in "lmn" for d in "ou"]
    path = tmp_path_factory.mktemp("text") / "notes.txt"
    path.write_text("\n".join(" ".join(rng.choices(words, k=9)) + "." for _ in range(200)))
    return path


@pytest.fixture(scope="module")
def artifact(tmp_path_factory, tiny_model_folder, text):
    folder = tmp_path_factory.mktemp("artifact")
    words = ("pca", "--model", tiny_model_folder, "--data", text, "--output", folder / "a", "--num-tokens", 1024)
    job = start(folder / "logs", [*words, "--seq-len", 64, "--reservoir", 100], 1)
    assert job.wait() == [0], job.err
    return folder / "a"


@pytest.fixture(scope="module")
def evaluate(artifact, text):
    return lambda output: ["evaluate", artifact, "--data", text, *SETTINGS, "--output", output]


@pytest.fixture(scope="module")
def single(tmp_path_factory, evaluate):
    folder = tmp_path_factory.mktemp("single")
    job = start(folder / "logs", evaluate(folder / "r.json"), 1)
    assert job.wait() == [0], job.err
    return untimed(folder / "r.json")


def untimed(path):
    """The results but for times, and the predictions."""
    body = json.loads(path.read_text())
    for row in body["results"]:
        assert row.pop("ms_per_step") > 0
    lines = [json.loads(line) for line in path.with_name("r.predictions.jsonl").read_text().splitlines()]
    assert len(lines) == 5 * 3  # settings by episodes
    return body, lines


@pytest.mark.parametrize("size", [2, 3])
def test_evaluate_finds_the_numbers_of_one_process(tmp_path, evaluate, single, size):
    """Windows and episodes leave a short batch each; all but times are equal, to the last bit."""
    job = start(tmp_path / "logs", evaluate(tmp_path / "r.json"), size)
    assert job.wait() == [0] * size, job.err
    assert untimed(tmp_path / "r.json") == single
    assert "loki" in job.out(0) and not job.out(1)
    assert [path.name for path in tmp_path.glob("r.json*")] == ["r.json"]


@pytest.mark.parametrize("size", [1, 2])
def test_what_a_killed_job_measured_is_kept_for_any_number_of_processes(tmp_path, evaluate, single, size):
    slow = "import time\nfrom kvcal.calibrate.evaluation.results import Results\nadd = Results.add\n"
    slow += "Results.add = lambda self, *rest: (time.sleep(0.2), add(self, *rest))[1]"
    job = start(tmp_path / "logs", evaluate(tmp_path / "r.json"), 2, slow)
    share = tmp_path / "r.json.rank-1"

    def measured(path):
        return sum(map(len, json.loads(path.read_text()).get("partial", {}).values())) if path.exists() else 0

    job.until(lambda: measured(share) >= 2)
    for rank in range(2):
        job.kill(rank)
    assert job.wait() == [-signal.SIGKILL] * 2
    there = measured(share) + measured(tmp_path / "r.json")
    count = (tmp_path / "count").as_posix()
    counted = "from kvcal.calibrate.evaluation.results import Results\nadd = Results.add\n"
    counted += f"def count(self, *rest):\n    open('{count}', 'a').write('1')\n    return add(self, *rest)\n"
    again = start(tmp_path / "again", evaluate(tmp_path / "r.json"), size, counted + "Results.add = count")
    assert again.wait() == [0] * size, again.err
    assert untimed(tmp_path / "r.json") == single and not share.exists()
    assert there + len((tmp_path / "count").read_text()) == 5 * 4  # settings by batches


@pytest.mark.parametrize(("size", "metric"), [(2, "cosine"), (3, "cosine"), (2, "joint")])
def test_cluster_finds_the_bytes_of_one_process(tmp_path, artifact, size, metric):
    """4 heads of 2 layers."""
    stages = []
    for number in (1, size):
        folder = tmp_path / str(number)
        shutil.copytree(artifact, folder)
        job = start(tmp_path / f"logs-{number}", ["cluster", folder, "--clusters", 5, "--metric", metric], number)
        assert job.wait() == [0] * number, job.err
        stages.append({path.name: path.read_bytes() for path in folder.iterdir()})
    made = "codebook." if metric == "joint" else "clusters."
    assert stages[0] == stages[1] and any(name.startswith(made) for name in stages[0])


def test_keys_that_cannot_be_clustered_are_told_once(tmp_path, artifact):
    job = start(tmp_path / "logs", ["cluster", artifact, "--clusters", 1000], 3)
    assert job.wait() == [2, 2, 2]
    assert len(job.err) == 1 and "100 keys cannot make 1000 clusters" in job.err[0]
