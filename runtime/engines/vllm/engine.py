"""What a worker of vLLM knows of kvcal: the policies of its layers, for the KV heads that it has."""

from __future__ import annotations

from typing import Any

import torch

from ....kernels.pages import PAGE
from ...attention import SoftmaxSpec
from ...methods.base import Policy
from ...methods.full import MANY
from .batch import batch_of
from .checks import check_engine
from .config import asked_of, bytes_per_token
from .layer import Layer


class Engine:
    def __init__(self, config: Any):
        """
        Args:
            config: vLLM's, which asks for kvcal.
        """
        from vllm.distributed import get_tensor_model_parallel_rank
        from vllm.platforms import current_platform

        asked = asked_of(config.additional_config)
        assert asked is not None
        model, self.config = config.model_config, config
        methods = check_engine(asked, config, current_platform.device_type)
        total, self.head_dim, self.dtype = model.get_total_num_kv_heads(), model.get_head_size(), model.dtype
        heads = heads_of(get_tensor_model_parallel_rank(), config.parallel_config.tensor_parallel_size, total)
        self.heads = heads.stop - heads.start
        policies = {layer: asked.policy(method, layer, self.head_dim, total) for layer, method in methods.items()}
        self.policies: dict[int, Policy] = policies
        if heads != slice(0, total):
            self.policies = {layer: policy.on_heads(heads) for layer, policy in policies.items()}
        self.captured = all(method.not_captured() is None for method in methods.values())
        """Whether CUDA graphs can hold the steps."""
        self._warm = False
        self.bytes_per_token = 0
        if policies:
            self.bytes_per_token = bytes_per_token(self.policies.values(), self.heads, self.head_dim, self.dtype)

    def layer(self, number: int, spec: SoftmaxSpec) -> Layer | None:
        """None: it has no method."""
        policy = self.policies.get(number)
        return None if policy is None else Layer.of(policy, self.heads, self.head_dim, self.dtype, spec)

    def warm_up(self, device: torch.device) -> None:
        """Decode a token in a layer of each kind, so that kernels are compiled now and not in a request's time."""
        if self._warm:
            return
        self._warm = True
        length = min(self.config.model_config.max_model_len, MANY)
        heads = self.config.model_config.get_num_attention_heads(self.config.parallel_config)
        for policy in {settings_of(policy): policy for policy in self.policies.values()}.values():
            layer = Layer.of(policy, self.heads, self.head_dim, self.dtype, SoftmaxSpec(1.0))
            table = torch.arange(-(-length // PAGE), device=device).unsqueeze(0)
            pieces = torch.zeros(table.numel(), self.heads, layer.layout.nbytes, dtype=torch.uint8, device=device)
            seq_lens = torch.tensor([length], dtype=torch.int32, device=device)
            slots = torch.tensor([length - 1], device=device)
            batch = batch_of([0, 1], [length], [False], seq_lens, table, slots)
            query, key, value = (
                torch.zeros(1, count, self.head_dim, dtype=self.dtype, device=device)
                for count in (heads, self.heads, self.heads)
            )
            layer.forward(query, key, value, pieces, batch, torch.empty_like(query))


def settings_of(policy: Policy) -> object:
    """What policies of one kind have in common."""
    return getattr(policy, "settings", type(policy))


def heads_of(rank: int, ranks: int, total: int) -> slice:
    """Which of `total` KV heads a worker has; where there are more workers than heads, several have the same one."""
    if total >= ranks:
        each = total // ranks
        return slice(rank * each, (rank + 1) * each)
    one = rank * total // ranks
    return slice(one, one + 1)


_engine: Engine | None = None


def engine_of(config: Any) -> Engine | None:
    """The engine of this process; None: the configuration does not ask for kvcal."""
    global _engine
    if asked_of(config.additional_config) is None:
        return None
    if _engine is None or _engine.config is not config:
        _engine = Engine(config)
    return _engine


def last_engine() -> Engine | None:
    """The one that was asked for last, for those who are not told a configuration."""
    return _engine


BLOCKS = [PAGE]
"""Tokens of the blocks that kernels take."""
