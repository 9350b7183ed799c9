"""The adapted model: the same object and class family, and what it can do."""

import copy
import inspect
import pickle

import pytest
import torch
import torch._dynamo.testing
from tiny_models import (
    VOCABULARY,
    adapted,
    disturb,
    foreign_code,
    gpt2,
    llama,
    logits,
    refuses,
    state_digest,
    t5,
    token_ids,
)
from torch import nn
from transformers import AutoModelForCausalLM, GPT2LMHeadModel

import minipeft
from minipeft import AdaptedModel, ConfigError, LoraConfig, StateError, get_lora_model
from minipeft.injection.adapted_layer import AdaptedLayer
from minipeft.injection.module_tree import wrappers
from minipeft.injection.modules_to_save import SavedModule

with foreign_code():
    import peft


def trainable(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def test_it_is_the_same_object_and_still_of_its_class():
    model = gpt2()
    forward = inspect.signature(model.forward)
    same = get_lora_model(model)
    assert same is model
    assert isinstance(model, GPT2LMHeadModel)
    assert isinstance(model, AdaptedModel)
    assert type(model).__name__ == "GPT2LMHeadModel"  # transformers looks names up
    assert inspect.signature(model.forward) == forward
    assert type(gpt2()) is GPT2LMHeadModel  # and other models of the class are untouched


def test_two_models_of_one_class_share_the_adapted_class():
    assert type(get_lora_model(gpt2())) is type(get_lora_model(gpt2()))


@pytest.mark.parametrize("make", [gpt2, llama, t5])
def test_copies_and_pickles_carry_adapters_and_state(make):
    model = adapted(make())
    expected = logits(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(other), expected)
        assert trainable(other) == trainable(model)
        with other.disable_adapter():
            assert not torch.equal(logits(other), expected)
            assert torch.equal(logits(model), expected)  # its switch is its own
        assert torch.equal(logits(other.unload()), logits(make()))
    assert torch.equal(logits(model), expected)


def test_a_model_built_from_the_adapted_class_is_a_plain_one():
    model = get_lora_model(gpt2())
    fresh = type(model)(model.config)
    assert type(fresh) is type(gpt2())
    assert inspect.signature(type(model)) == inspect.signature(type(fresh))
    assert type(get_lora_model(fresh)) is type(model)


def test_an_adapted_model_is_not_adapted_twice():
    model = adapted()
    before = state_digest(model)
    with pytest.raises(StateError, match=r"adapted already \('default'\); use model.add_adapter"):
        get_lora_model(model)
    assert state_digest(model) == before
    assert not any(isinstance(m.base_layer, AdaptedLayer) for _, m in wrappers(model))


def test_a_model_that_knows_nothing_of_transformers_works():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.body, self.head = (
                nn.Embedding(10, 6),
                nn.Sequential(nn.Linear(6, 6), nn.ReLU()),
                nn.Linear(6, 2),
            )

        def forward(self, ids, *, scale=1.0):
            return self.head(self.body(self.embed(ids))) * scale

    net, ids = Net(), torch.arange(10)
    before = net(ids, scale=2.0)
    model = get_lora_model(net, LoraConfig(r=2, target_modules=["embed", "0", "head"]))
    assert torch.equal(model(ids, scale=2.0), before)
    after = disturb(model)(ids)
    torch.testing.assert_close(model.merge_and_unload()(ids), after)
    assert type(net) is Net


def test_only_the_adapter_trains_and_the_base_keeps_every_bit():
    model = get_lora_model(gpt2())
    base = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    assert trainable(model) == {n for n, _ in model.named_parameters() if "lora_" in n}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(input_ids=token_ids(), labels=token_ids()).loss
        loss.backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(torch.equal(p, base[n]) for n, p in model.named_parameters() if n in base)


@pytest.mark.each_value
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")  # the name older releases know
@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("first", ["checkpointing", "adapting"])
@pytest.mark.parametrize("make", [gpt2, llama])
def test_gradient_checkpointing_gives_the_same_gradients(make, first, use_reentrant):
    def gradients(model):
        model.train()(input_ids=token_ids(), labels=token_ids()).loss.backward()
        return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}

    expected = gradients(adapted(make()))
    model, options = make(), {"use_reentrant": use_reentrant}
    if first == "checkpointing":
        model.gradient_checkpointing_enable(options)
    model = adapted(model)
    if first == "adapting":
        model.gradient_checkpointing_enable(options)
    found = gradients(model)
    assert found.keys() == expected.keys()
    for name, grad in found.items():
        torch.testing.assert_close(grad, expected[name])


def one_block_of_gpt2():
    model = gpt2()
    del model.transformer.h[1:]  # a second block only takes time
    return model


def two_layers():
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(VOCABULARY, 6), nn.Linear(6, 8), nn.Linear(8, 4))


@pytest.mark.parametrize("make", [two_layers, pytest.param(one_block_of_gpt2, marks=pytest.mark.slow)])
def test_one_graph_in_compile_and_switching_back_compiles_nothing_new(make):
    torch._dynamo.reset()
    model = adapted(make(), target_modules="all-linear")
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)

    def output(model):
        result = model(token_ids())
        return getattr(result, "logits", result)

    with torch.no_grad():
        expected = output(model)
        torch.testing.assert_close(output(compiled), expected)
        assert counter.frame_count == 1
        with model.disable_adapter():
            torch.testing.assert_close(output(compiled), output(model))
        assert counter.frame_count == 2
        torch.testing.assert_close(output(compiled), expected)
        assert counter.frame_count == 2


def compiled_by_count():
    """An adapted layer, the same compiled, and the counter of its graphs."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    config = LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    model = get_lora_model(nn.Sequential(nn.Linear(4, 4)), config)
    return model, torch.compile(model, backend=counter), counter


def test_an_adapter_that_is_loaded_or_deleted_unused_compiles_nothing(tmp_path):
    model, compiled, counter = compiled_by_count()
    model.save_pretrained(tmp_path)
    x = torch.ones(2, 4)
    with torch.no_grad():
        expected = compiled(x)
        for name in ("b", "c"):
            model.load_adapter(tmp_path, name)
            assert torch.equal(compiled(x), expected)
        model.delete_adapter("b")
        assert torch.equal(compiled(x), expected)
    assert counter.frame_count == 1


@pytest.mark.parametrize("verb", ["unload", "merge_and_unload"])
def test_a_model_that_was_compiled_before_it_was_unloaded_computes_what_it_is_now(verb):
    model, compiled, _ = compiled_by_count()
    x = torch.ones(2, 4)
    with torch.no_grad():
        compiled(x)
        getattr(model, verb)()
        assert torch.equal(compiled(x), model(x))


@pytest.mark.parametrize("verb", ["unload", "merge_and_unload"])
def test_a_forward_that_was_patched_before_it_was_unloaded_computes_what_it_is_now(verb):
    """As accelerate's offload and mixed precision do: the model's own ``forward`` is kept and called by another."""
    model, ids = adapted(), token_ids(2, 5)
    kept = model.forward
    model.forward = lambda ids: kept(ids)
    getattr(model, verb)()
    assert torch.equal(model(ids).logits, type(model).forward(model, ids).logits)


def test_a_compiled_model_is_made_lean_from_within():
    model = adapted()
    compiled = torch.compile(model, backend="eager")
    refuses(StateError, model, lambda: minipeft.lean(compiled), "OptimizedModule wraps the model")


@pytest.mark.parametrize("make", [gpt2, llama, t5])
def test_generate_works_and_listens_to_the_adapter(make):
    model = adapted(make(), target_modules="all-linear")
    ids = token_ids(2, 5)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    made = model.generate(ids, **options)
    assert torch.equal(made, copy.deepcopy(model).merge_and_unload().generate(ids, **options))
    with model.disable_adapter():
        base = model.generate(ids, **options)
    assert torch.equal(base, make().generate(ids, **options))
    assert not torch.equal(made, base)


def test_counting_agrees_with_the_printed_line(capsys):
    model = get_lora_model(gpt2(), LoraConfig(r=4))
    count, total = model.get_nb_trainable_parameters()
    assert count == 2 * 4 * (32 + 96)
    assert total == gpt2().num_parameters() + count
    model.print_trainable_parameters()
    assert (
        capsys.readouterr().out
        == f"trainable params: {count:,} || all params: {total:,} || trainable%: {100 * count / total:.4f}\n"
    )


def test_attributes_of_the_base_layer_are_read_through_the_adapted_one():
    model = get_lora_model(gpt2(), LoraConfig(target_modules=["c_attn", "wte"]))
    layer = model.transformer.h[0].attn.c_attn
    with model.disable_adapter():
        assert layer.weight is layer.base_layer.weight
    assert layer.nf == 96
    assert model.get_input_embeddings().num_embeddings == 100
    with pytest.raises(AttributeError, match="no_such"):
        _ = layer.no_such
    model.tie_weights()
    assert model.lm_head.weight is model.transformer.wte.base_layer.weight
    assert not layer._parameters


def test_the_state_dict_names_what_the_parameters_are_called():
    model = adapted()
    assert {n for n, _ in model.named_parameters(remove_duplicate=False)} <= set(model.state_dict())
    other = get_lora_model(gpt2(seed=5), LoraConfig(r=4))
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other), logits(model))


def test_a_plain_state_of_the_base_loads_into_the_adapted_model():
    model = get_lora_model(gpt2(seed=5), LoraConfig(r=4))
    result = model.load_state_dict(gpt2().state_dict(), strict=False)
    assert result.unexpected_keys == []
    assert all(".adapters." in key for key in result.missing_keys)
    assert torch.equal(logits(model), logits(gpt2()))


def test_adapters_switch_add_up_and_leave():
    model, base = adapted(), logits(gpt2())
    first = logits(model)
    model.add_adapter("second", LoraConfig(r=2, target_modules=["c_fc", "c_attn"], init_lora_weights=False))
    assert model.active_adapters == ["default"]
    assert torch.equal(logits(model), first)
    model.set_adapter("second")
    second = logits(model)
    assert not torch.equal(second, first)
    model.set_adapter(["default", "second"])
    both = logits(model)
    torch.testing.assert_close(copy.deepcopy(model).merge_and_unload()(token_ids()).logits, both)
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    model.delete_adapter("second")
    assert list(model.adapter_configs) == ["default"]
    assert not any("c_fc" in name for name, _ in wrappers(model))
    assert torch.equal(logits(model), first)
    assert torch.equal(logits(model.unload()), base)


def test_activity_and_trainability_are_separate():
    model = adapted()
    model.add_adapter("frozen", LoraConfig(r=2, inference_mode=True))
    model.add_adapter("waiting", LoraConfig(r=2))
    assert {n.split(".")[-2] for n in trainable(model)} == {"default"}
    model.set_adapter("frozen")
    assert trainable(model) == set()
    with model.disable_adapter():
        assert trainable(model) == set()
    assert trainable(model) == set()
    model.set_adapter(["waiting", "frozen"])
    assert {n.split(".")[-2] for n in trainable(model)} == {"waiting"}


def test_what_is_made_or_loaded_within_torch_inference_mode_trains_outside(tmp_path):
    base, x = nn.Sequential(nn.Linear(4, 3)), torch.randn(2, 4)
    config = LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    with torch.inference_mode():
        model = get_lora_model(base, config)
        model.merge_adapter()
        model.add_adapter("other", config)
        model.save_pretrained(tmp_path)
        model.load_adapter(tmp_path, "third", is_trainable=True)
        assert torch.is_inference_mode_enabled()
    model.unmerge_adapter()
    for name in ("default", "other", "third"):
        model.set_adapter(name)
        model(x).sum().backward()
        assert all(p.grad is not None for n, p in model.named_parameters() if f".{name}." in n)


def test_in_inference_mode_an_adapter_acts_and_does_not_train_until_it_is_chosen_again():
    model = adapted()
    model.add_adapter("second", LoraConfig(r=2, init_lora_weights=False))
    kept = copy.deepcopy(model)
    with foreign_code():
        theirs = peft.get_peft_model(gpt2(), peft.LoraConfig())
        theirs.add_adapter("second", peft.LoraConfig())

    def trains(model):
        return {name for name in ("default", "second") if any(f".{name}." in n for n in trainable(model))}

    steps = [("second", True), ("default", False), ("default", True), ("second", True), ("second", False)]
    for name, frozen in steps:
        for each in (model, theirs):
            each.set_adapter(name, inference_mode=frozen)
        kept.set_adapter(name)
        assert trains(model) == trains(theirs) == (set() if frozen else {name})
        assert torch.equal(logits(model), logits(kept))
    model.set_adapter(["default", "second"], inference_mode=True)
    model.rename_adapter("second", "third")
    assert not trainable(copy.deepcopy(model))
    model.delete_adapter("default")
    assert not trainable(model)
    model.train_adapters(["third"])
    assert len(trainable(model)) == len(model.adapter_parameters("third")) == 4
    model.set_adapter("third", True)
    assert not trainable(model)
    with pytest.raises(ConfigError, match="inference_mode"):
        model.set_adapter("third", inference_mode="no")


@pytest.mark.parametrize(
    ("act", "said"),
    [
        (lambda m: m.set_adapter("defualt"), r"no adapter 'defualt' \(closest: 'default'\)"),
        (lambda m: m.set_adapter([]), "at least one"),
        (lambda m: m.set_adapter(["default", "default"]), "once each"),
        (lambda m: m.delete_adapter("default"), "in use"),
        (lambda m: m.add_adapter("default", LoraConfig()), "there is an adapter 'default' already"),
        (lambda m: m.merge_adapter(["other"]), "no adapter 'other'"),
        (lambda m: m.save_pretrained("unused", "other"), "no adapter 'other'"),
        (lambda m: (m.merge_adapter(), m.set_adapter("default")), "unmerge_adapter"),
    ],
)
def test_wrong_names_and_moments_are_errors(act, said):
    with pytest.raises(StateError, match=said):
        act(adapted())


def test_disabling_is_undone_also_when_the_body_fails():
    model = adapted()
    expected = logits(model)
    with model.disable_adapter():
        with model.disable_adapter():
            pass
        assert torch.equal(logits(model), logits(gpt2()))  # the inner context did not switch it on again
        with pytest.raises(StateError, match="switched off"):
            model.merge_adapter()
    with pytest.raises(ZeroDivisionError), model.disable_adapter():
        raise ZeroDivisionError
    assert torch.equal(logits(model), expected)


def test_modules_to_save_train_in_full_and_leave_the_original_alone():
    model = adapted(modules_to_save=["lm_head", "ln_f"])
    assert isinstance(model.lm_head, SavedModule)
    assert not torch.equal(model.lm_head.adapters["default"].weight, model.transformer.wte.weight)
    expected = logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(gpt2()))
    merged = copy.deepcopy(model).merge_and_unload()
    torch.testing.assert_close(logits(merged), expected)
    assert torch.equal(logits(model.unload()), logits(gpt2()))
    assert model.lm_head.weight is model.transformer.wte.weight
    assert model.config.tie_word_embeddings
    assert not merged.config.tie_word_embeddings


def test_a_merged_head_survives_save_and_reload(tmp_path):
    model = adapted(modules_to_save=["lm_head"])
    expected = logits(model)
    model.merge_and_unload().save_pretrained(tmp_path)
    assert minipeft.AdaptedModel not in type(model).__mro__
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), expected)


def test_all_biases_train_as_copies():
    model = adapted(bias="all")
    plain = gpt2()
    biases = [n for n, _ in plain.named_parameters() if n.endswith(".bias")]
    moved = [n for n in trainable(model) if n.endswith("bias")]
    assert len(moved) == len(biases)
    expected = logits(model)
    assert torch.equal(logits(copy.deepcopy(model).unload()), logits(plain))
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected)
    assert all(not torch.equal(dict(merged.named_parameters())[n], dict(plain.named_parameters())[n]) for n in biases)


def test_two_adapters_that_train_one_module_in_full_cannot_act_together():
    model = adapted(modules_to_save=["ln_f"])
    model.add_adapter("other", LoraConfig(modules_to_save=["ln_f"]))
    with pytest.raises(StateError, match="transformer.ln_f: 'default', 'other' each train this module"):
        model.set_adapter(["default", "other"])
    model.set_adapter("other")
    assert model.transformer.ln_f.current() is model.transformer.ln_f.adapters["other"]


def test_ejecting_gives_class_and_trainability_back():
    model = gpt2()
    model.transformer.wpe.weight.requires_grad_(False)
    before = state_digest(model)
    get_lora_model(model, LoraConfig(modules_to_save=["ln_f"], bias="all"))
    model.unload()
    assert type(model) is GPT2LMHeadModel
    assert state_digest(model) == before
