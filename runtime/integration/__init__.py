"""Compressed caches in transformers: the only part of the runtime, beside `cla/`, that knows of it.

A model is changed in two places, both restored at the end: its attention calls are routed through ours, and a
forward pre-hook gives every call that would begin an empty cache one of ours. No forward is overridden.
`cla/sharing.py` changes a third, the projections of keys and values, and restores them, too.

`kvcal.runtime` imports `contexts` and `cache` when they are first asked for: they load transformers.
"""
