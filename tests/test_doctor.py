"""The doctor finds what is wrong with a set-up, nothing else, and leaves everything as it was."""

import functools
import hashlib
import json
import random
from pathlib import Path

import doctor_table
import numpy
import pytest
import torch
from doctor_cases import BROKEN, HEALTHY, lora, peft_lora, tokenizer, training
from tiny_models import adapted, disturb, foreign_code, gpt2, llama
from torch import nn
from typer.testing import CliRunner

import minipeft
from minipeft import ConfigError, DataError, LoraConfig, diagnose, get_lora_model
from minipeft.cli.main import app
from minipeft.diagnosis.check import Setup
from minipeft.diagnosis.diagnose import CHECKS, view_of
from minipeft.diagnosis.rates import _steps

ROOT = Path(__file__).resolve().parents[1]
PAGE, TINY = ROOT / "docs" / "doctor.md", ROOT / "examples" / "assets" / "tiny"


def everything(model, optimizer=None):
    """All that a diagnosis must leave alone, as one digest and the objects that must stay the same."""
    digest, kept = hashlib.sha256(), []
    for name, module in model.named_modules():
        hooks = [len(hooks) for key, hooks in vars(module).items() if key.endswith("hooks")]
        digest.update(f"{name} {type(module).__qualname__} {module.training} {hooks}".encode())
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    for name, tensor in tensors:
        kept += [tensor, tensor.grad]
        digest.update(f"{name} {tensor.requires_grad} {tensor.dtype}".encode())
        for values in (tensor, tensor.grad):
            if type(values).__module__.startswith("torchao"):
                values = values.dequantize()
            if values is not None and not values.is_meta:
                digest.update(values.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    for module in model.modules():
        state = vars(module).get("_minipeft")
        digest.update(repr(None if state is None else [vars(state), vars(state.switch)]).encode())
    digest.update(repr(None if optimizer is None else optimizer.state_dict()).encode())
    digest.update(
        repr(
            (random.getstate(), numpy.random.get_state()[1].tobytes(), torch.get_rng_state().numpy().tobytes())
        ).encode()
    )
    return digest.hexdigest(), kept


def diagnosed(case):
    """The names of what is found in a set-up, which is as before afterwards, with gradients that were there."""
    torch.manual_seed(0)
    with foreign_code():
        made = case.make()
    for parameter in made["model"].parameters():
        if parameter.requires_grad and not parameter.is_meta:
            parameter.grad = torch.full_like(parameter, 0.5)
    before, kept = everything(made["model"], made.get("optimizer"))
    found = diagnose(**made)
    after, now = everything(made["model"], made.get("optimizer"))
    assert after == before
    assert all(new is old for new, old in zip(now, kept, strict=True))
    return [finding.name for finding in found]


@pytest.fixture(scope="module")
def found():
    """What was found in each set-up, for the table."""
    return {}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_set_up_is_found_by_its_name_and_nothing_else(what, found):
    found[what] = diagnosed(BROKEN[what])
    assert found[what] == list(BROKEN[what].finds)


@pytest.mark.parametrize("what", HEALTHY)
def test_a_healthy_set_up_yields_nothing(what, found):
    found[what] = diagnosed(HEALTHY[what])
    assert found[what] == []


def test_the_table_of_the_page_is_what_was_found(found):
    for what, case in {**BROKEN, **HEALTHY}.items():
        if what not in found:  # in a run of this test alone
            found[what] = doctor_table.found_in(case)
    assert doctor_table.table(found) in PAGE.read_text("utf-8")


def test_every_check_has_a_set_up_that_it_finds():
    assert {name for case in BROKEN.values() for name in case.finds} == {"no-adapter", *(c.name for c in CHECKS)}


def test_explanations_name_checks_that_come_before():
    known = {"no-adapter"}
    for check in CHECKS:
        assert known.issuperset(check.unless), check.name
        known.add(check.name)


def test_a_finding_reads_well_and_is_data():
    made = training(lora())
    made["model"].disable_adapters()
    (finding,) = diagnose(**made)
    assert str(finding).splitlines()[0] == "adapters-disabled: adapter 'default'"
    assert finding.to_dict()["fix"] == "model.enable_adapters()"
    assert json.loads(json.dumps(finding.to_dict())) == finding.to_dict()


@pytest.mark.parametrize("base", ["ours", "PEFT's"])
def test_sizes_of_updates_and_steps_are_those_of_the_real_ones(base):
    model = disturb(lora(target_modules=["c_attn"]) if base == "ours" else peft_lora(target_modules=["c_attn"]))
    made = training(model)
    view = view_of(model)
    part = view.parts[0]
    layer = view.root.get_submodule("transformer.h.0.attn.c_attn")
    if base == "ours":
        down, up = (getattr(layer.adapters["default"], name) for name in ("lora_A", "lora_B"))
    else:
        down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    weight = layer.base_layer.weight.detach().double()
    before = 2 * (up.detach().double() @ down.detach().double())
    assert part.update_norm() == pytest.approx(float(before.norm()), rel=1e-5)
    assert part.weight_norm() == pytest.approx(float(weight.norm()), rel=1e-5)
    ((_, step), *_) = _steps(Setup(view, made["batch"], made["optimizer"], None, None))
    model(**made["batch"]).loss.backward()
    made["optimizer"].step()
    moved = 2 * (up.detach().double() @ down.detach().double()) - before
    assert 0.5 < step / float(moved.norm() / weight.norm()) < 2


def test_sizes_are_the_same_for_both_libraries():
    ours, theirs = lora(use_rslora=True), peft_lora(use_rslora=True)
    for part, other in zip(view_of(ours).parts, view_of(theirs).parts, strict=True):
        for mine, own in zip(part.parameters.values(), other.parameters.values(), strict=True):
            own.data.copy_(mine.data.normal_())
        assert (part.layer, part.adapter, part.scaling) == (other.layer, other.adapter, other.scaling)
        assert part.update_norm() == pytest.approx(other.update_norm(), rel=1e-4)
        assert part.weight_norm() == pytest.approx(other.weight_norm(), rel=1e-6)


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.linear, self.drop = nn.BatchNorm1d(8), nn.Linear(8, 3), nn.Dropout(0.5)

    def forward(self, x, labels):
        random.random()
        numpy.random.random()
        logits = self.linear(self.drop(self.norm(x)))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


@pytest.mark.parametrize("adapt", ["ours", "PEFT's"])
def test_statistics_hooks_and_generators_stay_as_they_are(adapt):
    options = {"r": 2, "lora_alpha": 4, "target_modules": ["linear"]}
    model = get_lora_model(Normed(), LoraConfig(**options)) if adapt == "ours" else peft_lora(Normed(), **options)
    made = training(model, {"x": torch.randn(4, 8), "labels": torch.tensor([0, 1, 2, 0])})
    steps = []
    for parameter in made["optimizer"].param_groups[0]["params"]:
        parameter.register_post_accumulate_grad_hook(lambda p: steps.append(p))  # as an optimizer in the backward pass
    before, _ = everything(model, made["optimizer"])
    assert diagnose(**made) == []
    assert everything(model, made["optimizer"])[0] == before
    assert steps == []
    model(**made["batch"])["loss"].backward()
    assert len(steps) == 2


def test_a_model_is_left_alone_even_if_the_batch_fails():
    model = lora(lora_dropout=0.1).eval()
    before, _ = everything(model)
    with pytest.raises(DataError):
        diagnose(model, {"input_ids": torch.tensor([[1, 1000]]), "labels": torch.tensor([[1, 1]])})
    assert everything(model)[0] == before


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ({"input_ids": torch.tensor([[1, 2]])}, "training needs labels"),
        (
            {"input_ids": torch.tensor([[1, 1000]]), "labels": torch.tensor([[1, 1]])},
            "cannot take this batch (IndexError",
        ),
        ({"pixels": torch.ones(1)}, "cannot take this batch"),
        ([1, 2], "must be what the model is called with"),
    ],
    ids=["no labels", "unknown ids", "another argument", "a list"],
)
def test_a_batch_that_cannot_be_tried_is_one_line(rows, words):
    with pytest.raises(DataError) as caught:
        diagnose(lora().train(), rows)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_without_labels_a_model_for_use_is_run_forward():
    assert diagnose(adapted(), {"input_ids": torch.tensor([[1, 2]])}) == []


def test_what_cannot_be_diagnosed_is_refused():
    import peft

    prompts = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with foreign_code():
        tuned = peft.get_peft_model(gpt2(), prompts)
    with pytest.raises(ConfigError, match="puts nothing on layers"):
        diagnose(tuned)
    with pytest.raises(ConfigError, match="takes a model"):
        diagnose({})
    with pytest.raises(ConfigError, match="optimizer must be"):
        diagnose(lora(), optimizer=1e-3)


def test_wrappers_are_looked_into():
    made, compiled = training(lora(), rate=0.0), functools.partial(torch.compile, backend="eager")
    names = [
        [f.name for f in diagnose(**{**made, "model": wrap(made["model"])})] for wrap in (compiled, nn.DataParallel)
    ]
    assert names == [["learning-rate-zero"]] * 2


class Outer(nn.Module):
    """A model inside another one, as sentence-transformers holds it."""

    def __init__(self, *inner):
        super().__init__()
        self.inner = nn.ModuleList(inner)

    def forward(self, **inputs):
        return self.inner[0](**inputs)


@pytest.mark.parametrize("adapt", [lora, peft_lora])
def test_an_adapted_model_is_found_inside_another_one(adapt):
    made = training(Outer(adapt(lora_dropout=0.1)))
    assert diagnose(**made) == []
    assert [f.name for f in diagnose(**{**made, "model": made["model"].eval()})] == ["eval-in-training"]


def test_of_several_adapted_models_none_is_passed_over():
    with pytest.raises(ConfigError, match="2 adapted models"):
        diagnose(Outer(lora(), lora()))


METHODS = {
    "loha": minipeft.LoHaConfig(target_modules=["q_proj"]),
    "lokr": minipeft.LoKrConfig(target_modules=["q_proj"]),
    "oft": minipeft.OFTConfig(target_modules=["q_proj"], oft_block_size=8),
    "ia3": minipeft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]),
    "vera": minipeft.VeraConfig(target_modules=["q_proj"]),
    "adalora": minipeft.AdaLoraConfig(target_modules=["q_proj"], total_step=10),
    "trainable tokens": minipeft.TrainableTokensConfig(token_indices=[1, 99]),
    "pissa": LoraConfig(target_modules=["q_proj"], init_lora_weights="pissa"),
    "a head and a table": LoraConfig(target_modules=["embed_tokens", "lm_head"]),
    "trained copies": LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"]),
}


@pytest.mark.parametrize("method", METHODS)
def test_other_methods_are_healthy_before_their_first_step_and_after_it(method):
    made = training(minipeft.get_adapter_model(llama(), METHODS[method]))
    assert diagnose(**made) == []
    made["model"](**made["batch"]).loss.backward()
    made["optimizer"].step()
    assert diagnose(**made) == []


def test_the_readme_has_the_counts_of_these_set_ups_and_checks():
    readme = (ROOT / "README.md").read_text("utf-8")
    for counted in (
        f"{len(CHECKS)} checks of your model",
        f"{len(BROKEN)} broken set-ups",
        f"{len(HEALTHY)} healthy ones",
    ):
        assert counted in readme


def test_the_page_shows_what_its_code_prints(capsys):
    text = PAGE.read_text("utf-8")
    code = text.partition("```python\n")[2].partition("```")[0]
    with foreign_code():
        exec(code.replace("openai-community/gpt2", str(TINY)), {})
    assert f"```text\n{capsys.readouterr().out}```" in text


FIXED_BY_CODE = (
    "adapters switched off",
    "PEFT's adapters switched off",
    "PEFT's model with no adapter active",
    "a scale of zero",
    "a merged adapter in training",
    "PEFT's merged adapter in training",
    "two active adapters that train",
    "the optimizer of a copy",
    "the optimizer made first",
    "all parameters in the optimizer",
    "a base that trains",
    "a quantized base whose norms train",
    "PEFT's ViT with reentrant checkpointing",
    "float16 adapters",
    "bfloat16 adapters at a small rate",
    "PEFT's dropout in evaluation",
    "a model left in evaluation mode",
    "labels shifted by hand",
    "labels on the padding",
)


@pytest.mark.parametrize("what", FIXED_BY_CODE)
def test_fixes_that_are_code_repair_the_set_up(what):
    with foreign_code():
        made = BROKEN[what].make()
    found, fixes = diagnose(**made), 0
    while found and fixes < 2:  # the optimizer of a base that trained is to be made again
        names = {"torch": torch, **made, **made["batch"]}
        with foreign_code():
            exec(found[0].fix, names)
        made = {name: names[name] for name in made} | {"batch": {name: names[name] for name in made["batch"]}}
        found, fixes = diagnose(**made), fixes + 1
    assert (found, fixes > 0) == ([], True)


# The command


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A base with its tokenizer, and adapters of it."""
    root = tmp_path_factory.mktemp("doctor")
    gpt2().save_pretrained(root / "base")
    tokenizer(eos_token="w0", model_max_length=64).save_pretrained(root / "base")
    with foreign_code():
        base = type(gpt2()).from_pretrained(root / "base")
    model = lora(base)
    model.save_pretrained(root / "fresh")
    disturb(model).save_pretrained(root / "good")
    disturb(lora(gpt2(seed=1))).save_pretrained(root / "other")
    (root / "text.txt").write_text("w3 w4 w5 w6")
    return root


def run(*arguments):
    with foreign_code():
        return CliRunner().invoke(app, ["doctor", *map(str, arguments)])


def test_the_command_answers_by_its_exit_code(folders):
    healthy = run(folders / "good", "--text", folders / "text.txt")
    assert healthy.exit_code == 0
    assert f"healthy, none of {len(CHECKS)} checks found anything" in healthy.output
    untrained = run(folders / "fresh", "--base", folders / "base")
    assert untrained.exit_code == 1
    assert untrained.output.startswith("adapter-untrained: adapter 'default' on")


def test_the_command_prints_json(folders):
    answer = run(folders / "fresh", "--json")
    assert answer.exit_code == 1
    assert [finding["name"] for finding in json.loads(answer.output)["findings"]] == ["adapter-untrained"]


def test_keys_that_a_file_lacks_are_a_finding(folders, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(folders / "good", tmp_path / "part")
    file = tmp_path / "part" / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors.pop(min(tensors))
    save_file(tensors, file)
    answer = run(tmp_path / "part")
    assert answer.exit_code == 1
    assert "7 of the adapter's 8 keys matched" in answer.output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nothing"], "is not a directory"),
        (["other", "--base", "base"], "was trained on another base"),
        (["other"], "does not name its base model"),
        (["good", "--base", "good"], "config.json"),
        (["good", "--text", "nothing.txt"], "cannot be read as text"),
    ],
    ids=["no adapter", "another base", "no base", "no model", "no text"],
)
def test_what_the_command_cannot_do_is_one_line(folders, arguments, words):
    places = [word if word.startswith("--") else folders / word for word in arguments]
    with foreign_code():
        result = CliRunner().invoke(app, ["doctor", *map(str, places)], standalone_mode=False)
    assert isinstance(result.exception, minipeft.MinipeftError), result.output
    assert words in str(result.exception)
    assert "\n" not in str(result.exception)


def test_a_classifier_is_loaded_with_the_head_of_its_file(tmp_path):
    from tiny_models import bert_classifier

    with foreign_code():
        bert_classifier().bert.save_pretrained(tmp_path / "base")
        base = type(bert_classifier()).from_pretrained(tmp_path / "base", num_labels=3)
    model = get_lora_model(base, LoraConfig(r=4, task_type="SEQ_CLS"))
    disturb(model).save_pretrained(tmp_path / "adapter")
    assert run(tmp_path / "adapter").output.endswith("found anything\n")
