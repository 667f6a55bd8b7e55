"""AdamW (Loshchilov and Hutter 2019) on float32 copies of parameters that have fewer bits."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

BETAS = (0.9, 0.95)
WEIGHT_DECAY = 0.1
"""Of matrices; norms and biases are not pulled to zero, where they do not belong."""
CLIPPED_NORM = 1.0
_MOMENTS = {"exp_avg": "mean", "exp_avg_sq": "square"}


class Optimizer:
    """Holds everything that a training's next step depends on, but for the data."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]):
        self.parameters = dict(parameters)
        self.masters = {
            name: parameter if parameter.dtype.itemsize >= 4 else nn.Parameter(parameter.detach().float())
            for name, parameter in self.parameters.items()
        }
        decayed = [master for master in self.masters.values() if master.dim() > 1]
        others = [master for master in self.masters.values() if master.dim() <= 1]
        groups = [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
        self._adam = torch.optim.AdamW([group for group in groups if group["params"]], lr=0.0, betas=BETAS)

    def clip(self) -> float:
        """Bring the gradients of `parameters` to a norm of at most `CLIPPED_NORM`; returns what it was."""
        for name, parameter in self.parameters.items():
            master = self.masters[name]
            if master is not parameter:
                master.grad = None if parameter.grad is None else parameter.grad.to(master.dtype)
                parameter.grad = None
        return float(nn.utils.clip_grad_norm_(self.masters.values(), CLIPPED_NORM))

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        for group in self._adam.param_groups:
            group["lr"] = learning_rate
        self._adam.step()
        self._adam.zero_grad(set_to_none=True)
        self._round()

    def state(self) -> tuple[dict[str, Tensor], dict[str, int]]:
        """(tensors by name, the steps that each parameter has taken)."""
        tensors, steps = {}, {}
        for name, master in self.masters.items():
            tensors[f"{name}/weight"] = master.detach()
            found = self._adam.state.get(master)
            if found:  # a parameter that no loss has reached yet has none
                steps[name] = int(found["step"])
                tensors |= {f"{name}/{ours}": found[theirs] for theirs, ours in _MOMENTS.items()}
        return tensors, steps

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor], steps: Mapping[str, int]) -> None:
        """Raises KeyError, RuntimeError: they are not of these parameters."""
        for name, master in self.masters.items():
            master.copy_(tensors[f"{name}/weight"])
            if name in steps:
                moments = {theirs: torch.empty_like(master) for theirs in _MOMENTS}
                for theirs, ours in _MOMENTS.items():
                    moments[theirs].copy_(tensors[f"{name}/{ours}"])
                self._adam.state[master] = {"step": torch.tensor(float(steps[name])), **moments}
        self._round()

    def _round(self) -> None:
        for name, parameter in self.parameters.items():
            if self.masters[name] is not parameter:
                parameter.copy_(self.masters[name])
