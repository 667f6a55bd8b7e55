"""What a user asks for: `additional_config={"kvcal": {"artifact": …, "method": …, …}}`, settings as of `compress`."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch

from ....artifacts import Artifact, KvcalError, MismatchError
from ....kernels.pages import PAGE
from ...kv.engine_pages import layout_of
from ...loading import load
from ...methods import METHODS, Method
from ...methods.base import Policy
from ...planned import chosen, naming
from ...settings import methods_by_layer, name_of

KEY = "kvcal"
EXAMPLE = '{"kvcal": {"artifact": "FOLDER", "method": "spectral"}}'


class Asked:
    """The artifact and the methods, in a process of vLLM."""

    def __init__(self, asked: Mapping[str, Any]):
        """
        Raises:
            KvcalError: no artifact, where the method needs one, or none that can be read.
        """
        settings = dict(asked)
        for name in settings:
            near = difflib.get_close_matches(name, ("artifact", "method"), n=1, cutoff=0.75)
            if near and name != near[0]:
                raise KvcalError(f"{name!r}: did you mean {near[0]!r}?")
        source, self.method = settings.pop("artifact", None), settings.pop("method", None)
        if source is not None and not isinstance(source, str):
            raise KvcalError(f"artifact {source!r}: give a folder or a Hub id")
        self.artifact: Artifact | None = None if source is None else load(source)
        self.settings = settings
        self._bound: dict[tuple[int, int], Policy] = {}

    def methods(self, layers: Sequence[int], total: int) -> dict[int, Method]:
        """The method of each of these layers, among `total`.

        Raises:
            KvcalError: settings that are none, or a method that cannot work in an engine's pages.
        """
        method = chosen(self.artifact, self.method, self.settings, total)
        is_plan = isinstance(method, list) and method is not self.method
        with naming(self.artifact if is_plan else None):
            found = methods_by_layer(method, self.settings, layers, total)
        for layer, of_layer in found.items():
            if why_not := of_layer.not_paged():
                fitting = ", ".join(name for name, kind in METHODS.items() if kind().not_paged() is None)
                raise KvcalError(f"{name_of(of_layer)}, layer {layer}: {why_not}; vLLM's pages take {fitting}")
        return found

    def policy(self, method: Method, layer: int, head_dim: int, heads: int) -> Policy:
        """The method in a layer of so many KV heads, which all processes have together.

        Raises:
            KvcalError: names the layer.
        """
        if (layer, head_dim) not in self._bound:
            try:
                policy = method.bind(layer, head_dim, self.artifact)
            except KvcalError as error:
                raise type(error)(f"{name_of(method)}, layer {layer}: {error}") from None
            for what, fitted, found in zip(
                ("KV heads", "dimensions"), policy.fitted_to, (heads, head_dim), strict=False
            ):
                if fitted not in (None, found):
                    raise MismatchError(
                        f"{name_of(method)}, layer {layer}: the artifact has {fitted} {what}, this model {found}: "
                        "calibrate this model with `calibrate pca --model …`"
                    )
            self._bound[layer, head_dim] = policy
        return self._bound[layer, head_dim]


@lru_cache(maxsize=4)
def _asked(text: str) -> Asked:
    return Asked(json.loads(text))


def asked_of(additional_config: object) -> Asked | None:
    """What a configuration of vLLM asks of kvcal; None: nothing. Read once in a process.

    Raises:
        KvcalError: see `Asked`; and for what was surely meant to ask for it.
    """
    given = additional_config if isinstance(additional_config, Mapping) else {}
    asked = given.get(KEY)
    if asked is None:
        for name in map(str, given):
            near = difflib.get_close_matches(name.lower(), [KEY], cutoff=0.75)
            if name != KEY and (near or name == "artifact"):
                raise KvcalError(f"additional_config has {name!r}, and no {KEY!r}: give it as {EXAMPLE}")
        return None
    if not isinstance(asked, Mapping):
        raise KvcalError(f"{asked!r}: give a mapping such as {EXAMPLE}")
    return _asked(json.dumps(asked, sort_keys=True))


def bytes_per_token(policies: Iterable[Policy], heads: int, head_dim: int, dtype: torch.dtype) -> int:
    """Of a token in one KV head, its share of what is kept of pages included: as many in every layer, since vLLM's
    pages are alike."""
    layouts = [layout_of(policy, heads, head_dim, head_dim, dtype) for policy in policies]
    most, least = max(layout.nbytes for layout in layouts), PAGE * dtype.itemsize
    # Whole rows of every part of every layer, for the kernels in numba; where that costs more than a sixteenth, as with
    # another rank in each layer, they are forgone.
    whole = -(-most // (unit := math.lcm(least, *(layout.unit for layout in layouts)))) * unit
    return (whole if whole <= most * 17 // 16 else -(-most // least) * least) // PAGE
