"""HF PEFT as an independent oracle: the same modules, numbers and files on the same tiny models.

Whatever PEFT and transformers warn about is silenced where they are called; minipeft is called outside of that, so a
warning of its own fails the test.
"""

import copy
import functools
import json
import re
import shutil

import pytest
import torch
import transformers
from fast_copy import copied
from rotation import often
from safetensors.torch import load_file, save_file
from tiny_models import (
    bert_classifier,
    disturb,
    foreign_code,
    gpt2,
    gpt2_classifier,
    llama,
    logits,
    state_digest,
    t5,
    token_ids,
)

import minipeft
from minipeft.injection.module_tree import adapted_layers, wrappers
from minipeft.injection.modules_to_save import SavedModule

with foreign_code():
    peft = pytest.importorskip("peft")
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

PREFIX = "base_model.model."
TRANSFORMERS = tuple(map(int, transformers.__version__.split(".")[:2]))
PATTERNS = {
    "rank_pattern": {"mlp.c_proj": 2, r"h\.1\.attn\.c_attn": 5},
    "alpha_pattern": {"c_fc": 3, "^transformer.h.0.attn.c_proj": 24},
}
LLAMA_PATTERNS = {
    "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.down_proj": 5},
    "alpha_pattern": {"v_proj": 3, "^model.layers.0.mlp.up_proj": 24},
}

# T5's `shared` is one of its cases, and shares its weight with the tables that the model calls.
pytestmark = [
    pytest.mark.filterwarnings("ignore:shared shares its weight with"),
    pytest.mark.filterwarnings("ignore:.*shared.*the model neither called nor read"),
]


def tied_llama():
    return llama(tie_word_embeddings=True)


# What both libraries are asked for, by the words they share.
CASES = {
    "gpt2 default": (gpt2, {}),
    "gpt2 conv1d": (gpt2, {"r": 4, "lora_alpha": 16, "target_modules": ["c_attn", "c_proj"]}),
    "gpt2 all-linear rslora patterns": (
        gpt2,
        {"r": 4, "lora_alpha": 16, "target_modules": "all-linear", "use_rslora": True, **PATTERNS},
    ),
    "gpt2 embedding": (gpt2, {"r": 4, "lora_alpha": 8, "target_modules": ["wte", "wpe"]}),
    "gpt2 regex": (gpt2, {"r": 4, "target_modules": r".*\.mlp\.c_(fc|proj)"}),
    "gpt2 one layer": (
        gpt2,
        {"r": 4, "target_modules": ["c_attn", "c_fc"], "layers_to_transform": [1], "layers_pattern": "h"},
    ),
    "gpt2 bias all": (gpt2, {"r": 4, "target_modules": ["c_attn", "c_proj"], "bias": "all"}),
    "gpt2 bias lora_only": (gpt2, {"r": 4, "target_modules": ["c_attn", "c_proj"], "bias": "lora_only"}),
    "gpt2 modules_to_save": (gpt2, {"r": 4, "target_modules": ["c_attn"], "modules_to_save": ["ln_f", "lm_head"]}),
    "gpt2 table to save": (gpt2, {"r": 4, "target_modules": ["c_attn"], "modules_to_save": ["wte"]}),
    "gpt2 alternatives": (
        gpt2,
        {"r": 3, "target_modules": ["c_attn", "c_fc"], "rank_pattern": {"c_fc|h.0.attn.c_attn": 5}},
    ),
    "gpt2 causal": (gpt2, {"r": 4, "target_modules": ["c_attn"], "task_type": "CAUSAL_LM"}),
    "gpt2 classifier": (gpt2_classifier, {"r": 4, "target_modules": ["c_attn"], "task_type": "SEQ_CLS"}),
    "llama default": (llama, {}),
    "llama all-linear": (llama, {"r": 4, "lora_alpha": 16, "target_modules": "all-linear"}),
    "llama rslora patterns": (
        llama,
        {
            "r": 4,
            "target_modules": ["q_proj", "v_proj", "up_proj", "down_proj"],
            "use_rslora": True,
            **LLAMA_PATTERNS,
        },
    ),
    "llama embedding": (llama, {"r": 4, "target_modules": ["embed_tokens", "q_proj"]}),
    "llama tied": (tied_llama, {"r": 4, "target_modules": ["embed_tokens", "lm_head"]}),
    "llama head": (llama, {"r": 4, "target_modules": ["lm_head", "v_proj"]}),
    "llama tables to save": (llama, {"r": 4, "modules_to_save": ["embed_tokens", "lm_head"]}),
    "llama gaussian exclude": (
        llama,
        {
            "r": 4,
            "target_modules": ["q_proj", "o_proj"],
            "exclude_modules": ["layers.0.self_attn.o_proj"],
            "init_lora_weights": "gaussian",
        },
    ),
    "bert classifier": (bert_classifier, {"r": 4, "task_type": "SEQ_CLS"}),
    "bert bias all": (bert_classifier, {"r": 4, "bias": "all"}),
    "bert bias lora_only": (bert_classifier, {"r": 4, "target_modules": ["query", "dense"], "bias": "lora_only"}),
    "bert modules_to_save": (bert_classifier, {"r": 4, "modules_to_save": ["pooler.dense", "classifier"]}),
    "t5 default": (t5, {"r": 4, "task_type": "SEQ_2_SEQ_LM"}),
    "t5 shared embedding": (t5, {"r": 4, "target_modules": ["shared", "wo"]}),
}
SELDOM = {  # what each of them asks for is asked for in another one, of the same architecture or of another
    "gpt2 default", "gpt2 conv1d", "gpt2 bias all", "gpt2 modules_to_save", "llama all-linear", "llama rslora patterns",
    "llama embedding", "bert classifier", "bert bias lora_only",
}  # fmt: skip
TRAINED = [
    "gpt2 conv1d",
    "gpt2 all-linear rslora patterns",
    "gpt2 embedding",
    "gpt2 bias all",
    "gpt2 bias lora_only",
    "gpt2 modules_to_save",
    "gpt2 classifier",
    "llama all-linear",
    "llama rslora patterns",
    "llama embedding",
    "bert classifier",
    "bert bias all",
]
FIFTY_STEPS = ("gpt2 all-linear rslora patterns", "llama all-linear", "bert bias all")  # one for each architecture
COURSES = [pytest.param(case, 8, marks=[pytest.mark.slow] * (case in SELDOM)) for case in TRAINED]
COURSES += [pytest.param(case, 50, marks=pytest.mark.slow) for case in FIFTY_STEPS]
every_case = pytest.mark.parametrize("case", often(CASES, CASES.keys() - SELDOM))


def ours(case):
    factory, options = CASES[case]
    return minipeft.get_lora_model(factory(), minipeft.LoraConfig(**options))


@copied
def theirs(case, adapter_name="default"):
    """PEFT's model of a case; its configuration object is PEFT's to change, so it gets a copy."""
    factory, options = CASES[case]
    with foreign_code(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return peft.get_peft_model(factory(), peft.LoraConfig(**copy.deepcopy(options)), adapter_name=adapter_name)


def their_logits(model, ids=None):
    with foreign_code():
        return logits(model.eval(), ids)


def save_theirs(model, directory):
    with foreign_code():
        model.save_pretrained(directory)


def load_theirs(base, directory, **options):
    with foreign_code():
        return peft.PeftModel.from_pretrained(base, directory, **options)


@pytest.fixture(scope="module")
def files_of(tmp_path_factory):
    """A function: the directory with the adapter of a case that PEFT or we made and disturbed, and its logits.

    Nobody writes into such a directory or onto such a model, so each is made once.
    """

    @functools.cache
    def made(whose, case):
        if case == "t5 shared embedding" and TRANSFORMERS < (5,):
            pytest.skip("before transformers 5, PEFT's adapter on T5's shared embedding acts in neither of its stacks")
        directory = tmp_path_factory.mktemp(whose)
        if whose == "theirs":
            reference = disturb(theirs(case))
            save_theirs(reference, directory)
            return directory, their_logits(reference)
        model = disturb(ours(case))
        model.save_pretrained(directory)
        return directory, logits(model)

    return made


def tensors_in(directory):
    return load_file(directory / "adapter_model.safetensors")


def assert_same_tensors(left, right):
    assert left.keys() == right.keys()
    for key in left:
        assert torch.equal(left[key], right[key]), key


def assert_close(left, right, tolerance=1e-5):
    """The issue's bound, on logits of the order of one."""
    assert torch.allclose(left, right, rtol=0, atol=tolerance), float((left - right).abs().max())


@every_case
def test_the_adapted_model_starts_bit_equal_to_the_base_and_trains_as_many_parameters_as_in_peft(case):
    factory, options = CASES[case]
    model, expected = ours(case), theirs(case)
    assert torch.equal(logits(model), logits(factory()))
    trainable, total = model.get_nb_trainable_parameters()
    assert trainable == sum(p.numel() for p in expected.parameters() if p.requires_grad)
    if options.get("bias", "none") == "none":  # our trained biases are copies, PEFT's are the base's own
        assert total == sum(p.numel() for p in expected.parameters())


@pytest.mark.parametrize(
    ("target", "init"), [("c_attn", True), ("c_attn", "gaussian"), ("wte", True), ("c_attn", False)]
)
def test_starting_values_have_the_moments_of_peft(target, init):
    """Both draw from one distribution a factor: zero stays zero, and the spread agrees within five standard errors."""
    options = {"r": 16, "target_modules": [target], "init_lora_weights": init}
    torch.manual_seed(0)
    with foreign_code():
        expected = peft.get_peft_model_state_dict(peft.get_peft_model(gpt2(), peft.LoraConfig(**options)))
    found = minipeft.get_lora_model(gpt2(), minipeft.LoraConfig(**options)).requires_grad_(False).adapter_state_dict()
    assert expected.keys() == found.keys()
    for key, tensor in found.items():
        wanted = expected[key]
        assert (tensor.std() - wanted.std()).abs() <= 5 * wanted.std() / tensor.numel() ** 0.5, key
        assert (tensor.abs().max() - wanted.abs().max()).abs() <= 2 * wanted.std(), key


def train(model, case, steps):
    """Losses of AdamW on four fixed batches in turn."""
    classifies = CASES[case][0] in (gpt2_classifier, bert_classifier)
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3, weight_decay=0.01)
    losses = []
    for step in range(steps):
        ids = token_ids(seed=step % 4)
        loss = model(input_ids=ids, labels=ids[:, 0] % 3 if classifies else ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    return losses


@pytest.mark.parametrize(("case", "steps"), COURSES)
def test_training_steps_give_the_losses_of_peft(case, steps, tmp_path):
    factory, _ = CASES[case]
    reference = theirs(case)
    save_theirs(reference, tmp_path)
    model = minipeft.load_adapter(factory(), tmp_path, is_trainable=True)
    with foreign_code():
        expected = train(reference, case, steps)
    losses = train(model, case, steps)
    assert max(abs(a - b) for a, b in zip(losses, expected, strict=True)) <= 1e-4
    assert sum(losses[-4:]) < 0.98 * sum(losses[:4])  # and it did train
    assert_close(logits(model.eval()), their_logits(reference), 1e-3)


# These tie the head to the table that is adapted, and PEFT merges into both: see test_tied_weights.py.
TIED = ("gpt2 embedding", "llama tied", "t5 shared embedding")


@pytest.mark.parametrize(
    "case",
    [case for case in often(CASES, CASES.keys() - SELDOM) if case.values[0] not in TIED],
)
def test_merged_logits_equal_those_of_peft_and_the_unmerged(case, files_of):
    factory, _ = CASES[case]
    directory, expected = files_of("theirs", case)
    model = minipeft.load_adapter(factory(), directory)
    unmerged = logits(model)
    assert_close(unmerged, expected)
    model.merge_adapter()
    assert_close(logits(model), unmerged)
    model.unmerge_adapter()
    assert torch.equal(logits(model), unmerged)
    merged = model.merge_and_unload()
    assert type(merged) is type(factory())
    assert_close(logits(merged), unmerged)
    with foreign_code():
        assert_close(logits(merged), logits(disturb(theirs(case)).eval().merge_and_unload()))


@every_case
def test_peft_computes_the_same_from_our_files_and_writes_them_back_unchanged(case, files_of, tmp_path):
    factory, _ = CASES[case]
    first, expected = files_of("ours", case)
    assert not torch.allclose(expected, logits(factory()), atol=1e-3)
    loaded = load_theirs(factory(), first)
    assert_close(their_logits(loaded), expected)
    save_theirs(loaded, tmp_path / "second")
    minipeft.load_adapter(factory(), tmp_path / "second").save_pretrained(tmp_path / "third")
    assert_same_tensors(tensors_in(first), tensors_in(tmp_path / "third"))
    assert tensors_in(first).keys() <= tensors_in(tmp_path / "second").keys()


@every_case
def test_we_compute_the_same_from_the_files_of_peft_and_write_them_back_unchanged(case, files_of, tmp_path):
    factory, _ = CASES[case]
    first, expected = files_of("theirs", case)
    loaded = minipeft.load_adapter(factory(), first)
    assert_close(logits(loaded), expected)
    loaded.save_pretrained(tmp_path / "second")
    save_theirs(load_theirs(factory(), tmp_path / "second"), tmp_path / "third")
    assert_same_tensors(tensors_in(first), tensors_in(tmp_path / "third"))
    # PEFT adds the whole table next to an adapted embed_tokens or lm_head; it is the base's, and we leave it there.
    base = {f"{PREFIX}{name}.base_layer.weight" for name, _ in adapted_layers(loaded)}
    assert tensors_in(tmp_path / "second").keys() == tensors_in(first).keys() - base


@every_case
def test_our_configuration_file_means_the_same_to_peft(case, files_of):
    """Every option that PEFT wrote stands in our file with that value, but for the targets, which we resolve."""
    found, expected = (
        json.loads((files_of(whose, case)[0] / "adapter_config.json").read_text()) for whose in ("ours", "theirs")
    )
    free = {"target_modules", "auto_mapping", "peft_version", "base_model_name_or_path", "modules_to_save"}
    for key in found.keys() - free - {"layers_pattern", "layers_to_transform"}:
        assert found[key] == expected[key], key
    assert found.keys() <= expected.keys()  # PEFT warns about a key it does not know
    targeted = {name for name, m in theirs(case).base_model.model.named_modules() if isinstance(m, BaseTunerLayer)}
    if not isinstance(found["target_modules"], str):
        assert {n for n in targeted if any(f".{n}".endswith(f".{e}") for e in found["target_modules"])} == targeted


def test_an_adapter_of_another_name_stands_in_a_directory_of_that_name(tmp_path):
    reference = disturb(theirs("gpt2 conv1d", "other"))
    save_theirs(reference, tmp_path / "theirs")
    model = minipeft.load_adapter(gpt2(), tmp_path / "theirs" / "other", adapter_name="other")
    assert_close(logits(model), their_logits(reference))
    model.save_pretrained(tmp_path / "ours")
    assert_same_tensors(tensors_in(tmp_path / "theirs" / "other"), tensors_in(tmp_path / "ours" / "other"))
    loaded = load_theirs(gpt2(), tmp_path / "ours" / "other", adapter_name="other")
    assert_close(their_logits(loaded), logits(model))


def test_two_adapters_of_one_model_are_two_adapters_to_peft(tmp_path):
    model = disturb(ours("gpt2 conv1d"))
    model.add_adapter("second", minipeft.LoraConfig(r=2, lora_alpha=5, target_modules=["c_fc"]))
    model.set_adapter("second")
    disturb(model, seed=5)
    model.save_pretrained(tmp_path)
    reference = load_theirs(gpt2(), tmp_path)
    with foreign_code():
        reference.load_adapter(tmp_path / "second", "second")
    for names in (["default"], ["second"], ["default", "second"]):
        model.set_adapter(names)
        with foreign_code():
            reference.base_model.set_adapter(names)
        assert_close(logits(model), their_logits(reference))


def test_two_adapters_of_peft_add_up_as_they_do_there(tmp_path):
    reference = disturb(theirs("llama all-linear"))
    with foreign_code():
        reference.add_adapter("second", peft.LoraConfig(r=2, lora_alpha=5, target_modules=["q_proj"]))
        reference.set_adapter("second")
        disturb(reference, seed=5).save_pretrained(tmp_path)
        reference.base_model.set_adapter(["default", "second"])
    model = minipeft.load_adapter(llama(), tmp_path)
    model.load_adapter(tmp_path / "second", "second")
    model.set_adapter(["default", "second"])
    assert_close(logits(model), their_logits(reference))
    assert_close(logits(model.merge_and_unload()), their_logits(reference))


def test_overlapping_patterns_keep_their_order_through_a_file(tmp_path):
    """The first key that fits counts. PEFT sorts the keys when it writes, and loads another scaling than it trained."""
    options = {"target_modules": ["c_attn", "c_fc"], "alpha_pattern": {"attn.c_attn": 1, ".*": 40}}
    model = disturb(minipeft.get_lora_model(gpt2(), minipeft.LoraConfig(**options)))
    model.save_pretrained(tmp_path)
    assert_close(logits(minipeft.load_adapter(gpt2(), tmp_path)), logits(model))
    assert_close(their_logits(load_theirs(gpt2(), tmp_path)), logits(model))


@pytest.mark.parametrize("key", ["q_pro.", ".._proj", "._proj", ".*\\.q_pro."])
def test_a_dot_that_ends_no_name_is_any_letter_as_in_peft(key, tmp_path):
    options = {"r": 4, "target_modules": ["q_proj", "o_proj"], "alpha_pattern": {key: 80}, "rank_pattern": {key: 2}}
    with foreign_code():
        reference = disturb(peft.get_peft_model(llama(), peft.LoraConfig(**options)))
    save_theirs(reference, tmp_path)
    assert_close(logits(minipeft.load_adapter(llama(), tmp_path)), their_logits(reference))


@pytest.mark.parametrize("factory", [bert_classifier, gpt2_classifier])
def test_a_classifier_with_all_biases_trained_in_peft_is_read(factory, tmp_path):
    """PEFT then writes the head's bias three times: as itself, as modules_to_save.bias and as original_module.bias."""
    options = {"task_type": "SEQ_CLS", "bias": "all"}
    with foreign_code():
        reference = peft.get_peft_model(factory(), peft.LoraConfig(**options))
        optimizer = torch.optim.SGD([p for p in reference.parameters() if p.requires_grad], lr=1.0)
        reference(input_ids=token_ids(), labels=torch.tensor([0, 2])).loss.backward()
        optimizer.step()
    save_theirs(reference, tmp_path)
    assert_close(logits(minipeft.load_adapter(factory(), tmp_path)), their_logits(reference))


class Xvector(torch.nn.Module):
    """As Wav2Vec2's: a linear layer whose name is the ending of another module's, and that one cannot be adapted."""

    def __init__(self):
        super().__init__()
        self.body = torch.nn.ModuleDict(
            {"extractor": torch.nn.Sequential(torch.nn.Linear(6, 6)), "q": torch.nn.Linear(6, 6)}
        )
        self.extractor = torch.nn.Linear(6, 3)

    def forward(self, x):
        return self.extractor(torch.tanh(self.body["q"](self.body["extractor"](x))))


def test_a_layer_whose_name_ends_that_of_another_module_comes_back(tmp_path):
    torch.manual_seed(0)
    base, x = Xvector(), torch.randn(4, 6)
    model = minipeft.get_lora_model(copy.deepcopy(base), minipeft.LoraConfig(r=2, target_modules="all-linear"))
    assert len(list(adapted_layers(disturb(model)))) == 3
    model.save_pretrained(tmp_path)
    assert_close(minipeft.load_adapter(copy.deepcopy(base), tmp_path)(x), model(x))
    assert_close(load_theirs(copy.deepcopy(base), tmp_path)(x), model(x))


def test_a_trained_module_whose_name_ends_one_inside_of_it_is_read_by_peft(tmp_path):
    """PEFT takes ``embeddings`` for ``embeddings.word_embeddings`` too, and then reads not even its own file."""
    config = minipeft.LoraConfig(r=2, target_modules=["query"], modules_to_save=["embeddings"])
    model = disturb(minipeft.get_lora_model(bert_classifier(), config))
    model.save_pretrained(tmp_path)
    assert_close(their_logits(load_theirs(bert_classifier(), tmp_path)), logits(model))
    assert_close(logits(minipeft.load_adapter(bert_classifier(), tmp_path)), logits(model))


def masked_bert():
    """A model whose output bias has two names: the prediction head's own, and its last layer's."""
    config = transformers.BertConfig(**bert_classifier().config.to_diff_dict())
    torch.manual_seed(0)
    return disturb(transformers.BertForMaskedLM(config)).eval()


@pytest.mark.parametrize(("target", "own"), [("query", "decoder.bias"), ("decoder", "decoder.base_layer.bias")])
def test_all_biases_train_where_a_head_shares_one_with_its_layer(target, own, tmp_path):
    options = {"r": 4, "target_modules": [target], "bias": "all"}
    model = disturb(minipeft.get_lora_model(masked_bert(), minipeft.LoraConfig(**options)))
    model.save_pretrained(tmp_path / "ours")
    read = load_theirs(masked_bert(), tmp_path / "ours")
    assert_close(their_logits(read), logits(model))
    with foreign_code():
        reference = disturb(peft.get_peft_model(masked_bert(), peft.LoraConfig(**options)))
    assert reference.get_nb_trainable_parameters()[0] == model.get_nb_trainable_parameters()[0]
    save_theirs(reference, tmp_path / "theirs")
    names = {f"{PREFIX}cls.predictions.{name}" for name in ("bias", own)}
    assert names < tensors_in(tmp_path / "theirs").keys()
    assert_close(logits(minipeft.load_adapter(masked_bert(), tmp_path / "theirs")), their_logits(reference))
    merged = copy.deepcopy(model).merge_and_unload(untie=True)
    assert_close(logits(merged), logits(model))


def test_all_biases_train_where_the_layer_of_such_a_head_is_trained_in_full(tmp_path):
    """PEFT's file has the trained bias under one name, and under the other one that of the base, which no gradient reaches."""
    options = {"r": 4, "target_modules": ["query"], "bias": "all", "modules_to_save": ["decoder"]}
    with foreign_code():
        reference = peft.get_peft_model(masked_bert(), peft.LoraConfig(**options))
        their_loss = reference(input_ids=token_ids(), labels=token_ids()).loss
    their_loss.backward()
    torch.optim.SGD(reference.parameters(), lr=1.0).step()
    save_theirs(reference, tmp_path)
    assert f"{PREFIX}cls.predictions.bias" in tensors_in(tmp_path)
    model = minipeft.load_adapter(masked_bert(), tmp_path)
    assert_close(logits(model), their_logits(reference.eval()))
    assert not torch.allclose(logits(model), logits(masked_bert()), atol=1e-3)


def test_base_tables_that_peft_writes_on_request_are_read_over(tmp_path):
    reference = disturb(theirs("gpt2 conv1d"))
    with foreign_code():
        reference.save_pretrained(tmp_path, save_embedding_layers=True)
    assert f"{PREFIX}transformer.wte.weight" in tensors_in(tmp_path)
    assert_close(logits(minipeft.load_adapter(gpt2(), tmp_path)), their_logits(reference))


class Net(torch.nn.Module):
    """No transformers, names without a path, a layer in a plain list, and one without bias."""

    def __init__(self):
        super().__init__()
        self.table = torch.nn.Embedding(20, 6, padding_idx=0)
        self.stack = torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.ReLU(), torch.nn.Linear(6, 6))
        self.head = torch.nn.Linear(6, 4, bias=False)

    def forward(self, x):
        return self.head(self.stack(self.table(x)))


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["table", "0", "head"]},
        {"target_modules": "all-linear", "bias": "all"},
        {"target_modules": ["head", "stack.2"], "bias": "lora_only"},
        {"target_modules": ["0"], "modules_to_save": ["head", "table"]},
    ],
)
def test_a_plain_torch_model_goes_both_ways(options, tmp_path):
    def net():
        torch.manual_seed(0)
        return Net()

    ids = torch.randint(0, 20, (3, 5))
    with foreign_code():
        reference = disturb(peft.get_peft_model(net(), peft.LoraConfig(**options)))
    save_theirs(reference, tmp_path / "first")
    model = minipeft.load_adapter(net(), tmp_path / "first")
    model.save_pretrained(tmp_path / "second")
    loaded = load_theirs(net(), tmp_path / "second")
    with torch.no_grad():
        assert_close(model(ids), reference(ids))
        assert_close(loaded(ids), reference(ids))
        assert not torch.allclose(model(ids), net()(ids), atol=1e-3)
    assert_same_tensors(tensors_in(tmp_path / "first"), tensors_in(tmp_path / "second"))


@pytest.mark.parametrize("case", ["gpt2 all-linear rslora patterns", "llama embedding", "gpt2 modules_to_save"])
def test_on_a_half_precision_base_the_factors_stay_float32_as_in_peft(case, tmp_path):
    factory, options = CASES[case]
    with foreign_code():
        reference = disturb(peft.get_peft_model(factory().bfloat16(), peft.LoraConfig(**copy.deepcopy(options))))
    save_theirs(reference, tmp_path / "first")
    model = minipeft.load_adapter(factory().bfloat16(), tmp_path / "first")
    model.save_pretrained(tmp_path / "second")
    first, second = tensors_in(tmp_path / "first"), tensors_in(tmp_path / "second")
    assert_same_tensors({key: first[key] for key in second}, second)
    assert all(t.dtype == (torch.float32 if "lora_" in key else first[key].dtype) for key, t in second.items())
    # PEFT computes with a float32 copy of every input, we in the layer's own dtype: as far from the same model in
    # float32 as the base itself is, but not as near as PEFT gets.
    ids = token_ids(8, 32)
    exact = logits(minipeft.load_adapter(factory().bfloat16().float(), tmp_path / "first"), ids)
    error, their_error = ((found - exact).norm() for found in (logits(model, ids), their_logits(reference, ids)))
    assert error <= 2 * their_error


def test_a_config_of_four_keys_is_enough(tmp_path):
    """What a hand-written directory holds, by PEFT's reader."""
    reference = disturb(theirs("llama all-linear"))
    save_theirs(reference, tmp_path)
    path = tmp_path / "adapter_config.json"
    written = json.loads(path.read_text())
    path.write_text(json.dumps({key: written[key] for key in ("peft_type", "r", "lora_alpha", "target_modules")}))
    assert_close(logits(minipeft.load_adapter(llama(), tmp_path)), their_logits(reference))


@pytest.mark.parametrize(
    "case",
    [
        "gpt2 conv1d",
        "gpt2 all-linear rslora patterns",
        "gpt2 embedding",
        "gpt2 modules_to_save",
        "llama all-linear",
        "llama head",
        "llama embedding",
        "gpt2 bias lora_only",
    ],
)
def test_transformers_loads_our_files_into_a_plain_model(case, files_of):
    factory, _ = CASES[case]
    directory, expected = files_of("ours", case)
    plain = factory()
    with foreign_code():
        plain.load_adapter(str(directory))
    assert_close(logits(plain.eval()), expected)


@pytest.mark.parametrize(
    "case", ["gpt2 causal", "gpt2 all-linear rslora patterns", "llama all-linear", "llama embedding"]
)
def test_transformers_builds_base_and_adapter_from_our_directory(case, tmp_path):
    factory, options = CASES[case]
    with foreign_code():
        factory().save_pretrained(tmp_path / "base")
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = disturb(minipeft.get_lora_model(base, minipeft.LoraConfig(**options)))
    model.save_pretrained(tmp_path / "adapter")
    with foreign_code():
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
        automatic = (
            peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter") if "task_type" in options else loaded
        )
    assert_close(logits(loaded.eval()), logits(model))
    assert_close(logits(automatic.eval()), logits(model))


def test_transformers_builds_a_classifier_with_its_trained_head(tmp_path):
    factory, options = CASES["bert classifier"]
    with foreign_code():
        factory().save_pretrained(tmp_path / "base")
        base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    model = disturb(minipeft.get_lora_model(base, minipeft.LoraConfig(**options)))
    model.save_pretrained(tmp_path / "adapter")
    with foreign_code():
        loaded = peft.AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter", num_labels=3)
    assert_close(logits(loaded.eval()), logits(model))


def test_we_read_what_transformers_saves_of_an_adapter(tmp_path):
    factory, options = CASES["gpt2 conv1d"]
    plain = factory()
    with foreign_code():
        try:
            plain.add_adapter(peft.LoraConfig(**options))
        except ValueError as error:  # transformers 5.24 wants PEFT 0.22
            if "version of PEFT" not in str(error):
                raise
            pytest.skip(f"transformers refuses this PEFT: {error}")
        disturb(plain)
        plain.save_pretrained(tmp_path)
    assert_close(logits(minipeft.load_adapter(factory(), tmp_path)), logits(plain.eval()))


SELECTIONS = [
    (gpt2, {}),
    (gpt2, {"target_modules": ["c_attn"]}),
    (gpt2, {"target_modules": ["c_proj"]}),
    (gpt2, {"target_modules": ["attn.c_proj", "mlp.c_fc"]}),
    (gpt2, {"target_modules": ["transformer.h.1.attn.c_attn"]}),
    (gpt2, {"target_modules": ["wte", "lm_head"]}),
    (gpt2, {"target_modules": "all-linear"}),
    (gpt2, {"target_modules": "all-linear", "exclude_modules": ["c_proj"]}),
    (gpt2, {"target_modules": "all-linear", "exclude_modules": r".*\.0\..*"}),
    (gpt2, {"target_modules": "all-linear", "modules_to_save": ["mlp"]}),
    (gpt2, {"target_modules": r"transformer\.h\.0\.(attn|mlp)\.c_proj"}),
    (gpt2, {"target_modules": r".*c_attn|.*c_fc"}),
    (gpt2, {"target_modules": ["c_attn", "c_proj"], "layers_to_transform": 1}),
    (gpt2, {"target_modules": ["c_attn", "c_proj"], "layers_to_transform": [0], "layers_pattern": ["h"]}),
    (gpt2, {"target_modules": ["c_attn"], "layers_to_transform": [0, 1], "layers_pattern": "transformer.h"}),
    (gpt2_classifier, {"target_modules": "all-linear", "task_type": "SEQ_CLS"}),
    (llama, {}),
    (llama, {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}),
    (llama, {"target_modules": "all-linear"}),
    (llama, {"target_modules": ["embed_tokens", "lm_head"]}),
    (llama, {"target_modules": ["q_proj"], "exclude_modules": ["model.layers.0.self_attn.q_proj"]}),
    (llama, {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1], "layers_pattern": "layers"}),
    (llama, {"target_modules": ["self_attn.q_proj", "mlp.up_proj"], "layers_to_transform": [0]}),
    (llama, {"target_modules": "all-linear", "modules_to_save": ["lm_head", "embed_tokens"]}),
    (bert_classifier, {}),
    (bert_classifier, {"task_type": "SEQ_CLS"}),
    (bert_classifier, {"target_modules": "all-linear", "task_type": "SEQ_CLS"}),
    (bert_classifier, {"target_modules": ["dense"]}),
    (bert_classifier, {"target_modules": ["dense"], "exclude_modules": ["pooler.dense"]}),
    (bert_classifier, {"target_modules": ["query", "dense"], "layers_to_transform": [1], "layers_pattern": "layer"}),
    (bert_classifier, {"target_modules": ["word_embeddings"]}),
    (t5, {}),
    (t5, {"target_modules": "all-linear"}),
    (t5, {"target_modules": ["q", "k", "v", "o", "wi", "wo"]}),
    (t5, {"target_modules": r"decoder\..*(SelfAttention|EncDecAttention)\.(q|v)"}),
    (t5, {"target_modules": ["q"], "layers_to_transform": [1], "layers_pattern": "block"}),
    (t5, {"target_modules": ["SelfAttention.q"], "exclude_modules": r"encoder\..*"}),
    (t5, {"target_modules": ["shared"]}),
]


@pytest.mark.parametrize(("factory", "options"), SELECTIONS, ids=[f"{f.__name__} {o}" for f, o in SELECTIONS])
def test_the_modules_that_peft_would_adapt_are_adapted(factory, options):
    model = minipeft.get_lora_model(factory(), minipeft.LoraConfig(**options))
    with foreign_code():
        reference = peft.get_peft_model(factory(), peft.LoraConfig(**copy.deepcopy(options))).base_model.model
    adapted = {name for name, module in reference.named_modules() if isinstance(module, BaseTunerLayer)}
    saved = {name for name, module in reference.named_modules() if isinstance(module, ModulesToSaveWrapper)}
    assert {name for name, _ in adapted_layers(model)} == adapted
    assert {name for name, wrapper in wrappers(model) if isinstance(wrapper, SavedModule)} == saved


@pytest.mark.parametrize(
    "table",
    [
        {"h.1.attn.c_attn": 2, "c_attn": 4},
        {"h.0.mlp.c_fc": 2, "mlp.c_fc": 3, "c_attn": 4},
        {r".*\.1\..*c_fc": 2, "c_fc": 4},
        {"h.1.mlp.c_fc": 4, ".*c_fc": 2},
        {"h.1.mlp.c_fc": 3, "^transformer.h.*": 2},
        {r"h\.(0|2)\..*": 2, "c_fc|attn.c_attn": 4},
    ],
)
def test_each_module_gets_the_rank_and_the_scaling_that_peft_gives_it(table):
    """Where keys overlap the first counts, whether it is a plain name or not."""
    alphas = {key: 10 * value for key, value in table.items()}
    options = {
        "r": 6,
        "target_modules": ["c_attn", "c_fc"],
        "use_rslora": True,
        "rank_pattern": table,
        "alpha_pattern": alphas,
    }
    model = minipeft.get_lora_model(gpt2(), minipeft.LoraConfig(**options))
    with foreign_code():
        reference = peft.get_peft_model(gpt2(), peft.LoraConfig(**copy.deepcopy(options))).base_model.model
    found = {name: layer.adapter("default") for name, layer in adapted_layers(model)}
    expected = {name: module for name, module in reference.named_modules() if isinstance(module, BaseTunerLayer)}
    assert {name: len(lora.lora_A) for name, lora in found.items()} == {n: m.r["default"] for n, m in expected.items()}
    assert {n: lora.scaling for n, lora in found.items()} == {n: m.scaling["default"] for n, m in expected.items()}


def test_all_linear_may_be_written_in_capitals():
    """As in PEFT, which compares without case."""
    model = minipeft.get_lora_model(llama(), minipeft.LoraConfig(target_modules="ALL-LINEAR"))
    expected = minipeft.get_lora_model(llama(), minipeft.LoraConfig(target_modules="all-linear"))
    assert model.adapter_state_dict().keys() == expected.adapter_state_dict().keys()


@pytest.mark.parametrize(("factory", "head"), [(gpt2_classifier, "score"), (bert_classifier, "classifier")])
def test_all_linear_leaves_a_classification_head_out_even_without_a_task_type(factory, head):
    """Unlike PEFT, which knows such a head by the task type only, and puts LoRA on its random weights."""
    model = minipeft.get_lora_model(factory(), minipeft.LoraConfig(target_modules="all-linear"))
    with foreign_code():
        reference = peft.get_peft_model(factory(), peft.LoraConfig(target_modules="all-linear")).base_model.model
    adapted = {name for name, module in reference.named_modules() if isinstance(module, BaseTunerLayer)}
    assert {name for name, _ in adapted_layers(model)} == adapted - {head}


def refused(directory, factory, *named):
    model = factory()
    before = state_digest(model)
    with pytest.raises(minipeft.MinipeftError) as caught:
        minipeft.load_adapter(model, directory)
    for word in named:
        assert word in str(caught.value)
    assert state_digest(model) == before


@pytest.mark.parametrize(
    ("factory", "options", "named"),
    [
        (llama, {"target_modules": ["q_proj"], "layer_replication": [[0, 2], [1, 2]]}, "layer_replication"),
        (llama, {"target_modules": ["q_proj"], "init_lora_weights": "pissa"}, "pissa"),
        (llama, {"target_modules": ["q_proj"], "init_lora_weights": "pissa_niter_4"}, "pissa_niter_4"),
        (llama, {"target_modules": ["q_proj"], "init_lora_weights": "olora"}, "olora"),
        (
            llama,
            {"target_modules": ["q_proj"], "task_type": "CAUSAL_LM", "alora_invocation_tokens": [1]},
            "alora_invocation_tokens",
        ),
    ],
)
def test_what_peft_does_and_we_do_not_is_refused_by_name(factory, options, named, tmp_path):
    with foreign_code():
        peft.get_peft_model(factory(), peft.LoraConfig(r=4, **options)).save_pretrained(tmp_path)
    refused(tmp_path, factory, named)


def test_another_method_of_peft_is_refused_by_name(tmp_path):
    with foreign_code():
        config = peft.HRAConfig(target_modules=["q_proj"], r=2)
        peft.get_peft_model(llama(), config).save_pretrained(tmp_path)
    refused(tmp_path, llama, "HRA")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("alpha", 3),
        ("lora_alhpa", 3),
        ("use_qalora", True),
        ("arrow_config", {"top_k": 3}),
        ("megatron_config", {"hidden": 1}),
        ("kasa_config", {"beta": 0.1}),
        ("monteclora_config", {"num_samples": 8}),
        ("init_lora_weights", "lora_ga"),
        ("init_lora_weights", "corda"),
        ("init_lora_weights", "loftq"),
        ("peft_type", "A_METHOD_TO_COME"),
    ],
)
def test_a_key_that_asks_for_something_unknown_is_refused_by_name(key, value, files_of, tmp_path):
    shutil.copytree(files_of("theirs", "gpt2 conv1d")[0], tmp_path, dirs_exist_ok=True)
    path = tmp_path / "adapter_config.json"
    values = json.loads(path.read_text())
    if key == "lora_alhpa":
        del values["lora_alpha"]
    path.write_text(json.dumps({**values, key: value}))
    refused(tmp_path, gpt2, key)


def test_an_unknown_key_that_asks_for_nothing_is_read_over(tmp_path):
    reference = disturb(theirs("gpt2 conv1d"))
    save_theirs(reference, tmp_path)
    path = tmp_path / "adapter_config.json"
    neutral = {"future_flag": False, "future_config": None, "future_table": {}, "future_list": []}
    path.write_text(json.dumps({**json.loads(path.read_text()), **neutral}))
    assert_close(logits(minipeft.load_adapter(gpt2(), tmp_path)), their_logits(reference))


def test_a_table_of_another_base_is_refused(tmp_path):
    """PEFT writes the base's own table beside an adapted embed_tokens; in another base it is not the same."""
    save_theirs(disturb(theirs("llama embedding")), tmp_path)
    refused(tmp_path, lambda: llama(seed=7), "embed_tokens")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"target_modules": ["c_attn", "transformer.h.0.mlp.c_fc"], "layers_to_transform": [1]}, "h.0.mlp.c_fc"),
    ],
)
def test_a_file_that_holds_more_than_its_options_say_is_refused(options, named, tmp_path):
    """PEFT takes a full name past layers_to_transform; no tensor of such a file is dropped."""
    with foreign_code():
        disturb(peft.get_peft_model(gpt2(), peft.LoraConfig(**options))).save_pretrained(tmp_path)
    refused(tmp_path, gpt2, named)


def test_a_bare_state_without_the_prefix_is_read(tmp_path):
    """PEFT reads such a file, changes nothing and warns at most."""
    model = disturb(theirs("gpt2 conv1d"))
    save_theirs(model, tmp_path)
    tensors = {key.removeprefix(PREFIX): tensor for key, tensor in tensors_in(tmp_path).items()}
    save_file(tensors, tmp_path / "adapter_model.safetensors", {"format": "pt"})
    torch.testing.assert_close(logits(minipeft.load_adapter(gpt2(), tmp_path)), their_logits(model))


@pytest.mark.parametrize("name", [*minipeft.OF_PEFT, "AutoPeftModelForCausalLM", "PeftModelForSequenceClassification"])
def test_a_name_of_peft_that_is_imported_from_minipeft_is_answered_with_ours(name):
    assert hasattr(peft, name)
    with pytest.raises(minipeft.MinipeftError, match=f"minipeft has no {name}, which is PEFT's; ") as caught:
        exec(f"from minipeft import {name}")
    assert isinstance(caught.value, ImportError)
    assert not hasattr(minipeft, name)
    with pytest.raises(AttributeError, match=f"minipeft has no {name}, which is PEFT's; "):
        getattr(minipeft, name)
    for ours in re.findall(r"use (?:model\.)?(\w+)", str(caught.value)):
        assert hasattr(minipeft, ours) or hasattr(minipeft.AdaptedModel, ours)
    with pytest.raises(ImportError, match="cannot import name 'get_peft_modle'"):
        from minipeft import get_peft_modle  # noqa: F401


def test_a_configuration_of_peft_that_is_not_here_is_answered_with_those_that_are():
    for name in peft.__all__:
        if name.endswith(("Config", "Model")) and not hasattr(minipeft, name):
            with pytest.raises(minipeft.MinipeftError, match=f"minipeft has no {name}[,;]") as caught:
                exec(f"from minipeft import {name}")
            offered = set(re.findall(r"\w+Config\b", str(caught.value))) - {name}
            assert all(hasattr(minipeft, word) for word in offered)
    with pytest.raises(ImportError, match="its methods are those of AdaLoraConfig, .*, LoraConfig, .*VeraConfig"):
        from minipeft import PrefixTuningConfig  # noqa: F401
