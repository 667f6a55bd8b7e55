"""The second run on a GPU, five minutes: whole models, the building of clusters, and what tools see inside kernels.

It writes OUT/second.json, second.log and ncu-*.csv, into the folder of the first run, whose checks its
rows rest on.
"""

from __future__ import annotations

from .first import Rows
from .run import Phase
from .sizes import Sizes

COUNTED = ("dense", "loki", "spectral")
SANITIZED = ("select", "attend", "step spectral, rows 8")


def phases(sizes: Sizes) -> list[Phase]:
    longest, middle, *_ = sizes.lengths
    most, least = (f"clusterkv {tokens}" for tokens in sizes.per_cluster)
    telling = ("full", most, "spectral", "loki")
    fitting = ("full", most, "spectral, rows 8")
    models = [
        *model(longest, 1, telling),
        *model(longest, None, fitting),
        *model(longest, 1, (least,)),
        *model(middle, None, fitting),
        *model(middle, 1, telling[:3]),
    ]
    builds = [
        {"kind": "build", "length": length, "calibrated": calibrated}
        for length in (middle, longest)
        for calibrated in (False, True)
    ]
    shape = {"length": longest, "batch": sizes.batches[-1]}
    counted = [{"kind": "counters", "method": method, **shape} for method in COUNTED]
    sanitized = [{"kind": "sanitizer", "check": check} for check in SANITIZED]
    return [
        Phase("whole models", models, most=140, limit=60, needs=15),
        Phase("building clusters", builds, most=60, limit=40, needs=15),
        Phase("counters", counted, most=80, kept=70, limit=50, needs=15, fresh=True),
        Phase("memory checker", sanitized, most=60, kept=50, limit=50, needs=15, at_once=3, fresh=True),
    ]


def model(length: int, batch: int | None, methods: tuple[str, ...]) -> Rows:
    """
    Args:
        batch: None: as many rows as fit.
    """
    return [{"kind": "model", "method": method, "length": length, "batch": batch} for method in methods]
