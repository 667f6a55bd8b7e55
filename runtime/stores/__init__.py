"""The methods: each a frozen dataclass of parameters that builds the stores of a layer."""

from ..methods.clusterkv import ClusterKV
from ..methods.exact_topk import ExactTopk
from ..methods.full import Full
from ..methods.loki import Loki
from ..methods.quest import Quest
from ..methods.sparq import Sparq
from ..methods.spectral import Spectral
from .base import Store
from .h2o import H2O
from .streaming import Streaming
from .subgen import SubGen

Method = Full | Spectral | Loki | ExactTopk | ClusterKV | Quest | Sparq | Streaming | H2O | SubGen

METHODS: dict[str, type[Method]] = {
    "full": Full,
    "spectral": Spectral,
    "loki": Loki,
    "exact_topk": ExactTopk,
    "clusterkv": ClusterKV,
    "quest": Quest,
    "sparq": Sparq,
    "streaming": Streaming,
    "h2o": H2O,
    "subgen": SubGen,
}

__all__ = ["METHODS", "Method", "Store"]
