"""nn.MultiheadAttention: against the module with the update written into its weights, and against PEFT."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import disturb, foreign_code, state_digest
from torch import nn

from minipeft import LoraConfig, StateError, TargetError, get_lora_model, load_adapter
from minipeft.files.readers.contents import read_contents

with foreign_code():
    peft = pytest.importorskip("peft")

DIM = 8


class Net(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.attn = nn.MultiheadAttention(DIM, 2, **options)
        for parameter in self.attn.parameters():
            nn.init.normal_(parameter, std=0.3)

    def forward(self, *args, **kwargs):
        return self.attn(*args, **kwargs)


def config(**options):
    return LoraConfig(**{"r": 3, "lora_alpha": 5, "target_modules": ["attn"], "init_lora_weights": False, **options})


def case(dtype=torch.float64, lora=None, **options):
    base = Net(**options).to(dtype)
    return base, get_lora_model(copy.deepcopy(base), config(**(lora or {})))


def merged_by_hand(base, model):
    """The base with both updates written into its weights; that of out_proj twice, as PEFT (0.21.2) does it."""
    other = copy.deepcopy(base)
    projections = (other.attn.in_proj_weight, model.attn, 1), (other.attn.out_proj.weight, model.attn.out_proj, 2)
    for weight, wrapper, times in projections:
        lora = wrapper.adapters["default"]
        weight.data += (times * 5 / 3 * lora.lora_B @ lora.lora_A).detach()
    return other


def inputs(name, dtype=torch.float64):
    x, other = torch.randn(2, 5, DIM, dtype=dtype), torch.randn(2, 5, DIM, dtype=dtype)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    causal = torch.ones(5, 5, dtype=torch.bool).triu(1)
    return {
        "self": ((x, x, x), {}),
        "cross, by keyword": ((), {"query": x, "key": other, "value": other, "need_weights": False}),
        "all different": ((x, other, x + other), {"average_attn_weights": False}),
        "padding mask": ((x, x, x), {"key_padding_mask": padding}),
        "causal mask": ((x, x, x), {"attn_mask": causal, "is_causal": True, "need_weights": False}),
        "float mask": ((x, x, x), {"attn_mask": torch.randn(5, 5, dtype=dtype)}),
        "unbatched": ((x[0], x[0], x[0]), {}),
    }[name]


CALLS = ["self", "cross, by keyword", "all different", "padding mask", "causal mask", "float mask", "unbatched"]
KINDS = [{}, {"batch_first": True}, {"batch_first": True, "bias": False}, {"add_bias_kv": True, "add_zero_attn": True}]


def assert_same(found, expected, **tolerance):
    torch.testing.assert_close(found[0], expected[0], **tolerance)
    assert (found[1] is None) == (expected[1] is None)
    if found[1] is not None:
        torch.testing.assert_close(found[1], expected[1], **tolerance)


@pytest.mark.parametrize("options", KINDS, ids=str)
@pytest.mark.parametrize("call", CALLS)
def test_the_output_is_that_of_the_weights_with_the_update_in_them(call, options):
    if call in ("padding mask", "float mask", "causal mask") and not options.get("batch_first"):
        options = {**options, "batch_first": True}
    base, model = case(**options)
    args, kwargs = inputs(call)
    expected = merged_by_hand(base, model)(*args, **kwargs)
    assert_same(model(*args, **kwargs), expected)
    assert not torch.allclose(expected[0], base(*args, **kwargs)[0], atol=1e-2)
    model.eval()
    with torch.no_grad():  # torch's own fast path, where the options allow it
        assert_same(model(*args, **kwargs), merged_by_hand(base, model).eval()(*args, **kwargs))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_start_is_exactly_the_base(dtype):
    base, model = case(dtype, lora={"init_lora_weights": True}, batch_first=True)
    args, _ = inputs("self", dtype)
    for mode in (True, False):
        assert torch.equal(model.train(mode)(*args)[0], base.train(mode)(*args)[0])


def test_a_merge_in_half_precision_rounds_as_the_forward_pass_does():
    _, model = case(torch.bfloat16, batch_first=True)
    args, _ = inputs("self", torch.bfloat16)
    y = model(*args)
    model.merge_adapter()
    assert_same(model(*args), y, rtol=1e-9, atol=1e-9)


def test_a_state_with_the_names_of_the_base_is_loaded():
    base, model = case()
    args, _ = inputs("self")
    y = model(*args)[0]
    model.load_state_dict(base.state_dict(), strict=False)
    assert torch.equal(model(*args)[0], y)


def test_an_exception_inside_leaves_the_weights_where_they_were():
    _, model = case()
    before = state_digest(model)
    with pytest.raises((RuntimeError, AssertionError)):
        model(torch.randn(2, 5, DIM + 1), torch.randn(2, 5, DIM), torch.randn(2, 5, DIM))
    assert state_digest(model) == before
    assert all(isinstance(p, nn.Parameter) for m in model.modules() for p in m._parameters.values() if p is not None)


def theirs(base, directory=None, **options):
    with foreign_code():
        base = copy.deepcopy(base)
        if directory is not None:
            return peft.PeftModel.from_pretrained(base, directory)
        return peft.get_peft_model(base, peft.LoraConfig(r=3, lora_alpha=5, target_modules=["attn"], **options))


def test_files_are_those_of_peft_in_both_directions(tmp_path):
    base, model = case(torch.float32)
    args, _ = inputs("self", torch.float32)
    model.save_pretrained(tmp_path / "ours")
    with foreign_code():
        torch.testing.assert_close(theirs(base, tmp_path / "ours")(*args)[0], model(*args)[0])
        reference = disturb(theirs(base))
        reference.save_pretrained(tmp_path / "theirs")
        keys = peft.get_peft_model_state_dict(reference).keys()
        expected = reference(*args)[0]
    loaded = load_adapter(copy.deepcopy(base), tmp_path / "theirs")
    torch.testing.assert_close(loaded(*args)[0], expected)
    assert loaded.adapter_state_dict().keys() == keys
    assert "base_model.model.attn.base_layer.out_proj.lora_A.weight" in keys
    assert read_contents(tmp_path / "theirs").not_selected() == []  # so `minipeft check` says that PEFT takes it whole


def test_the_update_of_out_proj_counts_twice_as_in_peft(tmp_path):
    base, model = case(torch.float32)
    args, _ = inputs("self", torch.float32)
    model.save_pretrained(tmp_path)
    expected = merged_by_hand(base, model)(*args)[0]
    with foreign_code():
        torch.testing.assert_close(theirs(base, tmp_path)(*args)[0], expected)
        torch.testing.assert_close(theirs(base, tmp_path).merge_and_unload()(*args)[0], expected)
    torch.testing.assert_close(model(*args)[0], expected)
    model.save_pretrained(tmp_path / "plain", convert_to_lora=True)
    with foreign_code():
        torch.testing.assert_close(theirs(base, tmp_path / "plain")(*args)[0], expected)
    torch.testing.assert_close(model.merge_and_unload()(*args)[0], expected)


def test_the_gradients_of_a_training_step_are_those_of_peft(tmp_path):
    base = Net()
    reference = disturb(theirs(base))
    args, _ = inputs("self", torch.float32)
    with foreign_code():
        reference.save_pretrained(tmp_path)
        reference(*args)[0].square().sum().backward()
        expected = {
            n.replace(".default.weight", ""): p.grad for n, p in reference.named_parameters() if p.requires_grad
        }
    model = load_adapter(copy.deepcopy(base), tmp_path, is_trainable=True)
    model(*args)[0].square().sum().backward()
    found = {f"base_model.model.{n}".replace(".adapters.default", ""): p.grad for n, p in model.named_parameters()}
    assert len(expected) == 4
    for name, gradient in expected.items():
        # PEFT adds the update of out_proj twice, and lets gradients through one of the two.
        torch.testing.assert_close(found[name], gradient * (2 if "out_proj" in name else 1))


def encoder(**options):
    torch.manual_seed(3)
    layer = nn.TransformerEncoderLayer(DIM, 2, 16, dropout=0.0, batch_first=True, **options)
    return nn.ModuleDict({"encoder": nn.TransformerEncoder(layer, 2, enable_nested_tensor=True)}).double()


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("targets", [["self_attn"], ["self_attn", "linear1", "linear2"]])
def test_the_fast_path_of_an_encoder_layer_does_not_go_around_the_adapter(targets, padded):
    base = encoder()
    model = get_lora_model(copy.deepcopy(base), config(target_modules=targets)).eval()
    x = torch.randn(2, 5, DIM, dtype=torch.float64)
    mask = {"src_key_padding_mask": torch.tensor([[False] * 5, [False] * 3 + [True] * 2])} if padded else {}
    merged = copy.deepcopy(model).merge_and_unload()
    with torch.no_grad():
        y = model.encoder(x, **mask)
        torch.testing.assert_close(y, merged.encoder(x, **mask))
        assert not torch.allclose(y, base.eval().encoder(x, **mask), atol=1e-2)
    torch.testing.assert_close(model.train().encoder(x, **mask)[0], merged.train().encoder(x, **mask)[0])


def test_a_decoder_layer_has_two_attentions_and_a_second_adapter_joins_the_first(tmp_path):
    model = nn.ModuleDict({"decoder": nn.TransformerDecoderLayer(DIM, 2, 16, dropout=0.0)})
    x, memory = torch.randn(4, 2, DIM), torch.randn(6, 2, DIM)
    base = copy.deepcopy(model)
    get_lora_model(model, config(target_modules=["self_attn", "multihead_attn"]))
    one = model.decoder(x, memory)
    model.add_adapter("second", config(target_modules=["multihead_attn"]))
    assert torch.equal(model.decoder(x, memory), one)
    model.set_adapter(["default", "second"])
    both = model.decoder(x, memory)
    assert not torch.allclose(both, one)
    model.save_pretrained(tmp_path)
    loaded = load_adapter(load_adapter(base, tmp_path), tmp_path / "second", "second")
    loaded.set_adapter(["default", "second"])
    assert torch.equal(loaded.decoder(x, memory), both)
    model.set_adapter("default")
    model.delete_adapter("second")
    assert torch.equal(model.decoder(x, memory), one)
    assert not any("AdaptedWeight" in type(m).__name__ for m in model.unload().modules())


@pytest.mark.parametrize(
    ("net", "options", "message"),
    [
        ({}, {"lora_dropout": 0.1}, "attn: the weight of MultiheadAttention is read .*lora_dropout = 0.1"),
        ({}, {"bias": "lora_only"}, "bias = 'lora_only'"),
        ({"kdim": 4, "vdim": 6}, {}, "attn: .*MultiheadAttention is registered, but this instance is refused"),
        (
            {},
            {"target_modules": ["out_proj"]},
            "attn.out_proj: MultiheadAttention reads .* never calls it.* Target the module around it",
        ),
        ({}, {"target_modules": [], "target_parameters": ["out_proj.weight"]}, "MultiheadAttention reads it"),
    ],
)
def test_what_would_do_nothing_is_refused_and_changes_nothing(net, options, message):
    model = Net(**net)
    before = state_digest(model)
    with pytest.raises(TargetError, match=message):
        get_lora_model(model, config(**options))
    assert state_digest(model) == before


def test_dropout_that_peft_would_drop_silently_is_refused_when_training_a_loaded_adapter(tmp_path):
    base = Net()
    with foreign_code():
        theirs(base, lora_dropout=0.5).save_pretrained(tmp_path)
    model = load_adapter(base, tmp_path, is_trainable=True)
    args, _ = inputs("self", torch.float32)
    model.eval()(*args)
    with pytest.raises(StateError, match="lora_dropout cannot act on in_proj_weight of MultiheadAttention"):
        model.train()(*args)


def test_separate_projections_are_adapted_as_parameters():
    model = Net(kdim=4, vdim=6).double()
    base = copy.deepcopy(model)
    names = ["q_proj_weight", "k_proj_weight", "v_proj_weight"]
    get_lora_model(model, config(target_modules=[], target_parameters=names))
    x, key, value = (torch.randn(5, 2, size, dtype=torch.float64) for size in (DIM, 4, 6))
    y = model(x, key, value)[0]
    y.sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert not torch.allclose(y, base(x, key, value)[0])
    torch.testing.assert_close(model.merge_and_unload()(x, key, value)[0], y)


class Pooled(Net):
    """As SigLIP's head: attention, then a layer that is called."""

    def __init__(self):
        super().__init__()
        self.after = nn.Linear(DIM, DIM)

    def forward(self, x):
        return self.after(self.attn(x, x, x)[0])


@pytest.mark.parametrize("use_dora", [False, True])
def test_a_file_of_peft_that_names_out_proj_loads_by_the_advice_of_its_refusal(use_dora, tmp_path):
    base, x = nn.Sequential(Pooled()), torch.randn(2, 5, DIM)
    base[0].probe = nn.Parameter(torch.randn(1, 1, DIM))  # as SigLIP has; a parameter of this rank may hold experts
    theirs = peft.LoraConfig(r=3, target_modules=["out_proj", "after"], use_dora=use_dora)
    reference = peft.get_peft_model(copy.deepcopy(base), theirs)
    disturb(reference.base_model.model[0].after)
    reference.save_pretrained(tmp_path)
    with pytest.raises(TargetError, match=r"delete this module's keys .* exclude_modules"):
        load_adapter(copy.deepcopy(base), tmp_path)
    weights, options = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    save_file({key: t for key, t in load_file(weights).items() if "out_proj" not in key}, weights)
    options.write_text(json.dumps({**json.loads(options.read_text()), "exclude_modules": ["attn.out_proj"]}))
    torch.testing.assert_close(load_adapter(base, tmp_path)(x), reference(x))
