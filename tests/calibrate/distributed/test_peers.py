"""Who is missed and who is not, over real connections."""

import queue
import socket
import threading
import time

from kvcal.calibrate.distributed.peers import Peers


class Board:
    """Where ranks find what others posted."""

    def __init__(self):
        self.posted = {}

    def fetch(self, key):
        while key not in self.posted:
            time.sleep(0.01)
        return self.posted[key]


def meet(size, before=lambda board: None):
    """Peers of all ranks, and the queue of (who noticed, who is gone)."""
    board, lost, found = Board(), queue.Queue(), {}

    def join(rank):
        found[rank] = Peers(
            rank,
            size,
            "127.0.0.1",
            post=board.posted.__setitem__,
            fetch=board.fetch,
            on_lost=lambda gone: lost.put((rank, gone)),
            patience=10,
        )

    first = threading.Thread(target=join, args=(0,))
    first.start()
    before(board)
    others = [threading.Thread(target=join, args=(rank,)) for rank in range(1, size)]
    for thread in others:
        thread.start()
    for thread in (first, *others):
        thread.join(10)
    return found, lost


def hang_up(peers):
    """What the kernel does when the process ends."""
    for connection in peers._others.values():
        connection.shutdown(socket.SHUT_RDWR)


def test_a_lost_rank_is_named_to_every_other_one():
    found, lost = meet(3)
    hang_up(found[2])
    noticed = {lost.get(timeout=5), lost.get(timeout=5), lost.get(timeout=5)}
    assert {(0, 2), (1, 2)} <= noticed  # and the lost one misses rank 0


def test_one_that_leaves_is_not_missed():
    found, lost = meet(3)
    for peers in found.values():
        peers.leave()
    for peers in found.values():
        hang_up(peers)
    time.sleep(0.3)
    assert lost.empty()


def test_a_stranger_is_turned_away():
    """Somebody who scans ports neither takes a rank's place nor keeps the ranks from meeting."""

    def knock(board):
        port = int(board.fetch("peers").split()[0])
        for words in (b"GET / HTTP/1.1", b"0123456789abcdef0123456789abcdef 1"):
            with socket.create_connection(("127.0.0.1", port), timeout=5) as stranger:
                stranger.sendall(words)
                stranger.settimeout(5)
                assert stranger.recv(10) == b""

    found, lost = meet(2, knock)
    assert sorted(found) == [0, 1]
    hang_up(found[1])
    assert (0, 1) in {lost.get(timeout=5), lost.get(timeout=5)}
