"""Whatever changes a model's output changes its hash, however its weights are kept; what does not, does not."""

import copy
import hashlib

import pytest
import torch
from architectures import build
from torch import nn
from torch.nn.utils import parametrize

from kvcal.artifacts import KvcalError, weights_sha256
from kvcal.artifacts.weights import model_state, sample


def digests(model):
    return weights_sha256(model), sample(model_state(model))


def test_weights_hash_is_over_names_shapes_and_float32_bytes():
    model = nn.Linear(3, 2)
    digest = hashlib.sha256()
    for name, parameter in (("bias", model.bias), ("weight", model.weight)):
        digest.update(f"{name} {list(parameter.shape)}\n".encode())
        digest.update(parameter.detach().numpy().tobytes())
    assert weights_sha256(model) == digest.hexdigest()


def test_weights_hash_is_the_same_in_either_dtype_of_a_bf16_checkpoint():
    model = build("llama").to(torch.bfloat16)
    in_bf16 = weights_sha256(model)
    assert in_bf16 == weights_sha256(model.float()) == weights_sha256(model.double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_hash_notices_one_changed_number(dtype):
    model = build("llama").to(dtype)
    before = weights_sha256(model)
    with torch.no_grad():
        next(model.parameters()).view(-1)[-1] *= 1 + 2 * torch.finfo(dtype).eps
    assert weights_sha256(model) != before


def test_computed_buffers_are_no_weights():
    model = build("llama")
    parameters = {name for name, _ in model.named_parameters()}
    assert {name for name, _ in model_state(model)} == parameters
    assert any(not name.endswith("weight") for name, _ in model.named_buffers())  # inv_freq


class GPTQLinear(nn.Module):
    """As AutoGPTQ and AWQ keep weights: eight 4-bit integers in an int32."""

    def __init__(self):
        super().__init__()
        self.register_buffer("qweight", torch.arange(8, dtype=torch.int32).view(2, 4) * 0x01234567)
        self.register_buffer("qzeros", torch.zeros(1, 1, dtype=torch.int32))
        self.register_buffer("scales", torch.ones(1, 4, dtype=torch.float16))
        self.register_buffer("table", torch.arange(4.0), persistent=False)


class Params4bit(nn.Parameter):
    """As bitsandbytes': integers, and an object of scales beside them."""

    def __new__(cls, absmax):
        made = torch.Tensor._make_subclass(cls, torch.zeros(4, dtype=torch.uint8))
        made.quant_state, made.module = State(absmax), nn.Linear(1, 1)
        return made


class State:
    def __init__(self, absmax):
        self.absmax, self.quant_type, self.nested = torch.tensor([absmax]), "nf4", None


class Holder(nn.Module):
    def __init__(self, **tensors):
        super().__init__()
        for name, tensor in tensors.items():
            setattr(self, name, tensor)


class Times(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, weight):
        return weight * self.factor


class Extra(nn.Module):
    def __init__(self, state):
        super().__init__()
        self.state = state

    def get_extra_state(self):
        return self.state


class Lora(nn.Linear):
    merged_adapters, disable_adapters = (), False

    def __init__(self, **strength):
        super().__init__(2, 2)
        self.active_adapters, self.scaling = ["default"], {"default": 2.0}
        vars(self).update(strength)


def quantised(offset, dtype):
    linear = nn.Sequential(nn.Linear(2, 2))
    with torch.no_grad():
        linear[0].weight.copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0 + offset]]))
        linear[0].bias.zero_()
    return torch.ao.quantization.quantize_dynamic(linear, {nn.Linear}, dtype=dtype)


def gptq(name, index, add):
    module = GPTQLinear()
    getattr(module, name).view(-1)[index] += add
    return module


def parametrized(factor):
    linear = nn.Linear(2, 2)
    nn.init.ones_(linear.weight), nn.init.ones_(linear.bias)
    return parametrize.register_parametrization(linear, "weight", Times(factor))


def lora(**strength):
    torch.manual_seed(0)
    return Lora(**strength)


OTHERS = {
    "dynamic-qint8": lambda changed: quantised(changed, torch.qint8),
    "dynamic-float16": lambda changed: quantised(changed, torch.float16),
    "one-bit-of-int32": lambda changed: gptq("qweight", -1, changed),
    "zeros": lambda changed: gptq("qzeros", 0, changed),
    "scales": lambda changed: gptq("scales", 0, changed),
    "quant-state": lambda changed: Holder(weight=Params4bit(1.0 + changed)),
    "attribute": lambda changed: Holder(weight=torch.tensor([1.0 + changed])),
    "extra-state": lambda changed: Extra({"amax": torch.tensor([1.0 + changed])}),
    "extra-bytes": lambda changed: Extra(bytes([changed])),
    "parametrization": lambda changed: parametrized(1.0 + changed),
    "lora-scaling": lambda changed: lora(scaling={"default": 2.0 + changed}),
    "lora-disabled": lambda changed: lora(disable_adapters=bool(changed)),
    "lora-active": lambda changed: lora(active_adapters=["other"] if changed else ["default"]),
    "sparse": lambda changed: Holder(weight=nn.Parameter(torch.tensor([0.0, 1.0 + changed]).to_sparse())),
    "complex": lambda changed: Holder(weight=nn.Parameter(torch.tensor([1 + changed * 1j]))),
}


@pytest.mark.filterwarnings("ignore")  # torch's quantisation is to move
@pytest.mark.parametrize("kind", OTHERS)
def test_weights_that_are_no_plain_parameters(kind):
    (whole, some), (again, _), (other, others) = (digests(OTHERS[kind](changed)) for changed in (0, 0, 1))
    assert whole == again != other
    assert some != others


def test_what_moves_when_a_module_is_first_run_is_counted_once():
    """bitsandbytes' 8-bit linear hands its scales from the parameter to the module, and saves them from either."""

    class Linear8bit(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.moved = Params4bit(1.0), None

        def _save_to_state_dict(self, destination, prefix, keep_vars):
            super()._save_to_state_dict(destination, prefix, keep_vars)
            destination[prefix + "SCB"] = self.moved if self.moved is not None else self.weight.quant_state.absmax

    model = Linear8bit()
    before = weights_sha256(model)
    model.moved, model.weight.quant_state = model.weight.quant_state.absmax, None
    assert weights_sha256(model) == before
    model.moved = model.moved + 1
    assert weights_sha256(model) != before


def test_tensor_subclasses_by_what_they_are_flattened_to():
    from torch.testing._internal.two_tensor import TwoTensor

    def held(second):
        return Holder(weight=nn.Parameter(TwoTensor(torch.ones(2), second * torch.ones(2))))

    assert digests(held(1.0)) == digests(held(1.0))
    assert weights_sha256(held(1.0)) != weights_sha256(held(2.0))


def test_a_spectral_norm_is_not_stepped_by_looking():
    model = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)).train()
    before = copy.deepcopy(model.state_dict())
    assert weights_sha256(model) == weights_sha256(model)
    assert model.parametrizations.weight.training
    assert all(torch.equal(before[name], now) for name, now in model.state_dict().items())


def test_a_compiled_model_has_the_weights_of_the_one_inside():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    plain = digests(model)
    model[0] = torch.compile(model[0], backend="eager")
    assert digests(model) == digests(torch.compile(model, backend="eager")) == plain
    model[1].running_var += 1
    assert weights_sha256(model) != plain[0]


def test_tied_weights_count_once():
    tied = build("gemma3")
    names = [name for name, _ in model_state(tied)]
    assert len(names) == len(set(names)) == len(list(tied.parameters()))


@pytest.mark.parametrize(
    "model, said",
    [
        (nn.Linear(2, 2, device="meta"), "its numbers are not here"),
        (nn.LazyLinear(2), "its numbers are not here"),
        (Extra(object()), "its weights are in a object, which cannot be read"),
    ],
)
def test_weights_that_cannot_be_read_are_refused(model, said):
    for read in (weights_sha256, lambda refused: sample(model_state(refused))):
        with pytest.raises(KvcalError, match=said):
            read(model)
