"""The stage `xcla`: what its codes lose of the reservoir is measured anew."""

from __future__ import annotations

import torch

from ...artifacts import Artifact
from ...artifacts.claims import require
from ...runtime.cla.group_code import STAGE, GroupCode, earlier_layers
from ..cla.group_sample import GroupSample

ROUNDING = 1e-2
"""Allowed relative error: a coefficient between two levels may get the other one."""
LEAST = 1e-9
"""And absolute, of rows that come back but for rounding."""


def check_group_codes(artifact: Artifact, where: str) -> None:
    """`lost` is that of the reservoir."""
    if not {"reservoir", "moments"} <= artifact.stages.keys():
        return
    layers = artifact.layers_in(STAGE)
    followed = {index for layer in layers for index in earlier_layers(artifact, layer.index)}
    for last in (layer for layer in layers if layer.index not in followed):
        group = [artifact.layers[index] for index in earlier_layers(artifact, last.index)] + [last]
        sample = GroupSample(artifact, group, artifact.stages[STAGE].tensors["angles"])
        for layer, lost in zip(group, sample.lost(GroupCode.load(artifact, last.index).layers), strict=True):
            stated, found = artifact.tensor(STAGE, layer.index, "lost"), torch.tensor(lost, dtype=torch.float64)
            holds = (stated - found).abs() <= ROUNDING * found + LEAST
            require(where, f"layers.{layer.index}.lost", holds, stated, "what the reservoir loses", by_head=False)
