"""The probe against loops written out from the definitions."""

import math

import pytest
import torch

from kvcal.calibrate.evaluation.attention_error import AttentionProbe, History
from kvcal.runtime.attention import SoftmaxSpec

B, HKV, G, P, D, DV, STEPS = 2, 2, 3, 9, 8, 5, 4


class Store:
    def __init__(self, mask):
        self.mask = mask

    def read_mask(self):
        return self.mask


def dense(query, keys, values, spec):
    """(weights over tokens, output) of one head's query, in float64."""
    scores = [spec.scaling * float(query.double() @ key.double()) for key in keys]
    if spec.softcap:
        scores = [spec.softcap * math.tanh(score / spec.softcap) for score in scores]
    weights = [math.exp(score) for score in scores]
    return torch.tensor(weights, dtype=torch.float64), sum(w * v.double() for w, v in zip(weights, values, strict=True))


@pytest.mark.parametrize("per_head", [True, False], ids=["mask per query head", "mask per KV head"])
@pytest.mark.parametrize("kind", ["plain", "softcap", "sinks"])
def test_error_and_mass(per_head, kind):
    torch.manual_seed(0)
    sinks = torch.randn(HKV * G)
    spec = {
        "plain": SoftmaxSpec(0.3),
        "softcap": SoftmaxSpec(0.9, softcap=1.5),
        "sinks": SoftmaxSpec(0.3, sink_logits=sinks),
    }[kind]
    key, value = torch.randn(B, HKV, P + STEPS, D), torch.randn(B, HKV, P + STEPS, DV)
    probe = AttentionProbe({7: History(key[:, :, :P], value[:, :, :P], STEPS)})
    errors, masses = ([[] for _ in range(B)] for _ in range(2))
    for step in range(STEPS):
        length = P + step + 1
        query, output = torch.randn(B, HKV * G, 1, D), torch.randn(B, HKV * G, 1, DV)
        mask = torch.rand(B, HKV * G if per_head else HKV, length) < 0.4
        new = slice(length - 1, length)
        probe(7, Store(mask), query, key[:, :, new], value[:, :, new], spec, output)
        for row in range(B):
            for head in range(HKV * G):
                group = head // G
                weights, out = dense(query[row, head, 0], key[row, group, :length], value[row, group, :length], spec)
                norm = weights.sum() + (sinks[head].double().exp() if spec.sink_logits is not None else 0)
                out = out / norm
                errors[row].append(float((output[row, head, 0].double() - out).norm() / out.norm()))
                read = mask[row, head if per_head else group]
                masses[row].append(float(weights[read].sum() / weights.sum()))
    error, mass = probe.result()
    assert error == {7: pytest.approx([sum(each) / len(each) for each in errors], rel=1e-5)}
    assert mass == {7: pytest.approx([sum(each) / len(each) for each in masses], rel=1e-5)}
    assert probe.seconds > 0


def test_a_history_is_rewound_for_the_next_setting():
    torch.manual_seed(0)
    key, value = torch.randn(1, 1, 3, 4), torch.randn(1, 1, 3, 2)
    history = History(key, value, 2)
    history.append(torch.ones(1, 1, 1, 4), torch.ones(1, 1, 1, 2))
    AttentionProbe({0: history})
    keys, values = history.append(torch.zeros(1, 1, 1, 4), torch.zeros(1, 1, 1, 2))
    assert torch.equal(keys, torch.cat((key, torch.zeros(1, 1, 1, 4)), 2))
    assert torch.equal(values, torch.cat((value, torch.zeros(1, 1, 1, 2)), 2))
