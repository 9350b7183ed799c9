"""Rotary embeddings as one node: transformers' function, to its last digit, and only where it is that function."""

import functools
import os
import subprocess
import sys

import pytest
import torch
from tiny_models import VOCABULARY, adapted, foreign_code, llama, token_ids
from torch import nn

from minipeft import lean, unlean
from minipeft.kernels.rotary import rotary, token_major
from minipeft.memory.rotary import FastRotary, is_rotary_attention, with_fast_rotary

with foreign_code():
    from transformers import (
        CohereConfig,
        CohereForCausalLM,
        GlmConfig,
        GlmForCausalLM,
        GPTNeoXConfig,
        GPTNeoXForCausalLM,
        MistralConfig,
        MistralForCausalLM,
        Olmo2Config,
        Olmo2ForCausalLM,
        Qwen3Config,
        Qwen3ForCausalLM,
    )
    from transformers.models.llama import modeling_llama

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
GROUPED = SIZES | {"num_key_value_heads": 2}
SAME = [
    (MistralForCausalLM, MistralConfig, GROUPED),
    (Qwen3ForCausalLM, Qwen3Config, GROUPED | {"head_dim": 16}),
    (Olmo2ForCausalLM, Olmo2Config, GROUPED),
    (
        GPTNeoXForCausalLM,
        GPTNeoXConfig,
        SIZES,
    ),  # turns a part of the features, which is left to transformers in each call
]
OTHER = [  # turn neighbouring features
    (GlmForCausalLM, GlmConfig, GROUPED | {"head_dim": 8}),
    (CohereForCausalLM, CohereConfig, GROUPED),
]


def inputs(dtype=torch.float64, heads=(4, 2), tokens=5, features=8, rows=2, angle_rows=1):
    generator = torch.Generator().manual_seed(0)
    random = functools.partial(torch.randn, generator=generator, dtype=torch.float64)
    q, k = (random(rows, tokens, count, features).to(dtype).transpose(1, 2) for count in heads)
    cos, sin = random(2, angle_rows, tokens, features).to(dtype)
    return q.requires_grad_(), k.requires_grad_(), cos, sin


def made(cls, config, sizes):
    torch.manual_seed(0)
    return cls(config(**sizes)).double()


def step(model, **options):
    ids = token_ids()
    loss = model(input_ids=ids, labels=ids, use_cache=False, **options).loss
    gradients = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad], allow_unused=True)
    return [loss.detach(), *(torch.zeros(()) if g is None else g for g in gradients)]


def attentions(model):
    return [module for module in model.modules() if hasattr(module, "o_proj") or hasattr(module, "query_key_value")]


@pytest.mark.parametrize("angle_rows", [1, 2])
def test_values_and_all_gradients_are_transformers(angle_rows):
    q, k, cos, sin = inputs(heads=(3, 2), tokens=3, features=4, angle_rows=angle_rows)
    wanted = modeling_llama.apply_rotary_pos_emb(q, k, cos, sin)
    found = rotary(q, k, cos.unsqueeze(1), sin.unsqueeze(1))
    for a, b in zip(found, wanted, strict=True):
        assert torch.allclose(a, b, rtol=1e-13)
        assert a.stride() == b.stride()
        assert not a._is_view() or a._base.grad_fn is None
    turn = functools.partial(rotary, cos=cos.unsqueeze(1), sin=sin.unsqueeze(1))
    assert torch.autograd.gradcheck(turn, (q, k))
    assert torch.autograd.gradgradcheck(turn, (q, k))
    gradients = torch.autograd.grad(found, (q, k), [torch.ones_like(each) for each in found])
    assert [g.stride() for g in gradients] == [q.stride(), k.stride()]  # so that no copy follows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_and_gradients_have_the_bits_of_transformers(dtype):
    q, k, cos, sin = inputs(dtype, tokens=64, features=64)
    theirs = modeling_llama.apply_rotary_pos_emb(q, k, cos, sin)
    ours = rotary(q, k, cos.unsqueeze(1), sin.unsqueeze(1))
    assert all(map(torch.equal, ours, theirs))
    into = [torch.randn_like(each) for each in theirs]
    assert all(map(torch.equal, torch.autograd.grad(ours, (q, k), into), torch.autograd.grad(theirs, (q, k), into)))


@pytest.mark.usefixtures("unprobed")
@pytest.mark.parametrize("checkpointing", ["none", "last", "mlp", "block", "sqrt"])
def test_a_lean_llama_turns_by_it(checkpointing, monkeypatch):
    model = adapted(llama(), target_modules="all-linear").double().train()
    plain = type(attentions(model)[0])
    expected, calls = step(model), []
    lean(model, checkpointing, chunked_loss=False)
    assert all(isinstance(attention, FastRotary) for attention in attentions(model))
    with_fast_rotary.cache_clear()
    monkeypatch.setattr(
        "minipeft.memory.rotary.rotary", lambda *tensors: calls.append(tensors[0].shape) or rotary(*tensors)
    )
    for found, wanted in zip(step(model), expected, strict=True):
        assert torch.allclose(found, wanted, rtol=1e-9, atol=1e-12)
    assert calls
    calls.clear()
    with torch.no_grad():
        model(input_ids=token_ids())
    model.eval()(input_ids=token_ids())
    assert not calls  # only what learns
    unlean(model)
    assert all(type(attention) is plain for attention in attentions(model))
    with_fast_rotary.cache_clear()


@pytest.mark.parametrize(("cls", "config", "sizes"), SAME, ids=lambda value: getattr(value, "__name__", ""))
def test_other_families_with_the_same_function(cls, config, sizes):
    model = adapted(made(cls, config, sizes), target_modules="all-linear").train()
    expected = step(model)
    lean(model, "none", chunked_loss=False)
    assert all(isinstance(attention, FastRotary) for attention in attentions(model))
    for found, wanted in zip(step(model), expected, strict=True):
        assert torch.allclose(found, wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("cls", "config", "sizes"), OTHER, ids=lambda value: getattr(value, "__name__", ""))
def test_another_function_is_left_alone(cls, config, sizes):
    model = made(cls, config, sizes)
    assert attentions(model)
    assert not any(is_rotary_attention(module) for module in model.modules())


def apply_rotary_pos_emb(q, k=None, cos=None, sin=None, unsqueeze_dim=1):
    """As Qwen4's: without keys it turns the queries alone."""
    both = modeling_llama.apply_rotary_pos_emb(q, q if k is None else k, cos, sin, unsqueeze_dim)
    return both[0] if k is None else both


class IndexedAttention(nn.Module):
    def forward(self, q, k, cos, sin):
        index = apply_rotary_pos_emb(q.transpose(1, 2), cos=cos, sin=sin, unsqueeze_dim=2)
        return *apply_rotary_pos_emb(q, k, cos, sin), index


def test_queries_without_keys_go_to_the_library():
    attention = IndexedAttention()
    assert is_rotary_attention(attention)
    found = with_fast_rotary(IndexedAttention.forward)(attention, *inputs())
    for a, b in zip(found, attention(*inputs()), strict=True):
        assert torch.allclose(a, b, rtol=1e-13)


def test_the_library_s_own_function_stays_where_it_is():
    own = modeling_llama.apply_rotary_pos_emb
    other = llama().train()
    before = step(other)
    lean(adapted(llama(), target_modules="all-linear").train())
    assert modeling_llama.apply_rotary_pos_emb is own
    assert all(map(torch.equal, step(other), before))


def test_angles_of_another_dtype_and_caches_go_to_the_library(monkeypatch):
    model = lean(adapted(llama(), target_modules="all-linear").train(), "none")
    with_fast_rotary.cache_clear()
    monkeypatch.setattr("minipeft.memory.rotary.rotary", lambda *tensors: pytest.fail("was called"))
    with torch.autocast("cpu", torch.bfloat16):  # queries in bfloat16, angles in float32
        assert step(model)[0].isfinite()
    with_fast_rotary.cache_clear()


def test_a_decorated_method_is_rebuilt_with_its_decorator():
    def counting(method):
        @functools.wraps(method)
        def wrapped(self, *args, **kwargs):
            self.calls += 1
            return method(self, *args, **kwargs)

        return wrapped

    class Counted(modeling_llama.LlamaAttention):
        calls = 0
        forward = counting(modeling_llama.LlamaAttention.forward)

    model = llama().double().train()
    model.requires_grad_(False)
    for block in model.model.layers:
        block.self_attn.__class__ = Counted
    model = adapted(model, target_modules="all-linear").double().train()
    expected = step(model)
    lean(model, "none", chunked_loss=False)
    before = [attention.calls for attention in attentions(model)]
    assert all(isinstance(attention, Counted) and isinstance(attention, FastRotary) for attention in attentions(model))
    for found, wanted in zip(step(model), expected, strict=True):
        assert torch.allclose(found, wanted, rtol=1e-9, atol=1e-12)
    assert [attention.calls for attention in attentions(model)] == [calls + 1 for calls in before]


def test_a_method_behind_anything_but_functions_is_left_alone():
    class Behind:
        def __init__(self, method):
            functools.update_wrapper(self, method)

        def __get__(self, module, cls=None):
            return self if module is None else functools.partial(self.__wrapped__, module)

    class Hidden(modeling_llama.LlamaAttention):
        forward = Behind(modeling_llama.LlamaAttention.forward)

    attention = attentions(llama())[0]
    assert is_rotary_attention(attention)
    attention.__class__ = Hidden
    assert not is_rotary_attention(attention)


def test_memory_is_token_by_token():
    x = torch.empty(2, 3, 4, 6)
    assert token_major(x).shape == x.shape
    assert token_major(x).transpose(1, 2).is_contiguous()


def test_the_kernel_for_gpus_turns_alike():
    """Triton's interpreter runs it on the CPU, in a process of its own, since it must be chosen before the import."""
    pytest.importorskip("triton")
    script = """
import sys, torch
sys.path.insert(0, "tests")
from test_rotary import inputs
from minipeft.kernels.rotary import by_torch
from minipeft.kernels.rotary_triton import turned
for dtype, tolerance in ((torch.float32, 1e-6), (torch.float16, 0), (torch.bfloat16, 1e-2)):  # the interpreter truncates to bfloat16
    for heads, features, angle_rows in (((4, 2), 8, 1), ((5, 1), 64, 2), ((3, 3), 12, 1)):
        tensors = [t.detach() for t in inputs(dtype, heads=heads, features=features, angle_rows=angle_rows)]
        q, k, cos, sin = (*tensors[:2], *(angle.unsqueeze(1) for angle in tensors[2:]))
        for q, k in ((q, k), (q.contiguous(), k.contiguous())):
            for back in (False, True):
                for a, b in zip(turned(q, k, cos, sin, back), by_torch(q, k, cos, sin, back)):
                    assert a.dtype is dtype and a.stride() == b.stride()
                    assert (a - b).norm() <= tolerance * b.norm(), (dtype, heads, back)
"""
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-c", script], check=True, env=environment)


class NotAttention(nn.Module):
    def forward(self, x):
        return x


def test_a_module_that_calls_no_such_function_is_no_attention():
    assert not is_rotary_attention(NotAttention())
    assert not is_rotary_attention(nn.Linear(2, 2))
