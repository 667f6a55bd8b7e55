"""Decode from an artifact in vLLM: `vllm serve MODEL --additional-config '{"kvcal": {"artifact": …}}'`.

vLLM loads `plugin.register` by its entry point, in each of its processes. `config` says what was asked for, `checks`
whether this engine can do it; `backend` gives vLLM its attention, `batch` says which tokens of a batch do what, and
`layer` attends. Only `plugin`, `engine`, `backend`, `cpu` and `cuda` import vLLM.
"""
