"""What one method has and the others have not: sharing, factor shapes, dropout, defaults, and what is refused."""

import copy
import pickle

import pytest
import torch
from method_cases import CASES, load_theirs, ours, their_logits
from safetensors.torch import load_file, save_file
from tiny_layers import OneLayer
from tiny_models import disturb, foreign_code, gpt2, llama, logits
from torch import nn

import minipeft
from minipeft import ConfigError, IA3Config, LoHaConfig, LoKrConfig, OFTConfig, TargetError, VeraConfig
from minipeft import get_adapter_model as adapt
from minipeft.injection.module_tree import adapted_layers
from minipeft.methods import ia3
from minipeft.methods.lokr import factorise
from minipeft.methods.oft import _series
from minipeft.registry import registry

with foreign_code():
    peft = pytest.importorskip("peft")
    from peft.tuners.lokr.layer import factorization
    from peft.tuners.oft.layer import OFTLayer, OFTRotationModule
    from peft.utils import constants


def default_tables():
    """(method, model_type, our targets, PEFT's); ours is None if the general default holds, which is LoRA's."""
    lora = constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    for method in ("ia3", "adalora", "vera", "loha", "lokr", "oft"):
        table = registry.default_targets(method)
        theirs = getattr(constants, f"TRANSFORMERS_MODELS_TO_{method.upper()}_TARGET_MODULES_MAPPING")
        for model_type, targets in theirs.items():
            if not model_type.startswith("RefinedWeb"):  # Falcon's name before transformers knew it
                found = table.get(model_type)
                yield method, model_type, found, targets, lora.get(model_type)


def test_default_targets_are_those_of_peft_by_model_type():
    checked = 0
    for method, model_type, found, expected, of_lora in default_tables():
        assert list(found) == expected if found is not None else expected == of_lora, (method, model_type)
        checked += 1
    assert checked > 100
    theirs = constants.TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING
    ours = registry.default_targets("ia3", "feedforward_modules")
    for model_type in theirs:
        if not model_type.startswith("RefinedWeb"):
            assert ours.get(model_type) == (ia3._regex(theirs[model_type]) if theirs[model_type] else None), model_type


@pytest.mark.parametrize(
    ("targets", "feedforward"),
    [
        (["attn.c_proj", "mlp.c_proj"], ["c_proj"]),  # no subset, which PEFT wants
        (["c_attn", "attn.c_proj", "h.0.mlp.c_proj"], ["h.0.mlp.c_proj"]),
        (["c_fc", "mlp.c_proj"], r".*c_fc"),
        ("all-linear", ["mlp.c_proj", "c_fc"]),
    ],
)
def test_peft_scales_the_same_inputs_however_they_are_named(targets, feedforward, tmp_path):
    model = disturb(adapt(gpt2(), IA3Config(target_modules=targets, feedforward_modules=feedforward)))
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(their_logits(load_theirs("ia3", tmp_path)), logits(model), rtol=0, atol=1e-5)
    assert torch.equal(logits(minipeft.load_adapter(gpt2(), tmp_path)), logits(model))


class Similar(nn.Module):
    """Two names of which one ends the other, without a dot between."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.proj, self.up_proj = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.up_proj(self.proj(x))


def test_a_name_that_only_ends_another_does_not_scale_its_input_in_peft_either(tmp_path):
    config = IA3Config(target_modules=["proj", "up_proj"], feedforward_modules=["proj"])
    model = disturb(adapt(Similar(), config))
    assert [layer.adapter("default").is_feedforward for _, layer in adapted_layers(model)] == [True, False]
    model.save_pretrained(tmp_path)
    with foreign_code():
        reference = peft.PeftModel.from_pretrained(Similar(), tmp_path)
    x = torch.randn(3, 4)
    torch.testing.assert_close(reference(x), model(x))


@pytest.mark.parametrize("feedforward", [["c_fc"], r".*c_fc"])
def test_a_feedforward_module_that_is_no_target_is_refused(feedforward):
    with pytest.raises(TargetError, match="feedforward_modules: .*c_fc"):
        adapt(gpt2(), IA3Config(target_modules=["c_attn"], feedforward_modules=feedforward))


def test_options_that_peft_lacks_are_written_as_the_modules_they_leave(tmp_path):
    config = IA3Config(target_modules=["c_attn", "c_fc"], feedforward_modules=["c_fc"], layers_to_transform=[1])
    model = disturb(adapt(gpt2(), config))
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(their_logits(load_theirs("ia3", tmp_path)), logits(model), rtol=0, atol=1e-5)
    config = VeraConfig(r=4, target_modules=["c_attn", "c_proj"], exclude_modules=["attn.c_proj"])
    model = disturb(adapt(gpt2(), config))
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(their_logits(load_theirs("vera", tmp_path)), logits(model), rtol=0, atol=1e-5)
    assert len(list(adapted_layers(minipeft.load_adapter(gpt2(), tmp_path)))) == 4


def projections(model):
    return [layer.adapter("default").projections for _, layer in adapted_layers(model)]


def storages(model):
    return {b.untyped_storage().data_ptr() for name, b in model.named_buffers(remove_duplicate=False) if "vera" in name}


def test_the_projections_are_one_storage_whatever_is_done_to_the_model():
    model = disturb(ours("vera"))
    expected = logits(model)
    assert not any("vera_A" in key or "vera_B" in key for key in model.state_dict())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(other), expected)
        for changed in (other, other.double()):
            assert len(set(map(id, projections(changed)))) == 1
            assert len(storages(changed)) == 2
        assert not storages(other) & storages(model)
        assert projections(other)[0].vera_A.dtype is torch.float64
    model.merge_adapter()
    undo = next(layer.undo.original for _, layer in adapted_layers(model))
    assert undo.adapters[0].projections.vera_A is projections(model)[0].vera_A  # no copy per layer to undo the merge
    assert undo.adapters[0].vera_lambda_b is not next(adapted_layers(model))[1].adapter("default").vera_lambda_b


def test_a_file_holds_the_projections_once_or_not_at_all(tmp_path):
    model = disturb(ours("vera"))
    model.save_pretrained(tmp_path / "with", state_dict={k: v + 0 for k, v in model.state_dict().items()})
    tensors = load_file(tmp_path / "with/adapter_model.safetensors")
    assert [key for key in tensors if "lambda" not in key] == ["base_model.vera_A", "base_model.vera_B"]
    assert torch.equal(tensors["base_model.vera_A"], projections(model)[0].vera_A)
    model = disturb(ours("vera", save_projection=False))
    model.save_pretrained(tmp_path / "without")
    assert not [key for key in load_file(tmp_path / "without/adapter_model.safetensors") if "lambda" not in key]
    assert torch.equal(logits(minipeft.load_adapter(gpt2(), tmp_path / "without")), logits(model))


def test_each_adapter_has_the_projections_of_its_own_key():
    model = disturb(ours("vera"))
    alone = logits(model)
    model.add_adapter("other", VeraConfig(target_modules=["c_attn"], r=3, projection_prng_key=1))
    model.add_adapter("same", VeraConfig(**CASES["vera"][2]))
    assert torch.equal(logits(model), alone)
    layer = dict(adapted_layers(model))["transformer.h.0.attn.c_attn"]
    assert torch.equal(layer.adapter("same").projections.vera_A, layer.adapter("default").projections.vera_A)
    assert layer.adapter("other").projections.vera_A.shape == (3, 32)
    expected = (3 * 2 / 32) ** 0.5  # Kaiming-uniform in (-bound, bound) for 32 inputs
    assert 0.8 * expected < layer.adapter("other").projections.vera_A.abs().max() <= expected


def test_a_file_without_the_projections_it_promises_is_refused(tmp_path):
    ours("vera").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    del tensors["base_model.vera_B"]
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(minipeft.CheckpointError, match=r"missing 'base_model\.vera_B'"):
        minipeft.load_adapter(gpt2(), tmp_path)


@pytest.mark.parametrize(
    "config",
    [
        VeraConfig(target_modules=["layer"], r=8),
        LoHaConfig(target_modules=["layer"], r=2),
        LoKrConfig(target_modules=["layer"], r=2),
    ],
    ids=lambda config: config.method,
)
def test_of_the_size_of_the_batch_at_most_the_input_is_kept(config):
    model = disturb(adapt(OneLayer(nn.Linear(64, 64)), config))
    x = torch.randn(512, 64, requires_grad=True)
    own = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    saved = {}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(x)
    large = [size for pointer, size in saved.items() if size >= x.nbytes and pointer != x.data_ptr()]
    assert large == []
    assert (x.data_ptr() in saved) == (config.method != "vera")


def test_sizes_are_split_as_peft_splits_them():
    for size in (*range(1, 200), 768, 1024, 3072, 50257):
        for near in (-1, 1, 2, 3, 4, 7, 16, 100):
            assert factorise(size, near) == factorization(size, near), (size, near)


@pytest.mark.parametrize("cls", [LoHaConfig, LoKrConfig])
def test_rank_dropout_drops_output_features_and_module_dropout_layers(cls):
    rescaled = {"rank_dropout_scale": True} if cls is LoKrConfig else {}
    for options, scales in (({"rank_dropout": 0.4, **rescaled}, True), ({"module_dropout": 0.4}, False)):
        layer = nn.Linear(6, 40)
        model = disturb(adapt(OneLayer(layer), cls(target_modules=["layer"], r=2, **options)), scale=1)
        x = torch.randn(3, 6)
        full = model.eval()(x) - layer(x)
        model.train()
        shares = []
        for _ in range(200):
            update = model(x) - layer(x)
            kept = update.abs().amax(0) > 1e-6
            shares.append(kept.float().mean())
            gain = 40 / kept.sum() if scales else 1
            torch.testing.assert_close(update[:, kept], full[:, kept] * gain, rtol=1e-3, atol=1e-4)
            assert scales or bool(kept.all()) == bool(kept.any())
        assert abs(torch.stack(shares).mean() - 0.6) < 0.1


def test_an_unscaled_rank_dropout_leaves_the_other_features_as_they_are():
    layer = nn.Linear(6, 40)
    model = disturb(adapt(OneLayer(layer), LoKrConfig(target_modules=["layer"], r=2, rank_dropout=0.5)), scale=1)
    x = torch.randn(3, 6)
    full = model.eval()(x) - layer(x)
    update = model.train()(x) - layer(x)
    kept = update.abs().amax(0) > 1e-6
    assert 0 < kept.sum() < 40
    torch.testing.assert_close(update[:, kept], full[:, kept], rtol=1e-4, atol=1e-5)


def test_blocks_have_the_sizes_of_peft():
    adjust = OFTLayer.adjust_oft_parameters
    for size in (1, 2, 7, 12, 30, 32, 48, 97, 768):
        for wanted in (1, 2, 3, 5, 8, 31, 32, 100):
            expected = wanted if size % wanted == 0 else adjust(None, size, wanted)
            assert OFTConfig(oft_block_size=wanted).block_size(size) == min(expected, size), (size, wanted)
            assert OFTConfig(r=wanted, oft_block_size=0).block_size(size) == size // min(expected, size)


@pytest.mark.parametrize("terms", range(2, 9))
def test_the_series_is_that_of_peft(terms):
    module = OFTRotationModule(3, 6, 4, 12, num_cayley_neumann_terms=terms)
    upper = 0.1 * torch.randn(3, 6)
    Q = module._pytorch_skew_symmetric(upper, 4)
    torch.testing.assert_close(_series(torch.eye(4), Q, terms), module._cayley_batch(upper, 4, True, terms))


def test_rotations_are_orthogonal_and_dropout_leaves_some_blocks_alone():
    config = OFTConfig(target_modules=["layer"], oft_block_size=4, use_cayley_neumann=False, module_dropout=0.5)
    model = disturb(adapt(OneLayer(nn.Linear(24, 3)), config), scale=1)
    adapter = model.layer.adapter("default").eval()
    R = adapter.rotations()
    torch.testing.assert_close(R @ R.transpose(1, 2), torch.eye(4).expand(6, 4, 4))
    assert (R - torch.eye(4)).abs().amax((1, 2)).min() > 0.1
    dropped = adapter.train().rotations(dropped=True)
    assert torch.equal(adapter.rotations(), R)  # a merge drops nothing
    still = (dropped == torch.eye(4)).all(2).all(1)
    assert int(still.sum()) == 3
    assert torch.equal(dropped[~still], R[~still])


def test_training_under_the_constraint_moves_the_parameter_into_the_ball():
    config = OFTConfig(target_modules=["layer"], oft_block_size=4, coft=True, eps=0.2)
    model = disturb(adapt(OneLayer(nn.Linear(8, 3)), config), scale=1)
    adapter, x = model.layer.adapter("default"), torch.randn(2, 8)
    before, expected = adapter.weight.detach().clone(), model.eval()(x).detach()
    assert torch.equal(adapter.weight, before)  # looking at it does not move it
    torch.testing.assert_close(model.train()(x), expected)
    norms = (2 * adapter.weight.square().sum(1)).sqrt()
    torch.testing.assert_close(norms, torch.full((2,), 0.2 / 2**0.5))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: LoHaConfig(use_effective_conv2d=1), "use_effective_conv2d must be True or False"),
        (lambda: LoKrConfig(init_weights="pissa"), "init_weights must be one of True, False, 'lycoris'"),
        (lambda: LoKrConfig(decompose_factor=0), "decompose_factor must be an integer from 1"),
        (lambda: LoHaConfig(rank_dropout=1.0), "rank_dropout must be a finite number >= 0 and < 1"),
        (lambda: OFTConfig(r=4), "give r = 4 or oft_block_size = 32"),
        (lambda: OFTConfig(bias="all"), "bias must be one of 'none'"),
        (lambda: VeraConfig(bias="vera_only"), "bias must be one of 'none'"),
        (lambda: VeraConfig(r=0), "r must be an integer from 1"),
        (lambda: IA3Config(feedforward_modules=[3]), "feedforward_modules must be a non-empty list"),
    ],
)
def test_an_option_that_is_not_there_is_refused_by_name(build, message):
    with pytest.raises(ConfigError, match=message):
        build()


@pytest.mark.parametrize("cls", [LoHaConfig, LoKrConfig])
def test_a_pattern_that_decides_nothing_is_refused(cls):
    with pytest.raises(TargetError, match="rank_pattern: k_proj"):
        adapt(llama(), cls(target_modules=["q_proj"], rank_pattern={"k_proj": 2}))


DROPPING = {
    "lora": minipeft.LoraConfig(target_modules=["q_proj"], lora_dropout=0.5),
    "dora": minipeft.LoraConfig(target_modules=["q_proj"], lora_dropout=0.5, use_dora=True),
    "adalora": minipeft.AdaLoraConfig(target_modules=["q_proj"], lora_dropout=0.5, total_step=9),
    "vera": VeraConfig(target_modules=["q_proj"], vera_dropout=0.5),
}


@pytest.mark.filterwarnings("ignore:.*after_step")
@pytest.mark.parametrize("method", DROPPING)
def test_dropout_is_found_and_set_as_that_of_any_torch_model(method):
    """TRL's trainers set each `nn.Dropout` to 0; Monte Carlo dropout lets them alone train."""
    model = disturb(adapt(llama(), DROPPING[method])).eval()
    expected = logits(model)
    dropouts = [module for module in model.modules() if isinstance(module, nn.Dropout)]
    for module in dropouts:
        module.train()
    assert not torch.allclose(logits(model), expected, atol=1e-4)
    model.train()
    for module in dropouts:
        module.p = 0
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5)
