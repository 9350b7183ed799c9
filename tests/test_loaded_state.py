"""A whole state (Lightning, accelerate.save_state, torch.save) brings its base into a process that had another one."""

import copy
import pickle

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from safetensors.torch import load_file, load_model, save_model
from tiny_models import disturb, gpt2, llama, logits, state_digest, token_ids
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import minipeft
from minipeft import LoraConfig, StateError, TrainableTokensConfig, get_adapter_model
from minipeft.injection.module_tree import adapted_layers

CONFIGS = {
    "lora": LoraConfig(r=4, target_modules=["c_attn"]),
    "bias": LoraConfig(r=4, target_modules=["c_attn"], bias="lora_only"),
    "all biases": LoraConfig(r=4, target_modules=["c_attn"], bias="all"),
    "rows beside": LoraConfig(r=4, target_modules=["c_attn"], trainable_token_indices=[1, 5, 3]),
    "rows": TrainableTokensConfig(token_indices=[5, 3, 97]),
    "rows of a head": LoraConfig(r=4, target_modules=["c_attn"], trainable_token_indices={"lm_head": [3, 5]}),
    "dora": LoraConfig(r=4, target_modules=["c_attn"], use_dora=True),
    "pissa": LoraConfig(r=4, target_modules=["c_attn"], init_lora_weights="pissa"),
    "copy": LoraConfig(r=4, target_modules=["c_attn"], modules_to_save=["ln_f"]),
    "vera": minipeft.VeraConfig(r=4, target_modules=["c_attn"]),
    "oft": minipeft.OFTConfig(oft_block_size=8, target_modules=["c_attn"]),
    "ia3": minipeft.IA3Config(target_modules=["c_attn"]),
    "lokr": minipeft.LoKrConfig(r=4, target_modules=["c_attn"]),
    "loha": minipeft.LoHaConfig(r=4, target_modules=["c_attn"]),
}


def made(kind, seed):
    return get_adapter_model(gpt2(seed=seed), CONFIGS[kind])


@pytest.mark.each_value
@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("assign", [False, True], ids=["copied", "assigned"])
def test_a_whole_state_gives_the_model_that_was_saved(kind, assign):
    saved = disturb(made(kind, 0))
    model = made(kind, 1)
    model.load_state_dict(copy.deepcopy(saved.state_dict()), assign=assign)
    assert torch.equal(logits(model), logits(saved))
    untie = kind == "rows of a head"
    merged, expected = copy.deepcopy(model).merge_and_unload(untie=untie), saved.merge_and_unload(untie=untie)
    torch.testing.assert_close(logits(merged), logits(expected), rtol=0, atol=1e-5)


@pytest.mark.each_value
@pytest.mark.parametrize("kind", ["rows", "bias", "all biases"])
@pytest.mark.parametrize(
    "convert",
    [
        copy.deepcopy,
        lambda model: pickle.loads(pickle.dumps(model)),
        lambda model: model.double(),
        lambda model: model.to(torch.bfloat16).float(),
    ],
    ids=["deepcopy", "pickle", "double", "there and back"],
)
def test_it_does_in_a_copy_and_another_dtype(kind, convert):
    saved = disturb(made(kind, 0))
    model = convert(made(kind, 1))
    model.load_state_dict(saved.state_dict())
    assert torch.equal(logits(model), logits(saved.to(next(model.parameters()).dtype)))


@pytest.mark.parametrize("kind", ["lora", "rows", "rows beside", "bias", "vera"])
def test_a_model_built_empty_and_filled_by_a_state_is_the_one_that_was_saved(kind):
    saved = disturb(made(kind, 0))
    with torch.device("meta"):
        model = made(kind, 1)
    model.to_empty(device="cpu").load_state_dict(saved.state_dict())
    assert torch.equal(logits(model), logits(saved))


def test_the_state_of_an_adapter_alone_leaves_the_base_here_as_it_is():
    saved, model = disturb(made("rows beside", 0)), made("rows beside", 1)
    own = {name: value for name, value in saved.state_dict().items() if ".adapters." in name}
    model.load_state_dict(own, strict=False)
    table = gpt2(seed=1)
    with torch.no_grad():
        table.transformer.wte.weight[[1, 5, 3]] = own["transformer.wte.adapters.default.trainable_tokens_delta"]
    embedded = model.transformer.wte(token_ids())
    torch.testing.assert_close(embedded, table.transformer.wte(token_ids()))


def test_rows_that_were_assigned_stay_tied():
    saved, model = disturb(made("rows", 0)), made("rows", 1)
    model.load_state_dict(copy.deepcopy(saved.state_dict()), assign=True)
    wte, head = model.transformer.wte.adapters["default"], model.lm_head.adapters["default"]
    assert wte.trainable_tokens_delta is head.trainable_tokens_delta


def test_what_is_kept_while_another_adapter_is_merged_stays():
    model = disturb(get_adapter_model(llama(), LoraConfig(r=2, target_modules=["embed_tokens"])))
    model.add_adapter("rows", TrainableTokensConfig(token_indices=[5, 3]))
    model.set_adapter(["default", "rows"])
    disturb(model)
    expected = logits(model)
    model.merge_adapter(["default"])
    model.load_state_dict(model.state_dict())
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("merged_there", [True, False])
def test_a_state_that_was_taken_with_another_adapter_merged_is_refused(merged_there, nested, tmp_path):
    saved, model = disturb(made("lora", 0)), disturb(made("lora", 1))
    (saved if merged_there else model).merge_adapter()
    outer, other = (nn.ModuleDict({"inner": m}) if nested else m for m in (saved, model))
    save_model(outer, tmp_path / "state.safetensors")  # which keeps no metadata
    before, state = state_digest(model), load_file(tmp_path / "state.safetensors")
    with pytest.raises(StateError, match="merged here. Call unmerge_adapter"):
        other.load_state_dict(state, strict=False)
    assert state_digest(model) == before
    with saved.disable_adapter():  # takes a merge back for its time
        state = copy.deepcopy(outer.state_dict())
    if not merged_there:
        model.unmerge_adapter()
    other.load_state_dict(state)
    torch.testing.assert_close(logits(model), logits(saved), rtol=0, atol=1e-5)


@torch.no_grad()
def test_accelerate_brings_back_a_state_only_if_the_same_is_merged(tmp_path):
    saved = disturb(made("lora", 0))
    expected = logits(saved)
    saved.merge_adapter()
    merged = logits(saved)
    Accelerator(cpu=True).save_model(saved, tmp_path)
    model = disturb(made("lora", 1))
    with pytest.raises(StateError, match="'default' was merged when this state was taken, and none is merged here"):
        load_model(model, tmp_path / "model.safetensors")
    model.merge_adapter()
    load_model(model, tmp_path / "model.safetensors")
    assert torch.equal(logits(model), merged)
    saved.unmerge_adapter()
    assert torch.equal(logits(saved), expected)


@pytest.mark.parametrize("kind", ["rows", "bias"])
def test_a_sharded_base_is_read_whole(kind, tmp_path):
    dist.init_process_group("gloo", f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        model, other = made(kind, 1), made(kind, 0)
        for name, layer in adapted_layers(model):
            adapter, same = layer.adapter("default"), dict(other.named_modules())[name].adapters["default"]
            for key, value in dict(other.named_modules())[name].base_layer.named_parameters():
                shard = distribute_tensor(value.detach(), mesh, [Shard(0)])
                layer.owner._parameters[key] = torch.nn.Parameter(shard, requires_grad=False)
            adapter.base_loaded(layer.owner, layer.ops)
            for key, buffer in adapter.named_buffers():
                assert type(buffer) is torch.Tensor
                assert torch.equal(buffer, same.get_buffer(key))
    finally:
        dist.destroy_process_group()
