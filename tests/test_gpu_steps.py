"""Training steps on a GPU: lean ones, in half precision, with dropout, with experts and mixed batches; nobody waits."""

import collections
import copy
import functools
import gc
import itertools
import warnings

import pytest
import torch
from gpu_device import DEVICE, METHODS, TOLERANCE, close, exact, learned, needs_cuda, off, on_device
from kept_bytes import bytes_kept
from test_rotary import inputs
from test_rows import BASE, alone, generated, several
from test_split_experts import MODELS, moe, with_lora
from tiny_models import VOCABULARY, foreign_code, llama, token_ids
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

import minipeft
from minipeft import LoraConfig, get_adapter_model, get_lora_model, lean, unlean
from minipeft.kernels.dropout_mask import DropoutMask, rows_per_seed
from minipeft.kernels.grouped_product import Groups, is_one_call
from minipeft.kernels.lora_linear import lora_linear
from minipeft.kernels.low_rank_groups import grouped
from minipeft.kernels.low_rank_sum import LowRankSum
from minipeft.kernels.rotary import by_torch, rotary

with foreign_code():
    import peft

pytestmark = on_device
ROWS = rows_per_seed(DEVICE)
CHECKPOINTING = ["none", "last", "mlp", "block", "sqrt", 2]
IDS = token_ids(4, 16)
LABELS = IDS.masked_fill(torch.arange(16) < 3, -100)


def batch(rows=slice(None), device=DEVICE):
    return {"input_ids": IDS[rows].to(device), "labels": LABELS[rows].to(device)}


def made(kind, dropout=0.0, dtype=torch.float32, layers=3, width=64):
    """A model on the device, in training mode, with an adapter that already acts."""
    sizes = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
    torch.manual_seed(0)
    if kind == "gpt2":
        drops = dict.fromkeys(("resid_pdrop", "attn_pdrop", "embd_pdrop"), dropout)
        config = GPT2Config(n_layer=layers, n_embd=width, n_head=4, n_positions=64, **drops, **sizes)
        base = GPT2LMHeadModel(config)
    else:
        sizes |= {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": layers}
        sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "attention_dropout": dropout}
        base = {"llama": LlamaForCausalLM, "qwen3": Qwen3ForCausalLM}[kind](
            {"llama": LlamaConfig, "qwen3": Qwen3Config}[kind](**sizes)
        )
    base = base.to(DEVICE, dtype)
    options = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False, "lora_dropout": dropout}
    return get_lora_model(base, LoraConfig(**options)).train()


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("checkpointing", CHECKPOINTING, ids=str)
@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen3"])
def test_a_lean_step_learns_what_the_plain_one_learns(kind, checkpointing, dropout):
    """With dropout each mask is that of the plain step, in the forward pass and where it is recomputed."""
    model = made(kind, dropout)
    expected = learned(model, **batch())
    if not dropout:
        close(expected, learned(exact(model), **batch(device="cpu")), 1e-4)
    lean(model, checkpointing)
    for _ in range(2):  # the first run shows what can be cut
        close(learned(model, **batch()), expected, 1e-4)
    unlean(model)
    close(learned(model, **batch()), expected, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(("heads", "features"), [((32, 8), 128), ((12, 1), 80), ((5, 5), 64)])
def test_queries_and_keys_are_turned_as_in_float64(heads, features, dtype):
    made = [
        tensor.detach() for tensor in inputs(dtype, heads=heads, tokens=33, features=features, rows=3, angle_rows=3)
    ]
    q, k, cos, sin = (
        *(t.to(DEVICE).requires_grad_() for t in made[:2]),
        *(t.to(DEVICE).unsqueeze(1) for t in made[2:]),
    )
    exact = [t.detach().double().cpu() for t in (q, k, cos, sin)]
    tolerance = 2 * torch.finfo(dtype).eps
    for layout in (lambda tensor: tensor, torch.Tensor.contiguous):
        found = rotary(layout(q), layout(k), cos, sin)
        gradients = torch.autograd.grad(found, (q, k), [tensor.detach() for tensor in found])
        wanted = by_torch(*exact, False)
        for a, b in zip((*found, *gradients), (*wanted, *by_torch(*wanted, *exact[2:], True)), strict=True):
            assert a.dtype is dtype
            assert (a.cpu() - b).norm() <= tolerance * b.norm()
        if dtype in (torch.bfloat16, torch.float16):  # rounded as by single operations
            assert all(map(torch.equal, found, by_torch(*(t.detach() for t in (q, k, cos, sin)), False)))


@pytest.mark.parametrize("mode", ["bfloat16", "float16", "autocast bfloat16", "autocast float16"])
@pytest.mark.parametrize("checkpointing", ["none", "last", "mlp", "block", "sqrt"])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_in_half_precision_a_lean_step_is_as_near_to_float64_as_the_plain_one(kind, checkpointing, mode):
    dtype = getattr(torch, mode.rpartition(" ")[2])
    model = made(kind, dtype=torch.float32 if "autocast" in mode else dtype)
    assert all(p.dtype is torch.float32 for p in model.parameters() if p.requires_grad)
    wanted = learned(exact(model), **batch(device="cpu"))

    def errors():
        with torch.autocast(DEVICE.type, dtype, enabled="autocast" in mode):
            found = learned(model, **batch())
        return {name: off(found[name], wanted[name]) for name in wanted}

    plain = errors()
    lean(model, checkpointing)
    errors()
    ours = errors()
    wrong = {
        name: (error, plain[name]) for name, error in ours.items() if not error <= 2 * plain[name] + TOLERANCE[dtype]
    }
    assert not wrong, f"lean and plain, off float64: {wrong}"
    assert max(plain.values()) < 6 * TOLERANCE[dtype], plain


@pytest.mark.parametrize("checkpointing", [None, "none", "block"])
def test_three_updates_with_a_gradient_scaler_are_those_in_float32(checkpointing):
    if DEVICE.type == "cpu":
        pytest.skip("the scaler is CUDA's")
    models = [made("llama") for _ in range(2)]
    if checkpointing is not None:
        lean(models[1], checkpointing)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**12)
    optimizers = [torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.3) for model in models]
    losses = []
    for _ in range(3):
        whole = models[0](**batch()).loss
        whole.backward()
        optimizers[0].step()
        with torch.autocast("cuda", torch.float16):
            half = models[1](**batch()).loss
        scaler.scale(half).backward()
        scaler.unscale_(optimizers[1])
        norm = torch.nn.utils.clip_grad_norm_(models[1].parameters(), 1e3)
        assert norm.isfinite()
        scaler.step(optimizers[1])
        scaler.update()
        losses.append((float(whole), float(half)))
        for optimizer in optimizers:
            optimizer.zero_grad()
    assert scaler.get_scale() == 2.0**12  # nothing overflowed
    assert losses[-1][1] < losses[0][1]
    assert all(abs(a - b) <= 5e-3 * abs(a) for a, b in losses), losses


@pytest.mark.parametrize("p", [0.05, 0.3, 0.9])
@pytest.mark.parametrize("rows", [7, ROWS, 3 * ROWS + 5])
def test_the_backward_pass_has_the_mask_of_the_forward_pass(rows, p):
    """The output is linear in x, in A and in B, so each product of one with its gradient is a sum over the output."""
    generator = torch.Generator().manual_seed(1)
    x, A, B, dy = (
        torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE)
        for shape in ((rows, 64), (4, 64), (48, 4), (rows, 48))
    )
    W = torch.zeros(48, 64, dtype=torch.float64, device=DEVICE)
    for tensor in (x, A, B):
        tensor.requires_grad_()
    y = lora_linear(x, W, None, A, B, 0.5, p)
    total = (y * dy).sum()
    for tensor, gradient in zip((x, A, B), torch.autograd.grad(total, (x, A, B)), strict=True):
        assert float((tensor * gradient).detach().sum() / total.detach()) == pytest.approx(1, abs=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_mask_drops_what_it_should_and_no_two_are_alike(dtype):
    x, p = torch.ones(4 * ROWS, 256, device=DEVICE, dtype=dtype), 0.1
    masks = [DropoutMask(p) for _ in range(2)]
    drawn = [torch.cat([survives.clone() for _, survives, _ in mask.blocks(x)]).bool() for mask in masks]
    again = torch.cat([survives.clone() for _, survives, _ in masks[0].blocks(x)]).bool()
    assert torch.equal(again, drawn[0])
    for mask in drawn:
        assert float((~mask).double().mean()) == pytest.approx(p, abs=5 * (p / mask.numel()) ** 0.5)
    parts = [*drawn[0].split(ROWS), *drawn[1].split(ROWS)]
    for one, other in itertools.combinations(parts, 2):  # they agree as independent ones do
        assert float((one == other).double().mean()) == pytest.approx(0.82, abs=0.02)


def waits(call):
    """Where Python stood when CUDA was waited for. transformers' own places are in it, too."""
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return collections.Counter(
        f"{warning.filename}:{warning.lineno}" for warning in said if "called a synchronizing" in str(warning.message)
    )


def waits_of_a_step(model, optimizer=None, **more):
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = optimizer or torch.optim.AdamW(trained, 1e-3)
    ids, labels = batch().values()

    def step():
        inputs = model.get_input_embeddings()(ids).detach().requires_grad_()
        model(inputs_embeds=inputs, labels=labels, use_cache=False, **more).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(4):  # the first pass is watched, and shows what can be cut; AdaLoRA looks at passes 1, 2, 4, 8, ...
        step()
    return waits(step)


def own_waits(kind):
    model = made(kind)
    with torch.no_grad():
        base = model.unload().requires_grad_(False)
    next(p for n, p in base.named_parameters() if "norm" in n or "ln_" in n).requires_grad_()
    return waits_of_a_step(base.train())


ALONE = METHODS | {
    "dropout": LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.1),
    "tokens": LoraConfig(r=4, target_modules="all-linear", trainable_token_indices=[3, 5]),
}


@needs_cuda
@pytest.mark.parametrize("method", ALONE)
def test_a_step_of_an_adapted_model_waits_for_nothing(method):
    base = made("llama").unload()
    model = get_adapter_model(base, ALONE[method]).train()
    assert waits_of_a_step(model) - own_waits("llama") == collections.Counter()


@needs_cuda
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("checkpointing", ["none", "last", "mlp", "block", "sqrt"])
def test_a_lean_step_waits_once_for_which_labels_count(kind, checkpointing):
    model, own = made(kind), own_waits(kind)
    extra = waits_of_a_step(lean(model, checkpointing)) - own
    assert sum(extra.values()) <= 1, extra
    assert waits_of_a_step(lean(model, checkpointing, chunked_loss=False)) - own == collections.Counter()


@needs_cuda
@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_a_step_of_experts_by_a_grouped_product_waits_for_nothing(kind):
    base = moe(kind, "grouped_mm", torch.bfloat16).to(DEVICE)
    own = copy.deepcopy(base).requires_grad_(False)
    own.model.norm.weight.requires_grad_()
    own = waits_of_a_step(own)
    assert waits_of_a_step(with_lora(base, r=4)) - own == collections.Counter()


@needs_cuda
def test_a_step_of_a_mixed_batch_waits_for_nothing():
    model = made("llama")
    model.add_adapter("other", LoraConfig(r=8, target_modules="all-linear"))
    model.train_adapters(["default", "other"])
    names = ["default", "other", "other", "default"]
    assert waits_of_a_step(model, adapter_names=names) - own_waits("llama") == collections.Counter()


@needs_cuda
def test_decoding_waits_for_nothing_that_the_base_does_not_wait_for():
    model = made("llama").eval()
    model.add_adapter("other", LoraConfig(r=8, target_modules="all-linear"))
    names, ids = ["default", "other", BASE, "default"], IDS.to(DEVICE)

    def decode(**more):
        with foreign_code(), torch.no_grad():
            model.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0, **more)

    def counted(**more):
        decode(**more)
        with torch.no_grad():
            return sum(waits(functools.partial(model, ids, use_cache=False, **more)).values())

    with model.disable_adapter():
        own = counted()
    assert (counted(), counted(adapter_names=names)) == (own, own)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("r", [1, 3, 4, 8, 12])
@pytest.mark.parametrize("sizes", [[3, 0, 5, 0, 8], [0, 0, 16, 0, 0], [1, 1, 1, 1, 1]], ids=str)
def test_a_grouped_product_is_that_of_each_group_in_float64(sizes, r, dtype):
    """Groups without rows, and ranks whose rows do not fill the 16 bytes that the kernel wants."""
    generator = torch.Generator().manual_seed(0)
    count, rows = len(sizes), sum(sizes)

    def random(*shape, scale=1.0):
        return (scale * torch.randn(shape, generator=generator)).to(dtype)

    x, own, left, right, dy = (
        random(rows, 64), random(count, 64, 96, scale=0.1), random(count, 64, r, scale=0.1),
        random(count, r, 96, scale=0.3), random(rows, 96),
    )  # fmt: skip
    leaves = [tensor.to(DEVICE).requires_grad_() for tensor in (x, left, right)]
    ends = torch.tensor(sizes).cumsum(0).to(DEVICE, torch.int32)
    stack = LowRankSum(own.to(DEVICE), leaves[1], leaves[2], 0.7)
    y = grouped(leaves[0], stack, ends)
    found = torch.autograd.grad(y, leaves, dy.to(DEVICE))
    exact_leaves = [tensor.double().requires_grad_() for tensor in (x, left, right)]
    parts, first = [], 0
    for index, size in enumerate(sizes):
        some = exact_leaves[0][first : first + size]
        parts.append(some @ (own[index].double() + 0.7 * exact_leaves[1][index] @ exact_leaves[2][index]))
        first += size
    expected = torch.cat(parts)
    wanted = torch.autograd.grad(expected, exact_leaves, dy.double())
    close(dict(enumerate((y, *found))), dict(enumerate((expected, *wanted))), TOLERANCE[dtype] / 2)
    empty = [index for index, size in enumerate(sizes) if size == 0]
    assert all(not gradient[empty].any() for gradient in found[1:])


@needs_cuda
def test_bfloat16_experts_are_one_call():
    x, stack = torch.empty(8, 64, device=DEVICE, dtype=torch.bfloat16), torch.empty(3, 64, 96, device=DEVICE)
    assert is_one_call(x, stack.bfloat16())
    ends = torch.tensor([2, 2, 8], device=DEVICE, dtype=torch.int32)
    groups = Groups(ends, True)
    with torch.no_grad():
        assert not waits(lambda: groups.times(x.zero_(), stack.bfloat16().zero_()))
    assert "sizes" not in vars(groups)


@pytest.mark.parametrize("r", [3, 4, 8])
@pytest.mark.parametrize("way", ["grouped_mm", "batched_mm"])
@pytest.mark.parametrize("kind", MODELS)
def test_experts_learn_what_the_loop_over_them_learns(kind, way, r):
    """In bfloat16 the loop has the same routing, which float64 need not have."""
    model = with_lora(moe(kind, "eager", torch.bfloat16), r=r).to(DEVICE)
    single = with_lora(moe(kind, "eager"), r=r).to(DEVICE)

    def step(some):
        ids = token_ids(2, 16).to(DEVICE)
        embeddings = some.get_input_embeddings()(ids).detach().requires_grad_()
        found = learned(some, inputs_embeds=embeddings, labels=ids)
        return {**found, "embeddings": embeddings.grad}

    expected = step(model)
    model.set_experts_implementation(way)
    close(step(model), expected, 2 * TOLERANCE[torch.bfloat16])
    twin = exact(single)
    embeddings = twin.get_input_embeddings()(token_ids(2, 16)).detach().requires_grad_()
    wanted = {**learned(twin, inputs_embeds=embeddings, labels=token_ids(2, 16)), "embeddings": embeddings.grad}
    single.set_experts_implementation(way)
    close(step(single), wanted, 1e-3)


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_experts_keep_no_more_than_twice_what_they_keep_without_an_adapter(kind):
    kept = []
    for model in (
        moe(kind, "grouped_mm", torch.bfloat16).requires_grad_(False),
        with_lora(moe(kind, "grouped_mm", torch.bfloat16)),
    ):
        model.to(DEVICE)
        embeddings = model.get_input_embeddings()(token_ids(4, 32).to(DEVICE)).detach().requires_grad_()
        model(inputs_embeds=embeddings)
        kept.append(bytes_kept(model, inputs_embeds=embeddings))
    assert kept[1] <= 2 * kept[0], kept


@pytest.fixture(scope="module")
def three():
    every = {"target_modules": "all-linear", "init_lora_weights": False}
    configs = {"a": LoraConfig(r=4, **every), "b": LoraConfig(r=2, lora_alpha=7, use_dora=True, **every)}
    return several(llama(), {**configs, "c": minipeft.IA3Config()}).to(DEVICE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("names", ["abc", "ccaab_b", "aaaaaabb"])
def test_each_row_is_what_its_adapter_alone_computes(three, names, dtype):
    names = [BASE if name == "_" else name for name in names]
    ids = token_ids(len(names), 9).to(DEVICE)
    model = copy.deepcopy(three).to(dtype)
    with torch.no_grad():
        found = model(ids, adapter_names=names).logits
        for row, name in enumerate(names):
            own = alone(model, name, lambda: model(ids).logits)
            close(found[row], own[row], 1e-4 if dtype is torch.float32 else 0.1)


@pytest.mark.parametrize("cache", [None, "static"])
def test_generate_gives_each_row_what_its_adapter_alone_gives(three, cache):
    names, ids = ["a", BASE, "c", "b"], token_ids(4, 6).to(DEVICE)
    more = {} if cache is None else {"cache_implementation": cache, "disable_compile": True}
    options = {"inputs": ids, "do_sample": False, **more}
    found = generated(three, names, **options)
    for row, name in enumerate(names):
        own = generated(three, [name] * 4, **options)
        assert torch.equal(found[row], own[row]), (name, found[row], own[row])
    assert found.device.type == DEVICE.type


@pytest.mark.parametrize("checkpointing", [None, "none", "block"])
def test_a_mixed_batch_gives_each_adapter_its_own_gradient(checkpointing):
    model = made("llama")
    model.add_adapter("other", LoraConfig(r=8, target_modules="all-linear", init_lora_weights=False))
    model.train_adapters(["default", "other"])
    if checkpointing is not None:
        lean(model, checkpointing)
    found = learned(model, adapter_names=["default", "other", "default", "other"], **batch())
    unlean(model)
    tokens = (LABELS[:, 1:] != -100).sum()
    for name, rows in (("default", [0, 2]), ("other", [1, 3])):
        model.set_adapter(name)
        model.train_adapters([name])
        some = learned(model, **batch(rows))
        share = (LABELS[rows, 1:] != -100).sum() / tokens
        own = {key: value * share for key, value in some.items() if f".{name}." in key}
        close({key: found[key] for key in own}, own, 1e-4)


@needs_cuda
def test_lean_takes_less_memory_than_the_plain_adapter_and_that_less_than_pefts():
    def base():
        torch.manual_seed(0)
        config = LlamaConfig(
            hidden_size=512, intermediate_size=1408, num_hidden_layers=6, num_attention_heads=8, num_key_value_heads=4,
            vocab_size=16000, pad_token_id=None,
        )  # fmt: skip
        return LlamaForCausalLM(config).to(DEVICE, torch.bfloat16).train()

    ids = torch.randint(16000, (8, 256), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    options = {"r": 8, "target_modules": "all-linear", "lora_dropout": 0.05}

    def peak(model):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
        for _ in range(2):
            gc.collect()  # what is left of another model or test
            torch.cuda.reset_peak_memory_stats()
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return (torch.cuda.max_memory_allocated() - before) / 2**20

    gc.collect()
    before, found = torch.cuda.memory_allocated(), {}
    with foreign_code():
        theirs = peft.get_peft_model(base(), peft.LoraConfig(task_type="CAUSAL_LM", **options))
    found["peft"] = peak(theirs)
    del theirs
    model = get_lora_model(base(), LoraConfig(**options))
    found["plain"] = peak(model)
    for checkpointing in ("none", "mlp", "block", "sqrt"):
        found[checkpointing] = peak(lean(model, checkpointing))
    print({name: f"{size:.0f} MiB" for name, size in found.items()})
    sizes = list(found.values())
    assert all(after < 1.02 * before for before, after in itertools.pairwise(sizes)), found
    assert found["none"] < found["plain"] < found["peft"]
    assert found["block"] < 0.8 * found["none"]
