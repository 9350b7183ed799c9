"""Bases whose weights accelerate keeps on a CPU or a disk: the same values, gradients and files as without offloading."""

import contextlib
import itertools

import accelerate
import pytest
import safetensors.torch
import torch
import transformers
from fast_copy import Template
from rotation import thinned
from tiny_models import disturb, foreign_code, gpt2, llama
from torch import nn

from minipeft import (
    AdaLoraConfig,
    ContractError,
    IA3Config,
    LoraConfig,
    MergeError,
    OFTConfig,
    StateError,
    TargetError,
    TrainableTokensConfig,
    VeraConfig,
    extra_loss,
    get_adapter_model,
    get_lora_model,
    load_adapter,
)
from minipeft.testing.case import case_of
from minipeft.testing.runtime import offloading

WEIGHTS = "adapter_model.safetensors"
X = torch.arange(24).reshape(2, 12)
CPU = torch.device("cpu")


def on_disk(model, folder):
    with foreign_code():
        accelerate.disk_offload(model, str(folder), execution_device=CPU)
    return model


def on_cpu(model, folder):
    with foreign_code():
        accelerate.cpu_offload(model, execution_device=CPU)
    return model


def dispatched(model, folder):
    """Half of it offloaded, with several hooks on each layer."""
    blocks = next(name for name, module in model.named_modules() if isinstance(module, nn.ModuleList))
    rest = [name for name, _ in model.named_modules() if name and blocks not in name and not blocks.startswith(name)]
    where = {**dict.fromkeys(rest, "cpu"), f"{blocks}.0": "disk", f"{blocks}.1": "cpu"}
    with foreign_code():
        return accelerate.dispatch_model(model, where, offload_dir=str(folder), main_device="cpu")


OFFLOAD = {"disk": on_disk, "cpu": on_cpu, "dispatched": dispatched}
CONFIGS = {
    "lora": LoraConfig(r=2, lora_dropout=0.0, bias="all"),
    "dora": LoraConfig(r=2, use_dora=True, bias="lora_only"),
    "pissa": LoraConfig(r=2, init_lora_weights="pissa"),
    "modules_to_save": LoraConfig(r=2, modules_to_save=["ln_f", "mlp"]),
    "tokens": LoraConfig(r=2, trainable_token_indices=[3, 5]),
    "embedding": LoraConfig(r=2, target_modules=["wte", "c_fc"]),
    "parameter": LoraConfig(r=2, target_modules=[], target_parameters=["c_fc.weight"]),
    "vera": VeraConfig(r=4),
    "ia3": IA3Config(target_modules=["c_attn", "c_fc"], feedforward_modules=["c_fc"]),
    "oft": OFTConfig(target_modules=["c_attn"], oft_block_size=4),
    "adalora": AdaLoraConfig(total_step=10),
    "trainable_tokens": TrainableTokensConfig(token_indices=[3, 5]),
}


def output(model):
    with foreign_code():
        return model(X).logits


def gradients(model):
    model.zero_grad()
    output(model).square().mean().backward()
    return {key: tensor.grad.clone() for key, tensor in model.adapter_state_dict().items() if tensor.grad is not None}


IN_TURN = [*itertools.product(OFFLOAD, ["lora"]), *zip(itertools.cycle(OFFLOAD), CONFIGS)]


@pytest.mark.each_value
@pytest.mark.parametrize(("how", "method"), thinned((OFFLOAD, CONFIGS), IN_TURN))
def test_an_offloaded_base_computes_trains_and_saves_the_same(how, method, tmp_path):
    torch.manual_seed(0)
    whole = get_adapter_model(gpt2(), CONFIGS[method])
    torch.manual_seed(0)
    model = get_adapter_model(OFFLOAD[how](gpt2(), tmp_path / "weights"), CONFIGS[method])
    disturb(whole)
    with torch.no_grad():
        for key, tensor in model.adapter_state_dict().items():
            tensor.copy_(whole.adapter_state_dict()[key])
    assert not any(tensor.is_meta for tensor in model.adapter_state_dict().values())
    computed, plain = output(whole), output(gpt2())
    assert torch.allclose(output(model), computed, atol=5e-6)
    expected, found = gradients(whole), gradients(model)
    assert expected.keys() == found.keys()
    assert all(torch.allclose(found[key], expected[key], atol=5e-6) for key in expected)
    with model.disable_adapter():
        assert torch.allclose(output(model), plain, atol=5e-6)
    assert torch.equal(extra_loss(model), extra_loss(whole))
    for name, each in (("ours", model), ("whole", whole)):
        each.save_pretrained(tmp_path / name)
    files = [(tmp_path / name / WEIGHTS).read_bytes() for name in ("ours", "whole")]
    assert files[0] == files[1]
    again = load_adapter(OFFLOAD[how](gpt2(), tmp_path / "again"), tmp_path / "whole")
    assert torch.allclose(output(again), computed, atol=5e-6)
    assert torch.allclose(output(again.unload()), plain, atol=5e-6)


@pytest.mark.parametrize("how", OFFLOAD)
def test_merging_into_an_offloaded_weight_is_refused(how, tmp_path):
    model = disturb(get_lora_model(OFFLOAD[how](llama(), tmp_path), LoraConfig(r=2)))
    expected = output(model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(MergeError, match=r"self_attn\.q_proj: accelerate offloads its weight"):
            merge()
    assert torch.equal(output(model), expected)


def test_another_base_is_noticed_though_it_is_offloaded(tmp_path):
    disturb(get_lora_model(llama(), LoraConfig(r=2))).save_pretrained(tmp_path / "adapter")
    model = on_disk(llama(seed=5), tmp_path / "weights")
    before = [(name, id(module)) for name, module in model.named_modules()]
    with pytest.raises(ValueError, match="was trained on another base"):
        load_adapter(model, tmp_path / "adapter")
    assert before == [(name, id(module)) for name, module in model.named_modules()]


def test_an_offloaded_adapter_is_pushed_as_it_is_saved(tmp_path, monkeypatch):
    model = on_cpu(disturb(get_lora_model(llama(), LoraConfig(r=2))), tmp_path)
    model.save_pretrained(tmp_path / "saved")
    monkeypatch.setattr("minipeft.files.hub.push", lambda folder, *_, **__: (folder / WEIGHTS).read_bytes())
    assert model.push_to_hub("owner/name") == (tmp_path / "saved" / WEIGHTS).read_bytes()


@pytest.fixture(scope="module")
def resized(tmp_path_factory):
    """A function: a model from a disk with five more rows; a new one at each call."""
    folder = tmp_path_factory.mktemp("base")
    llama().save_pretrained(folder)
    torch.manual_seed(1)
    with foreign_code():
        model = type(llama()).from_pretrained(folder)
        model.resize_token_embeddings(105)
    return Template(model).copy


@pytest.mark.parametrize("how", OFFLOAD)
def test_a_resized_vocabulary_is_saved_from_an_offloaded_base(how, resized, tmp_path):
    with foreign_code():
        bases = resized(), OFFLOAD[how](resized(), tmp_path / "weights")
    torch.manual_seed(2)
    whole = disturb(get_lora_model(bases[0], LoraConfig(r=2)))
    whole.save_pretrained(tmp_path / "whole")
    loaded = load_adapter(bases[1], tmp_path / "whole")
    loaded.save_pretrained(tmp_path / "again")
    files = [safetensors.torch.load_file(tmp_path / name / WEIGHTS) for name in ("whole", "again")]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(files[0][key], files[1][key]) for key in files[0])
    whole.save_pretrained(tmp_path / "tables", save_embedding_layers=True)
    with foreign_code():
        again = load_adapter(OFFLOAD[how](resized(), tmp_path / "more"), tmp_path / "tables")
        made = get_lora_model(OFFLOAD[how](resized(), tmp_path / "made"), LoraConfig(r=2))
    assert torch.allclose(output(again), output(whole), atol=5e-6)
    made.save_pretrained(tmp_path / "whole tables", save_embedding_layers=True)
    saved = safetensors.torch.load_file(tmp_path / "whole tables" / WEIGHTS)
    assert torch.equal(saved["base_model.model.lm_head.weight"], whole.lm_head.weight)


@pytest.mark.parametrize("how", OFFLOAD)
def test_the_same_parameters_train_on_an_offloaded_base(how, tmp_path):
    """Copies that train a bias hold the weight of an offloaded layer as well."""
    config = LoraConfig(r=2, bias="all", modules_to_save=["ln_f"])
    whole, offloaded = get_lora_model(gpt2(), config), get_lora_model(OFFLOAD[how](gpt2(), tmp_path), config)
    names, found = ({name for name, p in model.named_parameters() if p.requires_grad} for model in (whole, offloaded))
    assert found == names


@pytest.mark.parametrize("task", [None, "SEQ_CLS"])
def test_layers_that_from_pretrained_offloads_are_not_taken_for_new_ones(task, tmp_path):
    llama().save_pretrained(tmp_path / "base")
    auto = transformers.AutoModelForSequenceClassification if task else transformers.AutoModelForCausalLM
    where = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu"}
    where |= {"model.rotary_emb": "cpu", "score" if task else "lm_head": "cpu"}
    trained, saved = [], []
    for options in ({}, {"device_map": where, "offload_folder": str(tmp_path / "weights")}):
        base = auto.from_pretrained(tmp_path / "base", **options)
        assert any(p.is_meta for p in base.parameters()) == bool(options)
        model = get_lora_model(base, LoraConfig(r=2, target_modules=["q_proj"], task_type=task))
        model.save_pretrained(tmp_path / "adapter")
        trained.append({name for name, p in model.named_parameters() if p.requires_grad})
        saved.append(safetensors.torch.load_file(tmp_path / "adapter" / WEIGHTS).keys())
    assert trained[0] == trained[1]
    assert saved[0] == saved[1]


def test_an_adapted_model_can_be_offloaded_and_saved(tmp_path):
    model = disturb(get_lora_model(llama(), LoraConfig(r=2, use_dora=True, modules_to_save=["norm"])))
    expected = output(model)
    model.save_pretrained(tmp_path / "before")
    on_cpu(model, tmp_path)
    model.save_pretrained(tmp_path / "after")
    files = [(tmp_path / name / WEIGHTS).read_bytes() for name in ("before", "after")]
    assert files[0] == files[1]
    assert torch.allclose(output(model), expected, atol=5e-6)


VERBS = {
    "hotswap": lambda model, folder: model.hotswap_adapter(folder),
    "prepare_hotswap": lambda model, folder: model.prepare_hotswap(4),
    "combine": lambda model, folder: model.add_weighted_adapter(["default", "more"], [1.0, 1.0], "sum", "cat"),
}


@pytest.mark.parametrize("how", OFFLOAD)
def test_the_values_of_an_offloaded_adapter_are_not_replaced_in_vain(how, tmp_path):
    disturb(get_lora_model(llama(), LoraConfig(r=2)), seed=5).save_pretrained(tmp_path / "other")
    model = get_lora_model(llama(), LoraConfig(r=2))
    model.add_adapter("more", LoraConfig(r=2))
    OFFLOAD[how](disturb(model.eval()), tmp_path)
    expected, plain = output(model), output(llama())
    for verb, call in VERBS.items():
        with pytest.raises(StateError, match="accelerate offloads this adapter.*Nothing was changed"):
            call(model, tmp_path / "other")
        assert torch.equal(output(model), expected), verb
        other = get_lora_model(OFFLOAD[how](llama(), tmp_path / verb), LoraConfig(r=2))
        other.add_adapter("more", LoraConfig(r=2))
        call(other, tmp_path / "other")  # as the error advises
        assert torch.equal(output(other.eval()), plain) is (verb != "hotswap"), verb


@pytest.mark.each_value
@pytest.mark.parametrize("offloaded_first", [True, False])
@pytest.mark.parametrize("how", OFFLOAD)
def test_accelerate_s_hooks_come_off_an_adapted_model(how, offloaded_first, tmp_path):
    config = LoraConfig(r=2, modules_to_save=["norm"])
    model = OFFLOAD[how](llama(), tmp_path) if offloaded_first else llama()
    model = disturb(get_lora_model(model, config)).eval()
    if not offloaded_first:
        OFFLOAD[how](model, tmp_path)
    expected = output(model)
    with foreign_code():
        accelerate.hooks.remove_hook_from_module(model, recurse=True)
    assert not any(parameter.is_meta for parameter in model.parameters())
    assert torch.equal(output(model), expected)
    assert not torch.equal(output(model.unload()), expected)


def test_checkpointing_and_a_second_adapter_on_an_offloaded_base(tmp_path):
    model = get_lora_model(on_disk(llama(), tmp_path), LoraConfig(r=2, use_dora=True)).train()
    model.add_adapter("more", LoraConfig(r=2))
    model.set_adapter(["default", "more"])
    disturb(model)
    expected = {n: p.grad.clone() for n, p in _backward(model).named_parameters() if p.grad is not None}
    model.zero_grad()
    with foreign_code():
        model.gradient_checkpointing_enable({"use_reentrant": False})
    found = {n: p.grad for n, p in _backward(model).named_parameters() if p.grad is not None}
    assert all(torch.allclose(found[n], expected[n], atol=5e-6) for n in expected)
    assert len(expected) == len(found) > 0


@pytest.mark.parametrize("how", OFFLOAD)
def test_code_that_reads_an_offloaded_layer_gets_the_adapted_weight(how, tmp_path):
    config = LoraConfig(r=2, target_modules=["c_attn", "c_fc"], bias="lora_only")
    torch.manual_seed(0)
    whole = disturb(get_lora_model(gpt2(), config))
    torch.manual_seed(0)
    model = disturb(get_lora_model(OFFLOAD[how](gpt2(), tmp_path), config))
    for name in ("transformer.h.0.attn.c_attn", "transformer.h.1.mlp.c_fc"):
        for value in ("weight", "bias"):
            read, expected = (getattr(each.get_submodule(name), value) * 1 for each in (model, whole))
            assert torch.allclose(read, expected, atol=5e-6)
            assert read.requires_grad


def _backward(model):
    output(model).square().mean().backward()
    return model


def test_a_model_that_was_never_loaded_is_refused(tmp_path):
    disturb(get_lora_model(llama(), LoraConfig(r=2))).save_pretrained(tmp_path)
    with torch.device("meta"):
        empty = llama.__globals__["LlamaForCausalLM"](llama().config)
    with pytest.raises(TargetError, match="on the meta device"):
        load_adapter(empty, tmp_path)
    partly = llama()
    partly.model.layers[1].to("meta")
    for options in ({}, {"target_modules": ["lm_head"], "modules_to_save": ["layers.1.mlp"]}):
        with pytest.raises(TargetError, match=r"model\.layers\.1\..* on the meta device"):
            get_lora_model(partly, LoraConfig(**options))
    assert get_lora_model(empty, LoraConfig()).get_nb_trainable_parameters()[0] > 0  # counting needs no values


def test_a_block_whose_weights_come_all_at_once_is_refused(tmp_path):
    model = llama()
    with foreign_code():
        accelerate.cpu_offload(model, execution_device=CPU, preload_module_classes=["LlamaDecoderLayer"])
    before = fingerprint_without_values(model)
    with pytest.raises(TargetError, match="preload_module_classes"):
        get_lora_model(model, LoraConfig(r=2))
    assert before == fingerprint_without_values(model)
    assert torch.allclose(output(model), output(llama()), atol=5e-6)


def fingerprint_without_values(model):
    return [(name, id(module), type(module), sorted(vars(module))) for name, module in model.named_modules()]


@contextlib.contextmanager
def nothing(module):
    yield


def test_the_contract_suite_notices_a_weight_that_is_not_there(monkeypatch):
    case = case_of("dora", "torch.nn.modules.linear.Linear", None, None, {})
    assert offloading(case) is None
    monkeypatch.setattr("minipeft.injection.adapted_layer.present", nothing)
    with pytest.raises((ContractError, RuntimeError), match="offloading|meta"):
        offloading(case)
