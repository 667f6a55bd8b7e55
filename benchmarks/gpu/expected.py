"""What a row should take, reckoned before it is measured: bytes over the memory's rate, and a time for every launch.

What is written and read again at once, such as scores, comes from L2: it is counted where it is written. Arithmetic is
not counted. So a measured time far above is arithmetic, latency, or more bytes than these.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .sizes import CODEWORDS, SPECTRAL, Sizes

LAUNCH_US, OPERATION_US, EAGER_US = 2.5, 1.7, 6.0
"""Of a kernel of ours, which waits for its operands, and of a small operation of torch, in a graph; of one outside."""
REACHED = 0.9
"""Of the measured rate of reading."""
DATA_SHEET = {"H100": 3350.0, "H200": 4800.0, "A100": 2039.0}
"""GB/s, where no rate was measured."""
LAYER_OPERATIONS = 37
"""Of torch, in a layer of the model beside its attention step: norms, rotary embedding, projections, gated MLP."""
PAGE = 64
"""Tokens of the runtime's pages."""
OF_CHOICE, OF_CLUSTERS, OF_SELECTED = 6, 51, 2
"""Of torch, beside the kernels: as the best tokens are chosen, as clusters are (about), and as what is chosen is
attended to."""
AT_ONCE = 8192
"""Scores that `select` takes without a workspace, which it has zeroed."""

SEGMENT, LUMPS = 8192, 64
"""Tokens that a store clusters together, and calibrated centroids that build.py gives it."""
PASSES, OF_A_PASS, OF_A_CENTROID, OF_A_SEGMENT = 10, 31, 19, 60
"""Of k-means: passes where none were counted yet, and operations: one row's are not captured."""


@dataclass(frozen=True)
class Work:
    bytes: float = 0
    kernels: int = 0
    """Launches of ours."""
    operations: int = 0
    """Of torch that are no views, a launch each."""

    def __add__(self, other: Work) -> Work:
        return Work(self.bytes + other.bytes, self.kernels + other.kernels, self.operations + other.operations)

    def __mul__(self, times: int) -> Work:
        return Work(self.bytes * times, self.kernels * times, self.operations * times)

    def microseconds(self, rate: float, operation: float = OPERATION_US) -> float:
        """
        Args:
            rate: of reading, in GB/s.
            operation: µs of each.
        """
        return LAUNCH_US * self.kernels + operation * self.operations + self.bytes / (1000 * REACHED * rate)


def rate_of(rows: list[Mapping[str, Any]]) -> float | None:
    """GB/s of reading, measured or of the data sheet; None: an unknown device."""
    measured = next((row["read"] for row in rows if row.get("read")), None)
    name = next((row["gpu"] for row in rows if row.get("gpu")), "")
    return measured or next((rate for gpu, rate in DATA_SHEET.items() if gpu in name), None)


def beside(row: Mapping[str, Any], sizes: Sizes, rate: float) -> dict[str, Any]:
    """What stands in a row beside its time: {"expected_us", "bytes", "launches_expected"}, of each of its parts too."""
    if row["kind"] == "parts":
        works = parts(sizes, row["method"], row["length"], row["batch"])
        return {"parts": {name: {**of, **told(works[name], rate)} for name, of in row.get("parts", {}).items()}}
    work = reckoned(row, sizes)
    return told(work, rate, EAGER_US if row["kind"] == "build" else OPERATION_US) if work else {}


def told(work: Work, rate: float, operation: float = OPERATION_US) -> dict[str, Any]:
    launches = work.kernels + work.operations
    return {
        "expected_us": work.microseconds(rate, operation), "bytes": int(work.bytes), "launches_expected": launches,
    }  # fmt: skip


def reckoned(row: Mapping[str, Any], sizes: Sizes) -> Work | None:
    """Of a row that is to be measured, or was; None where bytes and launches do not decide."""
    kind, method, length, batch = (row.get(name) for name in ("kind", "method", "length", "batch"))
    if kind in ("step", "trace"):
        return step(sizes, method, length, batch)
    if kind == "baseline":  # one kernel over parts of the tokens, one that merges them
        return Work(dense_bytes(sizes, length, batch), 2)
    if kind == "selection":
        return Work(4 * batch * sizes.heads * length, 1)
    if kind == "model" and batch:
        return model(sizes, method, length, batch)
    if kind == "build":
        return build(sizes, length, row["calibrated"], row.get("passes", PASSES))
    return None


def step(sizes: Sizes, method: str, length: int, batch: int) -> Work:
    return sum(parts(sizes, method, length, batch).values(), Work())


def parts(sizes: Sizes, method: str, length: int, batch: int) -> dict[str, Work]:
    """Of one layer's step, by the names of its parts; "rest" is what it does between them."""
    pairs, kind = batch * sizes.heads, method.partition(",")[0].partition(" ")[0]
    kept = pairs * min(sizes.keep, length)
    rows = Work(kept * (2 * sizes.dims * sizes.itemsize + 4), 2, OF_SELECTED)
    if kind == "dense":
        return {"append": Work(0, 1), "attend": Work(dense_bytes(sizes, length, batch), 2)}
    if method == "loki, sampled":
        return loki_sampled(sizes, length, batch)
    if kind == "loki":
        return {**loki(sizes, method, length, batch), "attend": rows}
    if kind == "clusterkv":
        clusters = pairs * clusters_of(sizes, length, int(method.split()[1]))
        # What it has to read: of every cluster the mean and the size, of every chosen token where it lies.
        chosen = Work(clusters * (sizes.dims * sizes.itemsize + 4) + kept * 4, 0, OF_CLUSTERS)
        return {"append": Work(0, 1), "rest": chosen, "attend": rows}
    return spectral(sizes, method, length, batch)


def dense_bytes(sizes: Sizes, length: int, batch: int) -> int:
    return batch * sizes.heads * length * 2 * sizes.dims * sizes.itemsize


def clusters_of(sizes: Sizes, length: int, per_cluster: int) -> int:
    return max(1, round((length - sizes.window // 2 - sizes.sinks) / per_cluster))


def loki(sizes: Sizes, method: str, length: int, batch: int) -> dict[str, Work]:
    tokens, copied = batch * sizes.heads * length, batch > 1  # the map, once a row
    own = method != "loki"
    return {
        "append": Work(0, 1, 1 + copied + own),
        "rest": Work(0, 0, 1 + copied if own else 3),  # the query into the basis
        "score": Work(tokens * (sizes.rank * sizes.itemsize + 4 * sizes.group), 1),
        "select": Work(tokens * 4, 1, OF_CHOICE + (length > AT_ONCE)),
    }


def loki_sampled(sizes: Sizes, length: int, batch: int) -> dict[str, Work]:
    pairs = batch * sizes.heads
    read = pairs * (length * sizes.rank + min(sizes.keep, length) * 2 * sizes.dims) * sizes.itemsize
    return {"append": Work(0, 1, 2 + (batch > 1)), "attend": Work(read, 2)}


def spectral(sizes: Sizes, method: str, length: int, batch: int) -> dict[str, Work]:
    """What it has to read: of every token the code, of every page the mean error, of every head the codebook."""
    of = SPECTRAL[method]
    rank = int(of["rank"] * sizes.dims)
    token, page = rank * of["bits"] / 8 + 2 + 1, sizes.dims + 2
    row = 2 * (sizes.dims + 2) if of["rows"] == 8 else 2 * sizes.dims * sizes.itemsize
    shared = sizes.heads * 2 * (CODEWORDS * (4 * sizes.dims + 1) + 2 * rank * sizes.dims)
    pairs, kept = batch * sizes.heads, min(sizes.keep, length)
    read = pairs * (length * token + length // PAGE * page + kept * row)
    return {"append": Work(0, 1), "attend": Work(read + shared, 2)}


def build(sizes: Sizes, length: int, calibrated: bool, passes: int) -> Work:
    """Of one row's clusters, in segments: every pass reads float32 keys twice."""
    segments = -(-length // SEGMENT)
    centroids = min(length, SEGMENT) // sizes.per_cluster[0]
    drawn = max(0, centroids - LUMPS) if calibrated else centroids
    operations = OF_A_SEGMENT + OF_A_PASS * passes + OF_A_CENTROID * drawn
    return Work(sizes.heads * length * sizes.dims * 4 * 2 * passes, 0, segments * operations)


def model(sizes: Sizes, method: str, length: int, batch: int) -> Work:
    """A decode step of the whole model: weights, and each layer's attention."""
    name = {"full": "dense"}.get(method, method)
    wide, narrow = sizes.group * sizes.heads * sizes.dims, sizes.heads * sizes.dims
    layer = sizes.hidden * (2 * wide + 2 * narrow + 3 * sizes.intermediate)
    weights = sizes.layers * layer + sizes.vocabulary * sizes.hidden
    return step(sizes, name, length, batch) * sizes.layers + Work(
        weights * sizes.itemsize, 0, LAYER_OPERATIONS * sizes.layers
    )
