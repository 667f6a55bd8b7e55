"""What vLLM calls in each of its processes, at its entry point `vllm.general_plugins`, often more than once.

Nothing of vLLM changes for those who do not ask for kvcal: then the backend is the one that it stands in for.
"""

from __future__ import annotations

import functools
import logging
from collections import Counter
from collections.abc import Mapping
from typing import Any

from ....artifacts import KvcalError
from ...methods import Method
from ...settings import name_of
from .checks import check_engine, check_version
from .config import asked_of

LOG = logging.getLogger("vllm.kvcal")
"""Below vLLM's own, which says what is told and where."""


def register() -> None:
    import vllm
    from vllm.engine.arg_utils import EngineArgs

    create = EngineArgs.create_engine_config
    if not hasattr(create, "of_kvcal"):
        EngineArgs.create_engine_config = _checked(create)
    try:
        check_version(vllm.__version__)
    except Exception:  # said again, by `prepare`, to those who ask for kvcal
        return
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    if current_platform.is_cpu():  # which takes no other backend than its own
        register_backend(AttentionBackendEnum.CPU_ATTN, f"{__package__}.cpu.CpuBackend")
    elif current_platform.is_cuda():
        register_backend(AttentionBackendEnum.CUSTOM, f"{__package__}.cuda.CudaBackend")


def _checked(create: Any) -> Any:
    """vLLM's own method with `prepare` behind it: the one place that sees a whole configuration before there is an
    engine."""

    @functools.wraps(create)
    def create_engine_config(self: Any, *arguments: Any, **named: Any) -> Any:
        config = create(self, *arguments, **named)
        prepare(config)
        return config

    create_engine_config.of_kvcal = True  # type: ignore[attr-defined]
    return create_engine_config


def prepare(config: Any) -> None:
    """Check a configuration that asks for kvcal, and let its layers of full attention have our backend.

    Raises:
        KvcalError: names what does not fit, and what to do.
    """
    import vllm
    from vllm.platforms import current_platform

    try:
        asked = asked_of(config.additional_config)
        if asked is None:
            return
        check_version(vllm.__version__)
        methods = check_engine(asked, config, current_platform.device_type)
    except KvcalError as error:
        raise type(error)(f"kvcal: {error}") from None
    LOG.info("kvcal: %s decodes, from %s", told(methods), asked.artifact.name if asked.artifact else "no artifact")
    if current_platform.is_cuda():
        from vllm.v1.attention.backends.registry import AttentionBackendEnum

        config.attention_config.backend_per_kind["full_attention"] = AttentionBackendEnum.CUSTOM


def told(methods: Mapping[int, Method]) -> str:
    """Which method has how many layers."""
    names = Counter(name_of(method) for method in methods.values())
    return ", ".join(f"{name} in {count} layers" for name, count in names.items())
