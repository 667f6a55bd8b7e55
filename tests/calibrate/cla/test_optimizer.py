"""AdamW on float32 copies, against its formula (Loshchilov and Hutter 2019) in double precision."""

import numpy as np
import pytest
import torch
from torch import nn

from kvcal.calibrate.cla.optimizer import Optimizer

RATES = [0.01, 0.02, 0.005]


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
    optimizer = Optimizer(parameters)
    clipped = {name: [] for name in parameters}
    for step, rate in enumerate(RATES):
        for name, parameter in parameters.items():
            parameter.grad = gradients[name][step].clone()
        norm = np.sqrt(sum((gradients[name][step].double() ** 2).sum().item() for name in parameters))
        assert optimizer.clip() == pytest.approx(norm, rel=1e-5) and norm > 1
        for name in parameters:
            clipped[name].append(gradients[name][step].double().numpy() / norm)
        optimizer.step(rate)
    for name, decay in (("matrix", 0.1), ("norm", 0.0)):
        expected = adamw(starts[name], clipped[name], decay)
        np.testing.assert_allclose(optimizer.masters[name].detach().numpy(), expected, rtol=1e-5, atol=1e-6)
        rounded = optimizer.masters[name].to(dtype)
        assert parameters[name].dtype == dtype and torch.equal(parameters[name], rounded)


def test_steps_too_small_for_bfloat16_add_up():
    weight = nn.Parameter(torch.full((4, 4), 1.0, dtype=torch.bfloat16))
    optimizer = Optimizer({"weight": weight})
    for _ in range(40):
        weight.grad = torch.full_like(weight, 0.1)
        optimizer.clip()
        optimizer.step(1e-3)  # a bfloat16 near 1 moves by 4e-3 or not at all
    assert weight.unique().item() == pytest.approx(1 - 40e-3, abs=8e-3)


def test_small_gradients_are_not_enlarged():
    weight = nn.Parameter(torch.zeros(3))
    optimizer = Optimizer({"weight": weight})
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
            optimizer.step(0.01)

    straight, first, second = (Optimizer(made()) for _ in range(3))
    steps(straight, range(6))
    steps(first, range(3))
    second.restore(*first.state())
    steps(second, range(3, 6))
    for name in straight.masters:
        assert torch.equal(straight.masters[name], second.masters[name])
        assert torch.equal(straight.parameters[name], second.parameters[name])
