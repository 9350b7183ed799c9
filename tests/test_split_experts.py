"""LoRA of fused experts without W + BA: against W + BA in float64, against PEFT, and what is made and kept."""

import copy
import itertools
from types import SimpleNamespace

import pytest
import torch
from fast_copy import copied
from kept_bytes import bytes_kept
from rotation import rotated, thinned
from tiny_models import disturb, foreign_code, logits, token_ids
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minipeft import LoraConfig, get_lora_model, lean, load_adapter
from minipeft.injection import split_weight
from minipeft.injection.adapted_weight import AdaptedWeight
from minipeft.kernels import low_rank_groups, matmul
from minipeft.kernels.low_rank_sum import LowRankSum
from minipeft.methods.base import Adapter
from minipeft.methods.dora import Dora
from minipeft.methods.lora import Lora

with foreign_code():
    peft = pytest.importorskip("peft")
    from transformers import (
        DeepseekV3Config,
        DeepseekV3ForCausalLM,
        GptOssConfig,
        GptOssForCausalLM,
        MixtralConfig,
        MixtralForCausalLM,
        Qwen3MoeConfig,
        Qwen3MoeForCausalLM,
    )
    from transformers.models.aria.modeling_aria import AriaExperts
    from transformers.models.jetmoe.modeling_jetmoe import JetMoeParallelExperts
    from transformers.models.llama4.modeling_llama4 import Llama4TextExperts
    from transformers.models.muse_spark.modeling_muse_spark import MuseSparkExperts
    from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts
    from transformers.models.openai_privacy_filter.modeling_openai_privacy_filter import OpenAIPrivacyFilterExperts

SIZES = {"vocab_size": 100, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
SIZES |= {"hidden_size": 64, "pad_token_id": None, "bos_token_id": 0, "eos_token_id": 0, "use_cache": False}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16}
MODELS = {  # expert width over model width, experts and choices as in Mixtral 8x7B, Qwen3-30B-A3B, gpt-oss, DeepSeek-V3
    "mixtral": (MixtralForCausalLM, MixtralConfig, {"intermediate_size": 224, "num_local_experts": 8}),
    "qwen3_moe": (
        Qwen3MoeForCausalLM,
        Qwen3MoeConfig,
        {"moe_intermediate_size": 24, "num_experts": 32, "num_experts_per_tok": 8, "head_dim": 32},
    ),
    "gpt_oss": (
        GptOssForCausalLM,
        GptOssConfig,
        {"intermediate_size": 64, "num_local_experts": 16, "num_experts_per_tok": 4, "head_dim": 32},
    ),
    "deepseek_v3": (
        DeepseekV3ForCausalLM,
        DeepseekV3Config,
        {"moe_intermediate_size": 24, "n_routed_experts": 32, "num_experts_per_tok": 8, "n_group": 4, "topk_group": 2}
        | LATENT
        | {"first_k_dense_replace": 0},
    ),
}
IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
each_model = pytest.mark.parametrize("kind", MODELS)
each_way = pytest.mark.parametrize("way", IMPLEMENTATIONS)
# Mixtral in every way, the others in one each.
EVERY_KIND_AND_WAY = [("mixtral", way) for way in IMPLEMENTATIONS] + [
    *zip(list(MODELS)[1:], IMPLEMENTATIONS, strict=True)
]


@copied
def plain(kind):
    cls, config, options = MODELS[kind]
    with foreign_code(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return disturb(cls(config(**SIZES, **options)), scale=0.1)


def moe(kind, way="eager", dtype=torch.float32):
    model = plain(kind).to(dtype)
    with foreign_code():
        model.set_experts_implementation(way)
    return model.train()


def with_lora(model, targets=EXPERTS, **options):
    torch.manual_seed(1)
    options = {"r": 2, "lora_alpha": 3, "init_lora_weights": False, "target_modules": [], **options}
    return get_lora_model(model, LoraConfig(target_parameters=targets, **options))


@pytest.fixture
def formed(monkeypatch):
    """Lets a call run with W + BA formed."""

    def run(call):
        with monkeypatch.context() as patch:
            patch.setattr(AdaptedWeight, "split_weight", lambda self, names: None)
            return call()

    return run


def step(model):
    """The loss and all gradients of one step, from which the routing's gradient is not left out."""
    ids = token_ids(2, 16)
    model.zero_grad(set_to_none=True)
    embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
    loss = model(inputs_embeds=embeddings, labels=ids).loss
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), "embeddings": embeddings.grad} | gradients


def same(found, expected, tolerance=1e-11):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert float((found[name] - value).norm()) <= tolerance * float(value.norm()), name


@each_way
@each_model
def test_loss_and_gradients_are_those_of_W_plus_BA(kind, way, formed):
    """torch's own grouped product has no float64, so the loop is what all three are compared with."""
    model = with_lora(moe(kind, "eager", torch.float64))
    expected = formed(lambda: step(model))
    model.set_experts_implementation(way)
    same(step(model), expected)
    assert len(expected) == 6


CASES = ["one parameter", "the other", "two adapters", "one of two merged", "rescaled", "rank-stabilised"]
CASES += ["checkpointed", "frozen", "lean"]


@pytest.mark.filterwarnings("ignore:.*merged into the base")
@pytest.mark.parametrize(
    ("case", "way"), thinned((CASES, IMPLEMENTATIONS), zip(CASES, itertools.cycle(IMPLEMENTATIONS)))
)
def test_what_else_may_be_asked_of_adapters_gives_W_plus_BA_too(case, way, formed):
    targets = {"one parameter": EXPERTS[:1], "the other": EXPERTS[1:]}.get(case, EXPERTS)
    dtype, tolerance = (torch.float32, 1e-5) if way == "grouped_mm" else (torch.float64, 1e-11)
    model = with_lora(moe("gpt_oss", "eager", dtype), targets, use_rslora=case == "rank-stabilised")
    if "two" in case:
        model.add_adapter(
            "second", LoraConfig(r=3, init_lora_weights=False, target_modules=[], target_parameters=targets)
        )
        model.set_adapter(["default", "second"])
    if "merged" in case:
        model.merge_adapter(["second"])
    if case == "checkpointed":
        with foreign_code():
            model.gradient_checkpointing_enable({"use_reentrant": False})
    if case == "rescaled":
        model.set_scale("default", 0.5)
    if case == "lean":
        lean(model)
    if case == "frozen":
        for name, p in model.named_parameters():
            p.requires_grad_("self_attn" in name)
    expected = formed(lambda: step(model))
    model.set_experts_implementation(way)
    same(step(model), expected, tolerance)


def kept_of_128_tokens(model):
    ids = token_ids(4, 32)
    embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
    return bytes_kept(model, inputs_embeds=embeddings, labels=ids)


@pytest.mark.each_value
@each_way
@each_model
def test_the_backward_pass_keeps_at_most_twice_what_the_unadapted_model_keeps(kind, way, formed):
    """``batched_mm`` keeps a copy of an expert for each choice of each token; with an adapter it keeps none."""
    unadapted = kept_of_128_tokens(moe(kind, "grouped_mm" if way == "batched_mm" else way).requires_grad_(False))
    model = with_lora(moe(kind, way))
    assert kept_of_128_tokens(model) <= 1.7 * unadapted
    experts = sum(p.nbytes for p in model.parameters() if p.ndim == 3)
    assert formed(lambda: kept_of_128_tokens(model)) >= unadapted + experts


class Largest(TorchDispatchMode):
    """Notes the largest new array."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        old = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in old:
                self.numel = max(self.numel, tensor.numel())
        return result


@pytest.mark.parametrize(("kind", "way"), thinned((MODELS, IMPLEMENTATIONS), EVERY_KIND_AND_WAY))
def test_nothing_as_large_as_the_experts_is_made(kind, way, formed):
    model = with_lora(moe(kind, way))
    smallest = min(p.numel() for name, p in model.named_parameters() if "experts" in name and p.ndim == 3)
    with Largest() as made:
        step(model)
    assert made.numel < smallest / 2
    if (kind, way) == ("mixtral", "eager"):  # so that the measure is known to see one
        with Largest() as made:
            formed(lambda: step(model))
        assert made.numel >= smallest


@pytest.mark.each_value
@pytest.mark.parametrize(("kind", "way", "dtype"), rotated(MODELS, IMPLEMENTATIONS, [torch.float32, torch.bfloat16]))
def test_a_fresh_adapter_leaves_every_bit_without_gradients(kind, way, dtype):
    base = moe(kind, way, dtype).eval()
    model = with_lora(copy.deepcopy(base), init_lora_weights=True)
    assert torch.equal(logits(model), logits(base))


@pytest.mark.each_value
@pytest.mark.parametrize(("kind", "way", "autocast"), rotated(["mixtral", "gpt_oss"], IMPLEMENTATIONS, [False, True]))
def test_half_precision_rounds_about_as_W_plus_BA(kind, way, autocast, formed):
    """The experts by themselves: in a whole model a rounded router chooses others. Factors are in float32."""
    exact = with_lora(moe(kind, "eager", torch.bfloat16).double())
    model = with_lora(moe(kind, way, torch.float32 if autocast else torch.bfloat16))
    model.load_state_dict({n: v.to(model.state_dict()[n].dtype) for n, v in exact.state_dict().items()})
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(48, 64, generator=generator).bfloat16()
    shares, chosen = torch.rand(48, 8, generator=generator).bfloat16().topk(2)

    def outcome(model, dtype):
        experts = next(m for m in model.modules() if isinstance(m, AdaptedWeight))
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast and model is not exact):
            y = experts(x.to(dtype), chosen, shares.to(dtype))
        factors = [p for p in experts.parameters() if p.requires_grad]
        return [y.detach(), *torch.autograd.grad(y.double().square().sum(), factors)]

    def errors():
        pairs = zip(outcome(model, torch.float32 if autocast else torch.bfloat16), expected, strict=True)
        return torch.stack([(a.double() - b).norm() / b.norm() for a, b in pairs])

    expected = formed(lambda: outcome(exact, torch.float64))
    split = errors()
    assert float(split.max()) < 0.02
    assert float((split / formed(errors)).max()) < 2


class Net(nn.Module):
    def __init__(self, experts):
        super().__init__()
        self.experts = experts

    def forward(self, *args):
        return self.experts(*args)


def alone(cls, way="eager"):
    """The experts of a model by themselves, and arguments for a call."""
    sizes = dict.fromkeys(("hidden_size", "moe_hidden_size"), 8) | dict.fromkeys(
        ("intermediate_size", "moe_intermediate_size"), 6
    )
    sizes |= dict.fromkeys(("num_local_experts", "moe_num_experts", "n_routed_experts", "num_experts"), 4)
    acts = {"hidden_act": "silu", "mlp_hidden_act": "relu2", "swiglu_alpha": 1.7, "swiglu_limit": 7.0}
    config = SimpleNamespace(**sizes, **acts, moe_latent_size=None, post_norm_eps=1e-6, _experts_implementation=way)
    generator = torch.Generator().manual_seed(0)
    module = cls(4, 8, 6) if cls is JetMoeParallelExperts else cls(config)
    for p in module.parameters():
        p.data.copy_(torch.randn(p.shape, generator=generator))
    x = torch.randn(12, 8, generator=generator, dtype=torch.float64).requires_grad_()
    shares, chosen = torch.rand(12, 4, generator=generator, dtype=torch.float64).topk(2)
    arguments = {Llama4TextExperts: (x,), JetMoeParallelExperts: (x, [3, 0, 4, 5])}.get(cls, (x, chosen, shares))
    return Net(module).double(), arguments


OTHERS = [AriaExperts, NemotronHExperts, MuseSparkExperts, OpenAIPrivacyFilterExperts]
OTHERS = [(cls, way) for cls in OTHERS for way in IMPLEMENTATIONS]


@pytest.mark.parametrize(("cls", "way"), [*OTHERS, (Llama4TextExperts, None), (JetMoeParallelExperts, None)])
def test_modules_of_other_families_multiply_by_their_experts_too(cls, way, formed, monkeypatch):
    """Also those that transformers' interface does not know: they multiply like any module."""
    base, arguments = alone(cls, "eager")
    names = [f"experts.{name}" for name, p in base.experts.named_parameters() if p.ndim == 3]
    model = with_lora(base, names)

    def outcome():
        y = model(*arguments)
        return dict(enumerate([y.detach(), *torch.autograd.grad(y.square().sum(), [arguments[0], *factors])]))

    factors = [p for p in model.parameters() if p.requires_grad]
    expected = formed(outcome)
    if way is not None:
        next(m for m in model.modules() if isinstance(m, AdaptedWeight)).owner.config._experts_implementation = way
    monkeypatch.setattr(LowRankSum, "formed", None)  # so that forming one is an error
    tolerance = 1e-6 if cls is OpenAIPrivacyFilterExperts else 1e-11  # its own loop is in float32
    same(outcome(), expected, tolerance)


class ByFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        return dy @ weight.T, x.T @ dy


def unknown(x, weight):
    """What is not known as a product, and what torch's protocol does not show at all."""
    stays = torch.einsum("np,epq->nq", x, weight) + (weight * 2).sum() + weight.permute(2, 1, 0).mean()
    return stays + ByFunction.apply(x, weight[1].float().double()) + weight.transpose(1, 2)[0:2].norm()


class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.stack = nn.Parameter(torch.randn(3, 5, 4, dtype=torch.float64))
        self.is_transposed = True

    def forward(self, x):
        return unknown(x, self.stack)


def test_any_other_use_forms_the_weight_and_says_so_if_that_is_large(formed, monkeypatch, recwarn):
    torch.manual_seed(0)
    model, x = with_lora(Net(Odd()), ["stack"]), torch.randn(6, 5, dtype=torch.float64)
    factors = [p for p in model.parameters() if p.requires_grad]

    def outcome():
        y = model(x)
        return dict(enumerate([y.detach(), *torch.autograd.grad(y.square().sum(), factors)]))

    same(outcome(), formed(outcome), 1e-6)  # one product is in float32
    assert len(recwarn) == 0
    monkeypatch.setattr(split_weight, "SAID_FROM", 480)
    with torch.no_grad():
        model(x)
    with pytest.warns(UserWarning, match=r"Odd.stack: .* W \+ BA is formed at each call and kept"):
        model(x)


def test_a_method_that_does_more_than_to_add_a_product_is_formed():
    class Halved(Lora):
        def forward(self, base, ops, x, y):
            return (y + super().forward(base, ops, x, y)) / 2

    class Renamed(Lora):
        def reset_parameters(self, init_lora_weights, weight):
            super().reset_parameters(init_lora_weights, weight)

    assert Halved.weight_factors is Dora.weight_factors is Adapter.weight_factors
    assert Renamed.weight_factors is Lora.weight_factors


@pytest.mark.parametrize("rest", [0, 2])
def test_the_kernels_are_differentiable_twice(rest):
    torch.manual_seed(0)
    x, own = torch.randn(7 + rest, 4, dtype=torch.float64), torch.randn(3, 4, 5, dtype=torch.float64)
    factors = [torch.randn(3, 4, 2, dtype=torch.float64), torch.randn(3, 2, 5, dtype=torch.float64)]
    ends, index = torch.tensor([3, 3, 7], dtype=torch.int32), torch.randint(-3, 3, (7 + rest,))

    def run(x, left, right):
        stack = LowRankSum(own, left, right, 1.5)
        return low_rank_groups.grouped(x, stack, ends)[:7], low_rank_groups.gathered(x, stack, index)

    inputs = [t.requires_grad_() for t in (x, *factors)]
    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, inputs, fast_mode=True)
    with pytest.raises(IndexError):
        low_rank_groups.gathered(x, LowRankSum(own, *factors, 1.5), index.clamp(0) + 3)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02)], ids=str)
def test_torchs_grouped_product_gives_what_the_loop_gives(dtype, tolerance, monkeypatch):
    """A rank that does not fill 16 bytes, a group without rows, and rows after the last group."""
    torch.manual_seed(0)
    x = torch.randn(11, 8, dtype=dtype).requires_grad_()
    factors = [torch.randn(3, 8, 3).requires_grad_(), torch.randn(3, 3, 16).requires_grad_()]
    stack, ends = (
        LowRankSum(torch.randn(3, 8, 16, dtype=dtype), *factors, 0.5),
        torch.tensor([4, 4, 9], dtype=torch.int32),
    )

    def outcome():
        y = low_rank_groups.grouped(x, stack, ends)[:9]
        dx, *others = torch.autograd.grad(y.float().square().sum(), [x, *factors])
        return dict(enumerate([y.detach(), dx[:9], *others]))

    monkeypatch.setattr(matmul, "has_kernels", lambda dtype: True)  # else the loop is faster in half precision
    found = outcome()
    assert low_rank_groups.is_one_call(x, stack.own)
    monkeypatch.setattr(low_rank_groups, "is_one_call", lambda *_: False)
    same(found, outcome(), tolerance)


def losses_of(model):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1.0)
    losses = []
    for number in range(15):
        ids = token_ids(2, 8, number % 3)
        with foreign_code():
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def test_fifteen_steps_are_those_of_peft(tmp_path):
    with_lora(moe("mixtral")).save_pretrained(tmp_path)
    with foreign_code():
        theirs = peft.PeftModel.from_pretrained(moe("mixtral"), tmp_path, is_trainable=True).train()
    expected = losses_of(theirs)
    assert expected[-1] < expected[2] - 0.1
    for way in IMPLEMENTATIONS:
        ours = load_adapter(moe("mixtral", way), tmp_path, is_trainable=True).train()
        assert losses_of(ours) == pytest.approx(expected, rel=1e-4)
