"""AdamW (Loshchilov and Hutter 2019) on float32 copies of parameters that have fewer bits, and its learning rates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

BETAS = (0.9, 0.95)
WEIGHT_DECAY = 0.1
"""Of matrices; norms and biases are not pulled to zero, where they do not belong."""
CLIPPED_NORM = 1.0


class Optimizer:
    """Holds everything that a training's next step depends on, but for the data.

    The learning rate rises linearly over `warmup` steps, is `lr` in the next one, and falls by half a cosine that would
    reach 0 in the step after the last of `steps`.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], lr: float, warmup: int, steps: int):
        self.parameters = dict(parameters)
        masters = {
            name: parameter if parameter.dtype.itemsize >= 4 else nn.Parameter(parameter.detach().float())
            for name, parameter in self.parameters.items()
        }
        decayed = {name: master for name, master in masters.items() if master.dim() > 1}
        others = {name: master for name, master in masters.items() if master.dim() <= 1}
        self.masters = {**decayed, **others}
        """In the order in which AdamW numbers them."""
        groups = [
            {"params": list(part.values()), "weight_decay": decay, "initial_lr": lr}
            for part, decay in ((decayed, WEIGHT_DECAY), (others, 0.0))
        ]
        self._adam = torch.optim.AdamW(groups, lr=lr, betas=BETAS)
        self._warmup, self._steps = warmup, steps
        self._rates = self._rates_after(0)

    def clip(self) -> float:
        """Bring the gradients of `parameters` to a norm of at most `CLIPPED_NORM`; returns what it was."""
        for name, parameter in self.parameters.items():
            master = self.masters[name]
            if master is not parameter:
                master.grad = None if parameter.grad is None else parameter.grad.to(master.dtype)
                parameter.grad = None
        return float(nn.utils.clip_grad_norm_(self.masters.values(), CLIPPED_NORM))

    def step(self) -> float:
        """Returns the learning rate that was taken."""
        rate = float(self._rates.get_last_lr()[0])
        self._adam.step()
        self._adam.zero_grad()
        self._rates.step()
        self._round()
        return rate

    def state(self) -> dict[str, Tensor]:
        """NAME/weight, and what AdamW keeps of each parameter that has had a gradient; rates follow from the steps."""
        tensors = {f"{name}/weight": master.detach() for name, master in self.masters.items()}
        names = list(self.masters)
        for index, kept in self._adam.state_dict()["state"].items():
            tensors |= {f"{names[index]}/{what}": tensor for what, tensor in kept.items()}
        return tensors

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor], steps_done: int) -> None:
        """Raises LookupError, ValueError: they are not the `state` of these parameters."""
        found: dict[str, dict[str, Tensor]] = {name: {} for name in self.masters}
        for key, tensor in tensors.items():
            name, _, what = key.rpartition("/")
            found[name][what] = tensor
        for name, master in self.masters.items():
            expected = {"weight": master.shape}
            if len(found[name]) > 1:
                expected |= {"step": torch.Size(), "exp_avg": master.shape, "exp_avg_sq": master.shape}
            if {what: tensor.shape for what, tensor in found[name].items()} != expected:
                raise ValueError(f"{name}: other tensors or shapes than a training of it keeps")
            master.copy_(found[name].pop("weight"))
        state = {index: kept for index, kept in enumerate(found.values()) if kept}
        self._adam.load_state_dict({**self._adam.state_dict(), "state": state})
        self._rates = self._rates_after(steps_done)
        self._round()

    def _rates_after(self, steps_done: int) -> Any:
        from transformers import get_cosine_schedule_with_warmup

        # transformers' first rate is 0, with which nothing would be learned: ours are those from its second on.
        return get_cosine_schedule_with_warmup(self._adam, self._warmup + 1, self._steps + 1, last_epoch=steps_done)

    @torch.no_grad()
    def _round(self) -> None:
        for name, parameter in self.parameters.items():
            if self.masters[name] is not parameter:
                parameter.copy_(self.masters[name])
