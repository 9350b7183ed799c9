"""Layers that code reads instead of calling, or holds from before; and adapters that nothing uses, which are named."""

import copy
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from tiny_models import disturb, foreign_code, gpt2, llama, logits
from torch import nn
from torch.autograd import forward_ad
from torch.nn.utils import prune
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval
from transformers import (
    FuyuConfig,
    FuyuForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    WavLMConfig,
    WavLMModel,
)

import minipeft
from minipeft import LoraConfig, StateError, TrainableTokensConfig, get_adapter_model, get_lora_model, load_adapter
from minipeft.injection.adapted_layer import AdaptedLayer
from minipeft.injection.adapted_value import AdaptedValue
from minipeft.registry.registry import method_class, method_names
from minipeft.testing.examples import options_of


class Reader(nn.Module):
    """Calls one layer, and multiplies by the weight of another."""

    def __init__(self):
        super().__init__()
        self.called, self.read = nn.Linear(6, 6), nn.Linear(6, 5)

    def forward(self, x):
        return F.linear(torch.tanh(self.called(x)), self.read.weight, self.read.bias)


def reader(method="lora", **options):
    torch.manual_seed(0)
    options = {**options_of(method), **({"token_indices": [1, 3]} if method == "trainable_tokens" else {}), **options}
    config = method_class(method).config_class(target_modules=["read"], **options)
    return disturb(get_adapter_model(Reader().double(), config), scale=0.3)


IDS = torch.randint(1, 40, (2, 7), generator=torch.Generator().manual_seed(2))
X = torch.randn(4, 6, generator=torch.Generator().manual_seed(1)).double()


def gradients(model, output):
    names, parameters = zip(*[(n, p) for n, p in model.named_parameters() if p.requires_grad], strict=True)
    return dict(zip(names, torch.autograd.grad((output * torch.arange(5)).sum(), parameters), strict=True))


@pytest.mark.parametrize("method", method_names())
def test_a_weight_that_is_read_acts_and_trains_as_the_called_layer_does(method):
    model = reader(method)
    called = model.read(torch.tanh(model.called(X)))
    torch.testing.assert_close(model(X), called)
    for name, gradient in gradients(model, called).items():
        torch.testing.assert_close(gradients(model, model(X))[name], gradient, msg=name)
    with model.disable_adapter():
        assert torch.equal(
            model(X), F.linear(torch.tanh(model.called(X)), model.read.base_layer.weight, model.read.bias)
        )


@pytest.mark.parametrize("method", ["lora", "oft"])
def test_a_base_weight_that_is_unfrozen_and_read_gets_its_gradient(method):
    model = reader(method)
    own = model.read.base_layer.weight.requires_grad_()
    (wanted,) = torch.autograd.grad(model.read(torch.tanh(model.called(X))).square().sum(), own)
    (found,) = torch.autograd.grad(model(X).square().sum(), own)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("options", [{"bias": "lora_only"}, {"lora_bias": True}])
def test_so_does_a_trained_bias(options):
    model = reader(**options)
    called = model.read(torch.tanh(model.called(X)))
    torch.testing.assert_close(model(X), called)
    torch.testing.assert_close(gradients(model, model(X)), gradients(model, called))


def test_looking_at_a_weight_does_not_compute_it(monkeypatch):
    model = reader()
    monkeypatch.setattr(AdaptedLayer, "folded", lambda self, names: pytest.fail("computed"))
    weight = model.read.weight
    assert (weight.dtype, weight.shape, weight.device) == (torch.float64, (5, 6), torch.device("cpu"))
    assert weight.requires_grad
    assert weight.ndim == 2
    assert weight.size(0) == len(weight) == 5
    assert weight.is_floating_point()
    assert isinstance(weight, torch.Tensor)


def test_what_changes_a_weight_in_place_changes_the_base_layer():
    model = reader()
    base = model.read.base_layer.weight
    with torch.no_grad():
        model.read.weight.fill_(2.0)
        assert (base == 2).all()
        nn.init.ones_(model.read.weight)
        assert (base == 1).all()
        torch.add(base, 4.0, out=model.read.weight)
        assert (base == 5).all()
        model.read.weight[1] = 7
        assert (base[1] == 7).all()
    model.read.weight.data[0] = 3
    assert (base[0] == 3).all()
    model.read.weight.requires_grad_(True)
    assert base.requires_grad
    model.read.weight.requires_grad = False
    assert not base.requires_grad


def test_an_optimizer_step_between_the_forward_and_the_backward_pass_is_an_error_as_in_torch():
    model = reader()
    output = model(X).sum()
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.backward()


def test_reading_compiles_to_one_graph_and_goes_through_function_transforms():
    model = reader()
    expected = model(X)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(X), expected)
    torch.testing.assert_close(gradients(model, compiled(X)), gradients(model, expected))
    torch._dynamo.reset()
    torch.testing.assert_close(torch.func.vmap(model)(X), expected)
    with foreign_code(), forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(model(forward_ad.make_dual(X, torch.ones_like(X)))).tangent
    step = 1e-6
    torch.testing.assert_close(tangent, (model(X + step) - model(X - step)) / (2 * step))


class Helper:
    def __init__(self, layer):
        self.layer = layer

    def __call__(self, x):
        return self.layer(x)


class Held(nn.Module):
    def __init__(self, hold):
        super().__init__()
        self.layer = nn.Linear(6, 5)
        self.held = hold(self.layer)

    def forward(self, x):
        held = self.held[0] if isinstance(self.held, list) else self.held
        return held(x)


HOLDERS = {
    "helper object": Helper,
    "bound method": lambda layer: layer.forward,
    "list": lambda layer: [layer],
    "the layer's call": lambda layer: layer.__call__,
}


@pytest.mark.parametrize("how", HOLDERS)
@pytest.mark.parametrize("trained", ["adapter", "copy"])
def test_whatever_holds_a_layer_from_before_holds_the_adapted_one(how, trained):
    torch.manual_seed(0)
    plain = Held(HOLDERS[how]).double()
    layer, model = plain.layer, copy.deepcopy(plain)
    model.more = nn.ModuleList([nn.Linear(1, 1).double()])
    copies = {"target_modules": ["more.0"], "modules_to_save": ["layer"]}
    config = LoraConfig(r=2, **(copies if trained == "copy" else {"target_modules": ["layer"]}))
    held = model.layer
    disturb(get_lora_model(model, config))
    assert model.layer is held
    merged = copy.deepcopy(model).merge_and_unload()
    torch.testing.assert_close(model(X), F.linear(X, merged.layer.weight, merged.layer.bias))
    torch.testing.assert_close(merged(X), model(X))
    assert not torch.allclose(model(X), plain(X))
    model.unload()
    assert model.layer is held
    assert type(held) is nn.Linear
    assert torch.equal(model(X), plain(X))
    assert layer is plain.layer


def test_a_layer_with_a_forward_of_its_own_is_called_with_it():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5).double())
    layer = model[0]
    own = layer.forward
    layer.forward = lambda x: own(x) + 1
    expected = model(X)
    get_lora_model(model, LoraConfig(r=2, target_modules=["0"]))
    assert model[0] is not layer
    torch.testing.assert_close(model(X), expected)
    assert model.unload()[0] is layer


def written_out(model, base):
    """The base in float64 with every LoRA update written into its weights."""
    base = copy.deepcopy(base).double()
    for name, layer in model.named_modules():
        if isinstance(layer, AdaptedLayer):
            lora = layer.adapter("default")
            update = lora.scaling * lora.lora_B.double().flatten(1) @ lora.lora_A.double().flatten(1)
            weight = base.get_submodule(name).weight
            with torch.no_grad():
                weight += update.view(weight.shape)
    return base


def wavlm():
    torch.manual_seed(0)
    return WavLMModel(
        WavLMConfig(
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=48,
            conv_dim=(16, 16),
            conv_stride=(5, 2),
            conv_kernel=(10, 3),
            num_feat_extract_layers=2,
            num_conv_pos_embeddings=8,
            num_conv_pos_embedding_groups=2,
            layerdrop=0.0,
            mask_time_prob=0.0,
        )
    ).eval()


def mamba():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "state_size": 4, "num_hidden_layers": 1, "time_step_rank": 4}
    return MambaForCausalLM(MambaConfig(vocab_size=40, use_cache=False, **sizes)).eval()


FAMILIES = {
    "wavlm": (wavlm, None, lambda m, x: m(x).last_hidden_state, torch.randn(2, 400)),
    "mamba": (mamba, ["dt_proj", "conv1d", "x_proj", "in_proj", "out_proj"], lambda m, x: m(x).logits, IDS),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_families_that_read_their_layers_learn_in_all_of_them(family):
    make, targets, call, x = FAMILIES[family]
    base = make()
    model = disturb(get_lora_model(copy.deepcopy(base), LoraConfig(r=2, target_modules=targets)), scale=0.1)
    exact = call(written_out(model, base), x.double() if x.is_floating_point() else x)
    torch.testing.assert_close(call(model, x).double(), exact.double(), rtol=1e-4, atol=1e-5)
    call(model, x).square().mean().backward()
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert all(grad is not None and grad.any() for grad in trained.values())


def test_t5_looks_at_the_dtype_of_its_last_layer_without_computing_the_weight(monkeypatch):
    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    model = T5ForConditionalGeneration(T5Config(vocab_size=40, decoder_start_token_id=0, **sizes)).eval()
    get_lora_model(model, LoraConfig(r=2, target_modules=["wo"]))
    monkeypatch.setattr(AdaptedLayer, "folded", lambda self, names: pytest.fail("computed"))
    model(input_ids=IDS, decoder_input_ids=IDS)


class Nano(nn.Module):
    """Makes its logits from the embedding's weight, and its loss from the head's."""

    def __init__(self):
        super().__init__()
        self.wte, self.lin, self.head = nn.Embedding(11, 8), nn.Linear(8, 8), nn.Linear(8, 11, bias=False)

    def forward(self, x):
        h = torch.tanh(self.lin(self.wte(x)))
        return F.linear(h, self.wte.weight) + F.linear(h, self.head.weight)


@pytest.mark.parametrize(
    "config",
    [
        TrainableTokensConfig(token_indices=[3, 7], target_modules=["wte", "head"]),
        LoraConfig(r=2, target_modules=["wte", "head"]),
        LoraConfig(r=2, target_modules=["lin"], modules_to_save=["head", "wte"]),
        LoraConfig(r=2, target_modules=["lin"], trainable_token_indices={"wte": [3, 7], "head": [1]}),
    ],
    ids=["rows", "lora", "copies", "lora and rows"],
)
def test_heads_and_tables_that_are_read_are_what_merging_makes_of_them(config):
    torch.manual_seed(0)
    model = disturb(get_adapter_model(Nano().double(), config), scale=0.3)
    x = torch.arange(11)[None]
    merged = copy.deepcopy(model).merge_and_unload()
    torch.testing.assert_close(model(x), merged(x))
    model(x).square().mean().backward()
    assert all(p.grad.any() for p in model.parameters() if p.requires_grad)


def test_ties_are_made_between_the_layers_own_weights():
    model = get_lora_model(
        llama(tie_word_embeddings=True), LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[3])
    )
    model.tie_weights()
    tied = model.get_parameter("lm_head.weight")
    assert tied is model.get_parameter("model.embed_tokens.weight")
    assert not isinstance(tied, AdaptedValue)
    plain = nn.Linear(32, 100, bias=False)
    with pytest.raises(TypeError, match="Parameter or None expected"):
        plain.weight = model.lm_head.weight


def test_a_tie_that_is_there_may_be_made_again_after_the_adapted_weight_was_read():
    """As ``tie_weights`` of transformers does."""
    model = get_lora_model(llama(tie_word_embeddings=True), LoraConfig(r=2, target_modules=["lm_head"]))
    (model.lm_head.weight * 1).sum()  # as a fused loss reads it
    model.tie_weights()
    assert model.lm_head.base_layer.weight is model.model.embed_tokens.weight


def test_what_is_made_of_an_adapted_weight_is_not_assigned_to_the_base():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    nn.init.normal_(net[1].running_mean)
    model = disturb(get_lora_model(net, LoraConfig(r=2, target_modules=["0"]))).eval()
    x = torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(1))
    model[0].weight = nn.Parameter(
        model[0].base_layer.weight.detach().clone()
    )  # as tying does: nobody has read the adapted one
    expected = model(x)
    with pytest.raises(StateError, match="a new weight was assigned to an adapted Conv2d"):
        fuse_conv_bn_eval(model[0], model[1])
    with pytest.raises(StateError, match="act twice on what fuse_conv_bn_eval or torchao's quantize_ makes of it"):
        model[0].weight = nn.Parameter(model[0].weight.detach() + 0)
    torch.testing.assert_close(model(x), expected, rtol=0, atol=0)
    with model.disable_adapter():
        model[0].weight = nn.Parameter(model[0].weight.detach() + 0)
    torch.testing.assert_close(model(x), expected, rtol=0, atol=0)
    merged = model.merge_and_unload()
    torch.testing.assert_close(fuse_conv_bn_eval(merged[0], merged[1])(x), merged(x))


def test_what_is_made_of_a_trained_copy_is_not_assigned_to_the_original():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    model = disturb(get_lora_model(net, LoraConfig(r=2, target_modules=["0"], modules_to_save=["1"]))).eval()
    x, original = torch.randn(2, 3), model[1].base_layer.weight
    expected = model(x)
    with pytest.raises(StateError, match="a new weight was assigned to a Linear of which an adapter trains a copy"):
        model[1].weight = nn.Parameter(model[1].weight.detach() * 2)
    with pytest.raises(StateError, match="a new weight was assigned"):
        fuse_linear_bn_eval(model[1], nn.BatchNorm1d(2).eval())
    model[1].weight = original  # which changes nothing
    torch.testing.assert_close(model(x), expected, rtol=0, atol=0)
    with model.disable_adapter():
        model[1].weight = nn.Parameter(original.detach() * 2)
        torch.testing.assert_close(model[1](x), F.linear(x, 2 * original, model[1].bias))
    torch.testing.assert_close(model(x), expected, rtol=0, atol=0)
    assert not hasattr(model, "tie_weights")


def test_a_copied_head_is_tied_in_the_original_and_goes_on_training():
    model = get_lora_model(
        llama(tie_word_embeddings=True),
        LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head", "embed_tokens"]),
    )
    disturb(model)
    copies = [model.lm_head.weight, model.model.embed_tokens.weight]
    model.model.embed_tokens.base_layer.weight = tied = nn.Parameter(torch.zeros(100, 32), False)  # as loading may do
    model.tie_weights()
    assert model.lm_head.base_layer.weight is tied
    assert model.lm_head.weight is copies[0]
    assert model.model.embed_tokens.weight is copies[1]


def test_a_bias_that_is_taken_away_is_gone_and_a_plain_tensor_is_refused_as_torch_does():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    model = disturb(get_lora_model(net, LoraConfig(r=2, target_modules=["0"], modules_to_save=["1"])))
    x, bias = torch.randn(2, 3), model[0].bias
    expected = model[0](x) - bias
    model[0].bias = None
    assert model[0].base_layer.bias is None
    torch.testing.assert_close(model[0](x), expected)
    with pytest.raises(TypeError, match="cannot assign"):
        model[0].weight = torch.zeros(3, 3)
    with pytest.raises(StateError, match="a new bias was assigned"):
        model[1].bias = None


@pytest.mark.parametrize("name", ["weight", "bias"])
@pytest.mark.parametrize("place", [0, 1], ids=["adapted", "copied"])
def test_pruning_a_wrapper_is_refused_and_its_base_layer_can_be_pruned(place, name):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    model = disturb(get_lora_model(net, LoraConfig(r=2, target_modules=["0"], modules_to_save=["1"])))
    before, x = set(model.state_dict()), torch.randn(2, 3)
    expected = model(x)
    with pytest.raises(StateError, match=f"{name}_orig cannot be a parameter of an adapted Linear.*base_layer"):
        prune.l1_unstructured(model[place], name, 1)
    assert set(model.state_dict()) == before
    torch.testing.assert_close(model(x), expected, rtol=0, atol=0)
    layer = model[0].base_layer if place == 0 else model[1].adapters["default"]
    prune.l1_unstructured(layer, name, 1)
    assert not torch.equal(model(x), expected)


class Alias(nn.Module):
    """Calls one layer, and uses a weight that it took from another before."""

    def __init__(self):
        super().__init__()
        self.called, self.idle = nn.Linear(6, 6), nn.Linear(6, 6)
        self.weight = self.idle.weight

    def forward(self, x):
        return F.linear(self.called(x), self.weight)


def test_a_layer_that_nothing_uses_is_named_once_and_when_saved(tmp_path):
    model = get_lora_model(nn.Sequential(Alias()), LoraConfig(r=2, target_modules=["called", "idle"]))
    x = torch.randn(2, 6)
    with pytest.warns(UserWarning, match=r"^'0.idle': .* adapter 'default' does nothing there") as said:
        model(x)
    assert said[0].filename == __file__
    model(x)
    with pytest.warns(UserWarning, match="saving adapter 'default': '0.idle'"):
        model.save_pretrained(tmp_path)
    model.add_adapter("second", LoraConfig(r=2, target_modules=["idle"]))
    model.set_adapter("second")
    with pytest.warns(UserWarning, match="adapter 'second' does nothing"):
        model(x)
    model.delete_adapter("default")
    assert pickle.loads(pickle.dumps(model)).active_adapters == ["second"]


def test_a_trained_copy_that_nothing_uses_is_named():
    model = get_lora_model(nn.Sequential(Alias()), LoraConfig(r=2, target_modules=["called"], modules_to_save=["idle"]))
    with pytest.warns(UserWarning, match="'0.idle'"):
        model(torch.randn(2, 6))


def test_dropout_does_not_act_on_a_weight_that_is_read_and_that_is_said():
    model = reader(lora_dropout=0.5).train()
    with pytest.warns(UserWarning, match="'read': the model reads this weight .* 'lora_dropout'"):
        model(X)


class Tower(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.ModuleDict({"proj": nn.Linear(6, 6)})

    def forward(self, x):
        return self.inner["proj"](x)


class Multimodal(nn.Module):
    """An image tower and its projection run for images only; one expert of two is chosen."""

    def __init__(self):
        super().__init__()
        self.tower, self.projection, self.text = Tower(), nn.Linear(6, 6), nn.Linear(6, 6)
        self.experts = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))

    def forward(self, x, image=None):
        if image is not None:
            x = x + self.projection(self.tower(image))
        return self.experts[0](self.text(x))


def test_towers_and_experts_that_a_batch_does_not_visit_are_not_named():
    model = get_lora_model(Multimodal(), LoraConfig(r=2, target_modules="all-linear"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(torch.randn(2, 6))


def test_what_waits_for_patches_of_images_is_not_named_in_a_batch_of_text():
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = FuyuConfig(
        **sizes, patch_size=2, vocab_size=64, text_config={"model_type": "persimmon", "vocab_size": 64, **sizes}
    )
    model = get_lora_model(FuyuForCausalLM(config), LoraConfig(r=2, target_modules="all-linear"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(input_ids=torch.ones(1, 4, dtype=torch.long))


def test_an_idle_layer_stops_training_with_the_trainer(tmp_path):
    transformers = pytest.importorskip("transformers")
    from minipeft.hf import AdapterTrainer

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.alias = Alias()

        def forward(self, x, labels=None):
            return {"loss": self.alias(x).square().mean()}

    model = get_lora_model(Model(), LoraConfig(r=2, target_modules=["called", "idle"]))
    data = [{"x": torch.randn(6), "labels": 0} for _ in range(4)]
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=1, report_to=[], use_cpu=True, disable_tqdm=True
    )
    with pytest.raises(StateError, match=r"'alias.idle'"):
        AdapterTrainer(model, arguments, train_dataset=data).train()


def test_the_first_pass_is_watched_without_a_trace_in_the_model():
    model = get_lora_model(gpt2(), LoraConfig(r=2))
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    logits(model)
    assert not any(hooks)
    assert not torch.nn.modules.module._global_forward_pre_hooks
    with pytest.raises(ValueError, match="input_ids"):
        get_lora_model(gpt2(), LoraConfig(r=2))()
    assert not torch.nn.modules.module._global_forward_pre_hooks


def test_a_loaded_adapter_is_read_as_well(tmp_path):
    torch.manual_seed(0)
    model = disturb(get_lora_model(Nano(), LoraConfig(r=2, target_modules=["wte", "head"])))
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    again = load_adapter(Nano(), tmp_path)
    x = torch.arange(11)[None]
    assert torch.equal(again(x), model(x))
    assert minipeft.__all__
