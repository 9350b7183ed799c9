"""AdaLoRA's schedule, step by step beside PEFT's, and what is left of it in a file."""

import json

import pytest
import torch
from method_cases import load_theirs, ours, save_theirs, their_logits, theirs
from safetensors.torch import load_file
from tiny_models import disturb, foreign_code, gpt2, logits, token_ids

import minipeft
from minipeft import AdaLoraConfig, ConfigError, get_adapter_model

SCHEDULE = {"total_step": 30, "tinit": 4, "tfinal": 8, "deltaT": 3, "beta1": 0.7, "beta2": 0.9, "orth_reg_weight": 0.3}


def batch(step):
    return {"input_ids": token_ids(seed=step), "labels": token_ids(seed=step)}


def spectrum(model):
    """The diagonals of all modules, one after the other."""
    return torch.cat([t.flatten() for key, t in model.adapter_state_dict().items() if key.endswith("lora_E")]).detach()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Both libraries' models after thirty steps from one start, with PEFT's gradients given to both."""
    start = tmp_path_factory.mktemp("start")
    torch.manual_seed(0)
    reference = theirs("adalora", **SCHEDULE, task_type="CAUSAL_LM")  # without a task PEFT forgets the extra loss
    save_theirs(reference, start)
    model = minipeft.load_adapter(gpt2(), start, is_trainable=True)
    live = model.adapter_state_dict()
    their_live = {key.replace(".default", ""): p for key, p in reference.named_parameters() if p.requires_grad}
    optimizers = [torch.optim.AdamW(list(t.values()), lr=0.02, foreach=False) for t in (their_live, live)]
    history = []
    for step in range(SCHEDULE["total_step"]):
        for optimizer in optimizers:
            optimizer.zero_grad()
        with foreign_code():
            their_loss = reference(**batch(step)).loss
        loss = model(**batch(step)).loss + minipeft.extra_loss(model)
        for value in (their_loss, loss):
            value.backward()
        for key, tensor in live.items():
            torch.testing.assert_close(tensor.grad, their_live[key].grad, rtol=1e-3, atol=1e-5, msg=key)
            tensor.grad.copy_(their_live[key].grad)
        for optimizer in optimizers:
            optimizer.step()
        reference.base_model.update_and_allocate(step)
        minipeft.after_step(model, step)
        same = all(torch.equal(tensor, their_live[key]) for key, tensor in live.items())
        history.append((float(loss.detach()), float(their_loss.detach()), same, int((spectrum(model) != 0).sum())))
    return reference, model, history


def test_thirty_steps_give_the_losses_the_masks_and_the_weights_of_peft(trained):
    _, _, history = trained
    for step, (loss, their_loss, same, _) in enumerate(history):
        assert loss == pytest.approx(their_loss, rel=1e-5), step
        assert same, step
    left = [count for *_, count in history]
    assert left[4] == 4 * 5  # the whole budget until tinit
    assert set(left[22:]) == {4 * 2}  # the target of the four modules from total_step - tfinal on
    assert len(set(left)) > 4


def test_the_final_file_is_that_of_peft_and_holds_what_is_left(trained, tmp_path):
    reference, model, _ = trained
    save_theirs(reference, tmp_path / "theirs")
    model.save_pretrained(tmp_path / "ours")
    left, right = (load_file(tmp_path / which / "adapter_model.safetensors") for which in ("ours", "theirs"))
    assert left.keys() == right.keys()
    assert all(torch.equal(left[key], right[key]) for key in left)
    patterns = [
        json.loads((tmp_path / w / "adapter_config.json").read_text())["rank_pattern"] for w in ("ours", "theirs")
    ]
    assert patterns[0] == patterns[1]
    assert sum(map(sum, patterns[0].values())) == 4 * 2
    expected = logits(model.eval())
    torch.testing.assert_close(their_logits(load_theirs("adalora", tmp_path / "ours")), expected, rtol=0, atol=1e-5)
    for which in ("ours", "theirs"):
        again = minipeft.load_adapter(gpt2(), tmp_path / which)
        torch.testing.assert_close(logits(again), expected, rtol=0, atol=1e-5)
        again.save_pretrained(tmp_path / "again")
        assert all(
            torch.equal(t, right[key]) for key, t in load_file(tmp_path / "again/adapter_model.safetensors").items()
        )
        assert json.loads((tmp_path / "again/adapter_config.json").read_text())["rank_pattern"] == patterns[0]


def test_a_file_from_between_two_allocations_gives_the_model_as_it_is(tmp_path):
    model = disturb(ours("adalora", tinit=0))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for step in range(12):
        optimizer.zero_grad()
        model(**batch(step)).loss.backward()
        optimizer.step()
        minipeft.after_step(model, step)
    model(**batch(0)).loss.backward()
    optimizer.step()  # what was taken away has grown again
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(minipeft.load_adapter(gpt2(), tmp_path)), logits(model))


def test_ranks_may_go_down_further_after_loading(tmp_path):
    model = disturb(ours("adalora"))
    for name, layer in minipeft.injection.module_tree.adapted_layers(model):
        layer.adapter("default")._take_away(torch.tensor([True, False, True, False, "c_proj" not in name]))
    model.save_pretrained(tmp_path / "first")
    again = minipeft.load_adapter(gpt2(), tmp_path / "first", is_trainable=True)
    assert torch.allclose(logits(again), logits(model), atol=1e-6)
    for _, layer in minipeft.injection.module_tree.adapted_layers(again):
        adapter = layer.adapter("default")
        adapter._take_away(torch.arange(len(adapter.lora_E)) == 1)
    again.save_pretrained(tmp_path / "second")
    pattern = json.loads((tmp_path / "second/adapter_config.json").read_text())["rank_pattern"]
    assert set(map(tuple, pattern.values())) == {(False, False, True, False, False)}
    assert torch.allclose(logits(minipeft.load_adapter(gpt2(), tmp_path / "second")), logits(again), atol=1e-6)


def test_a_module_may_lose_all_its_components(tmp_path):
    model = disturb(ours("adalora"))
    layers = dict(minipeft.injection.module_tree.adapted_layers(model))
    layers["transformer.h.0.attn.c_attn"].adapter("default")._take_away(torch.zeros(5, dtype=torch.bool))
    model.save_pretrained(tmp_path)
    again = minipeft.load_adapter(gpt2(), tmp_path, is_trainable=True)
    assert torch.allclose(logits(again), logits(model), atol=1e-6)
    model(**batch(0)).loss.backward()
    assert minipeft.extra_loss(again).isfinite()
    assert torch.allclose(their_logits(load_theirs("adalora", tmp_path)), logits(model), atol=1e-5)


def test_the_extra_loss_is_the_distance_from_orthogonal():
    model = disturb(ours("adalora"))
    tensors = model.adapter_state_dict()
    grams = [t @ t.T for key, t in tensors.items() if key.endswith("_A")]
    grams += [t.T @ t for key, t in tensors.items() if key.endswith("_B")]
    expected = 0.5 * sum((gram - torch.eye(5)).square().sum().sqrt() for gram in grams) / len(grams)
    torch.testing.assert_close(minipeft.extra_loss(model), expected)
    with model.disable_adapter():
        assert not minipeft.extra_loss(model)


def test_an_allocation_without_gradients_is_refused_and_nothing_changes():
    model = disturb(ours("adalora"))
    before = spectrum(model)
    with pytest.raises(minipeft.StateError, match=r"lora_A has none; call after_step after backward"):
        minipeft.after_step(model, 5)
    assert torch.equal(spectrum(model), before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "total_step must be given"),
        ({"total_step": 5, "tinit": 3, "tfinal": 2}, "leave none of the total_step = 5"),
        ({"total_step": 5, "init_r": 2, "target_r": 3}, "target_r = 3 exceeds init_r = 2"),
        ({"total_step": 5, "beta1": 1.0}, "beta1"),
        ({"total_step": 5, "bias": "all"}, "bias"),
        ({"total_step": 5, "rank_pattern": {"h.lora_E": [True]}}, "list of init_r = 12 booleans"),
        ({"total_step": 5, "use_rslora": True}, "no option 'use_rslora'"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        AdaLoraConfig(**options)


def test_a_rank_pattern_for_no_target_is_refused():
    config = AdaLoraConfig(total_step=5, init_r=1, target_r=1, rank_pattern={"h.9.lora_E": [True]})
    with pytest.raises(minipeft.TargetError, match=r"rank_pattern: h\.9\.lora_E"):
        get_adapter_model(gpt2(), config)
