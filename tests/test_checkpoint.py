"""Adapter directories: written completely or not at all, read strictly, and harmless whatever they hold."""

import json
import math
import os
import shutil
import stat
import struct
import time
import warnings
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rotation import thinned
from tiny_models import adapted, disturb, foreign_code, gpt2, llama, logits, state_digest

import minipeft
from minipeft import CheckpointError, LoraConfig, MinipeftError, StateError, get_lora_model, load_adapter
from minipeft.files import atomic
from minipeft.files.tensor_file import TensorFile, open_tensors

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
KEY = "base_model.model.transformer.h.0.attn.c_attn.lora_A.weight"


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """The folder of an adapter that nobody writes into."""
    adapted().save_pretrained(folder := tmp_path_factory.mktemp("sound"))
    return folder


@pytest.fixture
def saved(sound, tmp_path):
    return shutil.copytree(sound, tmp_path / "adapter")


def rewrite(folder, change, keep_metadata=True):
    """Change the tensors of a saved adapter; without our metadata it is a file that PEFT could have written."""
    with safetensors.safe_open(folder / WEIGHTS, "pt") as file:
        metadata = file.metadata()
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    change(tensors)
    safetensors.torch.save_file(tensors, folder / WEIGHTS, metadata if keep_metadata else {"format": "pt"})


def edit_config(folder, **changes):
    values = json.loads((folder / CONFIG).read_text()) | changes
    (folder / CONFIG).write_text(json.dumps(values))


def refused(folder, said, model=None, **options):
    """Loading raises one of our errors that says this, and the model is bit for bit what it was."""
    model = gpt2() if model is None else model
    before = state_digest(model)
    with pytest.raises(MinipeftError, match=said) as caught:
        load_adapter(model, folder, **options)
    assert state_digest(model) == before
    assert len(str(caught.value)) < 900
    return str(caught.value)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"target_modules": "all-linear", "use_rslora": True, "lora_alpha": 3},
        {"target_modules": ["c_attn", "c_proj"], "rank_pattern": {"c_attn": 2}, "alpha_pattern": {"mlp.c_proj": 5}},
        {"target_modules": ["wte"]},
        {"bias": "lora_only"},
        {"bias": "all", "modules_to_save": ["lm_head", "ln_f"]},
        {"target_modules": r".*h\.1\..*c_attn"},
        {"target_modules": ["c_attn"], "layers_to_transform": [1]},
    ],
)
def test_what_is_saved_is_what_is_loaded(tmp_path, options):
    model = adapted(**options)
    model.save_pretrained(tmp_path)
    loaded = load_adapter(gpt2(), tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    assert not any(p.requires_grad for p in loaded.parameters())
    again = tmp_path / "again"
    loaded.save_pretrained(again)
    assert (again / WEIGHTS).read_bytes() == (tmp_path / WEIGHTS).read_bytes()
    trained = load_adapter(gpt2(), tmp_path, is_trainable=True)
    assert {n for n, p in trained.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }


def test_the_keys_are_peft_s(saved):
    with safetensors.safe_open(saved / WEIGHTS, "pt") as file:
        keys, metadata = sorted(file.keys()), file.metadata()
    blocks = [f"base_model.model.transformer.h.{i}.attn.c_attn.lora_{m}.weight" for i in (0, 1) for m in "AB"]
    assert keys == sorted(blocks)
    assert metadata["format"] == "pt"
    config = json.loads((saved / CONFIG).read_text())
    assert config["peft_type"] == "LORA"
    assert config["fan_in_fan_out"] is True
    assert config["inference_mode"] is True
    assert config["target_modules"] == ["c_attn"]


def test_adapter_state_dict_is_what_the_file_holds(saved):
    tensors = safetensors.torch.load_file(saved / WEIGHTS)
    live = load_adapter(gpt2(), saved).adapter_state_dict()
    assert live.keys() == tensors.keys()
    assert all(torch.equal(live[key], tensors[key]) for key in tensors)


def test_loading_an_adapter_that_changes_nothing_warns(tmp_path):
    get_lora_model(gpt2(), LoraConfig()).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="every update is zero"):
        load_adapter(gpt2(), tmp_path)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.compile's own
def test_a_wrapped_model_takes_no_file(saved):
    with pytest.raises(StateError, match="OptimizedModule wraps the model"):
        load_adapter(torch.compile(gpt2()), saved)


def test_a_plain_model_is_loaded_into_for_use_and_an_adapted_one_keeps_its_mode(saved):
    import peft

    used, trained = (load_adapter(gpt2().train(), saved, is_trainable=train) for train in (False, True))
    with foreign_code():
        theirs = peft.PeftModel.from_pretrained(gpt2().train(), saved)
    for model in (used, theirs):
        assert not any(module.training for module in model.modules())
    assert trained.training
    trained.load_adapter(saved, "second")
    assert trained.training


def test_loading_leaves_the_random_numbers_alone(saved):
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    load_adapter(gpt2(), saved)
    assert torch.equal(torch.rand(1), expected)


def test_further_adapters_have_their_own_folders_and_are_inactive_when_loaded(tmp_path):
    model = adapted()
    model.add_adapter("fr", LoraConfig(r=2, init_lora_weights=False))
    model.save_pretrained(tmp_path)
    assert (tmp_path / "fr" / WEIGHTS).exists()
    loaded = load_adapter(gpt2(), tmp_path)
    expected = logits(loaded)
    assert loaded.load_adapter(tmp_path / "fr", "fr") is loaded
    assert torch.equal(logits(loaded), expected)
    loaded.set_adapter("fr")
    model.set_adapter("fr")
    assert torch.equal(logits(loaded), logits(model))


def test_saving_while_merged_saves_the_adapter_itself(tmp_path, saved):
    model = adapted()
    model.merge_adapter()
    model.save_pretrained(tmp_path / "merged")
    assert torch.equal(logits(load_adapter(gpt2(), tmp_path / "merged")), logits(adapted()))


def test_a_gathered_state_is_saved_instead_of_the_live_tensors(tmp_path):
    model, other = adapted(), adapted(seed=2)
    model.save_pretrained(tmp_path, state_dict=other.state_dict())
    assert torch.equal(logits(load_adapter(gpt2(), tmp_path)), logits(other))
    partial = {k: v for k, v in other.state_dict().items() if "h.1" not in k}
    with pytest.raises(CheckpointError, match="state_dict lacks"):
        model.save_pretrained(tmp_path, state_dict=partial)


def test_peft_s_ways_to_say_which_adapters_and_how(tmp_path):
    model = adapted()
    for name in ("fr", "de"):
        model.add_adapter(name, LoraConfig(r=2))
    model.save_pretrained(tmp_path, selected_adapters=["default", "fr"], safe_serialization=True)
    assert (tmp_path / WEIGHTS).exists()
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["fr"]
    assert model.peft_config == model.adapter_configs
    assert model.active_adapter == "default"
    model.set_adapter(["fr", "de"])
    assert model.active_adapter == ["fr", "de"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"safe_serialization": False}, "safe_serialization must be True: .*never as a pickle"),
        ({"selected_adapters": ["default", "fr"]}, "no adapter 'fr'"),
        ({"selected_adapters": []}, "at least one"),
        ({"adapter_name": "default", "selected_adapters": ["default"]}, "not both"),
        ({"adapter_name": False}, "no adapter False"),  # transformers' is_main_process, PEFT's safe_serialization
        ({"push_to_hub": True}, r"push_to_hub=True is not possible; call model.push_to_hub"),
        ({"variant": "fp16"}, "variant='fp16' is not possible"),
        ({"save_peft_format": False}, "save_peft_format=False is not possible"),
        ({"distributed_checkpoint": True}, "distributed_checkpoint=True is not possible"),
        ({"max_shard_size": "1KB"}, "max_shard_size='1KB', and this adapter, which is always one file, has"),
        ({"max_shard_size": "a lot"}, "max_shard_size='a lot' is not possible; give bytes"),
        ({"save_function": "torch.save"}, "save_function='torch.save' is not possible"),
        ({"path_initial_model_for_weight_conversion": "init"}, "is not possible; .* pass convert_to_lora=True"),
        ({"max_shard": 1}, "has no option 'max_shard' .closest: 'max_shard_size'"),
    ],
)
def test_options_that_make_no_sense_write_nothing(tmp_path, options, said):
    with pytest.raises(MinipeftError, match=said):
        adapted().save_pretrained(tmp_path / "adapter", **options)
    assert not (tmp_path / "adapter").exists()


USUAL = {
    "scripts of transformers": {"is_main_process": True, "save_function": torch.save},
    "transformers": {
        "max_shard_size": "5GB",
        "push_to_hub": False,
        "token": None,
        "variant": None,
        "save_peft_format": True,
    },
    "PEFT": {
        "safe_serialization": True,
        "selected_adapters": ["default"],
        "path_initial_model_for_weight_conversion": None,
    },
}


@pytest.mark.parametrize("caller", USUAL)
def test_what_others_hand_to_save_pretrained_is_taken(caller, tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path / "plain")
    model.save_pretrained(tmp_path / "usual", **USUAL[caller])
    model.save_pretrained(tmp_path / "by position", True)
    expected = {path.name: path.read_bytes() for path in (tmp_path / "plain").iterdir()}
    for folder in ("usual", "by position"):
        assert {path.name: path.read_bytes() for path in (tmp_path / folder).iterdir()} == expected


def test_more_than_two_values_by_position_are_refused(tmp_path):
    with pytest.raises(MinipeftError, match="all but the directory and adapter_name by name"):
        adapted().save_pretrained(tmp_path, True, None)


def test_a_plain_model_around_an_adapted_one_does_not_save_its_layers_keys(tmp_path):
    model = gpt2()
    disturb(get_lora_model(model.transformer, LoraConfig(r=2, target_modules=["c_attn"])))
    assert "transformer.h.0.attn.c_attn.base_layer.weight" in model.state_dict()  # as a checkpoint of one's own
    with pytest.raises(MinipeftError, match=r"model\.transformer\.save_pretrained"):
        model.save_pretrained(tmp_path / "whole")
    model.transformer.save_pretrained(tmp_path / "adapter")
    loaded = gpt2()
    load_adapter(loaded.transformer, tmp_path / "adapter")
    model.transformer.merge_and_unload()
    model.save_pretrained(tmp_path / "whole")
    torch.testing.assert_close(logits(type(model).from_pretrained(tmp_path / "whole")), logits(loaded))


def test_only_the_main_process_writes(tmp_path):
    adapted().save_pretrained(tmp_path / "a", is_main_process=False)
    assert not (tmp_path / "a").exists()


def test_half_precision_files_load_into_float32(tmp_path, saved):
    rewrite(saved, lambda t: t.update({k: v.bfloat16() for k, v in t.items()}))
    model = load_adapter(gpt2(), saved)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_base_is_recognised_in_another_precision(saved, dtype):
    load_adapter(gpt2().to(dtype), saved)


def test_the_card_is_written_once_names_no_folder_of_this_machine_and_respects_the_reader_s_own(tmp_path):
    base = tmp_path / "base"
    gpt2().save_pretrained(base)
    model = get_lora_model(type(gpt2()).from_pretrained(base), LoraConfig(task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path / "a")
    card = (tmp_path / "a" / "README.md").read_text()
    assert "library_name: peft" in card
    assert "pipeline_tag: text-generation" in card
    assert str(tmp_path) not in card
    assert json.loads((tmp_path / "a" / CONFIG).read_text())["base_model_name_or_path"] == str(base)
    (tmp_path / "a" / "README.md").write_text("mine")
    model.save_pretrained(tmp_path / "a")
    assert (tmp_path / "a" / "README.md").read_text() == "mine"
    public = get_lora_model(gpt2(), LoraConfig(base_model_name_or_path="openai-community/gpt2"))
    public.save_pretrained(tmp_path / "b")
    card = (tmp_path / "b" / "README.md").read_text()
    assert "base_model: openai-community/gpt2" in card
    assert "base_model:adapter:openai-community/gpt2" in card
    assert "base_model_relation: adapter" in card


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop(KEY), f"missing '{KEY}'"),
        (lambda t: t.update({KEY.replace("c_attn", "c_atn"): t.pop(KEY)}), "found .*c_atn.*; expected .*c_attn"),
        (lambda t: t.update({KEY: t[KEY].T.contiguous()}), r"lora_A.weight: \[32, 4\] in the file, \[4, 32\] here"),
        (lambda t: t.update({KEY: t[KEY][:2].clone()}), r"\[2, 32\] in the file"),
        (lambda t: t.update(extra=torch.zeros(1)), "unexpected 'extra'"),
        (lambda t: [t.update({f"other.{k}.x": t.pop(k)}) for k in list(t)], "none of its 4 keys"),
        (
            lambda t: [t.update({k.replace("lora_A", "lora_A.default"): t.pop(k)}) for k in list(t)],
            "found .*; expected .*",
        ),
        (lambda t: t[KEY].view(-1)[3].fill_(float("nan")), f"NaN or infinity in '{KEY}'"),
        (lambda t: t[KEY].view(-1)[3].fill_(float("inf")), "NaN or infinity"),
        (lambda t: t.update({KEY: t[KEY].to(torch.int8)}), "is I8; adapters are floating point"),
        (lambda t: t.clear(), "none of its 0 keys"),
    ],
)
@pytest.mark.parametrize("ours", [True, False])
def test_tensors_that_do_not_fit(saved, change, said, ours):
    rewrite(saved, change, keep_metadata=ours)
    refused(saved, said)


def test_without_strict_the_rest_is_loaded_and_the_difference_reported(saved):
    rewrite(saved, lambda t: t.update(extra=torch.zeros(1), **{KEY: t[KEY]}) or t.pop(KEY))
    with pytest.warns(UserWarning, match=f"missing '{KEY}'; unexpected 'extra'.*the rest was loaded"):
        model = load_adapter(gpt2(), saved, strict=False)
    other = model.adapter_state_dict()[KEY.replace("h.0", "h.1")]
    assert torch.equal(other, adapted().adapter_state_dict()[KEY.replace("h.0", "h.1")])
    rewrite(saved, lambda t: t.update({KEY: torch.zeros(1, 1)}))
    refused(saved, "in the file", strict=False)  # a wrong shape is not an omission


@pytest.mark.parametrize("other", [lambda: gpt2(seed=7), lambda: gpt2(activation_function="relu", seed=8)])
def test_an_adapter_of_another_base_of_the_same_shape(saved, other):
    refused(saved, "trained on another base: the weights of transformer.h.0.attn.c_attn differ", other())
    model = load_adapter(other(), saved, allow_base_mismatch=True)
    assert isinstance(model, minipeft.AdaptedModel)


def test_an_adapter_of_another_family(saved):
    refused(saved, "leaves no module of LlamaForCausalLM|matches no module", llama())


def test_a_name_that_is_taken(saved):
    model = load_adapter(gpt2(), saved)
    before = state_digest(model)
    with pytest.raises(StateError, match="there is an adapter 'default' already; .* call hotswap_adapter"):
        model.load_adapter(saved)
    assert state_digest(model) == before
    model.hotswap_adapter(saved, "default")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "not valid JSON"),
        ("[1, 2]", "holds a list"),
        ('{"peft_type": "LORA", "peft_type": "LORA"}', "a key occurs twice"),
        ('{"peft_type": "LORA", "lora_alpha": NaN}', "NaN is not a JSON number"),
        ('{"peft_type": "LORA", "lora_alpha": -Infinity}', "Infinity is not a JSON number"),
        ('{"peft_type": "LORA", "r": 1e999}', "different saves|r must be"),
        ("[" * 100_000, "not valid JSON"),
        ('{"peft_type": "LORA", "r": ' + "9" * 5000 + "}", "not valid JSON|different saves"),
        (b"\xff\xfe", "not valid JSON"),
        (b" " * (2**20 + 1), "larger than 1,048,576 bytes"),
    ],
)
def test_a_hostile_or_broken_config(saved, text, said):
    (saved / CONFIG).write_bytes(text if isinstance(text, bytes) else text.encode())
    refused(saved, said)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"r": 2**16}, r"\[4, 32\] in the file, \[65536, 32\] here"),
        ({"r": 2_000_000_000}, "r must be an integer"),
        ({"r": -4}, "r must be"),
        ({"lora_alpha": "8"}, "lora_alpha must be"),
        ({"target_modules": "(a|a|aa)+(a|a)*(a|aa)*$"}, "takes more than|leaves no module"),
        ({"use_dora": True}, "lora_magnitude_vector"),
        ({"peft_type": "VERYNEW"}, "'VERYNEW' is not implemented"),
        ({"target_modules": ["c_proj"]}, "none of its 4 keys"),
    ],
)
def test_a_config_that_asks_for_something_else_than_foreign_weights_hold(saved, changes, said):
    rewrite(saved, lambda t: None, keep_metadata=False)
    edit_config(saved, **changes)
    refused(saved, said)


def test_a_huge_rank_allocates_nothing(saved):
    rewrite(saved, lambda t: None, keep_metadata=False)
    edit_config(saved, r=2**16, target_modules=["lm_head", "c_attn", "c_proj", "c_fc"])
    allocated = []
    with _Watch(allocated):
        refused(saved, "in the file|missing")
    assert max(allocated, default=0) < 2**20


class _Watch(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes the size of every tensor on a real device that an operation makes."""

    def __init__(self, sizes):
        super().__init__()
        self.sizes = sizes

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.device.type != "meta":
            self.sizes.append(result.nbytes)
        return result


def test_a_pair_of_two_saves_is_not_read(tmp_path, saved):
    other = tmp_path / "other"
    adapted(lora_alpha=32).save_pretrained(other)
    (saved / CONFIG).write_bytes((other / CONFIG).read_bytes())
    refused(saved, "come from different saves")


@pytest.mark.parametrize("targets", [["c_attn"], ["c_fc"]])
def test_a_save_between_the_header_and_the_tensors_of_a_file_is_noticed(tmp_path, monkeypatch, targets):
    adapted(target_modules=["c_attn"]).save_pretrained(tmp_path)
    real = TensorFile.read

    def read(file, *args, **options):
        adapted(seed=3, lora_alpha=64, target_modules=targets).save_pretrained(tmp_path)
        return real(file, *args, **options)

    monkeypatch.setattr(TensorFile, "read", read)
    model = gpt2()
    with pytest.raises(CheckpointError, match="changed while it was being read"):  # else new values, and the old alpha
        load_adapter(model, tmp_path)
    assert type(model) is type(gpt2())


def test_provenance_may_be_edited_by_hand(saved):
    edit_config(saved, base_model_name_or_path="somewhere/else", task_type="CAUSAL_LM", a_new_default=None)
    assert torch.equal(logits(load_adapter(gpt2(), saved)), logits(adapted()))


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt"])
def test_a_pickle_is_never_read(tmp_path, saved, name):
    canary = tmp_path / "canary"

    class Hostile:
        def __reduce__(self):
            return (Path.touch, (canary,))

    (saved / WEIGHTS).unlink()
    torch.save({KEY: Hostile()}, saved / name)
    refused(saved, f"'{name}' is a pickle, which is never read; .*minipeft convert")
    (saved / name).rename(saved / WEIGHTS)  # and not under another name either
    refused(saved, "is damaged")
    assert not canary.exists()


@pytest.mark.parametrize("missing", [WEIGHTS, CONFIG])
def test_a_missing_file(saved, missing):
    (saved / missing).unlink()
    if missing == CONFIG:
        rewrite(saved, lambda t: None, keep_metadata=False)
    refused(saved, f"has no {missing}")


@pytest.mark.parametrize("where", ["nowhere", "adapter/" + WEIGHTS])
def test_what_is_not_a_directory(tmp_path, saved, where):
    refused(tmp_path / where, "is not a directory")


def entry(*shape, start=0, end=None):
    return {
        "dtype": "F32",
        "shape": shape,
        "data_offsets": [start, start + 4 * math.prod(shape) if end is None else end],
    }


def header(entries):
    payload = (entries if isinstance(entries, str) else json.dumps(entries)).encode()
    return struct.pack("<Q", len(payload)) + payload


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"short",
        struct.pack("<Q", 2**40),
        struct.pack("<Q", 10) + b"not json!!",
        header({KEY: entry(4, 32)}),
        header({KEY: entry(4, 32)}) + bytes(513),
        header({KEY: entry(4, 32), "x": entry(4, start=512, end=520)}) + bytes(520),
        header({KEY: entry(4, 32), "x": entry(4, start=500)}) + bytes(516),
        header({KEY: entry(4, 32), "x": entry(4, start=520)}) + bytes(536),
        header({KEY: entry(4, 32) | {"dtype": "F33"}}) + bytes(512),
        header({KEY: entry(2**33, 2**33, end=512)}) + bytes(512),
        header({KEY: entry(2**70, end=512)}) + bytes(512),
        header({KEY: entry(*[10**17] * 150_000, end=512)}) + bytes(512),
        header({KEY: entry(*[1] * 150_000)}) + bytes(4),
        header({KEY: entry(4, 32) | {"a": json.loads("[" * 500 + "]" * 500)}}) + bytes(512),
        header('{"a": {}, "__metadata__": {}, "__metadata__": {}}'),
        header("[" * 100_000),
        header({KEY: {"dtype": "F32", "shape": [-4, -32], "data_offsets": [0, 512]}}) + bytes(512),
        header({KEY: {"dtype": "F32", "shape": "large"}}),
        header({KEY: 3}),
        header({"__metadata__": {"minipeft": "[" * 9000}}),
        header({"__metadata__": {"minipeft": '{"version": 99}'}}),
        header([1, 2]),
    ],
)
def test_hostile_bytes_instead_of_weights(saved, payload):
    (saved / WEIGHTS).write_bytes(payload)
    refused(saved, "is damaged|does not fit")


@pytest.mark.parametrize("unit", ["[],", '{"":0},'])
def test_a_file_that_is_all_header_is_refused_before_it_is_parsed(saved, unit):
    """safetensors allows 100 MB of it, which take seconds and gigabytes to parse."""
    payload = ('{"a":[' + unit * (2**25 // len(unit)) + "0]}").encode()
    (saved / WEIGHTS).write_bytes(struct.pack("<Q", len(payload)) + payload)
    start = time.process_time()
    refused(saved, "is damaged .its header claims 33,554,4")
    assert time.process_time() - start < 1


def test_a_key_that_the_header_has_twice_is_one_tensor(saved):
    """safetensors lets it pass if both entries are the same; then nothing is hidden from the comparison."""
    weights = (saved / WEIGHTS).read_bytes()
    length = struct.unpack("<Q", weights[:8])[0]
    text, data = weights[8 : 8 + length].decode().rstrip(), weights[8 + length :]
    again = json.dumps({KEY: json.loads(text)[KEY]})[1:-1]
    (saved / WEIGHTS).write_bytes(header(text.removesuffix("}") + f", {again}}}") + data)
    assert torch.equal(logits(load_adapter(gpt2(), saved)), logits(adapted()))
    other = json.dumps({KEY: {**json.loads(text)[KEY], "data_offsets": [0, 4]}})[1:-1]
    (saved / WEIGHTS).write_bytes(header(text.removesuffix("}") + f", {other}}}") + data)
    refused(saved, "is damaged")


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG])
def test_a_pipe_instead_of_a_file_is_refused_and_not_waited_for(saved, name):
    (saved / name).unlink()
    os.mkfifo(saved / name)
    refused(saved, "is not a plain file")
    os.mkfifo(saved / "card")
    (saved / "card").replace(saved / "README.md")
    adapted().save_pretrained(saved)  # in the place of the pipe; the card is somebody's own


def test_a_file_that_the_system_does_not_open_is_not_called_damaged(saved):
    resource = pytest.importorskip("resource")
    file = open_tensors(saved / WEIGHTS)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    os.close(first := os.open(os.devnull, os.O_RDONLY))
    resource.setrlimit(resource.RLIMIT_NOFILE, (first, limits[1]))  # so no more can be opened
    try:
        for read in (lambda: open_tensors(saved / WEIGHTS), file.read):
            with pytest.raises(CheckpointError, match="cannot be read .Too many open files"):
                read()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    (saved / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match="cannot be read .No such file"):
        file.read()


def test_an_unexpected_tensor_is_not_read(saved):
    """A sparse file of 2 GiB: with strict=False it is named in the warning, and takes neither memory nor time."""
    weights = (saved / WEIGHTS).read_bytes()
    length = struct.unpack("<Q", weights[:8])[0]
    entries, data = json.loads(weights[8 : 8 + length]), weights[8 + length :]
    entries["extra"] = entry(2**29, start=len(data))
    (saved / WEIGHTS).write_bytes(header(entries) + data)
    os.truncate(saved / WEIGHTS, (saved / WEIGHTS).stat().st_size + 2**31)
    allocated = []
    with _Watch(allocated), pytest.warns(UserWarning, match="unexpected 'extra'"):
        load_adapter(gpt2(), saved, strict=False)
    assert max(allocated) < 2**20


@pytest.mark.parametrize(
    "own",
    [
        {"config": [1]},
        {"config": "LORA"},
        {"base": [1]},
        {"base": {"transformer.h.0.attn.c_attn": ["a"] * 8}},
        {"base": {"transformer.h.0.attn.c_attn": [10**400] * 8}},
        {"base": {"transformer.h.0.attn.c_attn": 8}},
    ],
)
def test_hostile_metadata_of_our_own_kind(saved, own):
    tensors = safetensors.torch.load_file(saved / WEIGHTS)
    metadata = {"format": "pt", "minipeft": json.dumps({"version": 1, **own})}
    safetensors.torch.save_file(tensors, saved / WEIGHTS, metadata)
    refused(saved, "is damaged")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_broken_base_still_gives_a_file_that_can_be_read(tmp_path, value):
    model = adapted()
    with torch.no_grad():
        model.transformer.h[0].attn.c_attn.base_layer.weight[0, 0] = value
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(load_adapter(gpt2(), tmp_path)), logits(adapted()))


def test_a_base_stored_in_one_byte_saves_an_adapter_for_the_float_one(tmp_path):
    """As diffusers' layerwise casting stores it, for its hooks to widen in each call; float8 is no sample of the base."""
    model = adapted()
    layer = model.transformer.h[0].attn.c_attn.base_layer
    layer.weight.data = layer.weight.data.to(torch.float8_e4m3fn)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(load_adapter(gpt2(), tmp_path)), logits(adapted()))


@pytest.mark.parametrize("key", ["rank_pattern", "a_foreign_key"])
def test_json_nested_deeper_than_any_config_is_refused(saved, key):
    rewrite(saved, lambda tensors: None, keep_metadata=False)
    text = (saved / CONFIG).read_text().rstrip().removesuffix("}")
    (saved / CONFIG).write_text(text + f', "{key}x": ' + '{"a": ' * 700 + "null" + "}" * 700 + "}")
    refused(saved, "not valid JSON")


@settings(max_examples=50, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_no_damage_to_the_bytes_gets_past_unnoticed(sound, tmp_path_factory, data):
    """Cut, flip and insert anywhere: either one of our errors and an untouched model, or all tensors finite and in shape."""
    folder = shutil.copytree(sound, tmp_path_factory.mktemp("fuzz") / "adapter")
    name = data.draw(st.sampled_from([WEIGHTS, WEIGHTS, CONFIG]))
    payload = bytearray((folder / name).read_bytes())
    place = data.draw(st.integers(0, len(payload) - 1))
    kind = data.draw(st.sampled_from(["cut", "flip", "insert"]))
    if kind == "cut":
        del payload[place:]
    elif kind == "flip":
        payload[place] ^= data.draw(st.integers(1, 255))
    else:
        payload[place:place] = data.draw(st.binary(min_size=1, max_size=9))
    (folder / name).write_bytes(bytes(payload))
    model = gpt2()
    before = state_digest(model)
    try:
        loaded = load_adapter(model, folder)
    except MinipeftError:
        assert state_digest(model) == before
    else:
        assert all(t.isfinite().all() for t in loaded.adapter_state_dict().values())
        assert loaded.adapter_state_dict().keys() == adapted().adapter_state_dict().keys()


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_any_set_of_renamed_dropped_or_reshaped_tensors_is_refused(sound, tmp_path_factory, data):
    folder = shutil.copytree(sound, tmp_path_factory.mktemp("keys") / "adapter")
    keys = sorted(safetensors.torch.load_file(folder / WEIGHTS))

    def change(tensors):
        for key in data.draw(st.lists(st.sampled_from(keys), min_size=1, unique=True)):
            act = data.draw(st.sampled_from(["drop", "rename", "reshape"]))
            tensor = tensors.pop(key)
            if act == "rename":
                tensors[key + data.draw(st.sampled_from(["x", ".default", ".weight"]))] = tensor
            elif act == "reshape":
                tensors[key] = tensor.reshape(-1).clone()

    rewrite(folder, change)
    refused(folder, "does not fit")


def killed_while_saving(model, folder, name, count):
    """Save in a child process that dies, without any clean-up, as it is about to call os.`name` for the `count`-th time."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # forking with other threads running; the child starts none
        child = os.fork()
    if child == 0:
        real, calls = getattr(os, name), []

        def act(*args):
            calls.append(args)
            if len(calls) == count:
                os._exit(137)
            return real(*args)

        setattr(os, name, act)
        model.save_pretrained(folder)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


STEPS_OF_A_SAVE = {  # whether the new adapter is there before each
    ("fsync", 1): False,
    ("fsync", 2): False,
    ("fsync", 3): False,
    ("replace", 1): False,
    ("replace", 2): True,
    ("replace", 3): True,
    ("fsync", 4): True,
}
STEPS_TRIED = [(step, False) for step in STEPS_OF_A_SAVE] + [(("replace", 1), True), (("replace", 2), True)]


@pytest.mark.parametrize(("step", "fresh"), thinned((STEPS_OF_A_SAVE, [False, True]), STEPS_TRIED))
def test_a_save_that_is_killed_leaves_the_old_or_the_new_adapter(tmp_path, step, fresh):
    """Killed before each step: the files' fsyncs, the three renames (weights first), the folder's fsync."""
    is_new = STEPS_OF_A_SAVE[step]
    folder = tmp_path / "adapter"
    old, new = adapted(), adapted(seed=2, lora_alpha=32)
    if not fresh:
        old.save_pretrained(folder)
    assert killed_while_saving(new, folder, *step) == 137
    if is_new:
        assert torch.equal(logits(load_adapter(gpt2(), folder)), logits(new))
    elif fresh:
        refused(folder, "has no adapter_model.safetensors")
    else:
        assert torch.equal(logits(load_adapter(gpt2(), folder)), logits(old))
    new.save_pretrained(folder)  # the next save heals the pair and clears what the killed one left
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", CONFIG, WEIGHTS]
    assert torch.equal(logits(load_adapter(gpt2(), folder)), logits(new))


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG, "README.md"])
def test_a_save_without_room_for_one_of_its_files_changes_none(tmp_path, monkeypatch, name):
    adapted().save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    write = atomic.write_and_sync

    def full(path, payload):
        if path.name.startswith(f".{name}."):
            raise OSError(28, "No space left on device")
        write(path, payload)

    monkeypatch.setattr(atomic, "write_and_sync", full)
    with pytest.raises(
        CheckpointError, match=r"cannot be written \(No space left on device\); its files are unchanged"
    ):
        adapted(seed=2, lora_alpha=32).save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_files_have_the_mode_of_any_file_and_links_within_the_folder_stay_links(tmp_path):
    folder, outside = tmp_path / "adapter", tmp_path / "outside"
    store = folder / "store"
    store.mkdir(parents=True)
    (store / "weights").write_bytes(b"")
    outside.write_bytes(b"of somebody else")
    (folder / WEIGHTS).symlink_to(store / "weights")
    (folder / CONFIG).symlink_to(outside)
    umask = os.umask(0o027)
    try:
        adapted().save_pretrained(folder)
    finally:
        os.umask(umask)
    assert stat.S_IMODE((folder / CONFIG).stat().st_mode) == 0o640
    assert (folder / WEIGHTS).is_symlink()
    assert (store / "weights").stat().st_size > 0
    assert not (folder / CONFIG).is_symlink()  # a link out of the folder gives way to a file
    assert outside.read_bytes() == b"of somebody else"
    load_adapter(gpt2(), folder)


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG])
def test_a_link_that_leads_out_of_the_folder_is_not_read(tmp_path, saved, name):
    (saved / name).rename(tmp_path / name)
    (saved / name).symlink_to(Path("..") / name)
    refused(saved, "is a link that leads out of its folder")
    (saved.parent / "link").symlink_to(saved)  # to the whole folder is fine
    (saved / name).unlink()
    (tmp_path / name).rename(saved / name)
    load_adapter(gpt2(), saved.parent / "link")


def test_an_adapter_is_not_saved_into_the_folder_of_a_whole_model(tmp_path):
    gpt2().save_pretrained(tmp_path)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(CheckpointError, match="holds a whole model"):
        adapted().save_pretrained(tmp_path)
    assert sorted(tmp_path.iterdir()) == before


def test_a_full_disk_is_named_and_the_old_adapter_stays(saved, monkeypatch):
    def no_space(descriptor):
        raise OSError(28, "No space left on device")

    before = (saved / WEIGHTS).read_bytes()
    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(CheckpointError, match="cannot be written .No space left on device"):
        adapted(seed=2).save_pretrained(saved)
    assert (saved / WEIGHTS).read_bytes() == before
    assert sorted(path.name for path in saved.iterdir()) == ["README.md", CONFIG, WEIGHTS]


def test_too_little_space_is_known_before_anything_is_written(saved, monkeypatch):
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(CheckpointError, match=r"[\d,]+ bytes are needed and 1 are free"):
        adapted(seed=2).save_pretrained(saved)


@pytest.mark.parametrize("name", ["file", "x" * 300])
def test_a_path_that_cannot_be_a_folder_is_an_error(tmp_path, name):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        adapted().save_pretrained(tmp_path / name)


def test_a_folder_of_a_file_s_name_is_found_before_other_files_are_replaced(saved):
    (saved / CONFIG).unlink()
    (saved / CONFIG).mkdir()
    before = (saved / WEIGHTS).read_bytes()
    with pytest.raises(CheckpointError, match=f"{CONFIG} cannot be written, since it is a folder"):
        adapted(seed=2).save_pretrained(saved)
    assert (saved / WEIGHTS).read_bytes() == before


def test_shared_and_transposed_parameters_are_saved(tmp_path):
    model = adapted(target_modules=["c_attn"])
    first, second = (model.transformer.h[i].attn.c_attn.adapters["default"] for i in (0, 1))
    second.lora_A = first.lora_A
    first.lora_B.data = first.lora_B.data.T.contiguous().T
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(load_adapter(gpt2(), tmp_path)), logits(model))
