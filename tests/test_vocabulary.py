"""Resized vocabularies: an adapter's file holds the new rows, and loads onto a base that is resized again."""

import contextlib
import copy
import functools
import json
import math
import warnings

import accelerate
import peft
import pytest
import torch
import transformers
from fast_copy import Template
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from test_hf_trainer import DATA, OPTIONS, trained
from tiny_models import disturb, foreign_code, gpt2, llama, state_digest
from transformers import TrainingArguments

import minipeft
from minipeft import IA3Config, LoraConfig, TrainableTokensConfig, get_adapter_model, get_lora_model, load_adapter
from minipeft.errors import CheckpointError, ConfigError, MinipeftError, StateError
from minipeft.files.file_names import WEIGHTS_FILE
from minipeft.files.resized_vocabulary import base_vocabulary
from minipeft.hf import AdapterTrainer, restore_adapters

NEW = [100, 101, 102]
IDS = torch.tensor([[1, 100, 2, 101, 102, 3, 100, 4]])
TARGETS = {gpt2: ["c_attn"], llama: ["q_proj", "v_proj"]}
ROWS = "token_adapter.trainable_tokens_delta"
NOTHING = contextlib.nullcontext()


@pytest.fixture(params=[gpt2, llama], ids=["tied", "untied"])
def make(request):
    return request.param


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    return tmp_path_factory.mktemp("bases")


@pytest.fixture
def base(make, bases):
    """A base on disk, as `resized` finds it."""
    if not (bases / make.__name__).exists():
        with foreign_code():
            make().save_pretrained(bases / make.__name__)
    return bases / make.__name__


@functools.cache
def first_resized(make, directory, seed, size):
    with foreign_code():
        model = type(make()).from_pretrained(directory)
        torch.manual_seed(seed)
        model.resize_token_embeddings(size)
    return Template(model.eval())


def resized(make, directory, seed=5, size=103):
    return first_resized(make, directory, seed, size).copy()


@torch.no_grad()
def logits(model):
    return model(IDS).logits


def lora(make, model, **options):
    return disturb(get_lora_model(model, LoraConfig(**{"target_modules": TARGETS[make], "r": 4, **options})))


def assert_close(left, right):
    torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-5)


def test_new_rows_that_do_not_train_are_saved_and_nothing_else_of_the_table(make, base, tmp_path):
    model = lora(make, resized(make, base))
    model.save_pretrained(tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter" / WEIGHTS_FILE)
    shapes = [tuple(tensor.shape) for key, tensor in tensors.items() if key.endswith(ROWS)]
    assert shapes == [(3, 32)] * (1 if make is gpt2 else 2)
    assert max(math.prod(tensor.shape) for tensor in tensors.values()) <= 32 * 96
    again = load_adapter(resized(make, base, seed=6), tmp_path / "adapter")
    assert_close(logits(again), logits(model))
    with foreign_code():
        theirs = peft.PeftModel.from_pretrained(resized(make, base, seed=7), tmp_path / "adapter").eval()
    assert_close(logits(theirs), logits(model))
    with again.disable_adapter():
        assert torch.equal(logits(again), logits(resized(make, base, seed=6)))
    further = load_adapter(resized(make, base, seed=6), tmp_path / "adapter", is_trainable=True)
    assert all(tensor.requires_grad for key, tensor in further.adapter_state_dict().items() if key.endswith(ROWS))


def test_rows_that_train_and_rows_that_do_not_stand_in_one_list(make, base, tmp_path):
    names = {gpt2: [102, 7, 100], llama: {"embed_tokens": [102, 7, 100]}}
    model = lora(make, resized(make, base), trainable_token_indices=names[make])
    model.save_pretrained(tmp_path / "adapter")
    option = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["trainable_token_indices"]
    if make is gpt2:
        assert option == {"transformer.wte": [102, 7, 100, 101]}
    else:
        assert option == {"model.embed_tokens": [102, 7, 100, 101], "lm_head": NEW}
    assert_close(logits(load_adapter(resized(make, base, seed=6), tmp_path / "adapter")), logits(model))


@pytest.mark.each_value
@pytest.mark.parametrize("rows", [[3, 101], [100], [101, 102]], ids=str)
def test_rows_that_do_not_train_are_no_part_of_what_the_base_is_known_by(rows, make, base, tmp_path):
    model = lora(make, resized(make, base), trainable_token_indices=rows)
    model.save_pretrained(tmp_path / "adapter")
    assert_close(logits(load_adapter(resized(make, base, seed=6), tmp_path / "adapter")), logits(model))
    restore_adapters(disturb(lora(make, resized(make, base), trainable_token_indices=rows)), tmp_path / "adapter")


def test_nothing_is_added_where_the_vocabulary_is_the_base_s_own_or_all_new_rows_train(make, base, tmp_path):
    lora(make, resized(make, base, size=100)).save_pretrained(tmp_path / "own")
    assert not [key for key in load_file(tmp_path / "own" / WEIGHTS_FILE) if "token" in key]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # from_config: nobody knows what it was
        lora(make, make()).save_pretrained(tmp_path / "made")
    assert not [key for key in load_file(tmp_path / "made" / WEIGHTS_FILE) if "token" in key]
    both = {"embed_tokens": NEW, "lm_head": NEW}
    model = lora(make, resized(make, base), trainable_token_indices=NEW if make is gpt2 else both)
    model.save_pretrained(tmp_path / "new")
    option = json.loads((tmp_path / "new" / "adapter_config.json").read_text())["trainable_token_indices"]
    assert option == (NEW if make is gpt2 else both)


def test_tables_that_peft_saves_of_a_resized_model_give_their_new_rows(make, base, tmp_path):
    with foreign_code():
        theirs = peft.get_peft_model(resized(make, base), peft.LoraConfig(target_modules=TARGETS[make], r=4))
        disturb(theirs)
        theirs.save_pretrained(tmp_path / "theirs")
    tensors = load_file(tmp_path / "theirs" / WEIGHTS_FILE)
    assert [key for key, tensor in tensors.items() if tensor.shape == (103, 32)]
    model = load_adapter(resized(make, base, seed=6), tmp_path / "theirs")
    assert_close(logits(model), logits(theirs))
    model.save_pretrained(tmp_path / "ours")
    assert not [t for t in load_file(tmp_path / "ours" / WEIGHTS_FILE).values() if t.shape == (103, 32)]
    plain = make()
    before = state_digest(plain)
    with pytest.raises(CheckpointError, match=r"resize_token_embeddings\(103\)"):
        load_adapter(plain, tmp_path / "theirs")
    assert state_digest(plain) == before
    other = resized(make, base)
    with torch.no_grad():
        other.get_input_embeddings().weight[:90] += 1
    with pytest.raises(CheckpointError, match="differs from this model's"):
        load_adapter(other, tmp_path / "theirs")
    if make is gpt2:
        key = "base_model.model.lm_head.weight"
        save_file({**tensors, key: tensors[key] + 1}, tmp_path / "theirs" / WEIGHTS_FILE)
        with pytest.raises(CheckpointError, match="tied"):
            load_adapter(resized(make, base), tmp_path / "theirs")


@pytest.mark.each_value
@pytest.mark.parametrize("seed", [5, 6], ids=["the same rows", "other rows"])
@pytest.mark.parametrize("kind", ["all new rows", "some rows", "trained tables"])
def test_what_peft_trains_of_a_resized_vocabulary_is_read(kind, seed, make, base, tmp_path):
    options = {"trainable_token_indices": NEW if kind == "all new rows" else [3, 101]}
    if kind == "trained tables":
        options = {"modules_to_save": ["wte" if make is gpt2 else "embed_tokens", "lm_head"]}
    with foreign_code():
        theirs = peft.get_peft_model(resized(make, base), peft.LoraConfig(target_modules=TARGETS[make], r=4, **options))
        disturb(theirs).save_pretrained(tmp_path / "theirs")
    model = load_adapter(resized(make, base, seed), tmp_path / "theirs")
    assert_close(logits(model), logits(theirs))


@pytest.mark.parametrize("make", [gpt2])
@pytest.mark.parametrize("trained", ["wte", "lm_head"])
def test_other_new_rows_of_what_is_tied_to_a_trained_table_go_into_the_base(trained, make, tmp_path, base):
    with foreign_code():
        config = peft.LoraConfig(target_modules=TARGETS[make], r=4, modules_to_save=[trained])
        theirs = peft.get_peft_model(resized(make, base), config)
        disturb(theirs).save_pretrained(tmp_path / "theirs")
    assert_close(logits(load_adapter(resized(make, base), tmp_path / "theirs")), logits(theirs))
    with pytest.warns(
        UserWarning, match="rows 100, 101, 102 of transformer.wte, which resizing the base drew at random"
    ):
        model = load_adapter(resized(make, base, seed=6), tmp_path / "theirs")
    assert_close(logits(model), logits(theirs))


def tied_llama():
    return llama(tie_word_embeddings=True)


@pytest.mark.each_value
@pytest.mark.parametrize("make", [gpt2, tied_llama])
@pytest.mark.parametrize("place", ["embedding", "head"])
def test_new_rows_of_what_is_tied_to_a_trained_table_are_saved(place, make, base, tmp_path):
    options = {"target_modules": ["c_attn" if make is gpt2 else "q_proj"], "r": 4}
    table = LAYERS[gpt2 if make is gpt2 else llama][place]
    model = disturb(get_lora_model(resized(make, base), LoraConfig(**options, modules_to_save=[table])))
    model.save_pretrained(tmp_path / "rows")
    assert_close(logits(read(resized(make, base, seed=6), tmp_path / "rows")), logits(model))
    with foreign_code():
        theirs = peft.PeftModel.from_pretrained(resized(make, base, seed=6), tmp_path / "rows")
    assert_close(logits(theirs), logits(model))


@pytest.mark.parametrize("make", [gpt2, tied_llama])
def test_a_trained_table_brings_the_new_rows_of_what_uses_the_copy_too(make, base, tmp_path):
    targets, table = (["c_attn"], "wte") if make is gpt2 else (["q_proj"], "embed_tokens")
    config = LoraConfig(r=4, target_modules=targets, modules_to_save=[table], ensure_weight_tying=True)
    model = disturb(get_lora_model(resized(make, base), config))
    model.save_pretrained(tmp_path)
    assert_close(logits(load_adapter(resized(make, base, seed=6), tmp_path)), logits(model))


@pytest.mark.parametrize("seed", [5, 6], ids=["the same rows", "other rows"])
@pytest.mark.parametrize("make", [tied_llama])
def test_a_resized_table_that_peft_trains_with_what_is_tied_to_it_is_read(make, seed, base, tmp_path):
    with foreign_code():
        config = peft.LoraConfig(
            r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True
        )
        theirs = peft.get_peft_model(resized(make, base), config)
        disturb(theirs).save_pretrained(tmp_path / "theirs")
    assert_close(logits(load_adapter(resized(make, base, seed), tmp_path / "theirs")), logits(theirs))


def test_a_trainer_resumes_with_a_resized_vocabulary_if_the_new_rows_are_the_same(make, base, tmp_path):
    def run(model, **options):
        arguments = TrainingArguments(tmp_path / "run", **{**OPTIONS, "max_steps": 4})
        return trained(AdapterTrainer(model, arguments, train_dataset=DATA), **options)

    rows = {"trainable_token_indices": [7, 101] if make is gpt2 else {"embed_tokens": [7, 101]}}
    for options in ({}, rows, {"target_modules": ["lm_head"]}):
        whole = lora(make, resized(make, base), **options)
        losses = run(whole)
        again = lora(make, resized(make, base), **options)
        disturb(again)
        assert run(again, resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2")) == losses
        assert_close(logits(again), logits(whole))
        other = lora(make, resized(make, base, seed=6), **options)
        before = state_digest(other)
        with pytest.raises(CheckpointError, match="another base"):
            run(other, resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
        assert state_digest(other) == before


@pytest.mark.parametrize("make", [llama])
@pytest.mark.parametrize("targets", [["v_proj", "q_proj"], ["lm_head", "q_proj"]], ids=str)
def test_a_model_takes_up_what_peft_saved_of_it(targets, make, base, tmp_path):
    with foreign_code():
        theirs = peft.get_peft_model(resized(make, base), peft.LoraConfig(target_modules=targets, r=4))
        disturb(theirs).save_pretrained(tmp_path)
    model = lora(make, resized(make, base), target_modules=sorted(targets))
    restore_adapters(model, tmp_path)
    assert_close(logits(model), logits(theirs))
    with pytest.raises(CheckpointError, match="differs from this model's"):
        restore_adapters(lora(make, resized(make, base, seed=6), target_modules=targets), tmp_path)


def test_whole_tables_are_saved_on_request_and_read_by_peft(make, base, tmp_path):
    model = lora(make, resized(make, base))
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    tables = [key for key, t in load_file(tmp_path / "adapter" / WEIGHTS_FILE).items() if t.shape == (103, 32)]
    assert len(tables) == (1 if make is gpt2 else 2)
    with foreign_code():
        theirs = peft.PeftModel.from_pretrained(resized(make, base, seed=7), tmp_path / "adapter").eval()
    assert_close(logits(theirs), logits(model))
    assert_close(logits(load_adapter(resized(make, base, seed=6), tmp_path / "adapter")), logits(model))
    model.save_pretrained(tmp_path / "without", save_embedding_layers=False)
    assert not [key for key in load_file(tmp_path / "without" / WEIGHTS_FILE) if "token" in key or "wte" in key]


def test_wrong_requests_are_refused_before_anything_is_written(base, make, tmp_path):
    model = lora(make, resized(make, base), trainable_token_indices=NEW)
    for wrong in ("Auto", "yes", 1, None):
        with pytest.raises(ConfigError, match="save_embedding_layers"):
            model.save_pretrained(tmp_path / "adapter", save_embedding_layers=wrong)
    with pytest.raises(ConfigError, match="rows of"):
        model.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    assert not (tmp_path / "adapter").exists()


def test_tables_that_the_first_fsdp_has_made_flat_are_named(make, base, tmp_path):
    model = lora(make, resized(make, base))
    for layer in {model.get_input_embeddings(), model.get_output_embeddings()}:
        layer.weight = torch.nn.Parameter(layer.weight.detach().flatten(), requires_grad=False)
    with pytest.warns(UserWarning, match="gained, 100 to 102, are in no file: FSDP1"):
        model.save_pretrained(tmp_path)


def test_whole_tables_of_a_model_that_names_none_are_refused(tmp_path):
    net = get_lora_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), LoraConfig(r=2, target_modules=["0"]))
    with pytest.raises(ConfigError, match="names no input embedding"):
        net.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    assert not (tmp_path / "adapter").exists()
    net.save_pretrained(tmp_path / "adapter")


METHODS = {
    "on the tables": ("Lora", {"r": 4}, ["embedding", "head"]),
    "on the head": ("Lora", {"r": 4}, ["head"]),
    "on the head, with DoRA": ("Lora", {"r": 4, "use_dora": True}, ["head"]),
    "on the embedding": ("Lora", {"r": 4}, ["embedding"]),
    "IA3": ("IA3", {"feedforward_modules": []}, []),
    "VeRA": ("Vera", {"r": 4}, []),
    "one new row trains": ("TrainableTokens", {"token_indices": [101]}, ["embedding"]),
}
LAYERS = {gpt2: {"embedding": "wte", "head": "lm_head"}, llama: {"embedding": "embed_tokens", "head": "lm_head"}}


def read(model, directory):
    with pytest.warns(UserWarning, match=r"rows 10.* which resizing the base drew at random, have the adapter file's"):
        return load_adapter(model, directory)


def options_of(make, case):
    method, options, tables = METHODS[case]
    targets = [] if method == "TrainableTokens" else TARGETS[make]
    return method, {**options, "target_modules": [*targets, *(LAYERS[make][each] for each in tables)]}


@pytest.mark.each_value
@pytest.mark.parametrize("case", METHODS)
def test_a_base_gets_the_new_rows_of_a_table_where_the_adapter_has_no_room_for_them(case, make, base, tmp_path):
    method, options = options_of(make, case)
    model = disturb(get_adapter_model(resized(make, base), getattr(minipeft, f"{method}Config")(**options)))
    model.save_pretrained(tmp_path / "ours")
    again = read(resized(make, base, seed=6), tmp_path / "ours")
    assert_close(logits(again), logits(model))
    with foreign_code():
        theirs = peft.PeftModel.from_pretrained(resized(make, base, seed=7), tmp_path / "ours").eval()
    assert_close(logits(theirs), logits(model))
    assert_close(logits(load_adapter(resized(make, base), tmp_path / "ours")), logits(model))
    again.save_pretrained(tmp_path / "again")
    first, second = (load_file(tmp_path / each / WEIGHTS_FILE) for each in ("ours", "again"))
    assert first.keys() == second.keys()
    for key, tensor in first.items():
        own = options.get("token_indices", ()) if len(tensor) == 103 else ()  # which the base does not need
        places = [row for row in range(len(tensor)) if row not in own]
        assert torch.equal(tensor[places], second[key][places])
    expected = logits(model)
    assert_close(logits(again.merge_and_unload(untie=True)), expected)


@pytest.mark.each_value
@pytest.mark.parametrize("rows", [NEW, [3, *NEW]], ids=str)
def test_new_rows_that_train_leave_those_of_an_untied_head(rows, make, base, tmp_path):
    for library, adapt in ((minipeft, get_adapter_model), (peft, peft.get_peft_model)):
        config = library.TrainableTokensConfig(token_indices=rows, target_modules=[LAYERS[make]["embedding"]])
        with foreign_code():
            model = disturb(adapt(resized(make, base), config))
            model.save_pretrained(tmp_path / library.__name__)
        again, path = resized(make, base, seed=6), tmp_path / library.__name__
        if make is gpt2:
            assert_close(logits(load_adapter(again, path)), logits(model))
        elif library is minipeft:
            assert_close(logits(read(again, path)), logits(model))
        else:  # PEFT writes the table that is adapted and not the other
            with pytest.warns(UserWarning, match="brings nothing of rows 100 to 102 of lm_head"):
                load_adapter(again, path)


@pytest.mark.each_value
@pytest.mark.parametrize("case", METHODS)
def test_whole_tables_that_peft_writes_with_any_adapter_are_read(case, make, base, tmp_path):
    method, options = options_of(make, case)
    with foreign_code():
        theirs = peft.get_peft_model(resized(make, base), getattr(peft, f"{method}Config")(**options))
        disturb(theirs).save_pretrained(tmp_path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = load_adapter(resized(make, base, seed=6), tmp_path)
    lacking = [str(each.message) for each in caught if "brings nothing of rows 100 to 102 of" in str(each.message)]
    tables = METHODS[case][2]
    assert len(lacking) == (
        make is llama and len(tables) == 1
    )  # PEFT writes the table that is adapted and not the other
    if lacking:
        with foreign_code():
            theirs = peft.PeftModel.from_pretrained(resized(make, base, seed=6), tmp_path).eval()
    assert_close(logits(model), logits(theirs))


HALVES = [(torch.bfloat16, torch.float16), (torch.float16, torch.bfloat16)]


@pytest.mark.parametrize(("there", "here"), HALVES, ids=str)
def test_whole_tables_of_one_half_precision_are_read_in_the_other(there, here, make, base, tmp_path):
    with foreign_code():
        theirs = peft.get_peft_model(resized(make, base).to(there), peft.LoraConfig(target_modules=TARGETS[make]))
        disturb(theirs).save_pretrained(tmp_path)
        theirs = peft.PeftModel.from_pretrained(resized(make, base, seed=6).to(here), tmp_path).eval()
    expected = logits(theirs)
    model = load_adapter(resized(make, base, seed=6).to(here), tmp_path)
    assert (logits(model) - expected).abs().max() <= 0.02 * expected.abs().max()


@pytest.mark.each_value
@pytest.mark.parametrize(("there", "here"), [*HALVES, (torch.bfloat16, torch.float32)], ids=str)
def test_an_adapter_is_restored_on_its_base_in_another_dtype(there, here, make, base, tmp_path):
    model = lora(make, resized(make, base).to(there))
    model.save_pretrained(tmp_path)
    again = disturb(lora(make, resized(make, base).to(here)))
    restore_adapters(again, tmp_path)
    assert (logits(again) - logits(model)).abs().max() <= 0.02 * logits(model).abs().max()
    with pytest.raises(CheckpointError, match="another base"):
        restore_adapters(lora(make, resized(make, base, seed=6).to(here)), tmp_path)


def test_rows_for_the_base_are_refused_where_others_use_it_or_it_is_not_in_memory(make, base, tmp_path):
    adapted = lora(make, resized(make, base))
    adapted.save_pretrained(tmp_path / "other")
    model = disturb(get_lora_model(resized(make, base), LoraConfig(target_modules=["lm_head"], r=4)))
    model.save_pretrained(tmp_path / "head")
    busy = load_adapter(resized(make, base, seed=6), tmp_path / "other")
    before = state_digest(busy)
    with pytest.raises(CheckpointError, match=r"brings rows 100, 101, 102 of .* Load this adapter before its other"):
        busy.load_adapter(tmp_path / "head", "second")
    assert state_digest(busy) == before
    same = load_adapter(resized(make, base), tmp_path / "other")
    same.load_adapter(tmp_path / "head", "second")
    offloaded = accelerate.cpu_offload(resized(make, base, seed=6), torch.device("cpu"))
    with pytest.raises(CheckpointError, match="with all of its weights in memory"):
        load_adapter(offloaded, tmp_path / "head")


def test_a_table_that_an_adapter_is_merged_into_is_not_saved(make, base, tmp_path):
    model = disturb(get_lora_model(resized(make, base), LoraConfig(target_modules=["lm_head"], r=4)))
    model.merge_adapter(untie=True) if make is gpt2 else model.merge_adapter()
    for choice in ("auto", True):
        with pytest.raises(StateError, match=r"'default' is merged into .* Call unmerge_adapter\(\) first"):
            model.save_pretrained(tmp_path / "adapter", save_embedding_layers=choice)
    assert not (tmp_path / "adapter").exists()
    model.unmerge_adapter()
    model.save_pretrained(tmp_path / "adapter")
    assert_close(logits(read(resized(make, base, seed=6), tmp_path / "adapter")), logits(model))


def test_a_second_adapter_may_train_the_new_rows(tmp_path):
    with foreign_code():
        gpt2().save_pretrained(tmp_path / "base")
    model = get_adapter_model(
        resized(gpt2, tmp_path / "base"), IA3Config(target_modules=["c_attn"], feedforward_modules=[])
    )
    model.add_adapter("words", TrainableTokensConfig(token_indices=NEW))
    model.set_adapter(["default", "words"])
    disturb(model)
    model.save_pretrained(tmp_path / "adapter", "default", save_embedding_layers=False)
    model.save_pretrained(tmp_path / "adapter", "words")
    again = load_adapter(resized(gpt2, tmp_path / "base", seed=6), tmp_path / "adapter")
    again.load_adapter(tmp_path / "adapter" / "words", "words")
    again.set_adapter(["default", "words"])
    assert_close(logits(again), logits(model))


def bert():
    """A model whose head is tied and has a bias of its own."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=100, **sizes))
    torch.nn.init.normal_(model.cls.predictions.decoder.bias)
    return model.eval()


def tied_llama():
    return llama(tie_word_embeddings=True)


IN_BERT = {"target_modules": ["query"]}
BESIDE = {
    "biased head": (bert, IN_BERT),
    "all biases": (bert, {**IN_BERT, "bias": "all"}),
    "some rows, tied": (tied_llama, {"target_modules": ["q_proj"], "trainable_token_indices": NEW[:2]}),
}


@pytest.mark.parametrize("case", BESIDE)
def test_new_rows_beside_a_bias_or_rows_that_train_are_read_here_and_by_peft(case, tmp_path):
    """PEFT leaves out the bias of a head next to rows of tokens, and reads the rows of a tied head with those of the table."""
    make, options = BESIDE[case]
    directory = tmp_path / "base"
    with foreign_code():
        make().save_pretrained(directory)
    ties = {"ensure_weight_tying": True} if "tied" in case else {}
    model = disturb(get_lora_model(resized(make, directory), LoraConfig(r=4, **options, **ties)))
    model.save_pretrained(tmp_path / "adapter")
    with foreign_code():
        theirs = peft.PeftModel.from_pretrained(resized(make, directory, seed=7), tmp_path / "adapter").eval()
        assert_close(logits(theirs), logits(model))
        assert_close(logits(load_adapter(resized(make, directory, seed=6), tmp_path / "adapter")), logits(model))


@pytest.mark.parametrize(
    "options",
    [
        {**IN_BERT, "modules_to_save": ["word_embeddings"]},
        {"target_modules": ["query", "word_embeddings"]},
        {"target_modules": ["query", "decoder"]},
    ],
)
def test_whole_tables_next_to_what_peft_did_not_tie_are_no_sign_of_a_tie(options, tmp_path):
    directory = tmp_path / "base"
    with foreign_code():
        bert().save_pretrained(directory)
        theirs = peft.get_peft_model(resized(bert, directory), peft.LoraConfig(ensure_weight_tying=True, **options))
        disturb(theirs).eval().save_pretrained(tmp_path / "adapter")
        assert {tuple(t.shape) for t in load_file(tmp_path / "adapter" / WEIGHTS_FILE).values()} >= {(103, 32)}
        model = load_adapter(resized(bert, directory, seed=6), tmp_path / "adapter")
        assert_close(logits(model), logits(theirs))


def test_trained_tables_bring_their_new_rows_themselves(make, base, tmp_path):
    names = {gpt2: ["wte", "lm_head"], llama: ["embed_tokens", "lm_head"]}
    model = lora(make, resized(make, base), modules_to_save=names[make])
    model.save_pretrained(tmp_path / "adapter")
    assert_close(logits(load_adapter(resized(make, base, seed=6), tmp_path / "adapter")), logits(model))
    with pytest.raises(CheckpointError, match=r"resize_token_embeddings\(103\)"):
        load_adapter(make(), tmp_path / "adapter")


def test_the_hint_is_for_vocabularies_only(tmp_path):
    lora(gpt2, gpt2()).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS_FILE)
    wrong = {key: tensor[:3] if "lora_A" in key else tensor for key, tensor in tensors.items()}
    save_file(wrong, tmp_path / WEIGHTS_FILE)
    with pytest.raises(MinipeftError, match="another base") as caught:
        load_adapter(gpt2(), tmp_path)
    assert "resize" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ('{"vocab_size": 100}', 100),
        ('{"text_config": {"vocab_size": 90}}', 90),
        ("{}", None),
        ("[]", None),
        ("{", None),
        ('{"vocab_size": "many"}', None),
    ],
)
def test_the_vocabulary_of_a_base_is_read_from_its_directory_or_the_cache_of_the_hub(text, size, tmp_path, monkeypatch):
    model = gpt2()
    assert base_vocabulary(model) is None
    (tmp_path / "config.json").write_text(text)
    model.name_or_path = str(tmp_path)
    assert base_vocabulary(model) == size
    commit = "0" * 40
    snapshot = tmp_path / "models--someone--base" / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text(text)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    model.name_or_path, model.config._commit_hash = "someone/base", commit
    assert base_vocabulary(model) == size
    model.name_or_path = "someone/else"
    assert base_vocabulary(model) is None


TEXT = {
    **{"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
}


def mllama():
    return transformers.MllamaForCausalLM, transformers.MllamaTextConfig(**TEXT, cross_attention_layers=[1]), ["q_proj"]


def cpmant():
    sizes = {"vocab_size": 96, "hidden_size": 32, "num_attention_heads": 2, "dim_head": 16, "dim_ff": 32}
    config = transformers.CpmAntConfig(**sizes, num_hidden_layers=1, prompt_types=2, prompt_length=4)
    return transformers.CpmAntForCausalLM, config, ["project_q"]


@pytest.mark.each_value
@pytest.mark.parametrize("without", [None, "marks", "weights"])
@pytest.mark.parametrize("family", [mllama, cpmant])
def test_rows_beyond_the_vocabulary_that_the_checkpoint_has_are_not_saved(family, without, tmp_path):
    cls, config, targets = family()
    with foreign_code():
        cls(config).save_pretrained(tmp_path / "base")
        model = cls.from_pretrained(tmp_path / "base")
    assert len(model.get_input_embeddings().weight) == 104
    if without == "marks":
        model = copy.deepcopy(model)
    elif without == "weights":  # a checkpoint of another format
        (tmp_path / "base" / "model.safetensors").unlink()
    get_lora_model(model, LoraConfig(target_modules=targets)).save_pretrained(tmp_path / "adapter")
    assert not any(ROWS in key for key in load_file(tmp_path / "adapter" / WEIGHTS_FILE))


@pytest.mark.parametrize("family", [mllama, cpmant])
def test_rows_that_such_a_model_gains_are_saved(family, tmp_path):
    cls, config, targets = family()

    def resized_anew(seed):
        with foreign_code(), torch.random.fork_rng():
            torch.manual_seed(seed)
            model = cls.from_pretrained(tmp_path / "base", dtype=torch.float32)
            model.resize_token_embeddings(110)
        return model.eval()

    with foreign_code():
        cls(config).save_pretrained(tmp_path / "base", max_shard_size=20_000)
    assert (tmp_path / "base" / "model.safetensors.index.json").exists()
    model = disturb(get_lora_model(resized_anew(1), LoraConfig(target_modules=targets)))
    model.save_pretrained(tmp_path / "adapter")
    rows = [len(value) for key, value in load_file(tmp_path / "adapter" / WEIGHTS_FILE).items() if ROWS in key]
    assert sorted(rows) == [6, 14]  # 104 rows of the input and 96 of the output are the checkpoint's
    again = load_adapter(resized_anew(2), tmp_path / "adapter")
    ids = torch.tensor([[3, 105, 109, 7]])
    with torch.no_grad():
        assert_close(again(ids).logits, model(ids).logits)


def test_a_table_replaced_by_hand_is_a_resized_one(tmp_path):
    with foreign_code():
        gpt2().save_pretrained(tmp_path / "base")
        model = type(gpt2()).from_pretrained(tmp_path / "base")
        model.set_input_embeddings(torch.nn.Embedding(103, 32))
        model.tie_weights()
    lora(gpt2, model).save_pretrained(tmp_path / "adapter")
    assert [len(v) for k, v in load_file(tmp_path / "adapter" / WEIGHTS_FILE).items() if ROWS in k] == [3]


def gemma():
    """Its second table, with a vector of each token for each layer, is for fewer tokens, as Gemma 3n's is."""
    sizes = {"hidden_size": 16, "intermediate_size": [24, 24], "num_hidden_layers": 2, "num_attention_heads": 2}
    second = {"hidden_size_per_layer_input": 4, "vocab_size_per_layer_input": 97, "laurel_rank": 2}
    few = {"num_key_value_heads": 1, "head_dim": 8, "altup_num_inputs": 2, "num_kv_shared_layers": 0, "pad_token_id": 0}
    layers = {"layer_types": ["sliding_attention", "full_attention"], "activation_sparsity_pattern": [0.0, 0.0]}
    config = transformers.Gemma3nTextConfig(
        vocab_size=100, max_position_embeddings=32, **sizes, **second, **few, **layers
    )
    torch.manual_seed(0)
    return transformers.Gemma3nForCausalLM(config).eval()


@pytest.mark.parametrize("make", [gemma])
@pytest.mark.parametrize("targets", [["q_proj"], ["embed_tokens", "q_proj"]], ids=str)
def test_new_rows_of_a_second_table_for_each_layer_are_saved(targets, make, base, tmp_path):
    model = disturb(get_lora_model(resized(make, base), LoraConfig(r=2, target_modules=targets)))
    model.save_pretrained(tmp_path / "adapter")
    again = resized(make, base, seed=6)
    assert not torch.equal(
        again.model.embed_tokens_per_layer.weight[97:], model.model.embed_tokens_per_layer.weight[97:]
    )
    said = pytest.warns(UserWarning, match="have the adapter file's values now") if len(targets) == 2 else NOTHING
    with said:
        found = load_adapter(copy.deepcopy(again), tmp_path / "adapter")
    assert_close(logits(found), logits(model))
    saved = load_file(tmp_path / "adapter" / WEIGHTS_FILE)
    assert len(saved[f"base_model.model.model.embed_tokens_per_layer.{ROWS}"]) == 6
    with foreign_code():
        theirs = peft.PeftModel.from_pretrained(again, tmp_path / "adapter").eval()
    assert_close(logits(theirs), logits(model))
    if targets == ["q_proj"]:
        minipeft.merge_from_disk(base, tmp_path / "adapter", tmp_path / "merged")
        with foreign_code():
            assert_close(logits(type(make()).from_pretrained(tmp_path / "merged").eval()), logits(model))


@pytest.mark.parametrize("make", [gemma])
def test_a_second_table_is_left_alone_if_nothing_was_resized_and_not_resized_if_it_is_adapted(make, base, tmp_path):
    with foreign_code():
        model = type(make()).from_pretrained(base)
    adapter = get_lora_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    for folder, options in (("plain", {}), ("tables", {"save_embedding_layers": True})):
        adapter.save_pretrained(tmp_path / folder, **options)
        assert not [key for key in load_file(tmp_path / folder / WEIGHTS_FILE) if "per_layer" in key]
    model = get_lora_model(make(), LoraConfig(r=2, target_modules=["embed_tokens_per_layer"]))
    with pytest.raises(StateError, match=r"'model\.embed_tokens_per_layer' is adapted"):
        model.resize_token_embeddings(103)


def marian():
    """Resizing leaves the `out_features` of its head as they were."""
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 32}
    ids = {"pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    torch.manual_seed(0)
    return transformers.MarianMTModel(transformers.MarianConfig(vocab_size=100, **sizes, **heads, **ids)).eval()


def t5gemma():
    """Its head is a module that holds the table, and its decoder has a table of its own."""
    part = {"vocab_size": 100, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "head_dim": 8}
    part |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 32, "pad_token_id": 0}
    torch.manual_seed(0)
    config = transformers.T5GemmaConfig(encoder=part, decoder=part, vocab_size=100)
    return transformers.T5GemmaForConditionalGeneration(config).eval()


@pytest.mark.filterwarnings("ignore:.*not in the checkpoint|rows .* drew at random, have the adapter file:UserWarning")
@pytest.mark.parametrize("make", [marian, t5gemma])
def test_new_rows_are_saved_and_read_where_the_head_is_unlike_others(make, base, tmp_path):
    def another(seed):
        with foreign_code():
            model = type(make()).from_pretrained(base)
            torch.manual_seed(seed)
            model.resize_token_embeddings(103, mean_resizing=False)
        return model

    @torch.no_grad()
    def output(model):
        return model.eval()(input_ids=IDS, decoder_input_ids=IDS).logits

    model = lora(gpt2, another(5), target_modules=["q_proj"])
    model.save_pretrained(tmp_path)
    again = another(6)
    assert not torch.allclose(output(again), output(another(5)), rtol=1e-3)
    assert_close(output(load_adapter(again, tmp_path)), output(model))


@pytest.mark.parametrize("make", [marian])
def test_tokens_train_in_a_head_that_says_fewer_features_than_it_has(make, base):
    model = resized(make, base)
    assert model.lm_head.out_features == 100
    assert len(model.lm_head.weight) == 103
    model = lora(gpt2, model, target_modules=["q_proj"], trainable_token_indices=[3, 101])
    model(input_ids=IDS, decoder_input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)
    merged = copy.deepcopy(model).merge_and_unload()
    with torch.no_grad():
        found, expected = (m(input_ids=IDS, decoder_input_ids=IDS).logits for m in (merged, model))
    assert_close(found, expected)
