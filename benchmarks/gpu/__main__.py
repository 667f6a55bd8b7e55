"""Speed on a GPU: two runs, in which every kernel is checked before it is timed.

    python -m benchmarks.gpu first OUT     # six minutes: the kernels' gate, attention steps, their parts, traces
    python -m benchmarks.gpu second OUT    # five minutes: whole models, building clusters, counters, compute-sanitizer

Nothing has to be installed but torch, triton and transformers. OUT is saved after every row; --dry runs all of it on a
CPU, tiny, without times. Ends with 1 where a check or a row of ours failed. The page is made of folders that are copied
to benchmarks/results/gpu.
"""

from __future__ import annotations

import sys

from .command import main

if __name__ == "__main__":
    sys.exit(main(__doc__))
