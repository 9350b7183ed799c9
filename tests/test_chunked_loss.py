"""The chunked loss against torch's cross entropy on whole logits, in float64, as transformers calls it."""

import pytest
import torch
from torch.nn import functional as F
from transformers.loss.loss_utils import ForCausalLMLoss

from minipeft import LeanError
from minipeft.kernels import chunked_cross_entropy as chunked_loss
from minipeft.kernels.chunked_cross_entropy import causal_lm_loss

VOCABULARY, FEATURES = 53, 11


@pytest.fixture(params=[1, 7, 10_000], ids=lambda rows: f"{rows} rows a chunk")
def chunk(request, monkeypatch):
    monkeypatch.setattr(chunked_loss, "rows_per_chunk", lambda hidden, weight: request.param)


def arguments(dtype=torch.float64, bias=True, ignored=0.3):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 9, FEATURES, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(VOCABULARY, FEATURES, generator=generator, dtype=torch.float64).to(dtype)
    labels = torch.randint(VOCABULARY, (3, 9), generator=generator)
    labels[torch.rand(3, 9, generator=generator) < ignored] = -100
    return hidden, weight, torch.linspace(-1, 1, VOCABULARY).to(dtype) if bias else None, labels


def reference(hidden, weight, bias, labels, num_items=None, ignore_index=-100):
    logits = F.linear(hidden, weight, bias)[:, :-1].double()
    targets = labels[:, 1:]
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=ignore_index, reduction="sum")
    return loss / ((targets != ignore_index).sum() if num_items is None else num_items)


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("ignored", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("num_items", [None, 17, torch.tensor(17)])
def test_loss_and_gradient_are_those_of_whole_logits(bias, ignored, num_items):
    hidden, weight, b, labels = arguments(bias=bias, ignored=ignored)
    loss = causal_lm_loss(hidden, weight, b, labels, num_items_in_batch=num_items)
    expected = reference(hidden, weight, b, labels, num_items)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    (found,) = torch.autograd.grad(3 * loss, hidden)
    (wanted,) = torch.autograd.grad(3 * expected, hidden)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-14)
    assert found[:, -1].count_nonzero() == 0


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("num_items", [None, 5])
def test_it_is_the_loss_of_transformers(num_items):
    hidden, weight, b, labels = arguments(torch.float32)
    loss = causal_lm_loss(hidden, weight, b, labels, num_items_in_batch=num_items)
    expected = ForCausalLMLoss(F.linear(hidden, weight, b), labels, VOCABULARY, num_items_in_batch=num_items)
    torch.testing.assert_close(loss, expected)
    assert loss.dtype is torch.float32
    found, wanted = (torch.autograd.grad(value, hidden)[0] for value in (loss, expected))
    torch.testing.assert_close(found, wanted)


def test_labels_that_are_shifted_already_and_another_ignored_label():
    hidden, weight, b, labels = arguments()
    shifted = F.pad(labels, (0, 1), value=-100)[:, 1:]
    assert causal_lm_loss(hidden, weight, b, None, shift_labels=shifted) == causal_lm_loss(hidden, weight, b, labels)
    labels[labels == -100] = 4
    found = causal_lm_loss(hidden, weight, b, labels, ignore_index=4)
    torch.testing.assert_close(found, reference(hidden, weight, b, labels, ignore_index=4))


def test_without_a_label_that_counts_the_loss_is_nan_and_the_gradient_zero_as_in_torch():
    hidden, weight, b, labels = arguments(ignored=1.1)
    loss = causal_lm_loss(hidden, weight, b, labels)
    assert loss.isnan()
    assert F.cross_entropy(torch.randn(2, 3), torch.tensor([-100, -100])).isnan()
    assert causal_lm_loss(hidden, weight, b, labels, num_items_in_batch=3) == 0


def test_finite_differences_agree():
    hidden, weight, b, labels = arguments()
    assert torch.autograd.gradcheck(lambda h: causal_lm_loss(h, weight, b, labels), hidden)


def test_a_gradient_of_the_gradient_is_refused_and_not_wrong():
    hidden, weight, b, labels = arguments()
    with pytest.raises(LeanError, match="no second derivative"):
        torch.autograd.grad(causal_lm_loss(hidden, weight, b, labels), hidden, create_graph=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kernels", [True, False])
def test_half_precision_rounds_the_logits_once_and_sums_in_float32(dtype, kernels, monkeypatch):
    monkeypatch.setattr(chunked_loss.matmul, "WORTH_IT", 0)
    monkeypatch.setattr(chunked_loss.matmul, "has_kernels", lambda dtype: kernels)
    hidden, weight, b, labels = arguments(dtype)
    loss = causal_lm_loss(hidden, weight, b, labels)
    expected = ForCausalLMLoss(F.linear(hidden, weight, b), labels, VOCABULARY)
    assert loss.dtype is torch.float32
    torch.testing.assert_close(loss, expected, rtol=1e-2, atol=1e-2)
    found, wanted = (torch.autograd.grad(value, hidden)[0] for value in (loss, expected))
    assert found.dtype is dtype
    torch.testing.assert_close(found, wanted, rtol=5e-2, atol=5e-3)


def test_autocast_computes_in_its_own_dtype_and_gives_the_gradient_in_the_inputs():
    hidden, weight, b, labels = arguments(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = causal_lm_loss(hidden, weight, b, labels)
        expected = ForCausalLMLoss(F.linear(hidden, weight, b), labels, VOCABULARY)
    torch.testing.assert_close(loss, expected, rtol=1e-2, atol=1e-2)
    (gradient,) = torch.autograd.grad(loss, hidden)
    assert gradient.dtype is torch.float32
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, hidden)[0], rtol=5e-2, atol=5e-3)


def test_rows_without_a_label_never_meet_the_head(monkeypatch):
    rows = []
    real = chunked_loss.matmul.linear
    monkeypatch.setattr(
        chunked_loss.matmul, "linear", lambda x, *rest, **more: rows.append(len(x)) or real(x, *rest, **more)
    )
    hidden, weight, b, labels = arguments(ignored=0.6)
    causal_lm_loss(hidden, weight, b, labels)
    assert rows == [int((labels[:, 1:] != -100).sum())] * 2


def test_nothing_of_the_size_of_the_logits_is_kept_or_made(monkeypatch):
    monkeypatch.setitem(chunked_loss.CHUNK_BYTES, "cpu", 4 * VOCABULARY * 5)
    monkeypatch.setattr(chunked_loss, "CHUNK_ROWS", 5)
    hidden, weight, b, labels = arguments(torch.float32)
    largest = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                largest.append(result.numel())
            return result

    kept = []
    with Watch(), torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        causal_lm_loss(hidden, weight, b, labels).backward()
    assert max(largest) <= max(5 * VOCABULARY, weight.numel(), hidden.numel())
    assert kept == [hidden.numel(), 1]  # the gradient, and the number it is divided by


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("trains", [("hidden", "change"), ("hidden",), ("change",)])
def test_rows_of_the_head_may_be_changed_and_train(trains):
    hidden, weight, b, labels = arguments()
    indices = torch.tensor([5, 0, 5])  # a row twice, as of two adapters
    change = torch.randn(3, FEATURES, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    inputs = {"hidden": hidden.requires_grad_("hidden" in trains), "change": change.requires_grad_("change" in trains)}
    loss = causal_lm_loss(hidden, weight, b, labels, changed_rows=(indices, change))
    expected = reference(hidden, weight.index_add(0, indices, change), b, labels)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    for name in trains:
        (found,) = torch.autograd.grad(3 * loss, inputs[name], retain_graph=True)
        (wanted,) = torch.autograd.grad(3 * expected, inputs[name], retain_graph=True)
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-14)
