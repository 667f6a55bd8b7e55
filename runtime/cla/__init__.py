"""Cross-layer attention (Brandon et al. 2024): neighbouring layers share keys and values.

`sharing_map`, `method` and `file` are of the core, which needs no transformers. The others change a loaded model, and
`kvcal.runtime` imports them when they are first asked for.
"""
