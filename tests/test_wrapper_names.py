"""Wrappers around parts of a model, put on before or after adapting: names, files and values are those without them."""

import copy
import json

import pytest
import safetensors.torch
import torch
from tiny_models import disturb, foreign_code, gpt2, llama
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from minipeft import LoraConfig, TargetError, get_lora_model, load_adapter
from minipeft.ecosystem.wrapper_names import named_modules, named_parameters, unwrapped_name
from minipeft.injection.module_tree import candidates, wrappers
from minipeft.training.runs.optimizer_state import named_groups

WEIGHTS = "adapter_model.safetensors"
X = torch.arange(24).reshape(2, 12)


class DistributedDataParallel(nn.Module):
    """Looks like DDP, without its processes."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


class FullyShardedDataParallel(nn.Module):
    def __init__(self, module):
        super().__init__()
        self._fsdp_wrapped_module = module

    def forward(self, *args, **kwargs):
        return self._fsdp_wrapped_module(*args, **kwargs)


def compiled(module):
    with foreign_code():
        return torch.compile(module, backend="eager")


WRAP = {
    "activation checkpointing": checkpoint_wrapper,
    "torch.compile": compiled,
    "DataParallel": nn.DataParallel,
    "DDP": DistributedDataParallel,
    "FSDP": FullyShardedDataParallel,
    "several": lambda module: checkpoint_wrapper(compiled(module)),
}
BEFORE = ("activation checkpointing", "torch.compile", "DataParallel", "several")


def wrap_blocks(model, kind):
    layers = model.model.layers
    for index in range(len(layers)):
        layers[index] = WRAP[kind](layers[index])
    return model


def wrap_parts(model, kind):
    """Layers that are adapted or trained themselves."""
    attention = model.model.layers[0].self_attn
    attention.q_proj, model.model.norm = WRAP[kind](attention.q_proj), WRAP[kind](model.model.norm)
    return model


def output(model, kind=None):
    """What it computes; compiled only where `kind` says so, since the other tests are about names."""
    torch._dynamo.reset()
    stance = "default" if kind == "torch.compile" else "force_eager"
    with torch.no_grad(), foreign_code(), torch.compiler.set_stance(stance):
        return model(X).logits


CONFIG = LoraConfig(r=2, modules_to_save=["norm"], rank_pattern={"layers.1.self_attn.q_proj": 3})


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    model, folder = disturb(get_lora_model(llama(), CONFIG)), tmp_path_factory.mktemp("plain")
    model.save_pretrained(folder)
    return model, folder, output(model)


@pytest.mark.each_value
@pytest.mark.parametrize("wrap", [wrap_blocks, wrap_parts])
@pytest.mark.parametrize("kind", WRAP)
def test_an_adapter_wrapped_afterwards_saves_the_same_files(kind, wrap, plain, tmp_path):
    model, folder, expected = plain
    wrapped = wrap(copy.deepcopy(model), kind)
    wrapped.save_pretrained(tmp_path)
    for name in (WEIGHTS, "adapter_config.json"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()
    wrapped.save_pretrained(tmp_path / "of state", state_dict=wrapped.state_dict())
    assert (tmp_path / "of state" / WEIGHTS).read_bytes() == (folder / WEIGHTS).read_bytes()
    assert torch.allclose(output(wrapped, kind), expected, atol=1e-6)


@pytest.mark.parametrize("kind", BEFORE)
def test_a_wrapped_base_is_adapted_saved_and_loaded_as_a_plain_one(kind, plain, tmp_path):
    _, folder, expected = plain
    loaded = load_adapter(wrap_blocks(llama(), kind), folder)
    assert torch.allclose(output(loaded, kind), expected, atol=1e-6)
    loaded.save_pretrained(tmp_path)
    assert (tmp_path / WEIGHTS).read_bytes() == (folder / WEIGHTS).read_bytes()
    made = get_lora_model(wrap_blocks(llama(), kind), CONFIG)
    assert made.adapter_state_dict().keys() == loaded.adapter_state_dict().keys()
    assert dict(wrappers(made)).keys() == dict(wrappers(loaded)).keys()


@pytest.mark.parametrize("kind", BEFORE)
def test_a_wrapped_layer_and_a_wrapped_copy_act(kind, plain):
    _, folder, expected = plain
    assert torch.allclose(output(load_adapter(wrap_parts(llama(), kind), folder)), expected, atol=1e-6)


@pytest.mark.parametrize("kind", BEFORE)
def test_patterns_may_use_names_with_or_without_the_wrappers(kind):
    wrapped = wrap_blocks(llama(), kind)
    long = next(n for n, m in wrapped.named_modules() if n.endswith("self_attn.q_proj") and isinstance(m, nn.Linear))
    norm = long.replace("self_attn.q_proj", "input_layernorm")
    model = get_lora_model(wrapped, LoraConfig(r=2, target_modules=[long], modules_to_save=[norm]))
    assert [name for name, _ in wrappers(model)] == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.input_layernorm",
    ]
    regex = long.replace(".", r"\.").replace("0", r"\d")
    again = get_lora_model(
        wrap_blocks(llama(), kind),
        LoraConfig(r=2, target_modules=regex, rank_pattern={regex: 3} if "module" not in regex else {}),
    )
    assert [n for n, _ in wrappers(again)] == [f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)]
    for layers in (["model.layers.0.self_attn.q_proj"], r"model\.layers\.0\.self_attn\.q_proj"):
        assert len(dict(wrappers(get_lora_model(wrap_blocks(llama(), kind), LoraConfig(target_modules=layers))))) == 1
    one = get_lora_model(
        wrap_blocks(llama(), kind),
        LoraConfig(target_modules=["q_proj"], layers_to_transform=[1], layers_pattern=["layers"]),
    )
    assert [n for n, _ in wrappers(one)] == ["model.layers.1.self_attn.q_proj"]


@pytest.mark.parametrize("kind", BEFORE)
def test_saved_patterns_select_the_same_modules_in_a_plain_model(kind, tmp_path):
    long = {"DataParallel": "module.", "torch.compile": "_orig_mod."}.get(kind, "_checkpoint_wrapped_module.")
    long = f"layers.0.{long}{'_orig_mod.' if kind == 'several' else ''}"
    for number, targets in enumerate(([f"{long}self_attn.v_proj"], rf".*{long}self_attn\.v_proj")):
        config = LoraConfig(r=2, target_modules=targets, modules_to_save=[f"{long}mlp"])
        model = disturb(get_lora_model(wrap_blocks(llama(), kind), config))
        model.save_pretrained(tmp_path / str(number))
        assert torch.allclose(output(load_adapter(llama(), tmp_path / str(number))), output(model), atol=1e-6)


@pytest.mark.parametrize("part", ["_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module."])
def test_a_file_with_a_wrappers_names_fits_a_plain_model(part, plain, tmp_path):
    _, folder, expected = plain
    tensors = safetensors.torch.load_file(folder / WEIGHTS)
    renamed = {key.replace("layers.0.", f"layers.0.{part}"): tensor for key, tensor in tensors.items()}
    safetensors.torch.save_file(renamed, tmp_path / WEIGHTS)
    config = json.loads((folder / "adapter_config.json").read_text("utf-8"))
    config["rank_pattern"] = {f"layers.1.{part}self_attn.q_proj": 3}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config), "utf-8")
    assert torch.equal(output(load_adapter(llama(), tmp_path)), expected)


def test_a_run_knows_its_parameters_by_the_same_names(plain):
    def groups(model):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
        return named_groups(optimizer, {id(t): key for key, t in model.adapter_state_dict().items()})

    model = copy.deepcopy(plain[0])
    assert groups(model) == groups(wrap_blocks(copy.deepcopy(model), "several"))


@pytest.mark.parametrize("kind", BEFORE)
def test_verbs_find_their_layers_after_wrapping(kind):
    model = get_lora_model(llama().requires_grad_(True), CONFIG)
    model.add_adapter("other", LoraConfig(r=2))
    wrap_blocks(model, kind)
    model.set_adapter("other")
    model.set_adapter("default")
    assert sum(p.requires_grad for p in model.parameters()) == 2 * 4 + 1
    base = output(llama())
    assert torch.allclose(output(model.unload()), base, atol=1e-6)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("kind", ["DDP", "FSDP"])
def test_a_wrapper_that_would_not_see_new_parameters_is_refused(kind):
    model = wrap_blocks(llama(), kind)
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(TargetError, match=r"^model\.layers\.0\.self_attn\.q_proj: .*DataParallel wraps a part"):
        get_lora_model(model, LoraConfig())
    assert [name for name, _ in model.named_modules()] == names


def test_a_wrapped_head_is_still_the_head():
    model = llama()
    model.lm_head = checkpoint_wrapper(model.lm_head)
    assert "lm_head" not in dict(wrappers(get_lora_model(model, LoraConfig(target_modules="all-linear"))))
    embedding = gpt2()
    embedding.transformer.wte = checkpoint_wrapper(embedding.transformer.wte)
    adapted = get_lora_model(embedding, LoraConfig(trainable_token_indices=[3]))
    assert {"transformer.wte", "lm_head"} < dict(wrappers(adapted)).keys()


class Own(nn.Module):
    """A user's class with the names that wrappers use."""

    def __init__(self):
        super().__init__()
        self.module = nn.Sequential(nn.Linear(4, 4))
        self._orig_mod = nn.Linear(4, 4)

    def forward(self, x):
        return self._orig_mod(self.module(x))


def test_a_users_own_module_keeps_its_name(tmp_path):
    model = disturb(get_lora_model(Own(), LoraConfig(r=2, target_modules=["module.0", "_orig_mod"])))
    assert {name for name, _ in wrappers(model)} == {"module.0", "_orig_mod"}
    model.save_pretrained(tmp_path)
    again, x = Own(), torch.randn(3, 4)
    again.load_state_dict(
        {k.replace("base_layer.", ""): v for k, v in model.state_dict().items() if "adapters" not in k}
    )
    assert torch.equal(load_adapter(again, tmp_path)(x), model(x))


def test_names_without_wrappers_are_those_of_torch():
    model = gpt2()
    assert list(named_modules(model)) == list(model.named_modules())
    assert list(named_modules(model, remove_duplicate=False)) == list(model.named_modules(remove_duplicate=False))
    assert list(named_parameters(model)) == list(model.named_parameters())
    assert list(named_parameters(model, remove_duplicate=False)) == list(model.named_parameters(remove_duplicate=False))
    assert list(candidates(model)) == [name for name, _ in model.named_modules() if name]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("h.0._orig_mod.attn", "h.0.attn"),
        (r".*\._checkpoint_wrapped_module\.attn", r".*\.attn"),
        ("_orig_mod.h.q._fsdp_wrapped_module", "h.q"),
        ("_orig_mod", "_orig_mod"),
        ("my_orig_mod.q", "my_orig_mod.q"),
        ("module.q", "module.q"),
    ],
)
def test_only_a_wrappers_part_of_a_name_goes(name, expected):
    assert unwrapped_name(name) == expected
