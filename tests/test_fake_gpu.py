"""No step of training mixes devices or reads a value, on a GPU that has no values to read (see `fake_gpu`)."""

import pytest
import torch
from fake_gpu import fake_gpu, on
from method_cases import CASES, ours
from test_split_experts import moe, with_lora
from tiny_models import adapted, gpt2, llama

from minipeft import lean, per_adapter_loss
from minipeft.injection.module_tree import adapted_layers
from minipeft.injection.rows import Parts

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
    train(adapted(gpt2(), target_modules="all-linear", **options).train())


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
