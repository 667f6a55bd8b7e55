"""What a worker of vLLM knows of kvcal: the policies of its layers, for the KV heads that it has."""

from __future__ import annotations

from typing import Any

from ...attention import SoftmaxSpec
from ...methods.base import Policy
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
        self.longest = model.max_model_len
        self.captured = all(method.captured_at(self.longest) for method in methods.values())
        """Whether CUDA graphs are to hold the steps."""
        self.bytes_per_token = 0
        if policies:
            self.bytes_per_token = bytes_per_token(self.policies.values(), self.heads, self.head_dim, self.dtype)

    def layer(self, number: int, spec: SoftmaxSpec) -> Layer | None:
        """None: it has no method."""
        policy = self.policies.get(number)
        return None if policy is None else Layer.of(policy, self.heads, self.head_dim, self.dtype, spec)


def heads_of(rank: int, ranks: int, total: int) -> slice:
    """Which of `total` KV heads a worker has; where there are more workers than heads, several have the same one."""
    if total >= ranks:
        each = total // ranks
        return slice(rank * each, (rank + 1) * each)
    one = rank * total // ranks
    return slice(one, one + 1)


_engine: Engine | None = None


def engine_of(config: Any) -> Engine | None:
    """The engine of this process, from now on; None: the configuration does not ask for kvcal."""
    global _engine
    if asked_of(config.additional_config) is None:
        _engine = None
    elif _engine is None or _engine.config is not config:
        _engine = Engine(config)
    return _engine


def last_engine() -> Engine | None:
    """The one that was asked for last, for those who are not told a configuration."""
    return _engine
