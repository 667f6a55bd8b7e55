"""The methods: each a frozen dataclass of parameters that builds the stores of a layer."""

from .base import Store
from .exact_topk import ExactTopk
from .full import Full
from .h2o import H2O
from .loki import Loki
from .quest import Quest
from .sparq import Sparq
from .streaming import Streaming

Method = Full | Loki | ExactTopk | Quest | Sparq | Streaming | H2O

METHODS: dict[str, type[Method]] = {
    "full": Full,
    "loki": Loki,
    "exact_topk": ExactTopk,
    "quest": Quest,
    "sparq": Sparq,
    "streaming": Streaming,
    "h2o": H2O,
}

__all__ = ["METHODS", "Method", "Store"]
