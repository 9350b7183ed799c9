"""LoRA+: who learns at which rate, beside PEFT's own."""

import math

import pytest
import torch
from tiny_models import bert_classifier, foreign_code, gpt2, llama, token_ids
from torch import nn

import minipeft
from minipeft import ConfigError, LoraConfig, StateError, get_lora_model
from minipeft.training.lora_plus import lora_plus_groups

LR, RATIO, DECAY = 1e-3, 8.0, 0.1


def by_name(model, groups):
    """Each trainable parameter's (learning rate, decay); every one of them stands in exactly one group."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    listed = [(names[id(p)], (group["lr"], group["weight_decay"])) for group in groups for p in group["params"]]
    table = dict(listed)
    assert len(table) == len(listed)
    assert table.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    return table


def cases():
    return [
        (gpt2, {"target_modules": ["c_attn", "c_proj"]}),
        (gpt2, {"target_modules": ["c_attn", "wte"]}),
        (gpt2, {"target_modules": ["c_attn"], "modules_to_save": ["wte", "ln_f", "lm_head"]}),
        (llama, {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["model.norm", "lm_head"]}),
        (bert_classifier, {"target_modules": ["query"], "modules_to_save": ["classifier"]}),
    ]


@pytest.mark.parametrize(("make", "options"), cases())
@pytest.mark.parametrize("lr_embedding", [None, 1e-4])
def test_every_rate_is_peft_s(make, options, lr_embedding):
    peft, optimizers = pytest.importorskip("peft"), pytest.importorskip("peft.optimizers")
    model = get_lora_model(make(), LoraConfig(r=4, **options))
    with foreign_code():
        reference = peft.get_peft_model(make(), peft.LoraConfig(r=4, **options))
    extra = {} if lr_embedding is None else {"lr_embedding": lr_embedding}
    theirs_extra = {} if lr_embedding is None else {"loraplus_lr_embedding": lr_embedding}
    ours = by_name(model, lora_plus_groups(model, LR, RATIO, **extra))
    optimizer = optimizers.create_loraplus_optimizer(
        reference, torch.optim.AdamW, lr=LR, loraplus_lr_ratio=RATIO, **theirs_extra
    )
    theirs = by_name(reference, optimizer.param_groups)

    def plain(name):
        for old, new in (
            ("base_model.model.", ""),
            (".modules_to_save.default", ""),
            (".adapters.default", ""),
            (".default", ""),
            (".base_layer", ""),
            (".weight", ""),
        ):
            name = name.replace(old, new)
        return name.replace("lora_embedding_", "lora_")

    ours, theirs = ({plain(name): rate for name, (rate, _) in table.items()} for table in (ours, theirs))
    assert ours == theirs
    assert len(set(ours.values())) == 2 + ("wte" in options["target_modules"])


def test_the_groups_say_what_they_are_and_who_decays():
    config = LoraConfig(r=4, target_modules=["c_attn", "wte"], modules_to_save=["ln_f"], bias="lora_only")
    model = get_lora_model(gpt2(), config)
    groups = {group["name"]: group for group in lora_plus_groups(model, LR, RATIO, DECAY)}
    assert list(groups) == ["lora_A", "lora_B", "vectors", "lora_embedding"]
    assert [groups[name]["weight_decay"] for name in groups] == [DECAY, DECAY, 0.0, DECAY]
    assert [groups[name]["lr"] for name in groups] == [LR, LR * RATIO, LR * RATIO, 1e-6]
    names = {
        name: n
        for n, group in groups.items()
        for p in group["params"]
        for name, q in model.named_parameters()
        if p is q
    }
    kinds = {"lora_A": "lora_A", "lora_B": "lora_B", "lora_bias": "vectors", "weight": "vectors", "bias": "vectors"}
    for name, group in names.items():
        assert group == ("lora_embedding" if "wte" in name else kinds[name.rpartition(".")[2]]), name
    assert "lora_embedding" not in {g["name"] for g in lora_plus_groups(get_lora_model(gpt2()), LR)}


@pytest.mark.parametrize("cls", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adam])
def test_one_step_moves_b_at_its_own_rate(cls):
    """Against the step written out: SGD moves by lr * gradient, Adam's first step by lr * sign(gradient)."""
    model = get_lora_model(gpt2(), LoraConfig(r=4, init_lora_weights=False))
    optimizer = cls(lora_plus_groups(model, LR, RATIO))
    ids = token_ids()
    model(input_ids=ids, labels=ids).loss.backward()
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    optimizer.step()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            rate = LR * RATIO if name.endswith("lora_B") else LR
            gradient = parameter.grad
            step = gradient if cls is torch.optim.SGD else gradient / (gradient.abs() + 1e-8)
            torch.testing.assert_close(parameter, before[name] - rate * step, rtol=1e-5, atol=1e-7)


def test_a_scheduler_keeps_the_ratio():
    optimizer = torch.optim.SGD(lora_plus_groups(get_lora_model(gpt2()), LR, RATIO))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    for step in range(3):
        rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
        assert rates == pytest.approx({"lora_A": LR * 0.5**step, "lora_B": LR * RATIO * 0.5**step})
        optimizer.step()
        scheduler.step()


def test_an_adapter_that_rests_or_is_frozen_is_in_no_group():
    model = get_lora_model(gpt2(), LoraConfig(r=4))
    model.add_adapter("other", LoraConfig(r=2))
    by_name(model, lora_plus_groups(model, LR))
    for name, parameter in model.named_parameters():
        if name.endswith("lora_A"):  # LoRA-FA: A stays as it was drawn
            parameter.requires_grad_(False)
    assert [group["name"] for group in lora_plus_groups(model, LR)] == ["lora_B"]


def test_a_trained_head_that_is_tied_is_listed_once():
    model = get_lora_model(gpt2(), LoraConfig(r=4))
    model.get_input_embeddings().weight.requires_grad_(True)  # tied to the head
    groups = {group["name"]: group["params"] for group in lora_plus_groups(model, LR)}
    assert sum(p is model.get_input_embeddings().weight for p in groups["lora_A"]) == 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"lr": 0.0}, "lr"),
        ({"lr": math.nan}, "lr"),
        ({"lr": LR, "ratio": 0.5}, "ratio"),
        ({"lr": LR, "ratio": "16"}, "ratio"),
        ({"lr": LR, "weight_decay": -1.0}, "weight_decay"),
        ({"lr": LR, "lr_embedding": 0.0}, "lr_embedding"),
    ],
)
def test_a_number_out_of_range_is_refused(options, said):
    with pytest.raises(ConfigError, match=said):
        lora_plus_groups(get_lora_model(gpt2()), **options)


def test_a_model_without_training_lora_is_refused(tmp_path):
    model = get_lora_model(gpt2(), LoraConfig(init_lora_weights=False))
    model.save_pretrained(tmp_path)
    for idle in (gpt2(), minipeft.load_adapter(gpt2(), tmp_path)):
        with pytest.raises(StateError, match="no adapter of this model trains"):
            lora_plus_groups(idle, LR)


def test_a_method_without_a_pair_of_factors_is_refused(monkeypatch):
    model = get_lora_model(gpt2(), LoraConfig(r=4))
    adapter = next(m for m in model.modules() if type(m).__name__ == "Lora")
    monkeypatch.setattr(type(adapter), "file_tensors", lambda self: {"scale": nn.Parameter(torch.ones(3))})
    with pytest.raises(StateError, match=r"h\.0\.attn\.c_attn: LoRA\+ needs a pair lora_A, lora_B, .* trains 'scale'"):
        lora_plus_groups(model, LR)
