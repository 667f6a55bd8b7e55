"""Compressed caches in transformers: the only part of the runtime, beside `cla/`, that knows of it.

A model is changed in two places, both restored at the end: its attention calls are routed through ours, and a
forward pre-hook gives every call that would begin an empty cache one of ours. No forward is overridden.
`cla/sharing.py` changes a third, the projections of keys and values, and restores them, too.

All of it loads transformers, and is imported when a name of it is first asked for.
"""

from typing import TYPE_CHECKING

from ...artifacts.lazy import lazy_names

if TYPE_CHECKING:
    from .contexts import disable, enable

__all__ = ["disable", "enable"]

if not TYPE_CHECKING:  # a type checker would take any name for one of ours
    __getattr__, __dir__ = lazy_names(__name__, {"disable": "contexts", "enable": "contexts"}, __all__)
