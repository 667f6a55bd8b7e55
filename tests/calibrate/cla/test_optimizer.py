"""AdamW on float32 copies, against its formula (Loshchilov and Hutter 2019) in double precision; learning rates."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from kvcal.calibrate.cla.optimizer import Optimizer

PLAN = {"lr": 0.02, "warmup": 1, "steps": 3}
RATES = [0.01, 0.02, 0.01]
"""Of PLAN: half of the way up, the peak, half of the way down."""


def draw(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def adamw(start, gradients, decay, eps=1e-8):
    weight, first, second = start.astype(np.float64), 0.0, 0.0
    for step, (gradient, rate) in enumerate(zip(gradients, RATES, strict=True), 1):
        first, second = 0.9 * first + 0.1 * gradient, 0.95 * second + 0.05 * gradient**2
        weight = weight * (1 - rate * decay)
        weight = weight - rate * (first / (1 - 0.9**step)) / (np.sqrt(second / (1 - 0.95**step)) + eps)
    return weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_are_those_of_the_formula_and_norms_do_not_decay(dtype):
    parameters = {"matrix": nn.Parameter(draw(3, 4, seed=0).to(dtype)), "norm": nn.Parameter(draw(5, seed=1).to(dtype))}
    starts = {name: parameter.detach().float().numpy().copy() for name, parameter in parameters.items()}
    gradients = {
        name: [draw(*parameter.shape, seed=10 + step).to(dtype) for step in range(3)]
        for name, parameter in parameters.items()
    }
    optimizer = Optimizer(parameters, **PLAN)
    clipped = {name: [] for name in parameters}
    for step, rate in enumerate(RATES):
        for name, parameter in parameters.items():
            parameter.grad = gradients[name][step].clone()
        norm = np.sqrt(sum((gradients[name][step].double() ** 2).sum().item() for name in parameters))
        assert optimizer.clip() == pytest.approx(norm, rel=1e-5) and norm > 1
        for name in parameters:
            clipped[name].append(gradients[name][step].double().numpy() / norm)
        assert optimizer.step() == pytest.approx(rate)
    for name, decay in (("matrix", 0.1), ("norm", 0.0)):
        expected = adamw(starts[name], clipped[name], decay)
        np.testing.assert_allclose(optimizer.masters[name].detach().numpy(), expected, rtol=1e-5, atol=1e-6)
        rounded = optimizer.masters[name].to(dtype)
        assert parameters[name].dtype == dtype and torch.equal(parameters[name], rounded)


def test_steps_too_small_for_bfloat16_add_up():
    weight = nn.Parameter(torch.full((4, 4), 1.0, dtype=torch.bfloat16))
    optimizer = Optimizer({"weight": weight}, lr=1e-3, warmup=0, steps=10**6)
    for _ in range(40):
        weight.grad = torch.full_like(weight, 0.1)
        optimizer.clip()
        optimizer.step()  # a bfloat16 near 1 moves by 4e-3 or not at all
    assert weight.unique().item() == pytest.approx(1 - 40e-3, abs=8e-3)


def test_small_gradients_are_not_enlarged():
    weight = nn.Parameter(torch.zeros(3))
    optimizer = Optimizer({"weight": weight}, **PLAN)
    weight.grad = torch.tensor([0.3, 0.0, 0.4])
    assert optimizer.clip() == pytest.approx(0.5) and weight.grad.tolist() == pytest.approx([0.3, 0.0, 0.4])


def test_restored_it_goes_on_as_if_never_stopped():
    def made():
        a, b, idle = draw(3, 3, seed=0).bfloat16(), draw(2, seed=1), draw(2, seed=2)
        return {"a": nn.Parameter(a), "b": nn.Parameter(b), "idle": nn.Parameter(idle)}

    def steps(optimizer, seeds):
        for seed in seeds:
            for name in ("a", "b"):
                parameter = optimizer.parameters[name]
                parameter.grad = draw(*parameter.shape, seed=seed).to(parameter.dtype)
            optimizer.clip()
            optimizer.step()

    straight, first, second = (Optimizer(made(), lr=0.01, warmup=4, steps=6) for _ in range(3))
    steps(straight, range(6))
    steps(first, range(3))
    second.restore(first.state(), 3)
    steps(second, range(3, 6))
    for name in straight.masters:
        assert torch.equal(straight.masters[name], second.masters[name])
        assert torch.equal(straight.parameters[name], second.parameters[name])


def test_what_is_not_its_state_is_refused():
    def made(*shape, name="w"):
        weight = nn.Parameter(draw(*shape, seed=0))
        optimizer = Optimizer({name: weight}, **PLAN)
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        return optimizer

    found = made(3, 3).state()
    for other in (made(3), made(3, 3, name="v"), made(1, 3)):
        with pytest.raises((LookupError, ValueError)):
            other.restore(found, 1)
    partial = {name: found[name] for name in ("w/weight", "w/step")}
    for damaged in ({}, partial, {**found, "w/mean": found["w/step"]}):
        with pytest.raises(ValueError, match="w: other tensors or shapes"):
            made(3, 3).restore(damaged, 1)


def rates(lr, warmup, steps):
    optimizer = Optimizer({"weight": nn.Parameter(torch.zeros(2))}, lr, warmup, steps)
    return [optimizer.step() for _ in range(steps)]


def test_the_rate_rises_linearly_and_falls_by_half_a_cosine():
    found = rates(2.0, 10, 110)
    assert found[:10] == pytest.approx([2.0 * (step + 1) / 11 for step in range(10)])
    assert found[10:] == pytest.approx([1 + math.cos(math.pi * step / 100) for step in range(100)])
    assert rates(0.5, 0, 1) == [0.5] and rates(0.5, 1, 1) == [0.25]
