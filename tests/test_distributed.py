"""Adapted layers where torch splits the work or transforms it: DDP, FSDP2, torch.compile, torch.func.

The tests of DDP and FSDP2 start two processes, once for all of them. What these find is held against one process that
has the whole batch, or that goes over the halves in turn.
"""

import datetime
import warnings
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import warm
from tiny_models import foreign_code, gpt2, llama, token_ids
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DistributedDataParallel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from minipeft import LoraConfig, get_lora_model, lean
from minipeft.ecosystem.wrapper_names import unwrapped_name
from minipeft.files.base_samples import base_samples
from minipeft.kernels import lora_linear as fused
from minipeft.kernels import recompute

WORLD = 2
LAYERS = 8  # adapted ones in the tiny GPT-2: four a block
BATCHES = {"two products": token_ids(4, 6), "merged weight": token_ids(16, 64)}  # the way of the map, by number of rows
FEW, MANY = BATCHES


def in_training(dropout=0.0, dtype=torch.float32, **options):
    """A tiny GPT-2 in training mode with LoRA on all its linear maps but the head, the same in every process."""
    targets = ["c_attn", "c_proj", "c_fc"]
    config = LoraConfig(r=4, lora_alpha=8, target_modules=targets, lora_dropout=dropout, init_lora_weights=False)
    torch.manual_seed(0)
    return get_lora_model(gpt2(**options).to(dtype), config).train()


def checkpointed():
    model = in_training(dropout=0.3)
    with foreign_code():  # newer transformers have another name for it
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def marked():
    """Adapters keep the layer norms' inputs instead of their outputs, which are computed again in the backward pass."""
    model = in_training()
    for block in model.transformer.h:
        for norm in (block.ln_1, block.ln_2):
            norm.register_forward_hook(lambda norm, inputs, output: recompute.mark(output, norm, inputs[0]))
    return model


def with_idle_adapter():
    """DDP waits for each parameter that wants a gradient, unless told to find the unused ones; here it is not."""
    model = in_training()
    model.add_adapter("other", LoraConfig(r=2, target_modules=["c_attn", "wte"]))
    return model


MODELS = {
    "plain": in_training,
    "marked": marked,
    "idle adapter": with_idle_adapter,
    "dropout": lambda: in_training(dropout=0.3),
    "checkpointed": checkpointed,
    "autocast": lambda: in_training(dropout=0.3),
    "bfloat16 base": lambda: in_training(dtype=torch.bfloat16),
}
RECOMPUTED = ("none", "block")
EXACT = ("plain", "marked", "idle adapter")  # the halves' mean is the whole batch's, but for float32's rounding


def precision(variant):
    return torch.autocast("cpu", torch.bfloat16, enabled=variant == "autocast")


def loss_of(model, ids):
    logits = model(input_ids=ids).logits
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


def half(ids, rank):
    return ids.chunk(WORLD)[rank]


def trained(model):
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def taken_gradients(model):
    """The gradients that are there, and none is left."""
    found = {name: parameter.grad.clone() for name, parameter in trained(model).items()}
    model.zero_grad()
    return found


def gradients(model, ids):
    loss_of(model, ids).backward()
    return taken_gradients(model)


def an_optimizer(model):
    # The large eps keeps a step smooth in the gradient, so that rounding around zero does not turn its sign.
    return torch.optim.AdamW(trained(model).values(), lr=1e-2, eps=1e-2)


def fused_loss(model, ids):
    """The loss, after a look that every adapted layer went the fused way, which is what is tested here."""
    with mock.patch.object(fused, "_product", wraps=fused._product) as product:
        loss = loss_of(model, ids)
    assert product.call_count == LAYERS, product.call_count
    return loss


def parallel_gradients(parallel, ids, rank, variant="plain"):
    torch.manual_seed(rank)  # which features are dropped differs
    with precision(variant):
        loss = fused_loss(parallel, half(ids, rank))
    loss.backward()
    return taken_gradients(parallel.module if isinstance(parallel, DistributedDataParallel) else parallel)


def ddp(rank, cases):
    found = {}
    for variant, batch in cases:
        in_bucket = batch == MANY  # both ways that DDP has of holding gradients
        parallel = DistributedDataParallel(MODELS[variant](), gradient_as_bucket_view=in_bucket)
        # Twice, since what the first pass left unfinished shows in the second.
        passes = [parallel_gradients(parallel, BATCHES[batch], rank, variant) for _ in range(2)]
        found[f"{variant}, {batch}"] = passes
    return found


def ddp_accumulated(rank, cases):
    found = {}
    for batch, ids in BATCHES.items():
        model = in_training()
        parallel = DistributedDataParallel(model)
        first, last = half(ids, rank).chunk(2)
        with parallel.no_sync():
            (fused_loss(parallel, first) / 2).backward()
        alone = {name: parameter.grad.clone() for name, parameter in trained(model).items()}
        (fused_loss(parallel, last) / 2).backward()
        found[batch] = {"alone": alone, "together": taken_gradients(model)}
    return found


def sharded(model):
    mesh = init_device_mesh("cpu", (WORLD,))
    for block in model.transformer.h:
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    return fully_shard(model, mesh=mesh, reshard_after_forward=True)


def fsdp(rank, cases):
    found = {}
    for variant, batch in cases:
        model = sharded(MODELS[variant]())
        optimizer = an_optimizer(model)
        shards = parallel_gradients(model, BATCHES[batch], rank, variant)
        for name, parameter in trained(model).items():
            parameter.grad = shards[name].clone()
        optimizer.step()
        found[f"{variant}, {batch}"] = {
            "gradients": {name: shard.to_local() for name, shard in shards.items()},
            "stepped": {name: parameter.to_local().detach() for name, parameter in trained(model).items()},
            "sharded": all(shard.to_local().numel() < shard.numel() for shard in shards.values()),
        }
    return found


def lean_llama(checkpointing):
    model = llama()
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "norm" in name:  # else normalizing twice would be the same
            nn.init.uniform_(parameter, 0.5, 1.5)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    return lean(get_lora_model(model, config).train(), checkpointing)


def first_fsdp(rank, cases):
    """FSDP before `fully_shard`: other tensors stand in the places of parameters, in other ways in the backward pass."""
    found, wraps = {}, ModuleWrapPolicy({LlamaDecoderLayer})
    for checkpointing in RECOMPUTED:
        whole, here = lean_llama(checkpointing), torch.device("cpu")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it is going to be removed
            model = FullyShardedDataParallel(whole, auto_wrap_policy=wraps, use_orig_params=True, device_id=here)
            model(input_ids=BATCHES[FEW], labels=BATCHES[FEW]).loss.backward()
            with FullyShardedDataParallel.summon_full_params(model, with_grads=True):
                found[checkpointing] = {
                    unwrapped_name(name): parameter.grad.clone() for name, parameter in trained(model).items()
                }
    return {**found, "samples": base_samples(whole, "default")}


def main(directory, cases):
    warnings.simplefilter("error")
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=100))
    rank = dist.get_rank()
    found = {scenario.__name__: scenario(rank, cases) for scenario in (ddp, ddp_accumulated, fsdp, first_fsdp)}
    torch.save(found, directory / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory, request):
    """What each of the two processes found, and its stderr."""
    directory = tmp_path_factory.mktemp("ranks")
    wanted = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    cases = {(case["variant"], case["batch"]) for case in wanted if {"variant", "batch"} <= case.keys()}
    processes = warm.ranks(directory, main, directory, sorted(cases))
    return [torch.load(directory / f"{rank}.pt") | {"stderr": process.stderr} for rank, process in enumerate(processes)]


def assert_all_close(found, expected, rtol=1e-5):
    """Each tensor within `rtol`, relative to its largest element."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert value.isfinite().all(), name
        atol = rtol * value.abs().max().item()
        torch.testing.assert_close(found[name], value, rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def half_gradients(variant, ids, rank):
    """What a rank finds alone, from the features that it drops."""
    model = MODELS[variant]()
    torch.manual_seed(rank)
    with precision(variant):
        loss = loss_of(model, half(ids, rank))
    loss.backward()
    return taken_gradients(model)


def expected_gradients(variant, ids):
    """The whole batch's gradients; where its halves are computed differently, the mean of theirs."""
    if variant in EXACT:
        return gradients(in_training(), ids)
    first, second = (half_gradients(variant, ids, rank) for rank in range(WORLD))
    return {name: (value + second[name]) / 2 for name, value in first.items()}


@pytest.mark.each_value
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("variant", MODELS)
def test_ddp_gives_every_rank_the_gradients_of_the_whole_batch(variant, batch, ranks):
    expected = expected_gradients(variant, BATCHES[batch])
    for step in range(2):
        one, other = (found["ddp"][f"{variant}, {batch}"][step] for found in ranks)
        assert_equal(one, other)
        assert_all_close(one, expected)


def test_the_ranks_drop_different_features():
    ids = BATCHES[FEW]
    same = torch.cat([ids[:2], ids[:2]])
    one, other = (half_gradients("dropout", same, rank) for rank in range(WORLD))
    assert not any(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("batch", BATCHES)
def test_ddp_accumulates_alone_and_averages_with_the_last_backward_pass(batch, ranks):
    one, other = (found["ddp_accumulated"][batch] for found in ranks)
    assert not any(torch.equal(one["alone"][name], other["alone"][name]) for name in one["alone"])
    assert_equal(one["together"], other["together"])
    assert_all_close(one["together"], gradients(in_training(), BATCHES[batch]))


def joined(shards, what):
    """The whole tensors, of which each rank has some rows."""
    one, other = (found[what] for found in shards)
    return {name: torch.cat([rows, other[name]]) for name, rows in one.items()}


@pytest.mark.each_value
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("variant", MODELS)
def test_fsdp_gives_the_gradients_and_the_step_of_the_whole_batch(variant, batch, ranks):
    expected = expected_gradients(variant, BATCHES[batch])
    model = MODELS[variant]()
    for name, parameter in trained(model).items():
        parameter.grad = expected[name]
    an_optimizer(model).step()
    shards = [found["fsdp"][f"{variant}, {batch}"] for found in ranks]
    assert all(found["sharded"] for found in shards)
    assert_all_close(joined(shards, "gradients"), expected)
    assert_all_close(joined(shards, "stepped"), {name: value.detach() for name, value in trained(model).items()})


@pytest.mark.parametrize("checkpointing", RECOMPUTED)
def test_a_lean_model_has_its_gradients_under_the_first_fsdp_too(checkpointing, ranks):
    model = lean_llama("none")
    model(input_ids=BATCHES[FEW], labels=BATCHES[FEW]).loss.backward()
    expected = taken_gradients(model)
    for found in ranks:
        assert_all_close(found["first_fsdp"][checkpointing], expected)


def test_the_parts_that_the_first_fsdp_leaves_are_no_samples_of_the_base(ranks):
    """Else the saved adapter would be refused on its own base."""
    assert not any(row for found in ranks for row in found["first_fsdp"]["samples"].values())


@pytest.mark.each_value
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("variant", MODELS)
def test_gradients_lie_in_memory_as_their_parameters_do(variant, batch):
    """Else autograd copies each, and DDP may copy it once more and say so."""
    model = MODELS[variant]()
    parameters = list(trained(model).values())
    with precision(variant):
        loss = loss_of(model, BATCHES[batch])
    for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
        assert gradient.stride() == parameter.stride()


def test_ddp_finds_no_fault_with_the_layout_of_the_gradients(ranks):
    assert not any(word in found["stderr"] for found in ranks for word in ("stride", "layout"))


def one_block(**options):
    """To compile: of each layer type one, since a second block only takes time."""
    model = in_training(**options)
    del model.transformer.h[1:]
    return model


@pytest.fixture
def compiled():
    """How a model is compiled here: forward and backward pass traced, in one graph."""
    torch._dynamo.reset()
    return lambda model: torch.compile(model, fullgraph=True, backend="aot_eager")


def test_a_compiled_backward_pass_gives_the_gradients_of_the_fused_one(compiled):
    model, ids = one_block(), BATCHES[FEW]
    loss_of(compiled(model), ids).backward()
    assert_all_close(taken_gradients(model), gradients(model, ids))


@pytest.mark.slow
def test_a_compiled_backward_pass_works_under_autocast(compiled):
    model, ids = one_block(), BATCHES[FEW]
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(compiled(model), ids)
        expected = loss_of(model, ids)
    loss.backward()
    found = taken_gradients(model)
    expected.backward()
    assert {gradient.dtype for gradient in found.values()} == {torch.float32}
    assert_all_close(found, taken_gradients(model), rtol=0.05)


@pytest.mark.slow
def test_a_compiled_model_trains_with_dropout(compiled):
    model, ids = one_block(dropout=0.2), BATCHES[FEW]
    run, optimizer, losses = compiled(model), an_optimizer(model), []
    for _ in range(20):
        loss = loss_of(run, ids)
        loss.backward()
        assert all(parameter.grad.isfinite().all() for parameter in trained(model).values())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    with torch.no_grad():
        assert loss_of(run, ids) != loss_of(run, ids)  # dropped anew in every call
    assert sum(losses[-5:]) < sum(losses[:5]) - 0.5


def test_per_sample_gradients_by_vmap_are_those_of_the_samples_one_by_one():
    model, ids = in_training(attn_implementation="eager"), BATCHES[FEW]
    model.config.pad_token_id = None  # else transformers looks into the tokens for padding, which vmap forbids

    def loss(parameters, row):
        def call(input_ids):
            return torch.func.functional_call(model, parameters, (), {"input_ids": input_ids})

        return loss_of(call, row[None])

    parameters = {name: parameter.detach() for name, parameter in trained(model).items()}
    found = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, ids)
    for index, row in enumerate(ids):
        assert_all_close({name: value[index] for name, value in found.items()}, gradients(model, row[None]))
