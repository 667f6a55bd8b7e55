"""What is trained, against what, and how the model is left."""

import math

import pytest
import torch
from architectures import build
from cla_oracle import inventory
from cla_samples import GROUPS, STEPS, blocks, train, with_dropout

from kvcal.artifacts import KvcalError
from kvcal.calibrate.blocks import TokenBlocks
from kvcal.calibrate.cla import start, uptraining
from kvcal.calibrate.cla.fit_pass import fit_projections
from kvcal.calibrate.cla.objective import losses
from kvcal.calibrate.cla.uptraining import Uptraining, uptrain
from kvcal.runtime.cla import SharingMap, share, shared, sharing_of

LLAMA_SHARED = {
    "model.layers.0.self_attn.k_proj.weight",
    "model.layers.0.self_attn.v_proj.weight",
    "model.layers.1.self_attn.q_proj.weight",
    "model.layers.1.input_layernorm.weight",
    "model.layers.1.post_attention_layernorm.weight",
}


@pytest.fixture(scope="module")
def trained():
    """{what is trained: (model, its parameters before, the result)}"""
    found = {}
    for train_ in ("shared", "attention", "all"):
        of = build("llama")
        before = {name: parameter.detach().clone() for name, parameter in of.named_parameters()}
        found[train_] = of, before, train(of, train=train_, steps=25, distill=0.5)
    return found


@pytest.mark.parametrize("what", ["shared", "attention", "all"])
def test_only_what_is_trained_has_changed(trained, what):
    of, before, result = trained[what]
    with shared(of, GROUPS) as pooled, torch.no_grad():
        start = {name: parameter.clone() for name, parameter in of.named_parameters()}
        assert pooled.parameters.keys() <= result.weights.keys()
    attention = {name for name in start if ".self_attn." in name or "norm" in name}
    assert result.weights.keys() == {"shared": LLAMA_SHARED, "attention": attention, "all": start.keys()}[what]
    assert all(not torch.equal(weight, start[name]) for name, weight in result.weights.items())
    after = dict(of.named_parameters())
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("what", ["shared", "attention", "all"])
def test_the_losses_fall(trained, what):
    found = trained[what][2].settings
    for name in ("loss", "cross_entropy"):
        assert found["last_losses"][name] < 0.97 * found["first_losses"][name]


def test_the_weights_are_those_of_the_trained_model(trained):
    of, _, result = trained["shared"]
    text = blocks()
    with shared(of, GROUPS, weights=result.weights), torch.no_grad():
        logits = of(text.ids[:-1].long(), use_cache=False).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), text.ids[:-1, 1:].long().flatten())
    assert loss.item() < result.history[0]["cross_entropy"]


def test_the_model_is_left_as_it_was_found():
    of = build("llama")
    of.model.layers[1].train()
    of.lm_head.weight.requires_grad_(False)
    before, modes = inventory(of), [module.training for module in of.modules()]
    flags, random = [parameter.requires_grad for parameter in of.parameters()], torch.get_rng_state()
    train(of, train="all")
    assert inventory(of) == before and sharing_of(of) is None
    assert [module.training for module in of.modules()] == modes
    assert [parameter.requires_grad for parameter in of.parameters()] == flags
    assert all(parameter.grad is None for parameter in of.parameters())
    assert torch.equal(torch.get_rng_state(), random)


def spied(monkeypatch):
    """What `losses` is called with."""
    calls = []
    monkeypatch.setattr(uptraining, "losses", lambda *given: calls.append(given) or losses(*given))
    return calls


def test_the_teacher_is_the_original_model_without_dropout(monkeypatch):
    calls, of = spied(monkeypatch), with_dropout()
    train(of)
    assert len(calls) == STEPS
    for _, original, ids, attended in calls:
        with torch.no_grad():
            expected = of(ids, attention_mask=attended.long(), use_cache=False).logits
        assert torch.equal(original, expected) and not original.requires_grad


def test_without_distillation_there_is_no_teacher(monkeypatch):
    calls, of = spied(monkeypatch), build("llama")
    result = train(of, distill=0.0)
    assert all(original is None for _, original, _, _ in calls) and "kl" not in result.history[0]
    assert result.history[0]["loss"] == result.history[0]["cross_entropy"]


@pytest.mark.parametrize("distill", [0.25, 1.0])
def test_the_loss_is_the_weighted_mean(distill):
    for record in train(build("llama"), distill=distill).history:
        expected = (1 - distill) * record["cross_entropy"] + distill * record["kl"]
        assert record["loss"] == pytest.approx(expected, rel=1e-6)


def test_by_default_nothing_is_learned_of_the_text_itself():
    """The second layer's input, keys and values are the first's here: sharing changes nothing, and text gives no
    gradient."""
    of = build("llama")
    first, second = (of.model.layers[layer] for layer in GROUPS.shared[0])
    with torch.no_grad():
        first.self_attn.o_proj.weight.zero_()
        first.mlp.down_proj.weight.zero_()
    second.input_layernorm.load_state_dict(first.input_layernorm.state_dict())
    for name in ("k_proj", "v_proj"):
        getattr(second.self_attn, name).load_state_dict(getattr(first.self_attn, name).state_dict())
    mixed, default = (train(of, steps=1, **more).history[0]["gradient_norm"] for more in ({"distill": 0.5}, {}))
    assert mixed > 0.01 and default < 1e-5 * mixed


def test_the_first_loss_is_that_of_the_pooled_model():
    for pool in ("mean", "first"):
        of = build("llama")
        found = train(of, batch_size=len(blocks()), steps=1, pool=pool).history[0]["cross_entropy"]
        text = blocks()
        with shared(of, GROUPS, pool=pool), torch.no_grad():
            logits = of(text.ids.long(), attention_mask=text.attended.long(), use_cache=False).logits.double()
        nll = -logits[:, :-1].log_softmax(-1).gather(2, text.ids[:, 1:, None].long())[..., 0]
        assert found == pytest.approx(nll[text.attended[:, 1:]].mean().item(), rel=1e-5)


def test_dropout_is_drawn_in_training_and_the_seed_decides_it():
    first, again = (train(with_dropout()) for _ in range(2))
    other, plain = train(with_dropout(), seed=1), train(build("llama"))
    assert first.history == again.history
    assert first.history[0] != plain.history[0] and first.history != other.history


def test_a_bfloat16_model_is_trained_by_float32_steps():
    of = build("llama", dtype=torch.bfloat16)
    result = train(of, steps=25)
    assert {weight.dtype for weight in result.weights.values()} == {torch.bfloat16}
    assert result.settings["last_losses"]["loss"] < 0.97 * result.settings["first_losses"]["loss"]


@pytest.mark.parametrize("name", ["phi3", "gpt2", "gpt-neox", "qwen3"])
def test_joint_projections_and_norms_of_keys_are_trained_too(name):
    of = build(name)
    result = train(of, steps=12, lr=1e-2)
    assert result.history[-1]["loss"] < result.history[0]["loss"]
    with shared(of, GROUPS, weights=result.weights) as sharing:
        assert sharing.parameters.keys() == result.weights.keys()


def of_lengths(*lengths):
    text = blocks(len(lengths))
    attended = torch.arange(text.seq_len) < torch.tensor(lengths).unsqueeze(1)
    return TokenBlocks(text.ids, attended, attended.clone(), text.source)


def test_blocks_of_one_token_are_passed_over():
    training = Uptraining(steps=4, batch_size=1, lr=3e-3)
    found, without = (uptrain(build("llama"), of_lengths(*ends), GROUPS, training) for ends in ((9, 16, 1), (9, 16)))
    assert found.history == without.history
    assert found.settings["data"]["blocks"] == 3
    with pytest.raises(KvcalError, match=r"no block has two tokens, .*give more text"):
        uptrain(build("llama"), of_lengths(1, 1), GROUPS, training)


def test_a_loss_that_is_no_number_stops_it():
    of = build("llama")
    with pytest.raises(KvcalError, match=r"diverged: give a smaller --lr \(it was 1e\+30\)"):
        train(of, lr=1e30, train="all")
    assert sharing_of(of) is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": -1}, "-1 steps: give 1 or more, or 0"),
        ({"batch_size": 0}, "batches of 0 blocks"),
        ({"lr": 0.0}, "learning rate 0.0"),
        ({"lr": math.nan}, "learning rate nan"),
        ({"distill": -0.1}, "from 0 to 1"),
        ({"distill": 1.1}, "from 0 to 1"),
        ({"train": "none"}, "shared, attention, all"),
        ({"warmup": 6}, "fewer than the 6"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, message):
    with pytest.raises(KvcalError, match=message):
        Uptraining(**{"steps": STEPS, **settings})


def test_models_and_maps_that_cannot_be_trained_are_refused():
    of = build("llama")
    with pytest.raises(KvcalError, match="nothing to train"):
        train(of, sharing_map=SharingMap.parse("0,1,2"))
    with pytest.raises(KvcalError, match="context of 128"):
        uptrain(of, blocks(length=129), GROUPS, Uptraining(1))
    with pytest.raises(KvcalError, match="bfloat16 or float32"):
        train(build("llama", dtype=torch.float16))
    with pytest.raises(KvcalError, match="at least 1"):
        train(of, checkpoint_every=0)
    with pytest.raises(KvcalError, match="pool 'median': give one of fitted, mean, first"):
        train(of, pool="median")
    with pytest.raises(KvcalError, match=r"k_norm.*--pool mean"):
        train(build("qwen3"), pool="fitted")
    sharing = share(of, GROUPS)
    with pytest.raises(KvcalError, match="already"):
        train(of)
    sharing.remove()


def test_a_second_training_goes_on_from_the_first_ones_weights():
    of, text = build("llama"), blocks()
    first = train(of, steps=20, pool="first")
    more = uptrain(of, text, GROUPS, Uptraining(1, batch_size=len(text)), earlier=first)
    with shared(of, GROUPS, weights=first.weights), torch.no_grad():
        logits = of(text.ids.long(), attention_mask=text.attended.long(), use_cache=False).logits
    expected = losses(logits, None, text.ids.long(), text.attended)[0].item()
    assert more.history[0]["cross_entropy"] == pytest.approx(expected, rel=1e-5)
    assert more.settings["earlier"] == first.settings and more.settings["pool"] == "first"
    again = uptrain(of, text, GROUPS, Uptraining(1, batch_size=len(text)))
    assert again.settings["run"] != more.settings["run"]
    with pytest.raises(KvcalError, match="earlier training was of 0-1,2"):
        uptrain(of, text, SharingMap.parse("0,1-2"), Uptraining(1), earlier=first)


def test_no_steps_leave_what_is_fitted_on_a_part_of_the_text(monkeypatch):
    of, text = build("llama"), blocks(count=9)
    monkeypatch.setattr(start, "START_TOKENS", 3 * text.seq_len)
    found = uptrain(of, text, GROUPS, Uptraining(0), pool="fitted")
    kept = {name: getattr(text, name)[[0, 4, 8]] for name in ("ids", "counted", "attended")}
    expected = fit_projections(of, GROUPS, TokenBlocks(**kept, source=text.source))
    assert found.weights.keys() >= expected.keys() and found.history == ()
    assert all(torch.equal(found.weights[name], weight) for name, weight in expected.items())
    assert (found.settings["pool"], found.settings["steps"], found.settings["first_losses"]) == ("fitted", 0, {})
    for pool, earlier in (("mean", None), ("fitted", found)):
        with pytest.raises(KvcalError, match="0 steps"):
            uptrain(of, text, GROUPS, Uptraining(0), pool=pool, earlier=earlier)


def test_what_was_fitted_and_is_not_trained_stays():
    of, text = build("llama"), blocks()
    fitted = uptrain(of, text, GROUPS, Uptraining(0), pool="fitted").weights
    trained = uptrain(of, text, GROUPS, Uptraining(STEPS, lr=3e-3), pool="fitted").weights
    attention = "model.layers.{}.self_attn.{}.weight".format
    stay = {attention(0, "q_proj"), attention(0, "o_proj"), attention(1, "o_proj")}
    assert trained.keys() == fitted.keys() == LLAMA_SHARED | stay
    assert {name for name in stay if torch.equal(trained[name], fitted[name])} == stay
    assert not any(torch.equal(trained[name], fitted[name]) for name in LLAMA_SHARED)
    own = dict(of.named_parameters())
    assert not any(torch.equal(fitted[name], own[name]) for name in stay)


def test_a_training_goes_on_from_what_was_fitted():
    of, text = build("llama"), blocks()
    fitted = uptrain(of, text, GROUPS, Uptraining(0), pool="fitted")
    given = uptrain(of, text, GROUPS, Uptraining(STEPS), pool="fitted", start=fitted.weights)
    here, after = (
        uptrain(of, text, GROUPS, Uptraining(STEPS), **more) for more in ({"pool": "fitted"}, {"earlier": fitted})
    )
    for other in (given, after):
        assert other.history == here.history
        assert all(torch.equal(other.weights[name], weight) for name, weight in here.weights.items())
    assert given.settings == here.settings and after.settings["earlier"] == fitted.settings
