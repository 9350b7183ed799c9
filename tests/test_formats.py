"""Adapters of other tools: each format, good, damaged and ambiguous, against the tool's formula in float64."""

import contextlib
import errno
import itertools
import json

import numpy
import pytest
import safetensors.numpy
import torch
from foreign_files import MAKERS, Parts, diffusers, draw, kohya, litgpt, llm, mlx, torchtune, write_json
from old_experts import mixture
from safetensors.torch import load_file, save_file
from tiny_models import foreign_code, state_digest
from transformers import GptOssConfig, GptOssForCausalLM

import minipeft
from minipeft import CheckpointError
from minipeft.files import atomic, tensor_file
from minipeft.files.formats.convert import convert

FORMATS = sorted(MAKERS)


def weights_file(folder):
    (path,) = folder.glob("*.safetensors")
    return path


def check_updates(model, directory, updates):
    before = {name: model.get_submodule(name).weight.clone() for name, _ in model.named_modules() if name in updates}
    others = {name: p.clone() for name, p in model.named_parameters() if name.removesuffix(".weight") not in updates}
    merged = minipeft.load_adapter(model, directory).merge_and_unload()
    for name, update in updates.items():
        change = merged.get_submodule(name).weight - before[name]
        torch.testing.assert_close(change, update, rtol=1e-6, atol=1e-9)
    assert all(torch.equal(merged.get_parameter(name), value) for name, value in others.items())


def refused(directory, model, *named):
    before = state_digest(model)
    with pytest.raises(minipeft.MinipeftError) as caught:
        minipeft.load_adapter(model, directory)
    assert state_digest(model) == before
    assert str(caught.value).count("\n") == 0
    for word in named:
        assert word in str(caught.value)


def changed(folder, change):
    """Change the tensors of the only safetensors file in a folder."""
    from safetensors import safe_open

    path = weights_file(folder)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata)


@pytest.mark.parametrize("name", FORMATS)
def test_a_file_of_another_tool_changes_the_weights_as_that_tool_would(name, tmp_path):
    maker, model = MAKERS[name]
    updates = maker(tmp_path)
    check_updates(model(), tmp_path, updates)


@pytest.mark.parametrize("name", FORMATS)
def test_what_convert_writes_is_the_same_adapter(name, tmp_path):
    maker, model = MAKERS[name]
    source, out, base = tmp_path / "in", tmp_path / "out", tmp_path / "base"
    source.mkdir()
    base.mkdir()
    updates = maker(source)
    save_file(model().state_dict(), base / "model.safetensors")
    assert convert(source, out, base) == [out]
    assert sorted(path.name for path in out.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    check_updates(model(), out, updates)


@pytest.mark.each_value
@pytest.mark.parametrize("damage", ["a key less", "a key more", "another shape", "not finite"])
@pytest.mark.parametrize("name", FORMATS)
def test_a_damaged_file_is_refused_whole(name, damage, tmp_path):
    maker, model = MAKERS[name]
    maker(tmp_path)

    def change(tensors):
        key = next(key for key in sorted(tensors) if "alpha" not in key)
        if damage == "a key less":
            del tensors[key]
        elif damage == "a key more":
            end = "down_blocks_0_to_q.lora_x.weight" if "_to_q." in " ".join(tensors) else "lora_A.weight"
            first = key.partition("down_blocks")[0] if "down_blocks" in key else "model.layers.7."
            tensors[f"{first}{end}"] = torch.zeros(2, 2)
        elif damage == "another shape":
            tensors[key] = torch.zeros(3, *tensors[key].shape[1:])
        else:
            tensors[key][0, 0] = float("nan")

    changed(tmp_path, change)
    refused(tmp_path, model())
    if damage != "another shape":  # which only the model may tell
        with pytest.raises(minipeft.MinipeftError):
            convert(tmp_path, tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_mlx_that_says_alpha_besides_scale_is_ambiguous(tmp_path):
    mlx(tmp_path)
    write_json(tmp_path, lora_parameters={"rank": 4, "scale": 10.0, "alpha": 16, "dropout": 0.0})
    refused(tmp_path, llm(), "alpha", "scale")


def test_mlx_of_another_rank_than_its_configuration_is_refused(tmp_path):
    mlx(tmp_path)
    write_json(tmp_path, lora_parameters={"rank": 8, "scale": 10.0, "dropout": 0.0})
    refused(tmp_path, llm(), "rank 4", "8")


@pytest.mark.parametrize(
    "around", ["mlp.switch_mlp", "block_sparse_moe.switch_mlp", "mlp.experts", "mlp.experts.switch_mlp"]
)
def test_the_experts_of_mlx_become_those_of_one_parameter(around, tmp_path):
    """mlx_lm/tuner/lora.py, LoRASwitchLinear.fuse(): (scale * lora_b) @ lora_a for each expert, b (out, r), a (r, in)."""
    model = mixture("mixtral" if "sparse" in around else "qwen3_moe").double()
    experts = model.model.layers[1].mlp.experts
    count, inner, width = experts.down_proj.shape[0], experts.down_proj.shape[2], experts.down_proj.shape[1]
    tensors, products = {}, {}
    for seed, (name, rows, columns) in enumerate(
        [("gate_proj", inner, width), ("up_proj", inner, width), ("down_proj", width, inner)]
    ):
        a, b = draw(seed, count, 2, columns), draw(seed + 9, count, rows, 2)
        tensors |= {f"model.layers.1.{around}.{name}.lora_a": a, f"model.layers.1.{around}.{name}.lora_b": b}
        products[name] = 20 * b.double() @ a.double()
    q = draw(20, width, 2), draw(21, 2, model.model.layers[1].self_attn.q_proj.out_features)
    tensors |= {f"model.layers.1.self_attn.q_proj.lora_{end}": t for end, t in zip("ab", q, strict=True)}
    save_file(tensors, tmp_path / "adapters.safetensors", {"format": "mlx"})
    write_json(tmp_path, lora_parameters={"rank": 2, "scale": 20.0, "dropout": 0.0})
    before = {name: p.clone() for name, p in model.named_parameters()}
    merged = minipeft.load_adapter(model, tmp_path).merge_and_unload()
    expected = {
        "mlp.experts.gate_up_proj": torch.cat([products["gate_proj"], products["up_proj"]], 1),
        "mlp.experts.down_proj": products["down_proj"],
        "self_attn.q_proj.weight": 20 * (q[0].double() @ q[1].double()).T,
    }
    for name, p in merged.named_parameters():
        update = expected.get(name.removeprefix("model.layers.1."), torch.zeros(()))
        torch.testing.assert_close((p - before[name]).detach(), update.expand_as(p).to(p.dtype), rtol=1e-6, atol=1e-9)


class Noting:
    """An open file that notes which tensors are read from it."""

    def __init__(self, file, read):
        self.file, self.read = file, read

    def __getattr__(self, name):
        return getattr(self.file, name)

    def get_tensor(self, key):
        self.read.append(key)
        return self.file.get_tensor(key)


def test_a_stack_of_experts_is_read_once_for_all_of_them(tmp_path, monkeypatch):
    """Once for each expert, a stack of 128 would take 128 times its memory."""
    model, read, real = mixture("qwen3_moe"), [], tensor_file.safe_open
    count, width, inner = model.model.layers[1].mlp.experts.down_proj.shape
    name = "model.layers.1.mlp.switch_mlp.down_proj.lora_"
    save_file(
        {f"{name}a": draw(1, count, 2, inner), f"{name}b": draw(2, count, width, 2)}, tmp_path / "adapters.safetensors"
    )
    write_json(tmp_path, lora_parameters={"rank": 2, "scale": 20.0, "dropout": 0.0})

    @contextlib.contextmanager
    def noting(*args, **options):
        with real(*args, **options) as file:
            yield Noting(file, read)

    monkeypatch.setattr(tensor_file, "safe_open", noting)
    minipeft.load_adapter(model, tmp_path)
    assert sorted(read) == [f"{name}a", f"{name}b"]


def test_the_experts_of_gpt_oss_alternate_gate_and_up(tmp_path):
    """mlx_lm/models/gpt_oss.py, sanitize(): the even columns of gate_up_proj are the gate's; a parameter is (experts, in, out)."""
    with foreign_code():
        sizes = {"hidden_size": 16, "intermediate_size": 12, "num_attention_heads": 2, "num_key_value_heads": 2}
        more = {
            "head_dim": 8,
            "num_hidden_layers": 1,
            "vocab_size": 60,
            "num_local_experts": 3,
            "num_experts_per_tok": 2,
        }
        torch.manual_seed(0)
        model = GptOssForCausalLM(GptOssConfig(**sizes, **more, layer_types=["full_attention"])).double()
    tensors, products, around = {}, {}, "model.layers.0.mlp.experts"
    for seed, (name, rows, columns) in enumerate([("gate_proj", 12, 16), ("up_proj", 12, 16), ("down_proj", 16, 12)]):
        a, b = draw(seed, 3, 2, columns), draw(seed + 9, 3, rows, 2)
        tensors |= {f"{around}.{name}.lora_a": a, f"{around}.{name}.lora_b": b}
        products[name] = 20 * (b.double() @ a.double()).mT
    save_file(tensors, tmp_path / "adapters.safetensors", {"format": "mlx"})
    write_json(tmp_path, lora_parameters={"rank": 2, "scale": 20.0, "dropout": 0.0})
    experts = model.model.layers[0].mlp.experts
    before = experts.gate_up_proj.clone(), experts.down_proj.clone()
    experts = minipeft.load_adapter(model, tmp_path).merge_and_unload().model.layers[0].mlp.experts
    change = (experts.gate_up_proj - before[0]).detach()
    torch.testing.assert_close(change[..., ::2], products["gate_proj"], rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(change[..., 1::2], products["up_proj"], rtol=1e-6, atol=1e-9)
    torch.testing.assert_close((experts.down_proj - before[1]).detach(), products["down_proj"], rtol=1e-6, atol=1e-9)


def test_mlx_with_experts_of_two_counts_is_refused_by_name(tmp_path):
    mlx(tmp_path)
    name = "model.layers.0.mlp.switch_mlp.up_proj"
    pair = {f"{name}.lora_a": torch.zeros(2, 4, 32), f"{name}.lora_b": torch.zeros(3, 64, 4)}
    changed(tmp_path, lambda tensors: tensors.update(pair))
    refused(tmp_path, llm(), name, "not those of experts")


def test_dora_of_mlx_is_read(tmp_path):
    """mlx_lm/tuner/dora.py: m / |W + scale B A| times the rows of W + scale B A."""
    mlx(tmp_path)
    name, model = "model.layers.1.self_attn.q_proj", llm()
    m = torch.rand(32, generator=torch.Generator().manual_seed(0)) + 1

    def alone(tensors):
        for key in [key for key in tensors if not key.startswith(name)]:
            del tensors[key]
        tensors[f"{name}.m"] = m

    changed(tmp_path, alone)
    a, b = (t.double() for t in load_file(weights_file(tmp_path)).values() if t.ndim == 2)
    weight = model.get_submodule(name).weight.detach() + 20.0 * (a @ b).T
    expected = m.double().unsqueeze(1) * weight / weight.norm(dim=1, keepdim=True)
    merged = minipeft.load_adapter(model, tmp_path).merge_and_unload()
    torch.testing.assert_close(merged.get_submodule(name).weight.detach(), expected, rtol=1e-6, atol=1e-8)


def test_biases_of_diffusers_are_read(tmp_path):
    """Control LoRAs have them; peft/tuners/lora/layer.py: with lora_bias, B and its bias are scaled alike."""
    diffusers(tmp_path)
    biases = {"down_blocks.0.to_q": (2, draw(8, 12)), "conv_in": (2 / 4, draw(9, 4))}
    changed(tmp_path, lambda t: t.update({f"unet.{name}.lora_B.bias": b for name, (_, b) in biases.items()}))
    model, plain = minipeft.load_adapter(Parts(), tmp_path), Parts()
    assert model.adapter_configs["default"].lora_bias
    merged = model.merge_and_unload()
    for name, (scaling, bias) in biases.items():
        change = merged.get_submodule(name).bias - plain.get_submodule(name).bias
        torch.testing.assert_close(change, scaling * bias.double(), rtol=1e-6, atol=1e-9)


def test_torchtune_without_the_number_of_heads_is_refused(tmp_path):
    torchtune(tmp_path)
    (tmp_path / "config.json").unlink()
    refused(tmp_path, llm(), "config.json")


def test_torchtune_of_an_unknown_model_is_refused(tmp_path):
    torchtune(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "phi3"}))
    refused(tmp_path, llm(), "phi3", "llama")


def test_litgpt_of_a_model_that_is_not_known_is_refused(tmp_path):
    litgpt(tmp_path)
    text = (tmp_path / "model_config.yaml").read_text().replace("LLaMAMLP", "NewMLP")
    (tmp_path / "model_config.yaml").write_text(text)
    refused(tmp_path, llm(), "NewMLP", "merge_lora")


@pytest.mark.parametrize(
    "text", ["- 1", "a: [", "!!python/object/apply:os.system ['touch canary']", "[" * 5000, "a: &a [1]\nb: *a"]
)
def test_a_hostile_yaml_is_one_error(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    litgpt(tmp_path)
    (tmp_path / "hyperparameters.yaml").write_text(text)
    refused(tmp_path, llm(), "hyperparameters.yaml")
    assert not (tmp_path / "canary").exists()


def test_kohya_that_two_modules_would_answer_to_is_ambiguous(tmp_path):
    kohya(tmp_path)
    model = Parts()
    model.down_blocks_0 = torch.nn.ModuleDict({"to_q": torch.nn.Linear(8, 12)})
    refused(tmp_path, model, "down_blocks.0.to_q", "down_blocks_0.to_q")


def test_kohya_for_two_parts_is_not_loaded_into_one_model(tmp_path):
    kohya(tmp_path)
    changed(tmp_path, lambda tensors: tensors.update({"lora_te_x.lora_down.weight": torch.zeros(2, 2)}))
    refused(tmp_path, Parts(), "unet", "text_encoder", "minipeft convert")


def test_kohya_for_two_parts_becomes_two_adapters(tmp_path, monkeypatch):
    source, out, base = (tmp_path / name for name in ("in", "out", "base"))
    for folder in (source, base / "unet", base / "text_encoder"):
        folder.mkdir(parents=True)
    updates = kohya(source)
    changed(
        source,
        lambda tensors: tensors.update(
            {key.replace("_unet_", "_te_"): t.clone() for key, t in tensors.items() if "_to_q." in key}
        ),
    )
    for part in ("unet", "text_encoder"):
        save_file(Parts().state_dict(), base / part / "model.safetensors")
    write, count = atomic.write_and_sync, itertools.count()

    def on_a_full_disk(path, payload):
        write(path, payload)
        if next(count) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(atomic, "write_and_sync", on_a_full_disk)
        with pytest.raises(CheckpointError, match="No space left on device"):
            convert(source, out, base)
    assert not any(path.is_file() for path in out.rglob("*"))  # all parts or none
    assert convert(source, out, base) == [out / "text_encoder", out / "unet"]
    check_updates(Parts(), out / "unet", updates)
    check_updates(Parts(), out / "text_encoder", {"down_blocks.0.to_q": updates["down_blocks.0.to_q"]})


@pytest.mark.parametrize("name", ["down_blocks.0.to_q", "down_blocks.0.conv_in"])
def test_dora_of_lycoris_is_read(name, tmp_path):
    """lycoris/modules/locon.py, apply_weight_decompose(): m / |W + s B A| times the rows of W + s B A, m of (out, 1, ...)."""
    layer, key = Parts().get_submodule(name), f"lora_unet_{name.replace('.', '_')}"
    weight = layer.weight.detach()
    ones = (1,) * (weight.ndim - 1)
    down, up, m = draw(0, 2, *weight.shape[1:]), draw(1, len(weight), 2, *ones[1:]), draw(2, len(weight), *ones) + 2
    tensors = {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.dora_scale": m}
    save_file({**tensors, f"{key}.alpha": torch.tensor(1.0)}, tmp_path / "it.safetensors")
    summed = weight + (up.double().flatten(1) @ down.double().flatten(1) / 2).view(weight.shape)
    expected = m.double() * summed / summed.flatten(1).norm(dim=1).view(-1, *ones)
    check_updates(Parts(), tmp_path, {name: expected - weight})


def test_onetrainers_word_for_a_transformer_is_read(tmp_path):
    """As kohya's but for the prefix: diffusers/loaders/lora_conversion_utils.py, convert_onetrainer_state_dict()."""
    updates = kohya(tmp_path)
    tensors = load_file(weights_file(tmp_path))
    save_file({k.replace("_unet_", "_transformer_"): t for k, t in tensors.items()}, weights_file(tmp_path))
    check_updates(Parts(), tmp_path, updates)


@pytest.mark.parametrize(
    "name", ["double_blocks_0_img_attn_qkv", "joint_blocks_0_context_block_attn_qkv", "input_blocks_1"]
)
def test_names_of_the_original_code_are_refused_with_a_way_that_keeps_alpha(name, tmp_path):
    kohya(tmp_path)
    changed(tmp_path, lambda t: t.update({f"lora_unet_{name}.alpha": torch.tensor(1.0)}))
    refused(tmp_path, Parts(), name, "save_lora_adapter")


def test_kohyas_ends_behind_a_part_of_a_pipeline_are_read(tmp_path):
    updates = kohya(tmp_path)
    dots = {"_unet_down_blocks_0_to_q": "down_blocks.0.to_q", "_unet_down_blocks_0_to_out_0": "down_blocks.0.to_out.0"}
    tensors = {
        f"transformer.{dots[key.partition('.')[0].removeprefix('lora')]}.{key.partition('.')[2]}": tensor
        for key, tensor in load_file(weights_file(tmp_path)).items()
        if "conv_in" not in key
    }
    save_file(tensors, weights_file(tmp_path))
    check_updates(Parts(), tmp_path, {name: updates[name] for name in dots.values()})


def test_a_file_of_no_known_format_is_named_with_a_key_of_it(tmp_path):
    save_file(
        {"diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight": torch.ones(2, 2)}, tmp_path / "style.safetensors"
    )
    refused(tmp_path, Parts(), "style.safetensors", "diffusion_model.double_blocks", "save_lora_adapter")


def test_kohya_without_the_names_of_a_model_cannot_be_converted(tmp_path):
    kohya(tmp_path)
    with pytest.raises(minipeft.CheckpointError, match="--base"):
        convert(tmp_path, tmp_path / "out")


def test_an_adapter_of_peft_is_not_converted_again(tmp_path):
    minipeft.get_lora_model(llm()).save_pretrained(tmp_path)
    with pytest.raises(minipeft.CheckpointError, match="in PEFT's format already"):
        convert(tmp_path, tmp_path / "out")


def test_ten_thousand_keys_are_read_at_once(tmp_path):
    """A loop over the keys within one would take minutes."""
    from minipeft.files.format import open_adapter

    zero = numpy.zeros((1, 1), "float32")  # arrays are written in a seventh of the time that tensors take
    arrays = {f"model.layers.{i}.q.lora_{end}": zero for i in range(5_000) for end in "ab"}
    safetensors.numpy.save_file(arrays, tmp_path / "adapters.safetensors")
    write_json(tmp_path, lora_parameters={"rank": 1, "scale": 1.0})
    assert len(open_adapter(tmp_path).shapes) == 10_000


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8], ids=str)
def test_factors_of_a_type_that_nothing_is_trained_in_are_refused_by_name(dtype, tmp_path):
    minipeft.get_lora_model(llm()).save_pretrained(tmp_path)
    changed(tmp_path, lambda tensors: tensors.update({key: t.to(dtype) for key, t in tensors.items()}))
    refused(tmp_path, llm(), "adapters are floating point (F16, BF16, F32, F64)")
