"""Models and text in, artifacts out. The command line is `kvcal.calibrate.cli`; everything works without it.

from kvcal.calibrate import calibrate, load_model, make_blocks, open_data, save

loaded = load_model("demo")
data = open_data("stdlib")
blocks = make_blocks(data, loaded.tokenizer, num_tokens=16384, source=data.source)
artifact = save(calibrate(loaded.model, blocks, model_id="demo"), Path("demo-stdlib"))

Each name is imported when it is first asked for, so that the command line completes a word without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .blocks import TokenBlocks, make_blocks
    from .cluster_stage import cluster, cluster_report
    from .data import open_data
    from .models import load_model
    from .one_pass import calibrate, save
    from .rank import participation_ratio, rank_at, rank_report
    from .statistics import StatisticsFitter

_PLACES = {
    "StatisticsFitter": "statistics",
    "TokenBlocks": "blocks",
    "calibrate": "one_pass",
    "cluster": "cluster_stage",
    "cluster_report": "cluster_stage",
    "load_model": "models",
    "make_blocks": "blocks",
    "open_data": "data",
    "participation_ratio": "rank",
    "rank_at": "rank",
    "rank_report": "rank",
    "save": "one_pass",
}

__all__ = [
    "StatisticsFitter",
    "TokenBlocks",
    "calibrate",
    "cluster",
    "cluster_report",
    "load_model",
    "make_blocks",
    "open_data",
    "participation_ratio",
    "rank_at",
    "rank_report",
    "save",
]


def __getattr__(name: str) -> Any:
    if name in _PLACES:
        return getattr(import_module(f".{_PLACES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
