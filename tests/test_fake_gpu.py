"""No step of training mixes devices or reads a value, on a GPU that has no values to read (see `fake_gpu`)."""

import pytest
import torch
from fake_gpu import fake_gpu, on
from method_cases import CASES, ours
from test_split_experts import moe, with_lora
from tiny_models import adapted, foreign_code, gpt2, llama
from torch.utils._python_dispatch import TorchDispatchMode

from minipeft import lean, per_adapter_loss
from minipeft.injection.module_tree import adapted_layers
from minipeft.injection.rows import Parts

with foreign_code():
    import peft

pytestmark = pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
KINDS = ("cuda", "lazy")  # the first has no backward pass here


def train(model, kinds=KINDS, **options):
    """Two steps on each kind of device: the first forward pass is watched."""
    for kind in kinds:
        with fake_gpu():
            on(kind, model)
            optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
            ids = torch.zeros(2, 8, dtype=torch.long, device=kind)
            for _ in range(2):
                if "adapter_names" in options:
                    logits = model(input_ids=ids, use_cache=False, **options).logits
                    loss = sum(per_adapter_loss(logits, ids, options["adapter_names"]).values())
                else:
                    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
                assert loss.device.type == kind
                if kind == KINDS[1]:
                    loss.backward()
                    optimizer.step()
                    optimizer.zero_grad()


LORA = [{}, {"lora_dropout": 0.1}, {"use_dora": True}, {"use_dora": True, "lora_dropout": 0.1}]


IDS = ["lora", "dropout", "dora", "dora-dropout"]


@pytest.mark.parametrize("options", [*(pytest.param(o, marks=pytest.mark.slow) for o in LORA[:3]), LORA[3]], ids=IDS)
def test_lora_trains_on_one_device(options):
    model = adapted(gpt2(), target_modules="all-linear", **options).train()
    del model.transformer.h[1:]  # a second block only takes time
    train(model)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_every_method_trains_on_one_device(case):
    model = ours(case).train()
    for _, layer in adapted_layers(model):
        vars(layer.adapter("default")).update(
            {"step": 0} if case.startswith("adalora") else {}
        )  # its schedule has begun
    train(model)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", ["none", "last", "mlp", "block", "sqrt"])
@pytest.mark.parametrize("base", [gpt2, llama])
def test_a_lean_model_trains_on_one_device(base, checkpointing):
    """But for the labels that count, which the loss in chunks looks for; here all of them do."""
    dropout = 0.1 if checkpointing in ("block", "mlp") else 0.0
    train(lean(adapted(base(), target_modules="all-linear", lora_dropout=dropout).train(), checkpointing))


@pytest.mark.slow
def test_rows_with_adapters_of_their_own_train_on_one_device():
    model = adapted(llama(), target_modules="all-linear")
    model.add_adapter("b", model.adapter_configs["default"])
    model.train_adapters(["default", "b"])
    for names in (["default", "b"], ["b", "__base__"]):
        train(model.train(), adapter_names=names)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_experts_by_a_grouped_product_train_on_one_device(kind):
    train(with_lora(moe(kind, "grouped_mm")).to(torch.bfloat16), kinds=("cuda",))


NO_WORK = {
    "device",
    "empty",
    "empty_like",
    "new_empty",
    "empty_strided",
    "new_empty_strided",
    "detach",
    "alias",
    "lift_fresh",
}


class Calls(TorchDispatchMode):
    """Counts the operations that start a kernel on a GPU."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not func.is_view and str(func).split(".")[1] not in NO_WORK
        return func(*args, **(kwargs or {}))


def calls_of_a_step(model, base):
    with fake_gpu():
        on("lazy", model)
        ids = torch.zeros(2, 8, dtype=torch.long, device="lazy")
        for _ in range(2):
            with Calls() as calls:
                base(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return calls.count


@pytest.mark.slow
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_step_takes_no_more_calls_than_peft_s(dropout):
    options = {"r": 8, "target_modules": "all-linear", "lora_dropout": dropout}
    with foreign_code():
        theirs = peft.get_peft_model(llama().bfloat16(), peft.LoraConfig(**options)).train()
    ours = adapted(llama().bfloat16(), **options).train()
    assert calls_of_a_step(ours, ours) <= calls_of_a_step(theirs, theirs.get_base_model())


def test_numbers_of_rows_are_copied_without_waiting(monkeypatch):
    waits, real = [], torch.Tensor.to

    def to(tensor, *args, non_blocking=False, **options):
        waits.append(not non_blocking)
        return real(tensor, *args, **options)

    with fake_gpu():
        monkeypatch.setattr(torch.Tensor, "to", to)
        Parts.of(["a", None, "a", "b"], torch.device("cuda"))
    assert waits
    assert not any(waits)


def test_what_mixes_devices_or_waits_is_found():
    with fake_gpu():
        x = torch.ones(3, device="cuda")
        with pytest.raises(Exception, match="same device"):
            x + torch.ones(3)
        with pytest.raises(Exception, match="_local_scalar_dense"):
            float(x.sum())
