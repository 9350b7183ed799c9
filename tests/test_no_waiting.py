"""A training step reads no value of a tensor that the model alone does not read: a GPU would have to be waited for."""

from unittest import mock

import pytest
import torch
from rotation import often
from test_split_experts import moe, with_lora
from tiny_models import adapted, llama, token_ids
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minipeft import lean

READS = (
    "aten._local_scalar_dense",
    "aten.equal",
    "aten.is_nonzero",
    "aten.masked_select",
    "aten._unique2",
    "aten.nonzero",
)


class Reads(TorchDispatchMode):
    """Notes what looks at values, but for a number that was drawn on the CPU, as the seed of a dropout mask is."""

    def __init__(self):
        super().__init__()
        self.found, self.drawn = [], set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = str(func).rpartition(".")[0]
        if name == "aten.randint":
            self.drawn.add(result.data_ptr())
        seed = name == "aten._local_scalar_dense" and args[0].data_ptr() in self.drawn
        masks = name.startswith("aten.index") and any(t.dtype is torch.bool for t in _tensors(args[1:2]))
        states = name == "aten.equal" and args[0].dtype is torch.uint8  # of random generators, which are on the CPU
        if (name in READS or masks) and not (seed or states):
            self.found.append(name)
        return result


def _tensors(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def reads_of_a_step(model):
    ids = token_ids()
    for _ in range(2):  # the first forward pass is watched
        with Reads() as reads:
            embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
            model(inputs_embeds=embeddings, labels=ids, use_cache=False).loss.backward()
    return sorted(reads.found)


@pytest.fixture(scope="module")
def own():
    """What transformers reads by itself: whether the positions are those of packed rows."""
    return reads_of_a_step(llama().train())


@pytest.mark.parametrize("options", [{}, {"lora_dropout": 0.2}, {"use_dora": True}], ids=["lora", "dropout", "dora"])
def test_an_adapted_model_reads_nothing(options, own):
    found = reads_of_a_step(adapted(llama(), target_modules="all-linear", **options).train())
    assert [name for name in found if not (options.get("use_dora") and name == "aten.equal")] == own  # on a CPU only


@pytest.mark.parametrize("checkpointing", often(["none", "last", "mlp", "block", "sqrt"], ["last", "sqrt"]))
@mock.patch("minipeft.memory.lean.Probe", mock.Mock())  # lean's own proof, three passes
def test_a_lean_model_reads_once_which_labels_count(checkpointing, own):
    """That lets rows without a label skip the output head."""
    model = lean(adapted(llama(), target_modules="all-linear").train(), checkpointing)
    assert reads_of_a_step(model) == [*own, "aten.nonzero"]
    assert reads_of_a_step(lean(model, checkpointing, chunked_loss=False)) == own


def test_experts_by_a_grouped_product_read_nothing(own):
    assert reads_of_a_step(with_lora(moe("mixtral", "grouped_mm"))) == own
