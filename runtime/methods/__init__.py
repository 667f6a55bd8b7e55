"""The methods. Each has one file or folder: what the user sets, what is kept beside keys and values, how a step
attends."""

from .base import Method
from .clusterkv import ClusterKV
from .exact_topk import ExactTopk
from .full import Full
from .h2o import H2O
from .loki import Loki
from .quest import Quest
from .snapkv import SnapKV
from .sparq import Sparq
from .spectral import Spectral
from .streaming import Streaming
from .subgen import SubGen
from .xcla import Xcla

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
    "snapkv": SnapKV,
    "subgen": SubGen,
    "xcla": Xcla,
}
KEEPING = ", ".join(name for name, method in METHODS.items() if method.keeps_all_tokens)
"""Names of the methods that keep every token."""

__all__ = ["KEEPING", "METHODS", "Method"]
