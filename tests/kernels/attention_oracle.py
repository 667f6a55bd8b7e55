"""One softmax per query in float64, written as the sums it is made of, with no shift and nothing merged."""

import torch

NAN = float("nan")
_empty = torch.empty


def softmax_sums(query, keys, values, *, scaling, softcap=None):
    """(Σ e^logit v [Dv], Σ e^logit) over keys [n, D] and values [n, Dv] for one query [D]."""
    logits = keys.double() @ query.double() * scaling
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    mass = logits.exp()
    return mass @ values.double(), mass.sum()


def attention(query, key, value, slots, *, scaling, softcap=None, sink_logits=None):
    """[B, Hkv, G, Dv] float64: every query's one softmax over its tokens.

    Args:
        slots: function (sequence, head, member) -> where they are.
    """
    batch, heads, group, _ = query.shape
    results = []
    for sequence, head, member in ((b, h, g) for b in range(batch) for h in range(heads) for g in range(group)):
        chosen = torch.as_tensor(slots(sequence, head, member), dtype=torch.int64, device=key.device)
        keys, values = key[sequence, head, chosen], value[sequence, head, chosen]
        numerator, mass = softmax_sums(query[sequence, head, member], keys, values, scaling=scaling, softcap=softcap)
        if sink_logits is not None:
            mass = mass + sink_logits[head * group + member].double().exp()
        results.append(numerator / mass if mass > 0 else torch.zeros_like(numerator))
    return torch.stack(results).view(batch, heads, group, -1)


def make(generator, *shape, dtype=torch.float32):
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def poison(cache, keep):
    """A copy of a cache [B, H, S, D] that is NaN wherever keep [B, H or 1, S] is False."""
    return cache.masked_fill(~keep.expand(cache.shape[:3]).unsqueeze(-1), NAN)


def poisoned_empty(*shape, **options):
    """In place of torch.empty: what was never written shows."""
    tensor = _empty(*shape, **options)
    return tensor.fill_(NAN) if tensor.is_floating_point() else tensor
