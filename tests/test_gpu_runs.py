"""Runs on a GPU from end to end: quantized bases, trainers, examples/train.py, resuming, DDP, the doctor, the estimate."""

import copy
import gc
import gzip

import pytest
import torch
from gpu_device import DEVICE, TOLERANCE, close, devices, learned, needs_cuda, on_device
from safetensors.torch import load_file
from tiny_layers import OneLayer, conv1d
from tiny_models import VOCABULARY, _made, disturb, foreign_code, token_ids
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

import minipeft
from minipeft import LoraConfig, diagnose, estimate, get_lora_model, lean, load_adapter
from minipeft.hf import AdapterTrainer
from minipeft.injection.wrapper import innermost
from minipeft.layers.base import layer_ops

with foreign_code():
    import peft

pytestmark = on_device
KINDS = ("nf4", "fp4", "int8", "int8_weight_only")
EVERY = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False}
by_kind = pytest.mark.parametrize("kind", KINDS)
in_half = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
# int8 of bitsandbytes rounds its input on a GPU, too.
ROUNDS = {"nf4": 0.0, "fp4": 0.0, "int8": 0.03, "int8_weight_only": 0.0}


def batch(rows=4, length=16):
    ids = token_ids(rows, length).to(DEVICE)
    return {"input_ids": ids, "labels": ids}


def wide_gpt2():
    """64 features, so that no block of a 4-bit weight straddles two rows."""
    sizes = {"n_layer": 2, "n_embd": 64, "n_head": 2, "n_positions": 64, "vocab_size": VOCABULARY}
    drops = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return _made(GPT2LMHeadModel, 0, GPT2Config, **sizes, **drops, bos_token_id=0, eos_token_id=0, pad_token_id=0)


def wide_llama():
    sizes = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128, "max_position_embeddings": 64}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": VOCABULARY}
    return _made(LlamaForCausalLM, 0, LlamaConfig, **sizes, bos_token_id=0, eos_token_id=0, pad_token_id=None)


def quantized(model, kind):
    with foreign_code():
        try:
            return minipeft.quantize(model, kind)
        except minipeft.ConfigError as error:
            pytest.skip(str(error))


def weight_of(layer):
    layer = innermost(layer)
    return layer_ops(layer).read_weight(layer)


@in_half
@pytest.mark.parametrize("make", [lambda: nn.Linear(128, 64), lambda: conv1d(64, 128)], ids=["linear", "conv1d"])
@by_kind
def test_output_and_gradients_are_those_of_the_dequantized_layer(kind, make, dtype):
    model = quantized(OneLayer(make().to(DEVICE, dtype)), kind)
    model = get_lora_model(model, LoraConfig(r=4, target_modules=["layer"], init_lora_weights=False)).train()
    assert devices(model) == {DEVICE.type}
    base, lora = model.layer.base_layer, model.layer.adapters["default"]
    weight, bias = weight_of(base).double().cpu(), base.bias.double().cpu()
    x = torch.randn(6, 5, 128).to(DEVICE, dtype).requires_grad_()
    y = model(x)
    g = torch.randn(6, 5, 64).to(y)
    found = torch.autograd.grad(y, (x, lora.lora_A, lora.lora_B), g)
    z, A, B = (t.detach().cpu().double().requires_grad_() for t in (x, lora.lora_A, lora.lora_B))
    expected = z @ (weight + lora.scaling * B @ A).T + bias
    wanted = torch.autograd.grad(expected, (z, A, B), g.cpu().double())
    assert y.dtype is dtype
    close(dict(enumerate((y, *found))), dict(enumerate((expected, *wanted))), TOLERANCE[dtype] + ROUNDS[kind])
    model.eval()
    with torch.no_grad():
        close(model(x), expected, TOLERANCE[dtype] + ROUNDS[kind])


@pytest.mark.parametrize("family", [wide_gpt2, wide_llama], ids=["gpt2", "llama"])
@by_kind
def test_a_quantized_model_learns_what_its_dequantized_one_learns(kind, family, tmp_path):
    base = quantized(family().to(DEVICE), kind)
    with foreign_code():
        plain = minipeft.dequantize(copy.deepcopy(base))
    assert devices(base) == devices(plain) == {DEVICE.type}
    models = []
    for some in (base, plain):
        torch.manual_seed(1)
        models.append(get_lora_model(some, LoraConfig(**EVERY)).train())
    model, plain = models
    close(
        {n: p for n, p in model.named_parameters() if p.requires_grad},
        {n: p for n, p in plain.named_parameters() if p.requires_grad},
        0,
    )
    tolerance = 1e-4 + 4 * ROUNDS[kind]
    expected = learned(plain, **batch())
    close(learned(model, **batch()), expected, tolerance)
    for checkpointing in ("none", "block"):
        lean(model, checkpointing)
        close(learned(model, **batch()), expected, tolerance)
    minipeft.unlean(model)
    model.save_pretrained(tmp_path)
    again = load_adapter(quantized(family().to(DEVICE), kind), tmp_path, is_trainable=True).train()
    close(learned(again, **batch()), expected, tolerance)
    with torch.no_grad(), foreign_code():
        ids = batch()["input_ids"]
        before = model.eval()(ids).logits
        merged = model.merge_and_unload(dequantize=True)
        assert devices(merged) == {DEVICE.type}
        close(merged(ids).logits, before, 1e-4 + 4 * ROUNDS[kind])


@needs_cuda
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["nf4", "nf4 double", "int8"])
def test_what_transformers_quantized_there_means_the_same_to_peft(kind, storage, tmp_path):
    if kind == "int8" and storage is not torch.uint8:
        pytest.skip("only 4 bits are packed into another dtype")
    options = {"load_in_8bit": True} if kind == "int8" else {
        "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": "double" in kind,
        "bnb_4bit_compute_dtype": torch.bfloat16, "bnb_4bit_quant_storage": storage,
    }  # fmt: skip
    wide_llama().save_pretrained(tmp_path / "base")

    def load():
        with foreign_code():
            return AutoModelForCausalLM.from_pretrained(
                tmp_path / "base",
                quantization_config=BitsAndBytesConfig(**options),
                dtype=torch.bfloat16,
                device_map={"": 0},
            )

    model = disturb_there(get_lora_model(load(), LoraConfig(**EVERY)))
    model.save_pretrained(tmp_path / "ours")
    with foreign_code():
        theirs = peft.PeftModel.from_pretrained(load(), tmp_path / "ours", is_trainable=True).train()
        expected = learned(theirs, **batch())
        found = learned(model.train(), **batch())
    expected = {n.removeprefix("base_model.model.").replace(".default.weight", ""): g for n, g in expected.items()}
    found = {n.replace("adapters.default.", ""): g for n, g in found.items()}
    close(found, expected, 0.06 + 2 * ROUNDS[kind.partition(" ")[0]])
    again = load_adapter(load(), tmp_path / "ours", is_trainable=True).train()
    with foreign_code():
        again = {n.replace("adapters.default.", ""): g for n, g in learned(lean(again, "block"), **batch()).items()}
    close(again, expected, 0.06 + 2 * ROUNDS[kind.partition(" ")[0]])


def disturb_there(model):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter), alpha=0.05)
    return model


@pytest.fixture
def go(train, tmp_path, fresh_accelerator):
    """A short run of examples/train.py; returns its directory, the losses, and the memory that a row says."""
    tests = pytest.importorskip("test_train")
    text = tmp_path / "text.txt"
    text.write_text(gzip.decompress((tests.CORPUS / "code-train.txt.gz").read_bytes()).decode()[:1900], "utf-8")
    flags = [
        "--model_name",
        tests.TINY,
        "--train_file",
        text,
        "--max_length",
        "24",
        "--batch_size",
        "5",
        "--max_steps",
        "4",
    ]
    flags += ["--save_every", "2", "--keep", "9", "--dropout", "0.1", "--rank", "64", "--eval_every", "2"]

    def run(name, *more):
        directory = tmp_path / name
        with foreign_code():
            train.main([str(word) for word in (*flags, *more, "--output_dir", directory)])
        return directory, tests.losses_of(directory), tests.rows_of(directory)[1]["peak_memory_mib"]

    return run


@pytest.mark.parametrize(
    "flags",
    [[], ["--dtype", "bf16"], ["--mixed_precision", "bf16", "--lean"], ["--optim", "adamw_8bit", "--dtype", "bf16", "--lean"],
     ["--quantize", "nf4", "--dtype", "bf16", "--checkpointing", "block", "--lean"], ["--mixed_precision", "fp16"]],
    ids=lambda flags: " ".join(flags) or "plain",
)  # fmt: skip
def test_a_resumed_run_has_the_losses_of_the_whole_one(go, flags):
    """The masks of the model's dropout come from the device's generator, whose state is saved with the others."""
    if DEVICE.type == "cpu" and "fp16" in flags:
        pytest.skip("not on a CPU")
    if "nf4" in flags or "adamw_8bit" in flags:
        pytest.importorskip("bitsandbytes")
    directory, losses, memory = go("run", *flags)
    assert len(losses) >= 6
    if DEVICE.type == "cuda":
        assert 1 < memory < 4000
    whole = load_file(directory / "adapter_model.safetensors")
    again, resumed, _ = go("run", *flags, "--resume", directory / "checkpoints/step-00000002")
    found = load_file(again / "adapter_model.safetensors")
    if DEVICE.type == "cpu":
        assert resumed == losses
        assert all(torch.equal(whole[key], found[key]) for key in whole)
    else:  # torch's kernels there add in another order each time, which another mask would be far from
        assert resumed == pytest.approx(losses, rel=1e-5)
        close(found, whole, 0.05)


@pytest.mark.parametrize("trainer", [Trainer, AdapterTrainer], ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("options", [{"bf16": True}, {"bf16": True, "gradient_checkpointing": True}], ids=str)
def test_a_trainer_in_bfloat16_trains_as_pefts_model_does(trainer, options, tmp_path):
    data = [{"input_ids": row, "labels": row} for row in token_ids(16, 16)]
    given = {
        "max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1, "report_to": [],
        "disable_tqdm": True, "seed": 3, "save_strategy": "no", "use_cpu": DEVICE.type == "cpu", **options,
    }  # fmt: skip
    model = disturb(get_lora_model(wide_llama(), LoraConfig(**EVERY)), scale=0.02)
    model.save_pretrained(tmp_path / "start")
    with foreign_code():
        theirs = peft.PeftModel.from_pretrained(wide_llama(), tmp_path / "start", is_trainable=True)
    losses = []
    for some, cls in ((model, trainer), (theirs, Trainer)):
        with foreign_code():
            run = cls(some, TrainingArguments(str(tmp_path / "run"), **given), train_dataset=data)
            run.train()
        losses.append([entry["loss"] for entry in run.state.log_history if "loss" in entry])
        assert devices(some) == {DEVICE.type}
    assert len(losses[0]) == 4
    assert all(abs(a - b) < 0.02 * b for a, b in zip(*losses, strict=True)), losses


def test_distributed_data_parallel_on_one_process_has_the_same_gradients(tmp_path):
    model = get_lora_model(wide_llama().to(DEVICE), LoraConfig(**EVERY, lora_dropout=0.1)).train()
    expected = learned(model, **batch())
    torch.distributed.init_process_group(
        "nccl" if DEVICE.type == "cuda" else "gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1
    )
    try:
        for checkpointing in (None, "block"):
            if checkpointing is not None:
                lean(model, checkpointing)
            found = learned(nn.parallel.DistributedDataParallel(model), **batch())
            close({name.removeprefix("module."): value for name, value in found.items()}, expected, 1e-4)
    finally:
        torch.distributed.destroy_process_group()


def test_the_doctor_finds_a_healthy_model_healthy_and_changes_nothing():
    model = get_lora_model(
        wide_llama().to(DEVICE), LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.1)
    ).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-3)
    before = [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if DEVICE.type == "cuda" else [])]
    values = [p.detach().clone() for p in model.parameters()]
    found = diagnose(model, batch(), optimizer)
    assert [finding.name for finding in found] == []
    assert all(torch.equal(p, value) for p, value in zip(model.parameters(), values, strict=True))
    after = [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if DEVICE.type == "cuda" else [])]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@needs_cuda
def test_the_doctor_sees_an_adapter_that_was_left_on_the_cpu():
    model = get_lora_model(wide_llama().to(DEVICE), LoraConfig(r=4, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.cpu()
    assert any("cpu" in str(finding) for finding in diagnose(model))


SETUPS = {
    "full": {"training": "full", "dtype": "bfloat16"},
    "full in float32": {"training": "full", "dtype": "float32"},
    "lora": {"training": "lora", "dtype": "bfloat16"},
    "lora in float32": {"training": "lora", "dtype": "float32"},
    "lean, block": {"checkpointing": "block", "dtype": "bfloat16"},
    "lean, none": {"checkpointing": "none", "dtype": "bfloat16"},
    "lean, sqrt, NF4": {"checkpointing": "sqrt", "dtype": "bfloat16", "quantize": "nf4"},
    "lora, NF4": {"training": "lora", "dtype": "bfloat16", "quantize": "nf4"},
}


@needs_cuda
@pytest.mark.parametrize("setup", SETUPS)
def test_the_estimate_is_near_the_peak_of_a_real_step(setup):
    """But for the overhead, which is CUDA's context and no array."""
    options = SETUPS[setup]
    groups = 12 if options["dtype"] == "float32" else 4  # for groups of heads torch has no kernel in float32 there
    config = LlamaConfig(
        hidden_size=768, intermediate_size=2048, num_hidden_layers=8, num_attention_heads=12, num_key_value_heads=groups,
        vocab_size=32000, pad_token_id=None,
    )  # fmt: skip
    adapter, rows, length = LoraConfig(r=16, target_modules="all-linear"), 4, 512
    gc.collect()
    torch._C._cuda_clearCublasWorkspaces()  # of the tests before; those of a step are part of what it takes
    before = torch.cuda.memory_allocated()
    with foreign_code():
        found = estimate(config, adapter, **options, batch=rows, length=length, device="cuda")
        torch.set_default_dtype(getattr(torch, options["dtype"]))
        try:
            with DEVICE:
                model = LlamaForCausalLM(config).train()
        finally:
            torch.set_default_dtype(torch.float32)
        if "quantize" in options:
            minipeft.quantize(model, options["quantize"])
        if options.get("training") != "full":
            get_lora_model(model, adapter)
        if options.get("training") is None:
            lean(model, options["checkpointing"])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    ids = torch.randint(32000, (rows, length), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    for _ in range(2):
        loss = None
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated()
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        after, highest = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    real, said = torch.cuda.max_memory_allocated() - before, found.peak - found.memory["overhead"]
    held = torch.cuda.memory_allocated()
    torch._C._cuda_clearCublasWorkspaces()
    sizes = {"before": before, "model": start - before, "after forward": after - before, "forward": highest - before}
    sizes |= {"measured": real, "estimated": said, "workspaces": held - torch.cuda.memory_allocated(), **found.memory}
    line = f"{setup}, MiB: { ({name: round(size / 2**20) for name, size in sizes.items()}) }, ratio {said / real:.3f}"
    print(line)
    assert 0.85 < said / real < 1.15, line


def test_adamw_in_8_bit_updates_as_in_32_up_to_its_rounding():
    bnb = pytest.importorskip("bitsandbytes")
    models = [get_lora_model(wide_llama().to(DEVICE), LoraConfig(**{**EVERY, "r": 64})).train() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [
        cls([p for p in model.parameters() if p.requires_grad], 1e-3)
        for cls, model in zip((torch.optim.AdamW, bnb.optim.AdamW8bit), models, strict=True)
    ]
    start = {n: p.detach().clone() for n, p in models[0].named_parameters() if p.requires_grad}
    for _ in range(3):
        for model, optimizer in zip(models, optimizers, strict=True):
            model(**batch()).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    moved = [{n: p.detach() - start[n] for n, p in model.named_parameters() if n in start} for model in models]
    assert torch.uint8 in {value["state1"].dtype for value in optimizers[1].state.values()}  # of all but small factors
    close(moved[1], moved[0], 0.5)


def test_a_saved_state_of_the_generators_brings_the_same_numbers_back():
    from minipeft.training.runs.rng import rng_state, set_rng_state

    torch.empty(1, device=DEVICE)
    state = rng_state()
    assert ("cuda.0" in state) == (DEVICE.type == "cuda")
    drawn = [torch.rand(3, device=DEVICE), torch.rand(3)]
    set_rng_state(json_free(state))
    assert torch.equal(torch.rand(3, device=DEVICE), drawn[0])
    assert torch.equal(torch.rand(3), drawn[1])


def json_free(state):
    """As a file gives it back: on the CPU, in new memory."""
    return {name: tensor.cpu().clone() for name, tensor in state.items()}


@needs_cuda
def test_a_batch_that_does_not_fit_is_halved_and_learns_the_same(train, tmp_path, fresh_accelerator, capsys):
    tests = pytest.importorskip("test_train")
    text = tmp_path / "text.txt"
    text.write_text(gzip.decompress((tests.CORPUS / "code-train.txt.gz").read_bytes()).decode()[:120_000], "utf-8")
    flags = ["--model_name", tests.TINY, "--train_file", text, "--max_length", "128", "--batch_size", "64"]
    flags += ["--max_steps", "3", "--eval_every", "9", "--max_eval_examples", "4", "--auto_batch", "--output_dir"]

    def run(name):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        with foreign_code():
            train.main([str(word) for word in (*flags, tmp_path / name)])
        return [row["loss"] for row in tests.rows_of(tmp_path / name) if "loss" in row]

    whole = run("whole")
    assert "out of memory" not in capsys.readouterr().out
    peak, total = torch.cuda.max_memory_reserved(), torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(0.6 * peak / total)
    try:
        halved = run("halved")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert "out of memory: now 32 examples at a time" in capsys.readouterr().out, f"peak {peak / 2**20:.0f} MiB"
    assert halved == pytest.approx(whole, rel=2e-2)  # the model's dropout draws other masks


def test_served_rows_get_what_generate_gives_them_alone(tmp_path):
    tests = pytest.importorskip("test_serving")
    root = tests.saved(tests.llama, tmp_path)
    prompts = [("a", [9, 20, 31]), (None, [50, 8]), ("b.c", [70, 71, 72, 73]), ("d", [14])]
    clients = [tests.Client(name, prompt, 6) for name, prompt in prompts]
    drawn = [tests.Client("a", [9, 20], 6, temperature=1.0, top_p=0.9, seed=3) for _ in range(2)]
    expected = [tests.alone(tests.llama(), root, client) for client in clients]
    engine = tests.engine_of(lambda: tests.llama().to(DEVICE), root, max_rows=8)
    engine.start()
    try:
        engine.submit([*clients, *drawn])
        assert [client.result()[0] for client in clients] == expected
        assert drawn[0].result() == drawn[1].result()
    finally:
        engine.stop()
    assert devices(engine.batch.model) == {DEVICE.type}
