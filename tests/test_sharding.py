"""A base that is cut up over processes is known again all the same: its samples are taken before."""

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from tiny_models import VOCABULARY, foreign_code, gpt2, llama
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from transformers import GPT2LMHeadModel

import minipeft
from minipeft import CheckpointError, LoraConfig, StateError
from minipeft.files.base_samples import base_samples, remember_base
from minipeft.files.file_names import WEIGHTS_FILE
from minipeft.files.format import open_adapter
from minipeft.files.restore import restore_adapters
from minipeft.training.distributed.sharding import is_sharded, shard
from minipeft.training.runs.checkpoints import Checkpoints
from minipeft.training.runs.run_state import TrainingState


@pytest.fixture
def group(tmp_path):
    """A group of one process, which fully_shard makes shards for as it does for many."""
    dist.init_process_group("gloo", f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def two_targets(seed=0):
    torch.manual_seed(0)
    return minipeft.get_lora_model(gpt2(seed=seed), LoraConfig(r=2, target_modules=["c_attn", "c_fc"]))


def state_of(model):
    return TrainingState(model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1))


def sharded(model, remembered):
    if remembered:
        remember_base(model)
    return fully_shard(model, mesh=init_device_mesh("cpu", (1,)))


def test_an_adapter_saved_from_shards_refuses_another_base(group, tmp_path):
    expected = base_samples(two_targets(), "default")
    model = sharded(two_targets(), True)
    assert is_sharded(model)
    state = state_of(model)
    state.save_adapter(tmp_path / "adapter")
    folder = state.save(Checkpoints(tmp_path), 1)
    for directory in (tmp_path / "adapter", folder):
        assert open_adapter(directory).base == expected
        assert all(len(values) == 8 for values in expected.values())
        with pytest.raises(CheckpointError, match="trained on another base"):
            minipeft.load_adapter(gpt2(seed=1), directory)
        minipeft.load_adapter(gpt2(), directory, is_trainable=True)
    state.restore(folder)
    with pytest.raises(CheckpointError, match="trained on another base"):
        state_of(sharded(two_targets(seed=1), True)).restore(folder)


def test_shards_have_no_samples_to_take(group):
    assert set(map(len, base_samples(sharded(two_targets(), False), "default").values())) == {0}


def test_one_process_is_not_sharded():
    with pytest.raises(StateError, match="start more"):
        shard(two_targets(), "cpu")


def test_a_sharded_model_is_saved_from_its_whole_state_alone(group, tmp_path):
    """As accelerate gathers it for a model that it has prepared with FSDP2."""
    model, other = sharded(two_targets(), True), two_targets()
    with pytest.raises(CheckpointError, match=r"not whole in this process, as FSDP2.*accelerator\.get_state_dict"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))
    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    model.save_pretrained(tmp_path, state_dict=whole)
    found = minipeft.load_adapter(gpt2(), tmp_path, is_trainable=True).adapter_state_dict()
    assert all(torch.equal(found[key], value) for key, value in other.adapter_state_dict().items())


def resized(folder):
    """A base with four more tokens than its checkpoint has, an adapter, and rows that train."""
    with foreign_code():
        model = GPT2LMHeadModel.from_pretrained(folder)
        torch.manual_seed(0)
        model.resize_token_embeddings(VOCABULARY + 4)
    return minipeft.get_lora_model(model, LoraConfig(r=2, target_modules=["c_attn"], trainable_token_indices=[1, 2]))


def tied(folder):
    targets = ["q_proj", "embed_tokens", "lm_head"]
    config = LoraConfig(r=2, target_modules=targets, ensure_weight_tying=True)
    torch.manual_seed(0)
    return minipeft.get_lora_model(llama(tie_word_embeddings=True), config)


@pytest.mark.parametrize("make", [resized, tied])
def test_from_shards_the_same_is_saved_as_from_whole_weights(make, group, tmp_path):
    with foreign_code():
        gpt2().save_pretrained(tmp_path / "base")
    make(tmp_path / "base").save_pretrained(tmp_path / "whole")
    model = sharded(make(tmp_path / "base"), True)
    with pytest.raises(CheckpointError, match="not whole in this process"):
        model.save_pretrained(tmp_path / "shards")
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    model.save_pretrained(tmp_path / "gathered", state_dict=state)
    state_of(model).save_adapter(tmp_path / "run")
    for folder in ("gathered", "run"):
        found, expected = (load_file(tmp_path / name / WEIGHTS_FILE) for name in (folder, "whole"))
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], value) for key, value in expected.items())


def test_a_process_that_got_nothing_of_a_gathered_state_writes_nothing(tmp_path, monkeypatch):
    """accelerate.get_state_dict gives the first process all of it, and the others an empty one."""
    model = two_targets()
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    model.save_pretrained(tmp_path / "adapter", state_dict={})
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    with pytest.raises(CheckpointError, match="state_dict lacks"):
        model.save_pretrained(tmp_path / "adapter", state_dict={})
    assert not (tmp_path / "adapter").exists()


def test_what_needs_whole_tensors_is_refused_after_sharding(group, tmp_path):
    two_targets().save_pretrained(tmp_path)
    model = sharded(two_targets(), True)
    with pytest.raises(StateError, match="adapter 'default' are divided over processes"):
        restore_adapters(model, tmp_path)
    with pytest.raises(StateError, match=r"divided over processes.*call lean\(\) before"):
        minipeft.lean(model)


def divided(model, how):
    """As a process has a model under FSDP2, the first FSDP or ZeRO-3."""
    if how == "fsdp2":
        return sharded(model, True)
    for parameter in model.parameters():
        parameter.data = parameter.data.new_empty(0) if how == "zero3" else parameter.data.flatten()
        parameter._fsdp_flattened = how == "fsdp1"
    return model


@pytest.mark.parametrize("how", ["fsdp1", "fsdp2", "zero3"])
def test_what_reads_whole_factors_is_refused_where_they_are_divided(how, group, tmp_path):
    model = two_targets()
    model.add_adapter("other", LoraConfig(r=2, target_modules=["c_attn", "c_fc"]))
    model = divided(model, how)
    for verb in (
        lambda: model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "both", "cat"),
        lambda: model.save_pretrained(tmp_path / "lora", convert_to_lora=True),
        lambda: model.prepare_hotswap(8),
    ):
        with pytest.raises(StateError, match=r"c_attn: FSDP or DeepSpeed has divided this adapter"):
            verb()
    assert not (tmp_path / "lora").exists()


@pytest.mark.parametrize("how", ["fsdp1", "fsdp2", "zero3"])
def test_a_schedule_is_refused_where_factors_are_divided_and_a_gathered_state_is_saved(how, group, tmp_path):
    config = minipeft.AdaLoraConfig(
        init_r=4, target_r=2, total_step=9, target_modules=["c_attn"], init_lora_weights=False
    )
    model = minipeft.get_adapter_model(gpt2(), config)
    whole = {name: value.clone() for name, value in model.state_dict().items()}
    model = divided(model, how)
    for verb in (lambda: minipeft.extra_loss(model), lambda: minipeft.after_step(model, 0)):
        with pytest.raises(StateError, match=r"AdaLora trains by a schedule .* needs its tensors whole; use DDP"):
            verb()
    model.save_pretrained(tmp_path, state_dict=whole)
    found = minipeft.load_adapter(gpt2(), tmp_path).state_dict()
    assert all(torch.equal(found[name], value) for name, value in whole.items())


def test_saving_a_gathered_state_gathers_nothing_again(tmp_path):
    """The first FSDP gathers a block whenever it is asked for its state, and here only one process would ask."""
    model, other = two_targets(), two_targets()
    whole = {name: value + 1 for name, value in model.state_dict().items()}

    def wait_for_the_others(*_):
        raise AssertionError("a process that is alone would wait forever")

    for block in model.transformer.h:
        block.register_state_dict_pre_hook(wait_for_the_others)
    model.save_pretrained(tmp_path, state_dict=whole)
    found = minipeft.load_adapter(gpt2(), tmp_path, is_trainable=True).adapter_state_dict()
    assert all(torch.equal(found[key], value + 1) for key, value in other.adapter_state_dict().items())


def test_generate_can_be_registered_as_a_forward_method_as_the_trainer_does(group):
    model = sharded(two_targets(), True).eval()
    register_fsdp_forward_method(model, "generate")
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    ids = torch.tensor([[1, 2, 3]])
    expected = two_targets().eval().generate(ids, **options)
    assert torch.equal(model.generate(ids, **options), expected)
    assert torch.equal(model.generate(ids, adapter_names=["default"], **options), expected)


def test_torch_s_own_state_of_a_merged_model_says_so(group):
    model, other = two_targets(), two_targets(seed=1)
    model.merge_adapter()
    state = get_model_state_dict(torch.nn.parallel.DistributedDataParallel(model))
    assert state.keys() == model.state_dict().keys()
    with pytest.raises(StateError, match="merged when this state was taken"):
        set_model_state_dict(other, state)
    other.merge_adapter()
    set_model_state_dict(other, state)
    assert all(torch.equal(value, state[name]) for name, value in other.state_dict().items())
    assert (model.merged_adapters, two_targets().merged_adapters) == (("default",), ())
