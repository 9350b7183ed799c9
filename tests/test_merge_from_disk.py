"""Merging from disk to disk: the same tensors, bit for bit, as loading the model, merging and saving it."""

import json
import mmap
import os
import shutil
import weakref

import peft
import pytest
import torch
import transformers
from rotation import often
from safetensors.torch import load_file, save_file
from tiny_models import VOCABULARY, bert_classifier, disturb, foreign_code, gpt2, llama, logits, t5
from typer.testing import CliRunner

from minipeft import (
    AdaLoraConfig,
    CheckpointError,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    MergeError,
    OFTConfig,
    TrainableTokensConfig,
    VeraConfig,
    get_adapter_model,
    load_adapter,
    merge_from_disk,
)
from minipeft.cli.main import app
from minipeft.merging.from_disk import stored
from minipeft.merging.from_disk.shards import ShardWriter

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
BF16 = torch.bfloat16
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def mixtral():
    """12 experts, since 10 must come after 9."""
    config = transformers.MixtralConfig(
        num_hidden_layers=1,
        hidden_size=32,
        intermediate_size=16,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        num_local_experts=12,
        bos_token_id=0,
        eos_token_id=0,
    )
    torch.manual_seed(0)
    return transformers.MixtralForCausalLM(config).eval()


def llava():
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**sizes, image_size=16, patch_size=8),
        text_config=transformers.LlamaConfig(**sizes, vocab_size=VOCABULARY, bos_token_id=0, eos_token_id=0),
        image_token_index=99,
    )
    torch.manual_seed(0)
    return transformers.LlavaForConditionalGeneration(config).eval()


def modernbert():
    sizes = {"hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
    torch.manual_seed(0)
    return transformers.ModernBertForMaskedLM(
        transformers.ModernBertConfig(vocab_size=VOCABULARY, **sizes, **ids)
    ).eval()


def saved(model, folder, dtype=torch.float32, shard="1GB"):
    with foreign_code():
        model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    return folder


def loaded(folder, cls):
    with foreign_code():
        return cls.from_pretrained(folder)


def tensors(folder):
    return {key: value for path in sorted(folder.glob("*.safetensors")) for key, value in load_file(path).items()}


def write_tensors(folder, values):
    save_file(values, folder / WEIGHTS, metadata={"format": "pt"})


def train(folder, base, cls, config):
    """Save an adapter for this base, with all its parts moved."""
    torch.manual_seed(0)
    disturb(get_adapter_model(loaded(base, cls), config)).save_pretrained(folder)
    return folder


def in_memory(base, adapter, cls, **options):
    return load_adapter(loaded(base, cls), adapter).merge_and_unload(**options)


def same(one, other):
    """Equal bit for bit, under the same keys."""
    assert one.keys() == other.keys()
    assert [key for key in one if one[key].dtype != other[key].dtype or not torch.equal(one[key], other[key])] == []


def linears(method, **options):
    return method(target_modules=["q_proj", "down_proj"], **options)


LORA_HEAD = LoraConfig(r=4, task_type="SEQ_CLS", target_modules=["query", "value"])
CASES = {
    "lora, transposed": (gpt2, LoraConfig(r=4, bias="all"), {}),
    "lora, bf16, sharded": (llama, LoraConfig(r=4, target_modules="all-linear"), {"dtype": BF16, "shard": "20KB"}),
    "lora, fp16": (llama, LoraConfig(r=4), {"dtype": torch.float16}),
    "bias of a tied head": (modernbert, LoraConfig(r=4, bias="all"), {}),
    "lora with a bias": (gpt2, LoraConfig(r=4, lora_bias=True), {}),
    "lora on embedding and head": (llama, LoraConfig(r=4, target_modules=["embed_tokens", "lm_head"]), {"dtype": BF16}),
    "pissa": (llama, linears(LoraConfig, r=4, init_lora_weights="pissa"), {}),
    "dora": (llama, linears(LoraConfig, r=4, use_dora=True), {"dtype": BF16, "shard": "20KB"}),
    "loha": (llama, linears(LoHaConfig, r=4), {}),
    "lokr": (llama, linears(LoKrConfig, r=4), {}),
    "oft": (llama, linears(OFTConfig), {"dtype": BF16}),
    "ia3": (llama, IA3Config(), {"dtype": BF16}),
    "vera": (llama, VeraConfig(target_modules=["q_proj"], r=4), {}),
    "adalora": (llama, linears(AdaLoraConfig, init_r=4, target_r=2, total_step=10, tinit=1, tfinal=1), {}),
    "tokens, tied": (gpt2, TrainableTokensConfig(token_indices=[3, 5]), {}),
    "tokens beside lora": (llama, linears(LoraConfig, r=4, trainable_token_indices=[3, 5]), {"dtype": BF16}),
    "table in full, tied": (gpt2, LoraConfig(r=4, modules_to_save=["wte"]), {}),
    "tables in full, bf16": (
        llama,
        linears(LoraConfig, r=4, modules_to_save=["embed_tokens", "lm_head"]),
        {"dtype": BF16},
    ),
    "t5, tied": (t5, LoraConfig(r=4), {}),
    "t5, table in full": (t5, LoraConfig(r=4, modules_to_save=["shared"]), {"shard": "20KB"}),
    "classifier": (bert_classifier, LORA_HEAD, {}),
    "experts, one file": (mixtral, LoraConfig(r=2, target_modules=[], target_parameters=EXPERTS[1:]), {"dtype": BF16}),
    "experts, apart in shards": (
        mixtral,
        LoraConfig(r=2, target_modules=[], target_parameters=EXPERTS),
        {"shard": "9KB"},
    ),
    "wrapped text model": (llava, LoraConfig(r=4, target_modules=["q_proj", "lm_head"]), {}),
}


ALWAYS = ("lora, transposed", "bias of a tied head", "lora, bf16, sharded", "lora on embedding and head", "dora", "oft",
          "tokens, tied", "t5, table in full", "experts, apart in shards", "wrapped text model")  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*shares its weight")
@pytest.mark.parametrize("case", often(CASES, ALWAYS))
def test_the_merged_files_are_those_of_merge_and_unload(tmp_path, case):
    make, config, options = CASES[case]
    model = make()
    base = saved(model, tmp_path / "base", **options)
    adapter = train(tmp_path / "adapter", base, type(model), config)
    merged = in_memory(base, adapter, type(model))
    done = merge_from_disk(base, adapter, tmp_path / "out")
    same(tensors(saved(merged, tmp_path / "expected", merged.dtype)), tensors(tmp_path / "out"))
    assert done.checked.rows >= len(done.report.relative_error)
    assert done.checked.tensors == done.copied
    # One file in and one file out, under the same names.
    weights = [path.name for path in base.glob("model*")]
    assert sorted(weights) == sorted(path.name for path in (tmp_path / "out").glob("model*"))


def test_files_order_index_and_configuration_are_the_bases(tmp_path):
    base = saved(llama(), tmp_path / "base", BF16, "20KB")
    adapter = train(tmp_path / "adapter", base, transformers.LlamaForCausalLM, LoraConfig(r=4))
    done = merge_from_disk(base, adapter, tmp_path / "out")
    for name in (CONFIG, "generation_config.json"):
        assert (base / name).read_bytes() == (tmp_path / "out" / name).read_bytes()
    assert json.loads((base / INDEX).read_text()) == json.loads((tmp_path / "out" / INDEX).read_text())
    for path in base.glob("*.safetensors"):
        before, after = stored.stored_tensors(path), stored.stored_tensors(tmp_path / "out" / path.name)
        assert [(t.key, t.dtype, t.shape) for t in before[0]] == [(t.key, t.dtype, t.shape) for t in after[0]]
        assert before[1] == after[1]
    assert done.config == {}
    assert len(done.files) > 2


def test_the_report_is_that_of_merge_and_unload(tmp_path, caplog):
    base = saved(llama(), tmp_path / "base", BF16)
    adapter = train(tmp_path / "adapter", base, transformers.LlamaForCausalLM, linears(LoraConfig, r=4))
    report = load_adapter(loaded(base, transformers.LlamaForCausalLM), adapter).merge_adapter()
    with torch.autocast("cpu", torch.bfloat16):  # which changes nothing
        done = merge_from_disk(base, adapter, tmp_path / "out")
    assert done.report.relative_error.keys() == report.relative_error.keys()
    for path, error in report.relative_error.items():
        assert done.report.relative_error[path] == pytest.approx(error, rel=0.05)  # another order of summing
    with caplog.at_level("INFO", "minipeft"):
        in_memory(base, adapter, transformers.LlamaForCausalLM)
    assert caplog.messages[-1] == str(done.report)


@pytest.mark.filterwarnings("ignore:.*shares its weight")
def test_a_tied_weight_is_refused_or_gets_a_copy(tmp_path):
    base = saved(gpt2(), tmp_path / "base")
    adapter = train(tmp_path / "adapter", base, transformers.GPT2LMHeadModel, LoraConfig(r=4, target_modules=["wte"]))
    with pytest.raises(MergeError, match=r"wte\.weight is tied to 'lm_head\.weight'"):
        merge_from_disk(base, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    done = merge_from_disk(base, adapter, tmp_path / "out", untie=True)
    merged = in_memory(base, adapter, transformers.GPT2LMHeadModel, untie=True)
    same(tensors(saved(merged, tmp_path / "expected")), tensors(tmp_path / "out"))
    assert done.config == {"tie_word_embeddings": False}
    assert torch.equal(logits(loaded(tmp_path / "out", transformers.GPT2LMHeadModel)), logits(merged))


def test_peft_says_the_same_of_its_own_adapter(tmp_path):
    base = saved(llama(), tmp_path / "base")
    with foreign_code():
        config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], use_rslora=True)
        model = disturb(peft.get_peft_model(loaded(base, transformers.LlamaForCausalLM), config))
        model.save_pretrained(tmp_path / "adapter")
        expected = logits(model.eval())
    merge_from_disk(base, tmp_path / "adapter", tmp_path / "out")
    found = logits(loaded(tmp_path / "out", transformers.LlamaForCausalLM))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("said_by", ["task_type", "auto_mapping"])
def test_a_head_that_the_base_lacks_comes_from_the_adapter(tmp_path, said_by):
    config = bert_classifier().config
    torch.manual_seed(0)
    base = saved(transformers.BertForMaskedLM(config), tmp_path / "base")
    classifier = transformers.BertForSequenceClassification
    with foreign_code():
        torch.manual_seed(1)
        model = classifier.from_pretrained(base, num_labels=5)
    task = {"task_type": "SEQ_CLS"} if said_by == "task_type" else {"modules_to_save": ["classifier", "pooler"]}
    model = disturb(get_adapter_model(model, LoraConfig(r=4, target_modules=["query"], **task)))
    model.save_pretrained(tmp_path / "adapter")
    if said_by == "auto_mapping":
        path = tmp_path / "adapter" / "adapter_config.json"
        library = classifier.__module__
        mapping = {"auto_mapping": {"base_model_class": classifier.__name__, "parent_library": library}}
        path.write_text(json.dumps(json.loads(path.read_text()) | mapping))
    done = merge_from_disk(base, tmp_path / "adapter", tmp_path / "out")
    same(tensors(saved(model.merge_and_unload(), tmp_path / "expected")), tensors(tmp_path / "out"))
    assert {"architectures", "id2label"} <= done.config.keys()
    merged = loaded(tmp_path / "out", transformers.AutoModelForSequenceClassification)
    assert merged.config.num_labels == 5


@pytest.mark.parametrize("make", [llama, gpt2])
def test_rows_of_a_resized_vocabulary_come_from_the_adapter(tmp_path, make):
    base = saved(make(), tmp_path / "base", shard="20KB")
    model = loaded(base, type(make()))
    with foreign_code():
        model.resize_token_embeddings(VOCABULARY + 4)
    model = disturb(get_adapter_model(model, LoraConfig(r=4)))
    model.save_pretrained(tmp_path / "adapter")
    done = merge_from_disk(base, tmp_path / "adapter", tmp_path / "out")
    same(tensors(saved(model.merge_and_unload(), tmp_path / "expected")), tensors(tmp_path / "out"))
    assert done.config == {"vocab_size": VOCABULARY + 4}
    assert loaded(tmp_path / "out", type(make())).config.vocab_size == VOCABULARY + 4


def test_rows_that_the_base_itself_has_to_take_are_refused(tmp_path):
    base = saved(llama(), tmp_path / "base")
    model = loaded(base, transformers.LlamaForCausalLM)
    with foreign_code():
        model.resize_token_embeddings(VOCABULARY + 4)
    disturb(get_adapter_model(model, LoraConfig(r=4, target_modules=["lm_head"]))).save_pretrained(tmp_path / "adapter")
    with pytest.raises(CheckpointError, match=r"brings rows .* of lm_head.* with all of its weights in memory"):
        merge_from_disk(base, tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_rows_that_nobody_brings_are_named(tmp_path):
    base = saved(llama(), tmp_path / "base")
    model = loaded(base, transformers.LlamaForCausalLM)
    with foreign_code():
        model.resize_token_embeddings(VOCABULARY + 4)
        model = peft.get_peft_model(model, peft.TrainableTokensConfig(token_indices=[VOCABULARY + 3]))
        model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    with pytest.raises(MergeError, match=rf"rows {VOCABULARY}, .* are in neither"):
        merge_from_disk(base, tmp_path / "adapter", tmp_path / "out")


def old_llava(key):
    key = key.replace("model.language_model.", "language_model.model.")
    key = key.replace("model.vision_tower", "vision_tower").replace("model.multi_modal", "multi_modal")
    return key.replace("lm_head", "language_model.lm_head") if key.startswith("lm_head") else key


def old_bert(key):
    return key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")


OLD_NAMES = {
    "llava of transformers 4": (llava, old_llava, LoraConfig(r=4, target_modules=["q_proj", "lm_head"])),
    "gamma and beta": (bert_classifier, old_bert, LoraConfig(r=4, task_type="SEQ_CLS", bias="all")),
    "without the outer model": (gpt2, lambda key: key.removeprefix("transformer."), LoraConfig(r=4)),
}


@pytest.mark.parametrize("case", OLD_NAMES)
def test_a_base_with_older_names_keeps_them(tmp_path, case):
    make, rename, config = OLD_NAMES[case]
    model = make()
    base = saved(model, tmp_path / "base")
    write_tensors(base, {rename(key): value for key, value in tensors(base).items()})
    adapter = train(tmp_path / "adapter", base, type(model), config)
    merge_from_disk(base, adapter, tmp_path / "out")
    assert tensors(base).keys() == tensors(tmp_path / "out").keys()
    expected = in_memory(base, adapter, type(model)).state_dict()
    same(expected, loaded(tmp_path / "out", type(model)).state_dict())


@pytest.mark.parametrize("equal", [True, False])
def test_a_table_that_is_stored_twice_is_tied_if_both_are_equal(tmp_path, equal):
    base = saved(gpt2(), tmp_path / "base")
    values = tensors(base)
    write_tensors(base, values | {"lm_head.weight": values["transformer.wte.weight"] + (0 if equal else 0.1)})
    config = LoraConfig(r=4, trainable_token_indices=[4, 9])
    adapter = train(tmp_path / "adapter", base, transformers.GPT2LMHeadModel, config)
    merge_from_disk(base, adapter, tmp_path / "out")
    found = tensors(tmp_path / "out")
    assert torch.equal(found["lm_head.weight"], found["transformer.wte.weight"]) == equal
    expected = in_memory(base, adapter, transformers.GPT2LMHeadModel).state_dict()
    same(expected, loaded(tmp_path / "out", transformers.GPT2LMHeadModel).state_dict())


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A base and an adapter, not to be written."""
    folder = tmp_path_factory.mktemp("parts")
    base = saved(llama(), folder / "base", BF16, "20KB")
    return base, train(folder / "adapter", base, transformers.LlamaForCausalLM, linears(LoraConfig, r=4))


def copies(parts, folder):
    return [shutil.copytree(path, folder / path.name) for path in parts]


def change_config(base, **values):
    (base / CONFIG).write_text(json.dumps(json.loads((base / CONFIG).read_text()) | values))


def pickled(base, adapter, out):
    for path in base.glob("model*"):
        path.unlink()
    (base / "pytorch_model.bin").write_bytes(b"\x80\x04.")


def quantized(base, adapter, out):
    change_config(base, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})


def unknown_class(base, adapter, out):
    change_config(base, architectures=["NoSuchModel"])


def missing_weight(base, adapter, out):
    path = base / json.loads((base / INDEX).read_text())["weight_map"]["model.layers.0.mlp.down_proj.weight"]
    index = json.loads((base / INDEX).read_text())
    del index["weight_map"]["model.layers.0.mlp.down_proj.weight"]
    (base / INDEX).write_text(json.dumps(index))
    values = load_file(path)
    del values["model.layers.0.mlp.down_proj.weight"]
    save_file(values, path)


def escaping_index(base, adapter, out):
    index = json.loads((base / INDEX).read_text())
    index["weight_map"]["lm_head.weight"] = "../adapter/adapter_model.safetensors"
    (base / INDEX).write_text(json.dumps(index))


def cut_shard(base, adapter, out):
    path = max(base.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-10])


def not_finite(base, adapter, out):
    values = load_file(adapter / "adapter_model.safetensors", "cpu")
    save_file({key: value * float("nan") for key, value in values.items()}, adapter / "adapter_model.safetensors")


def without_config(base, adapter, out):
    (base / CONFIG).unlink()


def adapter_as_base(base, adapter, out):
    (base / CONFIG).rename(base / "adapter_config.json")


def out_is_there(base, adapter, out):
    out.mkdir()
    (out / "file").touch()


def another_base(base, adapter, out):
    saved(llama(seed=3), base, BF16, "20KB")


def another_family(base, adapter, out):
    shutil.rmtree(base)
    saved(gpt2(), base)


REFUSED = {
    "a pickle": (pickled, CheckpointError, "pytorch_model.bin"),
    "a quantized base": (quantized, MergeError, "quantized ('bitsandbytes')"),
    "a class that transformers lacks": (unknown_class, MergeError, "NoSuchModel"),
    "a weight that is not there": (missing_weight, MergeError, "down_proj.weight"),
    "an index that leads out": (escaping_index, CheckpointError, "not the name of a safetensors file"),
    "a shard cut short": (cut_shard, CheckpointError, "damaged"),
    "no configuration": (without_config, CheckpointError, CONFIG),
    "an adapter as the base": (adapter_as_base, CheckpointError, "is an adapter"),
    "values that are not finite": (not_finite, CheckpointError, "NaN"),
    "an output that is there": (out_is_there, CheckpointError, "not an empty"),
    "another family": (
        another_family,
        MergeError,
        "trained on a LlamaForCausalLM, and the base is a 'GPT2LMHeadModel'",
    ),
    "another base": (another_base, CheckpointError, "another base"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_merged_is_refused_and_leaves_nothing(parts, tmp_path, case):
    spoil, error, said = REFUSED[case]
    base, adapter = copies(parts, tmp_path)
    spoil(base, adapter, tmp_path / "out")
    before = sorted(path for path in tmp_path.rglob("*"))
    with pytest.raises(error) as caught:
        merge_from_disk(base, adapter, tmp_path / "out")
    assert said in str(caught.value)
    assert sorted(path for path in tmp_path.rglob("*")) == before


@pytest.mark.parametrize("place", ["base", "base/inside", "adapter/inside", "link"])
def test_the_output_may_not_lie_in_what_is_read(parts, tmp_path, place):
    base, adapter = copies(parts, tmp_path)
    (tmp_path / "link").symlink_to(base)
    with pytest.raises(CheckpointError, match=r"which is read|not an empty"):
        merge_from_disk(base, adapter, tmp_path / place)


@pytest.mark.parametrize("place", ["link", "mount", "."])
def test_a_directory_that_cannot_be_replaced_is_refused_before_the_work(parts, tmp_path, monkeypatch, place):
    (tmp_path / "mount").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "mount")
    monkeypatch.chdir(tmp_path / "mount")
    monkeypatch.setattr("os.path.ismount", lambda path: path == tmp_path / "mount")
    monkeypatch.setattr("minipeft.merging.from_disk.merge.open_base", None)
    with pytest.raises(CheckpointError, match=r"name a new directory in it\. Nothing was changed"):
        merge_from_disk(*parts, place if place == "." else tmp_path / place)


def test_a_place_that_no_system_has_is_refused(parts):
    with pytest.raises(CheckpointError, match="null byte"):
        merge_from_disk(*parts, "a\0b")


@pytest.mark.parametrize("moment", ["write", "copy", "finish"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_an_interrupted_merge_leaves_nothing(parts, tmp_path, monkeypatch, moment, error):
    own, calls = getattr(ShardWriter, moment), []

    def interrupted(self, *args):
        calls.append(args)
        if len(calls) > 1:
            raise error
        return own(self, *args)

    monkeypatch.setattr(ShardWriter, moment, interrupted)
    with pytest.raises(KeyboardInterrupt if error is KeyboardInterrupt else CheckpointError):
        merge_from_disk(*parts, tmp_path / "out")
    assert len(calls) > 1
    assert os.listdir(tmp_path) == []


def test_what_a_killed_merge_left_is_removed_by_the_next(parts, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("os.getpid", lambda: 2**22 + 1)  # no such process
        patch.setattr("shutil.rmtree", lambda *args, **options: None)
        patch.setattr(ShardWriter, "finish", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            merge_from_disk(*parts, tmp_path / "out[1]")
    assert len(os.listdir(tmp_path)) == 1
    merge_from_disk(*parts, tmp_path / "out[1]")
    assert os.listdir(tmp_path) == ["out[1]"]


def test_a_full_disk_is_noticed_before_anything_is_written(parts, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: shutil._ntuple_diskusage(1000, 990, 10))
    with pytest.raises(CheckpointError, match="bytes are needed and 10 are free"):
        merge_from_disk(*parts, tmp_path / "out")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("merged", [True, False])
def test_a_value_that_arrives_on_the_disk_as_another_is_found(parts, tmp_path, monkeypatch, merged):
    if merged:
        own = ShardWriter.write
        monkeypatch.setattr(ShardWriter, "write", lambda self, key, value: own(self, key, value * 1.1))
    else:
        own = stored.StoredTensor.chunks
        monkeypatch.setattr(stored.StoredTensor, "chunks", lambda self: (bytes(len(chunk)) for chunk in own(self)))
    with pytest.raises(MergeError, match="read again after it was written, and differs"):
        merge_from_disk(*parts, tmp_path / "out")
    assert os.listdir(tmp_path) == []


def test_one_weight_of_the_base_is_in_memory_at_a_time(parts, tmp_path, monkeypatch):
    alive, most, chunks = [0], [0], []

    class Counted(mmap.mmap):
        def __init__(self, number, length, **options):
            alive[0] += length
            most[0] = max(most[0], alive[0])
            weakref.finalize(self, lambda: alive.__setitem__(0, alive[0] - length))

    own = stored.StoredTensor.chunks

    def counted(self):
        for chunk in own(self):
            chunks.append(len(chunk))
            yield chunk

    monkeypatch.setattr(stored.mmap, "mmap", Counted)
    monkeypatch.setattr(stored.StoredTensor, "chunks", counted)
    monkeypatch.setattr(stored, "CHUNK", 1000)
    merge_from_disk(*parts, tmp_path / "out")
    largest = max(value.numel() * value.element_size() for value in tensors(parts[0]).values())
    # A page before its beginning may be mapped along; and the check holds a weight of the base and the merged one.
    assert 0 < most[0] <= 2 * (largest + mmap.ALLOCATIONGRANULARITY)
    assert alive[0] == 0
    assert 0 < max(chunks) <= 1000


def test_small_files_come_along_and_pickles_and_old_weights_do_not(parts, tmp_path):
    base, adapter = copies(parts, tmp_path)
    (base / "tokenizer.json").write_text("base")
    (base / "tokenizer_config.json").write_text("base")
    (base / "LICENSE").write_text("free")
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "tools.jinja").write_text("tools")
    for name in ("pytorch_model.bin", "consolidated.safetensors", "README.md", ".hidden", "flax_model.msgpack"):
        (base / name).write_text("old")
    torch.save([1], base / "disguised.txt")
    merge_from_disk(base, adapter, tmp_path / "one")
    added = {"tokenizer.json", "tokenizer_config.json", "LICENSE", "additional_chat_templates"}
    expected = {path.name for path in parts[0].iterdir()} | added
    assert {path.name for path in (tmp_path / "one").iterdir()} == expected
    assert (tmp_path / "one" / "additional_chat_templates" / "tools.jinja").read_text() == "tools"
    # The tokenizer that was saved with the adapter is the one that it was trained with.
    (adapter / "tokenizer_config.json").write_text("adapter")
    (adapter / "chat_template.jinja").write_text("adapter")
    merge_from_disk(base, adapter, tmp_path / "two")
    assert (tmp_path / "two" / "tokenizer_config.json").read_text() == "adapter"
    assert (tmp_path / "two" / "chat_template.jinja").exists()
    assert not (tmp_path / "two" / "tokenizer.json").exists()


def test_the_command_prints_a_table_or_json(parts, tmp_path):
    places = ["merge", "--base", str(parts[0]), "--adapter", str(parts[1])]
    runner = CliRunner()
    table = runner.invoke(app, [*places, "--out", str(tmp_path / "one")], catch_exceptions=False)
    assert "4 changed, 17 copied bit for bit" in table.stdout
    assert "model.layers.1.self_attn.q_proj" in table.stdout
    found = json.loads(runner.invoke(app, [*places, "--out", str(tmp_path / "two"), "--json"]).stdout)
    assert found["tensors_changed"] == 4
    assert len(found["relative_error"]) == 4
    same(tensors(tmp_path / "one"), tensors(tmp_path / "two"))


def test_a_base_on_the_hub_that_is_not_in_the_cache_is_an_error(parts, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(CheckpointError, match="not in .* the only place to look"):
        merge_from_disk("nobody/nothing", parts[1], tmp_path / "out", local_files_only=True)


def test_a_base_may_have_an_old_name_of_the_hub(parts, tmp_path, monkeypatch):
    """Without an owner, as ``gpt2``; transformers and estimate take it, too."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    root = tmp_path / "cache" / "models--tiny"
    shutil.copytree(parts[0], root / "snapshots" / ("a" * 40))
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text("a" * 40)
    merge_from_disk("tiny", parts[1], tmp_path / "one", local_files_only=True)
    merge_from_disk(parts[0], parts[1], tmp_path / "two")
    same(tensors(tmp_path / "one"), tensors(tmp_path / "two"))
    with pytest.raises(CheckpointError, match="'gone' is not a directory here, and"):
        merge_from_disk("gone", parts[1], tmp_path / "three", local_files_only=True)


def test_a_large_weight_is_checked_too(parts, tmp_path, monkeypatch):
    monkeypatch.setattr("minipeft.merging.from_disk.check.LARGE", 100)
    base, _ = parts
    adapter = train(tmp_path / "adapter", base, transformers.LlamaForCausalLM, linears(LoraConfig, r=4, use_dora=True))
    assert merge_from_disk(base, adapter, tmp_path / "out").checked.rows == 16
