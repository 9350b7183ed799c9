"""Training that would teach an adapter nothing is named: it is merged, not in the optimizer, or gets no gradient."""

import contextlib
import itertools
import warnings
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from tiny_models import adapted, bert_classifier, foreign_code, gpt2, token_ids
from torch import nn
from transformers import TrainerCallback, TrainingArguments

from minipeft import LoraConfig, StateError, get_lora_model, load_adapter
from minipeft.hf import AdapterTrainer
from minipeft.injection.training_guard import check_training
from minipeft.injection.without_gradient import WATCHES
from minipeft.testing.case import fingerprint
from minipeft.training.updates import Updater

LABELS = torch.tensor([0, 1])


def classifier():
    return get_lora_model(bert_classifier(), LoraConfig(r=2, task_type="SEQ_CLS")).train()


def loss(model):
    return model(input_ids=token_ids(), labels=LABELS).loss


def test_a_training_pass_with_a_merged_adapter_warns_once_a_merge():
    model = classifier()
    model.merge_adapter()
    with pytest.warns(UserWarning, match=r"'default' is merged.*no gradient.*unmerge_adapter\(\)") as said:
        loss(model).backward()
    assert "minipeft" in said[0].filename
    loss(model)
    model.unmerge_adapter()
    loss(model)
    model.merge_adapter()
    with pytest.warns(UserWarning, match="no gradient"):
        loss(model)


def test_an_adapter_that_is_all_that_trains_is_named_too():
    model = adapted(gpt2()).train()
    model.merge_adapter()
    with pytest.warns(UserWarning, match="'default' is merged"):
        model(input_ids=token_ids(), labels=token_ids())


@pytest.mark.parametrize("mode", ["evaluation", "no gradients", "nothing trains", "frozen"])
def test_other_passes_say_nothing(mode):
    model = classifier()
    if mode == "frozen":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and "lora" not in name)
    if mode == "nothing trains":
        model = get_lora_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(r=2, target_modules=["0"]))
    model.merge_adapter()
    model.train(mode != "evaluation")
    with torch.set_grad_enabled(mode != "no gradients"):
        model(torch.randn(2, 4)) if mode == "nothing trains" else loss(model)


def test_a_second_adapter_that_trains_on_top_of_a_merged_one_says_nothing_if_that_does_not_train(tmp_path):
    first = adapted(gpt2())
    first.save_pretrained(tmp_path)
    model = gpt2()
    load_adapter(model, tmp_path)
    model.merge_adapter()
    model.add_adapter("second", LoraConfig(r=2))
    model.unmerge_adapter()
    model.set_adapter(["default", "second"])
    model.merge_adapter(["default"])
    model.train()(input_ids=token_ids(), labels=token_ids()).loss.backward()


@pytest.mark.parametrize("leave", ["unmerge_adapter", "unload", "merge_and_unload"])
def test_nothing_is_left_behind(leave):
    model = classifier()
    before = fingerprint(model)
    model.merge_adapter()
    getattr(model, leave)()
    assert not model._forward_hooks
    assert not model._forward_hooks_with_kwargs
    assert leave != "unmerge_adapter" or fingerprint(model) == before


def test_an_optimizer_without_any_of_the_adapters_parameters_is_refused():
    base = bert_classifier()
    optimizer = torch.optim.SGD(base.parameters(), 0.1)
    model = get_lora_model(base, LoraConfig(r=2, task_type="SEQ_CLS"))
    with pytest.raises(StateError, match=r"optimizer has none .*'default'.*after adapting"):
        check_training(model, optimizer)
    check_training(model, torch.optim.SGD([p for n, p in model.named_parameters() if n.endswith("lora_B")], 0.1))
    check_training(base.unload(), optimizer)


def test_training_while_merged_is_refused():
    model = classifier()
    model.merge_adapter()
    with warnings.catch_warnings(), pytest.raises(StateError, match="'default' is merged"):
        check_training(model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1))


@pytest.mark.parametrize("fault", ["optimizer", "merged"])
def test_the_trainer_refuses_both_before_the_first_step(fault, tmp_path):
    base = gpt2()
    optimizer = torch.optim.SGD(base.parameters(), 0.1)
    model = adapted(base)
    if fault == "merged":
        model.merge_adapter()
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer)
    arguments = TrainingArguments(str(tmp_path), max_steps=1, use_cpu=True, report_to=[], disable_tqdm=True)
    data = [{"input_ids": ids, "labels": ids} for ids in token_ids()]
    trainer = AdapterTrainer(model, arguments, train_dataset=data, optimizers=(optimizer, schedule))
    with pytest.raises(StateError, match="optimizer has none" if fault == "optimizer" else "is merged"):
        trainer.train()


class Chooses(TrainerCallback):
    """Lets another adapter act after each step."""

    def __init__(self, model, names):
        self.model, self.names = model, itertools.cycle(names)

    def on_step_end(self, *args, **kwargs):
        self.model.set_adapter(next(self.names))


def choosing_trainer(folder, both):
    """A Trainer of a model with two adapters, of which a callback chooses one after each step, and its optimizer."""
    model = adapted(gpt2())
    model.add_adapter("second", LoraConfig(r=2))
    parameters = [p for name in ("default", "second")[: 1 + both] for p in model.adapter_parameters(name)]
    optimizer = torch.optim.SGD(parameters, 0.1)
    arguments = TrainingArguments(
        str(folder), max_steps=3, use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="no"
    )
    data = [{"input_ids": ids, "labels": ids} for ids in token_ids()]
    schedule, choice = torch.optim.lr_scheduler.ConstantLR(optimizer), Chooses(model, ["second", "default"])
    optimizers = optimizer, schedule
    return AdapterTrainer(model, arguments, train_dataset=data, optimizers=optimizers, callbacks=[choice])


def test_an_adapter_that_a_callback_chooses_must_be_in_the_optimizer(tmp_path):
    with foreign_code(), pytest.raises(StateError, match="optimizer has none .*'second'"):
        choosing_trainer(tmp_path, both=False).train()
    with foreign_code():
        choosing_trainer(tmp_path, both=True).train()


@pytest.mark.parametrize("from_the_start", [False, True])
def test_an_adapter_that_is_chosen_after_ddp_wrapped_the_model_is_refused(from_the_start, tmp_path):
    trainer = choosing_trainer(tmp_path, both=True)
    if from_the_start:
        trainer.model.train_adapters(["default", "second"])
    call, several = trainer.callback_handler.callbacks[-1], SimpleNamespace(world_size=2)
    call.on_train_begin(several, None, None, optimizer=trainer.optimizer)
    trainer.model.set_adapter("second")
    with contextlib.nullcontext() if from_the_start else pytest.raises(StateError, match="'second' did not train when"):
        call.on_step_begin(several, None, None, optimizer=trainer.optimizer)


def test_an_adapter_that_trains_besides_the_active_one_must_be_in_the_optimizer():
    model = adapted(gpt2())
    model.add_adapter("second", LoraConfig(r=2))
    model.train_adapters(["second"])
    check_training(model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1))
    with pytest.raises(StateError, match="optimizer has none .*'second'"):
        check_training(model, torch.optim.SGD(model.adapter_parameters("default"), 0.1))


@pytest.mark.usefixtures("fresh_accelerator")
def test_the_updater_refuses_an_optimizer_made_before_adapting():
    base = gpt2()
    optimizer = torch.optim.SGD(base.parameters(), 0.1)
    model, accelerator = adapted(base), Accelerator(cpu=True)
    with pytest.raises(StateError, match="optimizer has none"):
        Updater(accelerator, model, accelerator.prepare(optimizer), micro_batch=1, clip=1.0)


class Partly(nn.Module):
    """A layer reads under no_grad, another's output is not in the loss, and a tower runs for images only."""

    def __init__(self):
        super().__init__()
        self.text, self.indexer, self.pooler = (nn.Linear(4, 4) for _ in range(3))
        self.tower = nn.Sequential(nn.Linear(4, 4))

    def forward(self, x, image=None):
        with torch.no_grad():
            index = self.indexer(x).argmax(-1)
        y = self.text(x) if image is None else self.text(x) + self.tower(image)
        return y[torch.arange(len(x)), index], self.pooler(y)


def steps_of(model, count, image=None):
    """Train, and return which steps warned, and of what."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    said = []
    for step in range(1, count + 1):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model(torch.randn(3, 4), image)[0].sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        said += [(step, str(warning.message).partition(":")[0], warning.filename) for warning in caught]
    return said


def test_layers_without_a_gradient_in_ten_steps_are_named_once():
    model = get_lora_model(Partly(), LoraConfig(r=2, target_modules="all-linear")).train()
    assert steps_of(model, 12) == [(10, "'indexer', 'pooler', 'tower.0'", __file__)]


def test_a_layer_with_a_gradient_in_one_of_ten_steps_is_not_named():
    model = get_lora_model(Partly(), LoraConfig(r=2, target_modules=["text", "tower.0"])).train()
    assert steps_of(model, 1, torch.randn(3, 4)) == steps_of(model, 12) == []


def test_each_adapter_is_watched_while_it_trains_and_no_longer():
    model = get_lora_model(Partly(), LoraConfig(r=2, target_modules=["text"])).train()
    model.add_adapter("second", LoraConfig(r=2, target_modules=["text", "pooler"]))
    assert steps_of(model, 2) == []
    assert list(WATCHES[model]) == ["second"]
    model.set_adapter("second")
    assert [step for step, *_ in steps_of(model, 12)] == [10]
    assert not WATCHES[model]


class Headed(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x, image=None):
        return (self.head(self.body(x)),)


def headed():
    return get_lora_model(Headed(), LoraConfig(r=2, target_modules=["body"], modules_to_save=["head"])).train()


def first_warnings(model):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
        for _ in range(2):
            model(torch.randn(3, 4))[0].sum().backward()
            optimizer.step()
    return [str(warning.message) for warning in caught if warning.filename == __file__]


@pytest.mark.parametrize("kind", ["torchao", "bitsandbytes"])
def test_a_trained_copy_that_is_quantized_after_adapting_is_named_at_the_first_step(kind):
    with foreign_code():
        package = pytest.importorskip("torchao.quantization" if kind == "torchao" else kind)
    model = headed()
    if kind == "torchao":
        package.quantize_(model, package.Int8WeightOnlyConfig())
    else:  # as its own way of quantizing a model does
        model.head.adapters["default"] = package.nn.Linear8bitLt(4, 4, has_fp16_weights=False)
    (said,) = first_warnings(model)
    assert said.startswith("'head': what adapter 'default' trains there was quantized after adapting")


@pytest.mark.parametrize("layer", ["body", "head"])
def test_a_layer_that_is_frozen_after_adapting_is_named_at_the_first_step(layer):
    model = headed()
    for parameter in model.get_submodule(layer).parameters():
        parameter.requires_grad_(False)
    (said,) = first_warnings(model)
    assert said.startswith(
        f"'{layer}': adapter 'default' learns nothing there, since something has set requires_grad=False"
    )
    for parameter in model.adapter_parameters("default"):  # as it says
        parameter.requires_grad_(True)
    assert all(p.requires_grad for p in model.get_submodule(f"{layer}.adapters").parameters())


def test_a_factor_that_is_frozen_on_purpose_is_not_named():
    model = headed()
    model.body.adapters["default"].lora_A.requires_grad_(False)
    assert first_warnings(model) == []


@pytest.mark.parametrize("projects", ["frozen weights", "copies that train", "nothing"])
def test_an_optimizer_that_projects_no_gradient_of_an_adapter_is_named(projects):
    """As transformers makes the groups of GaLore and APOLLO: of the weights of nn.Linear modules."""
    model = classifier()
    kept = [model.classifier.adapters["default"].weight] if projects == "copies that train" else []
    frozen = [
        module.weight for module in model.modules() if type(module) is nn.Linear and not module.weight.requires_grad
    ]
    more = {"update_proj_gap": 200, "rank": 128} if projects != "nothing" else {}
    rest = [p for p in model.parameters() if p.requires_grad and not any(p is other for other in kept)]
    optimizer = torch.optim.AdamW([{"params": rest}, {"params": [*frozen, *kept], **more}])
    loss(model).backward()
    said = pytest.warns(UserWarning, match=r"AdamW projects the gradients of frozen weights alone.*optim='adamw_torch'")
    with said if projects == "frozen weights" else contextlib.nullcontext():
        optimizer.step()
