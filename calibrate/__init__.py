"""Models and text in, artifacts out. The command line is `kvcal.calibrate.cli`; everything works without it.

    from kvcal.calibrate import calibrate, rank_report

    artifact = calibrate("smollm2-135m", "text/").save_pretrained("smollm2-135m-text")
    print(rank_report(artifact)["model"])

Models and text that are loaded already go the same way: `calibrate(model, make_blocks(documents, tokenizer))`.
Each name is imported when it is first asked for, so that the command line completes a word without torch.
"""

from typing import TYPE_CHECKING

from ..artifacts.lazy import lazy_names

if TYPE_CHECKING:
    from .blocks import TokenBlocks, make_blocks
    from .cluster_stage import cluster, cluster_report
    from .data import open_data
    from .evaluation.grid import make_grid
    from .evaluation.prompts import make_prompts
    from .evaluation.protocol import evaluate
    from .models import load_model
    from .one_pass import calibrate, save
    from .planning.make import plan
    from .publish import push
    from .rank import participation_ratio, rank_at, rank_report
    from .reports import report
    from .statistics import StatisticsFitter

__all__ = [
    "StatisticsFitter",
    "TokenBlocks",
    "calibrate",
    "cluster",
    "cluster_report",
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
    "report",
    "save",
]

if not TYPE_CHECKING:  # a type checker would take any name for one of ours
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "StatisticsFitter": "statistics",
            "TokenBlocks": "blocks",
            "calibrate": "one_pass",
            "cluster": "cluster_stage",
            "cluster_report": "cluster_stage",
            "evaluate": "evaluation.protocol",
            "load_model": "models",
            "make_blocks": "blocks",
            "make_grid": "evaluation.grid",
            "make_prompts": "evaluation.prompts",
            "open_data": "data",
            "participation_ratio": "rank",
            "plan": "planning.make",
            "push": "publish",
            "rank_at": "rank",
            "rank_report": "rank",
            "report": "reports",
            "save": "one_pass",
        },
        __all__,
    )
