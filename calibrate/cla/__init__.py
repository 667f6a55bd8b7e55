"""Cross-layer attention (Brandon et al. 2024) for a pretrained model: what sharing costs, and which layers share."""

from .cache_cost import bytes_per_token
from .grouping import best_grouping
from .patterns import PATTERNS, pattern_groups
from .stage import share, share_report

__all__ = ["PATTERNS", "best_grouping", "bytes_per_token", "pattern_groups", "share", "share_report"]
