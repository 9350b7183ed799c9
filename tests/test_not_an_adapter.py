"""What is not an adapter is named as what it is, and hostile files are refused at once; the model stays as it was."""

import json
import os
import time

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_config import junk
from tiny_models import adapted, disturb, foreign_code, gpt2, logits, state_digest

from minipeft import CheckpointError, LoraConfig, MinipeftError, get_lora_model, load_adapter

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 1049\n"


@pytest.fixture
def saved(tmp_path):
    folder = tmp_path / "adapter"
    adapted().save_pretrained(folder)
    return folder


def refused(folder, said, model=None):
    model = gpt2() if model is None else model
    before, start = state_digest(model), time.perf_counter()
    with pytest.raises(MinipeftError, match=said) as caught:
        load_adapter(model, folder)
    assert time.perf_counter() - start < 5
    assert state_digest(model) == before
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 900
    return str(caught.value)


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
@pytest.mark.parametrize(
    ("payload", "said"),
    [
        (POINTER, "git lfs pull"),
        (b"/annex/objects/SHA256E-s10--0.safetensors\n", "git annex get"),
        (b"<!DOCTYPE html><html><body>404</body></html>", "a web page"),
        (b"  <html>", "a web page"),
        (b"Entry not found", "an error message of the server"),
        (b"PK\x03\x04" + b"\0" * 40, "a zip archive"),
        (b"\x80\x02ctorch\n", "a pickle"),
        (b"\x1f\x8b\x08" + b"\0" * 30, "a gzip archive"),
        (b"GGUF\x03\0\0\0" + b"\0" * 30, "a GGUF file"),
        (b"", "It is empty"),
    ],
    ids=lambda value: value[:12].decode("latin-1") if isinstance(value, bytes) else "",
)
def test_a_file_that_stands_for_something_else_is_named(saved, name, payload, said):
    (saved / name).write_bytes(payload)
    refused(saved, said)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["config.json", "model.safetensors"], "It is a whole model"),
        (["config.json", "pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json"], "It is a whole model"),
        (["consolidated.00.pth", "params.json"], "It is a whole model"),
        (["model_index.json"], "a whole pipeline of diffusers"),
        ([CONFIG, "pytorch_adapter.bin", "head_config.json", "pytorch_model_head.bin"], "AdapterHub"),
        ([CONFIG, "adapter.safetensors"], "AdapterHub"),
        ([CONFIG, *(f"adapter_model-0000{n}-of-00002.safetensors" for n in (1, 2))], "an adapter in shards"),
        ([CONFIG, "adapter_model.safetensors.index.json"], "an adapter in shards"),
        (
            ["optimizer.pt", "training_args.bin"],
            "Trainer's checkpoint without an adapter: its trainer saved no weights",
        ),
        (["trainer_state.json", "model.safetensors", "optimizer.pt"], "its trainer saved a whole model"),
        (["optimizer.pt"], "the state of an optimizer"),
        (
            ["optimizer.bin", "scheduler.bin", "random_states_0.pkl", "model.safetensors"],
            "a state that accelerate saved",
        ),
        (["zero_to_fp32.py", "latest", "trainer_state.json"], "a DeepSpeed checkpoint"),
        ([".metadata", "__0_0.distcp"], "a sharded checkpoint of FSDP"),
        (["pytorch_model_fsdp_0/__0_0.distcp", "optimizer_0/.metadata"], "a sharded checkpoint of FSDP"),
        ([f"checkpoint-10/{CONFIG}", f"checkpoint-10/{WEIGHTS}"], "is in its sub-directory 'checkpoint-10'"),
        ([f"a/{WEIGHTS}", f"b/{WEIGHTS}"], r"sub-directory 'b' \(there are 2\)"),
        (["adapter.zip"], "an archive: unpack it"),
        ([], "It is empty"),
        (["notes.txt"], "has no adapter_model.safetensors. Nothing"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_a_folder_without_an_adapter_is_named(tmp_path, names, said):
    for name in names:
        (tmp_path / "place" / name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith("el.safetensors") or name == "adapter.safetensors":
            save_file({"transformer.wte.weight": torch.zeros(2)}, tmp_path / "place" / name)
        else:
            (tmp_path / "place" / name).write_bytes(b"x")
    (tmp_path / "place").mkdir(exist_ok=True)
    said_all = refused(tmp_path / "place", said)
    assert "again with safe_serialization" not in said_all


def test_a_whole_model_or_an_optimizer_under_an_adapters_name_is_named(saved):
    whole = {name: tensor.clone() for name, tensor in gpt2().state_dict().items() if "lm_head" not in name}
    save_file(whole, saved / WEIGHTS, metadata={"format": "pt"})
    refused(saved, "These are weights of the model itself")
    save_file({"state.0.exp_avg": torch.zeros(2), "state.0.step": torch.zeros(1)}, saved / WEIGHTS)
    refused(saved, "It is the state of an optimizer")


def test_a_configuration_of_another_library_is_named(saved):
    save_file(load_file(saved / WEIGHTS), saved / WEIGHTS)  # without what minipeft adds
    theirs = {
        "config": {"architecture": None, "r": 8},
        "hidden_size": 768,
        "model_type": "bert",
        "name": "x",
        "version": "1",
    }
    (saved / CONFIG).write_text(json.dumps(theirs))
    refused(saved, "AdapterHub")
    (saved / CONFIG).write_text(json.dumps({"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}))
    refused(saved, "the configuration of a whole model")


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_what_is_not_a_plain_file_is_refused_at_once(saved, name):
    (saved / name).unlink()
    (saved / name).mkdir()
    refused(saved, "is not a plain file")
    (saved / name).rmdir()
    os.mkfifo(saved / name)
    refused(saved, "is not a plain file")
    (saved / name).unlink()
    (saved / name).symlink_to(saved / name)  # a loop
    refused(saved, "is not a plain file|cannot be|link")


def test_a_header_of_ten_gigabytes_is_not_read(saved):
    with (saved / WEIGHTS).open("wb") as file:
        file.write((10 * 2**30).to_bytes(8, "little"))
        file.truncate(30 * 2**30)  # sparse
    refused(saved, "is damaged")


@pytest.mark.parametrize(
    "text", ['{"r": 1, "r": 2}', "[" * 100_000, '{"r": ' * 50 + "1" + "}" * 50, "[1]", "\ufeff{}", "{"]
)
def test_json_that_is_not_strict_is_refused(saved, text):
    (saved / CONFIG).write_text(text)
    refused(saved, CONFIG)


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_value_of_any_option_loads_the_same_or_is_refused(data, saved):
    """Without our metadata in the weights, as a file of a stranger's."""
    save_file(load_file(saved / WEIGHTS), saved / WEIGHTS)
    plain = LoraConfig(target_modules=["c_attn"]).to_dict()
    key = data.draw(st.sampled_from(sorted({*plain, "eva_config", "peft_version", "other_keys", "zz"})))
    (saved / CONFIG).write_text(json.dumps({**plain, key: data.draw(junk(allow_nan=False))}))
    model = gpt2()
    before = state_digest(model)
    try:
        load_adapter(model, saved)
    except MinipeftError:
        assert state_digest(model) == before


@pytest.mark.parametrize("part", [torch.empty(0), torch.empty(7)])  # as DeepSpeed ZeRO-3 and the first FSDP leave them
def test_tensors_that_are_elsewhere_are_saved_from_the_whole_state(tmp_path, part):
    model = adapted()
    state = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.data = part if parameter.requires_grad else parameter.data
    with pytest.raises(CheckpointError, match=r"are not whole in this process.*accelerator.get_state_dict"):
        model.save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter" / WEIGHTS).exists()
    model.save_pretrained(tmp_path / "adapter", state_dict=state)
    for name, parameter in model.named_parameters():
        parameter.data = state[name]
    assert torch.equal(logits(load_adapter(gpt2(), tmp_path / "adapter")), logits(model))


def test_values_that_cannot_be_loaded_are_saved_with_a_warning(tmp_path):
    model = adapted()
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad)[0, 0] = float("nan")
    with pytest.warns(UserWarning, match="is saved, but cannot be loaded again: it holds NaN") as caught:
        model.save_pretrained(tmp_path)
    assert caught[0].filename == __file__
    refused(tmp_path, "holds NaN or infinity")


def test_a_compiled_model_is_saved_without_the_names_of_its_wrapper(tmp_path):
    with foreign_code():
        model = torch.compile(disturb(get_lora_model(gpt2(), LoraConfig(r=2))))
    model.save_pretrained(tmp_path)
    assert not [key for key in load_file(tmp_path / WEIGHTS) if "_orig_mod" in key]
