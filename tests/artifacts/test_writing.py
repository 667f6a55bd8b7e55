"""Several writers at once, signals at any moment, and modes of files. Faults of the disk are in test_faulty_disk."""

import errno
import os
import random
import signal
import stat
import threading

import pytest
from forked import forked
from samples import artifact, rescored

from kvcal.artifacts import KvcalError, Stage, load, locks, save
from kvcal.artifacts.locks import FileLock
from kvcal.artifacts.signals import signals_held
from kvcal.artifacts.workplace import Workplace
from kvcal.artifacts.writing import new_folder, save_tensors, write_atomically


def in_threads(count, run):
    errors = []

    def guarded(number):
        try:
            run(number)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors


def changed(found, by):
    return found.with_stage("score", rescored(found, by))


def test_many_writers_of_one_file_leave_what_one_of_them_wrote(tmp_path):
    contents = [bytes([number]) * 10_000 for number in range(4)]
    errors = in_threads(4, lambda number: [write_atomically(tmp_path / "f", contents[number]) for _ in range(20)])
    assert errors == [] and (tmp_path / "f").read_bytes() in contents
    assert [path.name for path in tmp_path.iterdir()] == ["f"]


def test_of_many_writers_of_one_new_artifact_one_succeeds(tmp_path):
    errors = in_threads(4, lambda number: save(artifact(number), tmp_path / "a"))
    assert len(errors) == 3 and all(isinstance(error, KvcalError) for error in errors)
    load(tmp_path / "a")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_two_builders_of_one_folder_with_one_pid_do_not_meet(tmp_path, monkeypatch):
    """Two containers have a process 1 each."""
    monkeypatch.setattr(os, "getpid", lambda: 1)
    with pytest.raises(KvcalError, match="cannot be written"), new_folder(tmp_path / "a") as second:
        with new_folder(tmp_path / "a") as first:
            (first / "f").write_text("1")
            (second / "f").write_text("2")
        assert (second / "f").read_text() == "2"
    assert (tmp_path / "a/f").read_text() == "1"


def test_a_reader_gets_the_old_or_the_new_artifact_while_it_is_replaced(tmp_path):
    found = save(artifact(), tmp_path / "a")
    done = threading.Event()

    def write(_):
        current = found
        for number in range(25):
            current = save(changed(current, number + 1), tmp_path / "a")
        done.set()

    def read(_):
        while not done.is_set():
            opened = load(tmp_path / "a")
            for name in opened.stages["score"].tensors:
                opened.stages["score"].tensors[name]

    assert in_threads(3, lambda number: (read if number else write)(number)) == []


class Alarm(BaseException):
    pass


def test_signals_at_random_moments_leave_the_old_artifact_or_the_new_one(tmp_path):
    found = save(artifact(), tmp_path / "a")
    rng, interrupted = random.Random(0), 0

    def ring(number, frame):
        raise Alarm

    previous = signal.signal(signal.SIGALRM, ring)
    try:
        for number in range(120):
            wanted = changed(found, number + 1)
            try:
                signal.setitimer(signal.ITIMER_REAL, rng.uniform(1e-4, 8e-3))
                save(wanted, tmp_path / "a", {"README.md": b"card"})
                signal.setitimer(signal.ITIMER_REAL, 0)
            except Alarm:
                interrupted += 1
            signal.setitimer(signal.ITIMER_REAL, 0)
            assert signal.getsignal(signal.SIGALRM) is ring
            now = load(tmp_path / "a")
            tensors = now.stages["score"].tensors
            old, new = (found.stages["score"].tensors, wanted.stages["score"].tensors)
            assert all((tensors[name] == old[name]).all() for name in old) or all(
                (tensors[name] == new[name]).all() for name in new
            )
            found = now
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    assert interrupted > 20


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_held_signal_does_what_it_does_at_the_end(number):
    came = []
    previous = signal.signal(number, lambda *_: came.append(number))
    try:
        with signals_held():
            os.kill(os.getpid(), number)
            assert came == []
        assert came == [number]
    finally:
        signal.signal(number, previous)


def test_an_interrupt_while_handlers_are_put_back_leaves_no_signal_without_effect(monkeypatch):
    """Whichever handler could not be put back gives way at the first signal."""
    came, real = [], signal.signal
    numbers = (signal.SIGUSR1, signal.SIGUSR2)
    previous = {number: real(number, lambda given, _: came.append(given)) for number in numbers}
    try:
        with pytest.raises(Alarm), signals_held():

            def put_back(number, handler):
                if number in numbers:
                    raise Alarm
                return real(number, handler)

            monkeypatch.setattr(signal, "signal", put_back)
        monkeypatch.undo()
        for number in numbers:
            os.kill(os.getpid(), number)
        assert came == list(numbers)
    finally:
        for number, handler in previous.items():
            real(number, handler)


def test_a_folder_that_was_loaded_by_another_path_is_updated(tmp_path, monkeypatch):
    save(artifact(), tmp_path / "a")
    monkeypatch.chdir(tmp_path)
    found = load("a")
    monkeypatch.chdir("/")
    assert save(changed(found, 1), tmp_path / "a").content_hash != found.content_hash


def test_a_held_signal_that_ends_processes_ends_it_afterwards(tmp_path):
    def child():
        with signals_held():
            os.kill(os.getpid(), signal.SIGTERM)
            (tmp_path / "held").touch()
        (tmp_path / "never").touch()

    assert forked(child) == -signal.SIGTERM
    assert [path.name for path in tmp_path.iterdir()] == ["held"]


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o027])
def test_files_have_the_mode_that_the_umask_leaves(tmp_path, mask):
    previous = os.umask(mask)
    try:
        save(artifact(), tmp_path / "a", {"README.md": b"card"})
        write_atomically(tmp_path / "f", b"x")
        save_tensors(tmp_path / "t", artifact().stages["pca"].tensors)
    finally:
        os.umask(previous)
    modes = {
        stat.S_IMODE(path.stat().st_mode) for path in [*(tmp_path / "a").iterdir(), tmp_path / "f", tmp_path / "t"]
    }
    assert modes == {0o666 & ~mask}
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o777 & ~mask


def test_a_file_that_only_its_owner_may_read_stays_one(tmp_path):
    (tmp_path / "f").write_bytes(b"old")
    (tmp_path / "f").chmod(0o600)
    write_atomically(tmp_path / "f", b"new")
    assert (tmp_path / "f").read_bytes() == b"new" and stat.S_IMODE((tmp_path / "f").stat().st_mode) == 0o600


def test_no_mode_of_the_file_that_is_replaced_opens_the_new_one(tmp_path):
    (tmp_path / "f").write_bytes(b"a stranger's")
    (tmp_path / "f").chmod(0o4666)
    previous = os.umask(0o077)
    try:
        write_atomically(tmp_path / "f", b"new")
    finally:
        os.umask(previous)
    assert stat.S_IMODE((tmp_path / "f").stat().st_mode) == 0o600


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP])
def test_a_file_system_without_locks_is_written_to(tmp_path, monkeypatch, number):
    def flock(*args):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(locks.fcntl, "flock", flock)
    found = save(artifact(), tmp_path / "a")
    save(changed(found, 1), tmp_path / "a")
    FileLock(tmp_path / "lock").acquire()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "lock"]


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES])
def test_a_lock_that_fails_is_said(tmp_path, monkeypatch, number):
    def flock(*args):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(locks.fcntl, "flock", flock)
    with pytest.raises(KvcalError, match="cannot be written"):
        write_atomically(tmp_path / "f", b"new")
    with pytest.raises(KvcalError, match="cannot be written"):
        FileLock(tmp_path / "lock").acquire()
    assert not (tmp_path / "f").exists()


def test_a_file_system_that_cannot_sync_folders_is_written_to(tmp_path, monkeypatch):
    real = os.fsync

    def fsync(handle):
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    found = save(artifact(), tmp_path / "a")
    save(changed(found, 1), tmp_path / "a")


def test_a_card_that_cannot_be_placed_is_said_and_the_artifact_is_saved(tmp_path):
    found = save(artifact(), tmp_path / "a")
    (tmp_path / "a" / "README.md").mkdir()
    with pytest.raises(KvcalError, match="the artifact was saved, but not all that lies beside") as error:
        save(changed(found, 1), tmp_path / "a", {"README.md": b"card"})
    assert "nothing was changed" not in str(error.value)
    assert load(tmp_path / "a").content_hash != found.content_hash


@pytest.mark.parametrize("wrong", ["shape", "value", "setting"])
def test_what_could_not_be_loaded_again_replaces_nothing(tmp_path, wrong):
    found = save(artifact(), tmp_path / "a")
    before = {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()}
    tensors, settings = dict(found.stages["score"].tensors), {}
    name = "layers.0.post.key_map"
    if wrong == "shape":
        tensors[name] = tensors[name][:, :2]
    elif wrong == "value":
        tensors[name][0, 0, 0] = float("nan")
    else:
        settings["rate"] = float("nan")
    bad = found.with_stage("score", Stage(tensors, settings))
    with pytest.raises(KvcalError):
        save(bad, tmp_path / "a")
    assert {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()} == before
    with pytest.raises(KvcalError):
        save(bad, tmp_path / "b")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_users_file_beside_the_stages_is_kept(tmp_path):
    found = save(artifact(), tmp_path / "a")
    mine = tmp_path / "a" / "mine.01234567.safetensors"
    mine.write_text("keep")
    save(changed(found, 1), tmp_path / "a")
    assert mine.read_text() == "keep"


def test_a_workplace_can_be_entered_by_nobody_else(tmp_path):
    with Workplace(tmp_path) as work:
        assert stat.S_IMODE(work.path.stat().st_mode) == 0o700
    assert not list(tmp_path.iterdir())


def test_long_work_is_one_process_at_a_time(tmp_path):
    lock, other = FileLock(tmp_path / "new" / "lock"), FileLock(tmp_path / "new" / "lock")
    lock.acquire()
    lock.acquire()
    with pytest.raises(KvcalError, match="another process works on this now"):
        other.acquire()
    lock.release()
    other.acquire()
    other.release()


def test_a_lock_on_a_file_that_was_removed_is_none(tmp_path, monkeypatch):
    """Its holder removes it between our opening and our locking it; others lock the new file of that name."""
    real = locks.try_lock

    def late(handle):
        monkeypatch.setattr(locks, "try_lock", real)
        (tmp_path / "lock").unlink()
        return real(handle)

    monkeypatch.setattr(locks, "try_lock", late)
    FileLock(tmp_path / "lock").acquire()
    with pytest.raises(KvcalError, match="another process works on this now"):
        FileLock(tmp_path / "lock").acquire()


def test_a_lock_goes_with_its_process(tmp_path):
    def child():
        FileLock(tmp_path / "lock").acquire()
        os.kill(os.getpid(), signal.SIGKILL)

    assert forked(child) == -signal.SIGKILL
    FileLock(tmp_path / "lock").acquire()
