from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import constants

from kvcal.artifacts import KvcalError
from kvcal.calibrate.data import open_data
from kvcal.calibrate.models import resolve_model
from kvcal.runtime import hub, load

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OTHER = "f" * 40


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Hub cache on disk: main -> COMMIT, and OTHER without a branch."""
    root = tmp_path / "hub"
    repository = root / "models--org--name"
    blob = repository / "blobs" / "aaaa"
    blob.parent.mkdir(parents=True)
    blob.write_text("{}")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    for commit in (COMMIT, OTHER):
        snapshot = repository / "snapshots" / commit
        snapshot.mkdir(parents=True)
        (snapshot / "config.json").symlink_to("../../blobs/aaaa")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(root))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return root


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> Any:
        raise AssertionError("the network was used")

    monkeypatch.setattr(hub, "unreachable", fail)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A Hub that knows the model org/remote and nothing else."""

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(200)
            self.end_headers()

        def do_GET(self) -> None:
            known = self.path.startswith("/api/models/org/remote")
            body = json.dumps({"id": "org/remote", "sha": COMMIT, "siblings": []} if known else {}).encode()
            self.send_response(200 if known else 404)
            if not known:
                self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    httpd = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=httpd.serve_forever, args=(0.02,), daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{httpd.server_port}")
    yield
    httpd.shutdown()
    httpd.server_close()


@pytest.mark.parametrize(
    ("revision", "commit"), [(None, COMMIT), ("main", COMMIT), (COMMIT, COMMIT), (OTHER, OTHER)], ids=str
)
def test_cached_snapshot_needs_no_network(cache: Path, no_network: None, revision: str | None, commit: str) -> None:
    found = hub.locate("org/name", "model", revision)
    assert found == hub.Located(cache / "models--org--name" / "snapshots" / commit, commit)


def test_without_a_ref_the_newest_snapshot_is_the_default(cache: Path, no_network: None) -> None:
    """Such is a cache after a download by commit, and ours are."""
    (cache / "models--org--name" / "refs" / "main").unlink()
    for age, newest in enumerate([OTHER, COMMIT, OTHER]):
        os.utime(cache / "models--org--name" / "snapshots" / newest, (2e9 + age, 2e9 + age))
        assert hub.locate("org/name").revision == newest
    with pytest.raises(AssertionError, match="the network was used"):
        hub.locate("org/name", revision="v2")


def test_a_model_is_no_dataset(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(KvcalError, match=r"dataset org/name.*--repo-type dataset"):
        hub.locate("org/name", "dataset")


@pytest.mark.parametrize(("name", "revision"), [("org/absent", None), ("org/name", "v2")])
def test_offline_error_is_one_line_that_says_what_where_and_what_to_do(
    cache: Path, no_network: None, monkeypatch: pytest.MonkeyPatch, name: str, revision: str | None
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(KvcalError) as caught:
        hub.locate(name, "model", revision)
    message = str(caught.value)
    assert "\n" not in message
    for part in (name, revision or "", str(cache), f"hf download {name}", "HF_HUB_OFFLINE"):
        assert part in message


def test_partial_snapshot_is_not_taken(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(KvcalError, match=r"only without weights in the Hub cache"):
        hub.locate("org/name", lacking=lambda folder: "weights")
    assert hub.locate("org/name", lacking=lambda folder: None).revision == COMMIT


def _refusing_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_refused_connection_fails_at_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    endpoint = f"http://127.0.0.1:{_refusing_port()}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    start = time.monotonic()
    with pytest.raises(KvcalError, match=f"{endpoint} does not answer.*hf download org/absent"):
        hub.locate("org/absent")
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("hangs", ["connection", "name look-up"])
def test_black_hole_costs_one_time_out(cache: Path, monkeypatch: pytest.MonkeyPatch, hangs: str) -> None:
    assert hub.TIMEOUT_S <= 3
    monkeypatch.setattr(hub, "TIMEOUT_S", 0.3)
    released = threading.Event()
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()  # connections are queued and never answered
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        if hangs == "name look-up":

            def look_up(*_: Any, **__: Any) -> Any:
                released.wait(60)
                raise OSError("no such host")

            monkeypatch.setattr(constants, "ENDPOINT", "http://hub.invalid")
            monkeypatch.setattr(socket, "getaddrinfo", look_up)
        start = time.monotonic()
        with pytest.raises(KvcalError, match="does not answer"):
            hub.locate("org/absent")
        assert time.monotonic() - start < 3
        released.set()


def test_online_gives_the_commit(cache: Path, server: None) -> None:
    assert hub.locate("org/remote") == hub.Located(None, COMMIT)


def test_online_but_unknown(cache: Path, server: None) -> None:
    with pytest.raises(KvcalError, match=r"^model org/absent: the Hub has no such repository.*spelling"):
        hub.locate("org/absent")


@pytest.mark.parametrize("name", ["org/na me", "a/b/c", "org/..", ""])
def test_invalid_ids(cache: Path, no_network: None, name: str) -> None:
    with pytest.raises(KvcalError, match="not a Hub id"):
        hub.locate(name)


TOO_LONG = ["a" * 201, "a" * 5000, "a/" * 1000 + "a", "é" * 150]


@pytest.mark.parametrize("revision", TOO_LONG, ids=lambda revision: f"{revision[:2]}{len(revision)}")
def test_a_revision_that_is_no_name_of_a_file(cache: Path, no_network: None, revision: str) -> None:
    """Models, data sets and artifacts: wherever a revision may stand."""
    asked = (
        lambda: hub.locate("org/name", "model", revision),
        lambda: load(f"org/name@{revision}"),
        lambda: load("org/name", revision),
        lambda: resolve_model(f"org/name@{revision}"),
        lambda: resolve_model(f"mistral-7b@{revision}"),
        lambda: open_data(f"org/name@{revision}:plain"),
        lambda: hub.check_revision("org/name", revision),
    )
    for ask in asked:
        with pytest.raises(KvcalError, match=r"no name of a branch or tag|does not exist") as caught:
            ask()
        assert len(str(caught.value)) < 3100


def test_what_the_cache_notes_does_not_lead_out_of_it(cache: Path, no_network: None) -> None:
    outside = cache / "outside"
    outside.mkdir()
    for noted in ("../../../outside", str(outside), "..", "\udcff"):
        (cache / "models--org--name" / "refs" / "main").write_text(noted, errors="surrogateescape")
        assert hub.locate("org/name").folder.parent.name == "snapshots"


@pytest.mark.parametrize("sha", ["../../x", "x" * 5000, "\x1b[2J", None, COMMIT + "\n"], ids=ascii)
def test_a_hub_that_answers_with_no_commit(
    cache: Path, server: None, monkeypatch: pytest.MonkeyPatch, sha: str | None
) -> None:
    monkeypatch.setattr("huggingface_hub.HfApi.repo_info", lambda *_, **__: SimpleNamespace(sha=sha))
    with pytest.raises(KvcalError, match="the Hub answered with a commit") as caught:
        hub.locate("org/remote")
    assert "\x1b" not in str(caught.value)


@pytest.mark.parametrize("revision", ["/", "..", "../../..", "a/../../b", "/etc", "a//b", "a/", "a\0", "a\nb", "~", ""])
def test_a_revision_does_not_lead_out_of_the_cache(cache: Path, no_network: None, revision: str) -> None:
    with pytest.raises(KvcalError, match="no name of a branch or tag"):
        hub.locate("org/name", "dataset", revision)


@pytest.mark.parametrize("revision", ["v1.0", "refs/pr/3", "feature/x_y-z", "_a", "2024+b"])
def test_names_of_branches(cache: Path, revision: str) -> None:
    folder = cache / "models--org--name" / "refs" / revision
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.write_text(COMMIT)
    assert hub.locate("org/name", revision=revision).revision == COMMIT


def test_one_line() -> None:
    assert hub.one_line(ValueError("first  line\nsecond\n")) == "first line second"
    assert hub.one_line(EOFError()) == "EOFError"
    assert len(hub.one_line(ValueError("x" * 1000))) == 200
