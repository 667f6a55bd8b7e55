"""Cross-layer attention (Brandon et al. 2024): neighbouring layers share keys and values; and `xcla`, where they share
coefficients of them (`group_code`, `group_store`).

`sharing_map`, `method`, `file`, `group_code` and `group_store` are of the core, which needs no transformers. The others
change a loaded model, and are imported when a name of theirs is first asked for.
"""

from typing import TYPE_CHECKING

from ...artifacts.lazy import lazy_names
from .sharing_map import SharingMap

if TYPE_CHECKING:
    from .checkpoint import load_cla
    from .folder import save_cla
    from .sharing import Sharing, share, shared, sharing_of

__all__ = ["Sharing", "SharingMap", "load_cla", "save_cla", "share", "shared", "sharing_of"]

if not TYPE_CHECKING:  # a type checker would take any name for one of ours
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "load_cla": "checkpoint",
            "save_cla": "folder",
            "Sharing": "sharing",
            "share": "sharing",
            "shared": "sharing",
            "sharing_of": "sharing",
        },
        __all__,
    )
