"""Cross-layer attention (Brandon et al. 2024): neighbouring layers share keys and values; and `xcla`, where they share
coefficients of them (`group_code`, `group_store`).

`sharing_map`, `method`, `file`, `group_code` and `group_store` are of the core, which needs no transformers. The others
change a loaded model, and `kvcal.runtime` imports them when they are first asked for.
"""
