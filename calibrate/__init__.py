"""Models and text in, artifacts out. The command line is `kvcal.calibrate.cli`; everything works without it.

from kvcal.calibrate import calibrate, load_model, make_blocks, open_data, save

loaded = load_model("demo")
data = open_data("stdlib")
blocks = make_blocks(data, loaded.tokenizer, num_tokens=16384, source=data.source)
artifact = save(calibrate(loaded.model, blocks, model_id="demo"), Path("demo-stdlib"))
"""

from .blocks import TokenBlocks, make_blocks
from .capture import LayerTensors, capture
from .cluster_stage import cluster, cluster_report
from .compare import compare
from .data import open_data
from .models import load_model
from .one_pass import calibrate, save
from .rank import participation_ratio, rank_at, rank_report
from .report import report
from .statistics import StatisticsFitter

__all__ = [
    "LayerTensors",
    "StatisticsFitter",
    "TokenBlocks",
    "calibrate",
    "capture",
    "cluster",
    "cluster_report",
    "compare",
    "load_model",
    "make_blocks",
    "open_data",
    "participation_ratio",
    "rank_at",
    "rank_report",
    "report",
    "save",
]
