"""CUDA graphs and torch.compile on a GPU: what was captured follows inputs, swapped adapters and their strength."""

import functools

import pytest
import torch
from gpu_device import DEVICE, METHODS, close, devices, learned, on_device
from test_gpu_contract import layer_of
from test_hotswap import saved
from test_split_experts import moe, with_lora
from tiny_models import adapted, disturb, foreign_code, llama, token_ids
from torch._dynamo.utils import counters

import minipeft
from minipeft import LoraConfig, get_adapter_model, lean, load_adapter
from minipeft.registry import registry

pytestmark = on_device
BACKEND = "inductor" if DEVICE.type == "cuda" else "aot_eager"  # a GPU is for what inductor makes
IDS = token_ids(4, 16)
LEAN = "lean"  # without what reads which labels count


def one_block():
    """To compile: a second block only takes time."""
    model = llama()
    del model.model.layers[1:]
    return model


def captured(call):
    """What replays a call that was captured once. Without CUDA it is the call itself."""
    if DEVICE.type != "cuda":
        return call
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = call()

    def replay():
        graph.replay()
        return output

    return replay


@pytest.fixture
def fresh():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("layer", ["Linear", "Embedding", "Conv2d"])
@pytest.mark.parametrize("method", registry.method_names())
def test_a_captured_layer_computes_what_it_computes(method, layer):
    name = next(name for name in registry.layers() if name.endswith(f".{layer}"))
    if (refused := minipeft.testing.report.refusal(method, name)) is not None:
        pytest.skip(refused)
    model, x = layer_of(method, torch.float32, name, (16, 16))
    with torch.no_grad():
        replay = captured(functools.partial(model, x))
        for _ in range(2):
            x.copy_(x.flip(0))
            close(replay().clone(), model(x), 1e-6)


@pytest.mark.parametrize("method", [*METHODS, LEAN])
def test_a_captured_step_has_the_gradients_of_new_inputs(method):
    torch.manual_seed(0)
    config = METHODS["lora" if method == LEAN else method]
    model = disturb(get_adapter_model(llama(), config), scale=0.05).to(DEVICE).train()
    if method == LEAN:
        lean(model, "none", chunked_loss=False)
    ids = IDS.to(DEVICE)
    learned(model, input_ids=ids, labels=ids)  # which is watched

    def step():
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        return loss.detach()

    model.zero_grad(set_to_none=True)
    replay = captured(step)
    for _ in range(2):
        ids.copy_(ids.flip(1).add(1) % 90 + 1)
        for p in model.parameters():
            if p.grad is not None:
                p.grad.zero_()
        loss = replay().clone()
        found = {"loss": loss} | {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        grads = {n: p.grad for n, p in model.named_parameters()}
        expected = learned(model, input_ids=ids, labels=ids)
        for n, p in model.named_parameters():
            p.grad = grads[n]
        close(found, expected, 1e-4)


def files(tmp_path, **options):
    """Adapters of several ranks and strengths for a Llama, and what a CPU computes with each."""
    configs = [LoraConfig(r=r, lora_alpha=alpha, **options) for r, alpha in ((4, 16), (2, 3), (8, 8), (1, 7))]
    return [saved(config, tmp_path / str(seed), seed, llama()) for seed, config in enumerate(configs)]


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_a_captured_model_follows_each_swapped_adapter_and_its_strength(dora, tmp_path):
    made = files(tmp_path, use_dora=dora)
    model = load_adapter(llama().to(DEVICE), made[0][0])
    model.prepare_hotswap(8)
    assert devices(model) == {DEVICE.type}
    ids = token_ids().to(DEVICE)
    with torch.no_grad():
        replay = captured(lambda: model(ids, use_cache=False).logits)
        for index in (0, 1, 2, 3, 0, 2):
            model.hotswap_adapter(made[index][0])
            close(replay(), made[index][1], 1e-4)
        if not dora:
            for strength in (0.5, 0.0, 1.0):
                model.set_scale("default", strength)
                close(replay(), model(ids, use_cache=False).logits, 1e-5)


def test_room_made_on_a_cpu_moves_to_the_device(tmp_path):
    made = files(tmp_path)
    model = load_adapter(llama(), made[0][0])
    model.prepare_hotswap(8)
    model.to(DEVICE)
    ids = token_ids().to(DEVICE)
    with torch.no_grad():
        replay = captured(lambda: model(ids, use_cache=False).logits)
        model.hotswap_adapter(made[2][0])
        close(replay(), made[2][1], 1e-4)


def test_a_captured_batch_of_several_adapters_follows_their_values():
    model = adapted(llama(), target_modules="all-linear")
    model.add_adapter("other", LoraConfig(r=8, target_modules="all-linear", init_lora_weights=False))
    model.to(DEVICE)
    ids, names = IDS.to(DEVICE), ["default", "other", "__base__", "other"]
    call = functools.partial(model, ids, use_cache=False, adapter_names=names)
    try:
        with torch.no_grad():
            replay = captured(lambda: call().logits)
    except RuntimeError as error:
        pytest.skip(f"which rows use which adapter is copied to the device at each call ({error!s:.200})")
    with torch.no_grad():
        disturb(model, seed=9)
        close(replay().clone(), call().logits, 1e-5)


@pytest.mark.usefixtures("fresh")
def test_generate_with_a_static_cache_is_compiled_once_for_all_adapters(tmp_path):
    """transformers compiles the decoding step by itself, with CUDA graphs."""
    made = files(tmp_path)
    model = load_adapter(llama().to(DEVICE), made[0][0]).eval()
    model.prepare_hotswap(8)
    ids = token_ids(2, 6).to(DEVICE)
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}

    def generated(**more):
        with foreign_code(), torch.no_grad():
            return model.generate(ids, **options, **more)

    graphs = None
    for index in (0, 2, 1):
        model.hotswap_adapter(made[index][0])
        expected = generated()
        assert torch.equal(generated(cache_implementation="static"), expected), index
        graphs = counters["stats"]["unique_graphs"] if graphs is None else graphs
    assert counters["stats"]["unique_graphs"] == graphs


def compiled_step(model, mode=None, **inputs):
    call = torch.compile(model, fullgraph=True, backend=BACKEND, mode=mode if BACKEND == "inductor" else None)
    expected = learned(model, **inputs)
    for _ in range(3 if mode else 1):
        if mode:
            torch.compiler.cudagraph_mark_step_begin()
        model.zero_grad(set_to_none=True)
        loss = call(**inputs).loss
        loss.backward()
        found = {"loss": loss.detach().clone()}
        found |= {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        close(found, expected, 2e-4)
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("checkpointing", ["plain", "none", "block"])
def test_a_compiled_step_is_one_graph_with_the_same_gradients(checkpointing):
    model = adapted(one_block(), target_modules="all-linear").to(DEVICE).train()
    if checkpointing != "plain":
        lean(model, checkpointing)
    ids = IDS.to(DEVICE)
    compiled_step(model, input_ids=ids, labels=ids, use_cache=False)


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("kind", ["plain", "lean"])
def test_a_step_compiled_with_cuda_graphs_has_the_same_gradients(kind):
    """What reads values, as the loss in chunks does, stays outside of them.

    Experts are not here: in float32 transformers' own grouped product reads how many rows a group has, within the graph.
    """
    model = adapted(one_block(), target_modules="all-linear").to(DEVICE).train()
    if kind == "lean":
        lean(model, "none")
    ids = IDS.to(DEVICE)
    compiled_step(model, "reduce-overhead", input_ids=ids, labels=ids, use_cache=False)


@pytest.mark.usefixtures("fresh")
def test_compiled_dropout_drops_as_much_and_differs_each_time():
    model = adapted(llama(), target_modules=["q_proj"], lora_dropout=0.5).to(DEVICE).train()
    layer = model.model.layers[0].self_attn.q_proj
    with torch.no_grad():
        layer.base_layer.weight.zero_()
    call = torch.compile(layer, fullgraph=True, backend=BACKEND)
    x = torch.ones(4096, 32, device=DEVICE)
    adapter = layer.adapters["default"]
    W = adapter.scaling * adapter.lora_B @ adapter.lora_A
    mean = x @ W.t()
    one, two = call(x), call(x)
    assert not torch.equal(one, two)
    for y in (one, two):
        close(y.mean(0), mean.mean(0), 0.1)
        spread = (W.square().sum(1)).sqrt()  # of a sum of 32 terms, each doubled or dropped
        close(y.std(0), spread, 0.1)


@pytest.mark.usefixtures("fresh")
def test_compiled_experts_are_split_in_one_graph():
    model = with_lora(moe("mixtral", "grouped_mm"), r=4).to(DEVICE)
    ids = token_ids(2, 16).to(DEVICE)
    embeddings = model.get_input_embeddings()(ids).detach()
    compiled_step(model, inputs_embeds=embeddings, labels=ids)


@pytest.mark.usefixtures("fresh")
def test_a_compiled_model_in_bfloat16_follows_swapped_adapters_without_compiling_again(tmp_path):
    made = files(tmp_path)
    model = load_adapter(llama().to(DEVICE, torch.bfloat16), made[0][0])
    model.prepare_hotswap(8)
    call = torch.compile(model, fullgraph=True, backend=BACKEND)
    ids, graphs = token_ids().to(DEVICE), None
    with torch.no_grad():
        for index in (0, 1, 2, 3):
            model.hotswap_adapter(made[index][0])
            close(call(ids, use_cache=False).logits, made[index][1], 0.05)
            graphs = counters["stats"]["unique_graphs"] if graphs is None else graphs
        model.set_scale("default", 0.25)
        close(call(ids, use_cache=False).logits, model(ids, use_cache=False).logits, 0.05)
    assert counters["stats"]["unique_graphs"] == graphs == 1
