"""Adapters written under the names of transformers 4: they are those of the fixtures that reading is tested with, and load equal."""

import json

import pytest
import torch
import transformers as tf
from old_experts import FAMILIES, logits, mixture, old_file
from rotation import shared
from safetensors.torch import load_file, save_file
from test_file_names import OLD, TEXT, VISION, clip, made, output
from tiny_models import adapted as adapted_model
from tiny_models import llama
from tiny_models import logits as plain_logits
from typer.testing import CliRunner

import minipeft
from minipeft.cli.main import app
from minipeft.errors import MinipeftError
from minipeft.files.readers.made_for import made_for
from minipeft.files.readers.names import Reader

pytest.importorskip("transformers.conversion_mapping")
COMMON = ("mixtral", "qwen2_moe", "deepseek_v3")


def converted(model, directory, reader=Reader.TRANSFORMERS, **options):
    """The adapter of a model under old names: keys of its file, and the directory."""
    model.save_pretrained(directory / "new")
    made_for(reader, directory / "new", directory / "old", base=directory / "base", old_names=True, **options)
    return set(load_file(directory / "old" / "adapter_model.safetensors")), directory / "old"


def base_in(directory, model):
    """The configuration is all that is needed."""
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(directory / "base")


@pytest.mark.parametrize("case", shared(OLD, 1))  # the others in test_file_names.py
def test_the_names_are_those_that_reading_knows(case, tmp_path):
    build, targets, rename, _ = OLD[case]
    base = build()
    base_in(tmp_path, base)
    targets = targets if isinstance(targets, str) else list(targets)
    options = {"init_lora_weights": False, "r": 2, "rank_pattern": {"q_proj": 4} if "q_proj" in targets else {}}
    model = minipeft.get_lora_model(base, minipeft.LoraConfig(target_modules=targets, **options)).eval()
    keys, old = converted(model, tmp_path)
    ours = {rename(key) for key in model.adapter_state_dict()}
    assert keys == ours
    again = minipeft.load_adapter(build(), old)
    torch.testing.assert_close(output(again), output(model), rtol=0, atol=1e-6)
    assert again.adapter_state_dict().keys() == model.adapter_state_dict().keys()


def test_the_towers_of_clip_have_no_second_tower_inside(tmp_path):
    base = clip()
    base_in(tmp_path, base)
    targets = ["text_model.encoder.layers.0.self_attn.q_proj", "vision_model.encoder.layers.1.mlp.fc1"]
    model = minipeft.get_lora_model(base, minipeft.LoraConfig(r=2, init_lora_weights=False, target_modules=targets))
    assert converted(model, tmp_path)[0] == model.adapter_state_dict().keys()


VISION_OF_4_57 = "vision_model.encoder.layers.1.mlp.fc1"
OF_4_57 = {  # a name of today -> that in the class of transformers 4.57
    "AltCLIPModel": {
        "text_model.roberta.encoder.layers.0.attention.self.query": "text_model.roberta.encoder.layer.0.attention.self.query",
        VISION_OF_4_57: VISION_OF_4_57,
    },
    "AltCLIPTextModel": {"roberta.encoder.layers.0.output.dense": "roberta.encoder.layer.0.output.dense"},
    "AltCLIPVisionModel": {"encoder.layers.1.mlp.fc1": VISION_OF_4_57},
    "MLCDVisionModel": {"encoder.layers.1.mlp.fc1": VISION_OF_4_57},
    "ViTMSNForImageClassification": {
        "vit.layers.0.attention.q_proj": "vit.encoder.layer.0.attention.attention.query",
        "vit.layers.1.mlp.fc1": "vit.encoder.layer.1.intermediate.dense",
        "classifier": "classifier",
    },
    "ViTMSNModel": {"layers.0.attention.q_proj": "encoder.layer.0.attention.attention.query"},
}


@pytest.mark.parametrize("name", OF_4_57)
def test_where_the_tables_lead_elsewhere_the_names_are_those_of_the_class_then(name, tmp_path):
    cls, text = getattr(tf, name), {**TEXT, "project_dim": 16, "pad_token_id": 1}
    options = {"text_config": text, "vision_config": VISION} if name == "AltCLIPModel" else {**VISION}
    base = made(cls, cls.config_class(**(text if name == "AltCLIPTextModel" else options)))
    base_in(tmp_path, base)
    config = minipeft.LoraConfig(r=2, init_lora_weights=False, target_modules=list(OF_4_57[name]))
    model = minipeft.get_lora_model(base, config)
    keys, old = converted(model, tmp_path)
    assert keys == {f"base_model.model.{n}.lora_{f}.weight" for n in OF_4_57[name].values() for f in "AB"}
    no_table = {"key_mapping": {r"encoder\.layer\.": "encoder.layers."}} if name == "AltCLIPTextModel" else {}
    again = minipeft.load_adapter(made(cls, base.config), old, **no_table).adapter_state_dict()
    state = model.adapter_state_dict()
    assert again.keys() == state.keys()
    assert all(torch.equal(again[key], tensor) for key, tensor in state.items())


@pytest.mark.each_value
@pytest.mark.parametrize(
    "family", [pytest.param(f, marks=() if f in COMMON else pytest.mark.slow) for f in FAMILIES], ids=str
)
@pytest.mark.parametrize("use_rslora", [False, True])
def test_experts_have_the_names_of_their_family(family, use_rslora, tmp_path):
    base_in(tmp_path, mixture(family))
    file, targets = old_file(mixture(family), family, use_rslora=use_rslora)
    file.save(tmp_path / "given", target_modules=targets)
    model = minipeft.load_adapter(mixture(family), tmp_path / "given")
    keys, old = converted(model, tmp_path)
    assert keys == file.tensors.keys()
    for key, tensor in load_file(old / "adapter_model.safetensors").items():
        torch.testing.assert_close(tensor, file.tensors[key], rtol=0, atol=0)
    again = minipeft.load_adapter(mixture(family), old)
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=1e-6)
    targets = json.loads((old / "adapter_config.json").read_text())["target_modules"]
    names = {key.removeprefix("base_model.model.").rpartition(".lora_")[0] for key in keys}
    assert all(any(f".{name}".endswith(f".{target}") for target in targets) for name in names)


def test_a_router_is_a_layer_again_with_its_own_rank(tmp_path):
    base_in(tmp_path, mixture("mixtral"))
    config = minipeft.LoraConfig(
        r=2,
        init_lora_weights=False,
        target_modules="all-linear",
        target_parameters=["mlp.gate.weight", "experts.down_proj"],
        rank_pattern={"gate.weight": 3},
    )
    model = minipeft.get_lora_model(mixture("mixtral"), config).eval()
    keys, old = converted(model, tmp_path)
    assert "base_model.model.model.layers.0.block_sparse_moe.gate.lora_A.weight" in keys
    values = json.loads((old / "adapter_config.json").read_text())
    assert values["target_parameters"] is None
    assert sorted(values["target_modules"]) == ["gate", "k_proj", "o_proj", "q_proj", "v_proj", "w2"]
    again = minipeft.load_adapter(mixture("mixtral"), old)
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=1e-6)


def test_a_table_that_speaks_of_the_weight_renames_its_layer(tmp_path):
    """transformers renamed ``.gate.weight`` of PhiMoE, whose router's weight alone can be adapted today."""
    base_in(tmp_path, mixture("phimoe"))
    targets = {"target_modules": ["q_proj"], "target_parameters": ["router.weight"]}
    config = minipeft.LoraConfig(r=2, init_lora_weights=False, **targets)
    model = minipeft.get_lora_model(mixture("phimoe"), config).eval()
    keys, old = converted(model, tmp_path)
    assert "base_model.model.model.layers.1.block_sparse_moe.gate.lora_A.weight" in keys
    state = minipeft.load_adapter(mixture("phimoe"), old).adapter_state_dict()
    assert state.keys() == model.adapter_state_dict().keys()
    assert all(torch.equal(state[key], tensor) for key, tensor in model.adapter_state_dict().items())


@pytest.mark.parametrize("reader", [Reader.VLLM, Reader.LLAMA_CPP, Reader.SGLANG])
def test_a_server_gets_mixtrals_own_words(reader, tmp_path):
    base_in(tmp_path, mixture("mixtral"))
    config = minipeft.LoraConfig(
        r=2,
        init_lora_weights=False,
        target_modules=["q_proj", "k_proj", "v_proj"],
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
    )
    model = minipeft.get_lora_model(mixture("mixtral"), config).eval()
    model.save_pretrained(tmp_path / "new")
    with pytest.raises(MinipeftError, match="--base"):
        made_for(reader, tmp_path / "new", tmp_path / "out")
    made_for(reader, tmp_path / "new", tmp_path / "out", base=tmp_path / "base")
    keys = load_file(tmp_path / "out" / "adapter_model.safetensors").keys()
    assert {key.split(".")[-3] for key in keys if "experts" in key} == {"w1", "w2", "w3"}
    assert all(".block_sparse_moe." in key for key in keys if "experts" in key)
    again = minipeft.load_adapter(mixture("mixtral"), tmp_path / "out")
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=1e-5)


def test_the_interleaved_experts_of_gpt_oss_stay_together(tmp_path):
    sizes = {"vocab_size": 60, "hidden_size": 16, "intermediate_size": 12, "num_hidden_layers": 1, "head_dim": 8}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 3, "num_experts_per_tok": 2}
    base = made(tf.GptOssForCausalLM, tf.GptOssConfig(**sizes))
    base_in(tmp_path, base)
    options = {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
    model = minipeft.get_lora_model(base, minipeft.LoraConfig(r=2, init_lora_weights=False, **options))
    keys, directory = converted(model, tmp_path)
    assert keys == model.adapter_state_dict().keys()
    loaded = minipeft.load_adapter(made(tf.GptOssForCausalLM, tf.GptOssConfig(**sizes)), directory)
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=0)


def test_the_command_writes_them_and_says_what_it_needs(tmp_path):
    base_in(tmp_path, llama())
    adapted_model(llama(), target_modules=["q_proj"]).save_pretrained(tmp_path / "new")
    place, out, base = str(tmp_path / "new"), str(tmp_path / "out"), str(tmp_path / "base")
    run = CliRunner().invoke
    assert "--for" in str(run(app, ["convert", place, out, "--old-names"]).exception)
    assert "--base" in str(run(app, ["convert", place, out, "--old-names", "--for", "transformers"]).exception)
    done = run(app, ["convert", place, out, "--old-names", "--for", "transformers", "--base", base])
    assert done.exit_code == 0, done.exception
    minipeft.load_adapter(llama(), out)


@pytest.mark.parametrize("targets", [["q_proj", "k_proj", "v_proj"], ["q_proj"], ["v_proj"]], ids=str)
def test_layers_that_were_one_matrix_then_are_refused(targets, tmp_path):
    torch.manual_seed(0)
    model = tf.NomicBertModel(
        tf.NomicBertConfig(
            vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24
        )
    )
    base_in(tmp_path, model)
    with pytest.raises(MinipeftError, match="had no name in NomicBertModel of transformers 4"):
        converted(adapted_model(model, target_modules=targets), tmp_path)
    assert not (tmp_path / "old").exists()


def test_an_adapter_of_another_base_is_refused_and_nothing_is_written(tmp_path):
    base_in(tmp_path, mixture("mixtral"))
    adapted_model(llama(), target_modules=["down_proj"]).save_pretrained(tmp_path / "new")
    with pytest.raises(MinipeftError, match="LlamaForCausalLM cannot be built|Mixtral"):
        made_for(Reader.PEFT, tmp_path / "new", tmp_path / "old", base=tmp_path / "base", old_names=True)
    assert not (tmp_path / "old").exists()


def test_readers_with_names_of_their_own_are_not_given_these(tmp_path):
    base_in(tmp_path, llama())
    adapted_model(llama(), target_modules=["q_proj"]).save_pretrained(tmp_path / "new")
    for reader in (Reader.MLX, Reader.DIFFUSERS):
        with pytest.raises(MinipeftError, match="its own names"):
            made_for(reader, tmp_path / "new", tmp_path / "old", base=tmp_path / "base", old_names=True)


def test_a_renamed_file_is_converted_like_one_of_today(tmp_path):
    """The adapter is brought to the model's names first, whatever they were."""
    base_in(tmp_path, mixture("mixtral"))
    file, targets = old_file(mixture("mixtral"), "mixtral")
    file.save(tmp_path / "new", target_modules=targets)
    renamed = {key.replace("base_model.model.model.", "base_model.model."): t for key, t in file.tensors.items()}
    save_file(renamed, tmp_path / "new" / "adapter_model.safetensors")
    made_for(Reader.PEFT, tmp_path / "new", tmp_path / "old", base=tmp_path / "base", old_names=True)
    assert load_file(tmp_path / "old" / "adapter_model.safetensors").keys() == file.tensors.keys()


def test_a_table_whose_rows_of_tokens_train_is_no_target(tmp_path):
    base_in(tmp_path, llama())
    model = adapted_model(llama(), target_modules=["q_proj", "v_proj"], trainable_token_indices=[5, 9]).eval()
    _, old = converted(model, tmp_path)
    assert json.loads((old / "adapter_config.json").read_text())["target_modules"] == ["q_proj", "v_proj"]
    torch.testing.assert_close(
        plain_logits(minipeft.load_adapter(llama(), old)), plain_logits(model), rtol=0, atol=1e-6
    )
