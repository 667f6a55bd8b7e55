"""Models and text in, artifacts out. The command line is `kvcal.calibrate.cli`; everything works without it.

    from kvcal.calibrate import calibrate, rank_report

    artifact = calibrate("smollm2-135m", "text/").save_pretrained("smollm2-135m-text")
    print(rank_report(artifact)["model"])

Models and text that are loaded already go the same way: `calibrate(model, make_blocks(documents, tokenizer))`.
"""

from typing import TYPE_CHECKING

from ..artifacts.lazy import lazy_names
from .blocks import TokenBlocks, make_blocks
from .capture import LayerTensors, capture
from .cluster_stage import cluster, cluster_report
from .compare import compare
from .data import open_data
from .models import load_model
from .one_pass import calibrate, save
from .publish import push
from .rank import participation_ratio, rank_at, rank_report
from .statistics import StatisticsFitter

if TYPE_CHECKING:
    from .evaluation.grid import make_grid
    from .evaluation.prompts import make_prompts
    from .evaluation.protocol import evaluate
    from .planning.make import plan

__all__ = [
    "LayerTensors",
    "StatisticsFitter",
    "TokenBlocks",
    "calibrate",
    "capture",
    "cluster",
    "cluster_report",
    "compare",
    "evaluate",
    "load_model",
    "make_blocks",
    "make_grid",
    "make_prompts",
    "open_data",
    "participation_ratio",
    "plan",
    "push",
    "rank_at",
    "rank_report",
    "save",
]

if not TYPE_CHECKING:  # a type checker would take any name for one of ours
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "evaluate": "evaluation.protocol",
            "make_grid": "evaluation.grid",
            "make_prompts": "evaluation.prompts",
            "plan": "planning.make",
        },
        __all__,
    )
