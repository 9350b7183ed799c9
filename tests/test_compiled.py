"""torch.compile: one graph and no other numbers, for adapted and lean models; experts split, and the loss in chunks."""

import warnings

import pytest
import torch
from kept_bytes import bytes_kept
from test_split_experts import moe, same, step, with_lora
from tiny_models import adapted, llama, token_ids
from torch import nn
from torch._dynamo.utils import counters

from minipeft import LoraConfig, get_lora_model, lean
from minipeft.injection import split_weight
from minipeft.injection.adapted_weight import AdaptedWeight
from minipeft.kernels.chunked_cross_entropy import causal_lm_loss
from minipeft.kernels.grouped_product import grouped_times


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def compiled(function, backend="aot_eager"):
    """In one graph, whose operations then run as they are."""
    return torch.compile(function, fullgraph=True, backend=backend)


def test_the_loss_in_chunks_is_one_operation_of_a_graph():
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias, change = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((2, 9, 6), (31, 6), (31,), (3, 6))
    )
    hidden.requires_grad_(), change.requires_grad_()
    labels = torch.randint(31, (2, 9), generator=generator).masked_fill(torch.arange(9) < 4, -100)

    def loss():
        return causal_lm_loss(hidden, weight, bias, labels, changed_rows=(torch.tensor([1, 5, 30]), change))

    def outcome(function):
        value = function()
        return dict(enumerate([value.detach(), *torch.autograd.grad(3 * value, [hidden, change])]))

    same(outcome(compiled(loss)), outcome(loss), 1e-12)


def test_operations_that_read_values_are_left_out_of_cuda_graphs():
    ops = torch.ops.minipeft
    for operation in (ops.chunked_cross_entropy, ops.grouped_times, ops.grouped_outer):
        assert torch.Tag.cudagraph_unsafe in operation.default.tags


def test_a_grouped_product_gives_a_frozen_stack_no_gradient():
    generator = torch.Generator().manual_seed(0)
    x, stack = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((7, 4), (3, 4, 5)))
    ends = torch.tensor([2, 2, 7], dtype=torch.int32)
    x.requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda _: None):
        y = grouped_times(x, stack, ends)
    assert [tensor.data_ptr() for tensor in kept] == [stack.data_ptr(), ends.data_ptr()]  # of x nothing
    torch.testing.assert_close(y, torch.cat([x[:2] @ stack[0], x[2:] @ stack[2]]))
    assert torch.autograd.gradcheck(lambda *args: grouped_times(*args, ends), (x, stack.requires_grad_()))


class Uses(nn.Module):
    """Multiplies by a stack in each way that the rules know, and in one that they do not."""

    def __init__(self, odd):
        super().__init__()
        self.stack = nn.Parameter(torch.randn(3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))
        self.odd = odd

    def forward(self, x):
        w = self.stack
        y = nn.functional.linear(x, w[1]) + x @ w[0].t() + torch.bmm(x.expand(3, *x.shape), w).sum(0)
        y = y + torch.bmm(w[torch.tensor([2, 0, 2, 1, 1])], x.unsqueeze(-1)).squeeze(-1)
        return y + w.square().sum() if self.odd else y


class Net(nn.Module):
    def __init__(self, odd):
        super().__init__()
        self.uses = Uses(odd)

    def forward(self, x):
        return self.uses(x)


@pytest.mark.parametrize("odd", [False, True], ids=["products", "another use"])
def test_each_product_by_a_stack_is_split_in_a_graph_too(odd, monkeypatch):
    """W + BA, formed at once, is the reference. What is not a product forms it, and that is said while compiling."""
    torch.manual_seed(0)
    model = get_lora_model(
        Net(odd), LoraConfig(r=2, init_lora_weights=False, target_modules=[], target_parameters=["stack"])
    )
    factors = [p for p in model.parameters() if p.requires_grad]
    x = torch.randn(5, 6, dtype=torch.float64)

    def outcome(function):
        y = function(x)
        return dict(enumerate([y.detach(), *torch.autograd.grad(y.square().sum(), factors)]))

    with monkeypatch.context() as patch:
        patch.setattr(AdaptedWeight, "split_weight", lambda self, names: None)
        expected = outcome(model)
    monkeypatch.setattr(split_weight, "SAID_FROM", 1)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        same(outcome(compiled(model)), expected)
    assert any("Uses.stack" in str(warning.message) for warning in said) == odd


def gradients(model, call, ids):
    model.zero_grad(set_to_none=True)
    loss = call(input_ids=ids, labels=ids).loss
    loss.backward()
    return {"loss": loss.detach()} | {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", ["none", "last", "mlp", "block", "sqrt"])
def test_a_lean_model_is_one_graph_for_all_lengths_and_keeps_no_logits(checkpointing):
    model = lean(adapted(llama(), target_modules="all-linear").train(), checkpointing)
    graph = compiled(model)
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda kept: sizes.append(kept.numel()), lambda _: None):
        graph(input_ids=token_ids(4, 12), labels=token_ids(4, 12))
    assert len(sizes) > 10
    assert 4 * 12 * model.config.vocab_size not in sizes  # which no other array has
    for length in (12, 16, 9):
        ids = token_ids(4, length)
        same(gradients(model, graph, ids), gradients(model, model, ids), 1e-5)
    assert counters["stats"]["unique_graphs"] <= 3  # under those hooks, of a first length, and for all others


@pytest.mark.slow
@pytest.mark.parametrize("way", ["grouped_mm", "batched_mm"])
@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_experts_are_split_in_one_graph(kind, way):
    model = with_lora(moe(kind, "eager", torch.float64))
    expected = step(model)
    model.set_experts_implementation(way)
    model.compile(fullgraph=True, backend="aot_eager")
    same(step(model), expected)
    ids = token_ids(1, 4)
    embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
    experts = sum(p.nbytes for p in model.parameters() if p.ndim == 3)
    assert bytes_kept(model, inputs_embeds=embeddings, labels=ids) < experts / 2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch's, about its compiler
def test_experts_in_a_loop_break_the_graph_as_they_do_without_an_adapter_and_stay_right():
    model = with_lora(moe("mixtral", "eager"))
    expected = step(model)
    model.compile(backend="aot_eager")
    same(step(model), expected, 1e-5)
