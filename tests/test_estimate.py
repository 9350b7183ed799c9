"""The estimate of memory, compared with the arrays that a real step makes and frees."""

import dataclasses
import json
import math
import weakref

import pytest
import torch
from rotation import often
from safetensors.torch import load_file
from test_cli import run
from tiny_models import bert_classifier, foreign_code, gpt2, llama, t5
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    BertConfig,
    BertForMultipleChoice,
    CLIPVisionConfig,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MixtralConfig,
    MixtralForCausalLM,
    ViTConfig,
    ViTForImageClassification,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

import minipeft
from minipeft import ConfigError, LoraConfig, MinipeftError, estimate, get_adapter_model, get_lora_model, lean
from minipeft.files.tensor_bytes import header_of
from minipeft.kernels import matmul
from minipeft.kernels.chunked_cross_entropy import CHUNK_BYTES
from minipeft.planning.estimate import Setup
from minipeft.planning.fit import USABLE, fit
from minipeft.planning.step import sized_for

ALL = LoraConfig(r=4, target_modules="all-linear")
BATCH, LENGTH = 3, 24
VISION = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "image_size": 16,
    "patch_size": 4,
}


def mixtral(seed=0):
    config = MixtralConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=100, num_local_experts=4,
    )  # fmt: skip
    return MixtralForCausalLM(config)


def dropping_gpt2(seed=0):
    model = gpt2()
    config = GPT2Config.from_dict({**model.config.to_dict(), "resid_pdrop": 0.1})
    return type(model)(config)


def vit(seed=0):
    return ViTForImageClassification(ViTConfig(**VISION))


def whisper(seed=0):
    config = WhisperConfig(
        vocab_size=100, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=48, decoder_ffn_dim=48, num_mel_bins=8, max_source_positions=20,
        max_target_positions=64, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    return WhisperForConditionalGeneration(config)


def gemma2(seed=0):
    """Its logits are capped, so their loss cannot be computed in chunks."""
    config = Gemma2Config(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, vocab_size=100, max_position_embeddings=64, sliding_window=16,
    )  # fmt: skip
    return Gemma2ForCausalLM(config)


def llava(seed=0):
    vision = CLIPVisionConfig(**VISION)
    return LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=llama().config, image_token_id=99)
    )


CASES = {
    "full": (gpt2, {"training": "full"}),
    "lora": (gpt2, {"training": "lora"}),
    "experts": (mixtral, {"training": "lora"}),
    "lean, dropout": (dropping_gpt2, {}),
    "lean, sqrt": (llama, {"checkpointing": "sqrt"}),
    "lean, block, NF4": (gpt2, {"checkpointing": "block", "quantize": "nf4"}),
    "a head that trains in full": (bert_classifier, {}),
    "encoder and decoder": (t5, {"training": "lora"}),
    "pictures": (vit, {"training": "lora"}),
    "recordings": (whisper, {"training": "lora"}),
    "capped logits": (gemma2, {}),
    "text alone": (llava, {"training": "full"}),
}
# What a step reads besides token ids, as a user would give it.
READS = {
    bert_classifier: lambda ids: {"input_ids": ids, "labels": torch.arange(len(ids))},
    vit: lambda ids: {"pixel_values": torch.randn(len(ids), 3, 16, 16), "labels": torch.ones(len(ids)).long()},
    whisper: lambda ids: {"input_features": torch.randn(len(ids), 8, 40), "labels": ids},
}
HEADS = {bert_classifier: "SEQ_CLS", vit: "SEQ_CLS"}


class Made(TorchDispatchMode):
    """The most bytes of new arrays that are alive at a time, while everything is really computed."""

    def __init__(self):
        super().__init__()
        self.alive, self.now, self.most = {}, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in given | self.alive.keys():
                self._note(tensor.untyped_storage())
        return result

    def _note(self, storage):
        key, size = storage._cdata, storage.nbytes()

        def freed(_):
            self.now -= size
            del self.alive[key]

        self.alive[key], self.now = weakref.ref(storage, freed), self.now + size
        self.most = max(self.most, self.now)


def held(model, optimizer):
    states = [value for state in optimizer.state.values() for value in state.values()]
    scales = [value for p in model.parameters() for value in quantization_of(p)]
    tensors = [*model.parameters(), *model.buffers(), *states, *scales]
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


def quantization_of(parameter):
    state = getattr(parameter, "quant_state", None)
    return [] if state is None else [state.absmax, state.code, state.state2.absmax, state.state2.code]


def real_peak(make, tmp_path, training="lean", checkpointing=None, quantize=None):
    """Bytes at the peak, and what the estimate says besides: parameters, those that train, and bytes of the file."""
    model = make()
    with foreign_code():
        model = (model if quantize is None else minipeft.quantize(model, quantize)).train()
    model.config.use_cache = False
    if training != "full":
        get_lora_model(model, dataclasses.replace(ALL, task_type=HEADS.get(make)))
    if training == "lean":
        lean(model, checkpointing, chunked_loss=make not in (bert_classifier, gemma2))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    own = held(model, optimizer)
    with Made() as made:
        batch = READS.get(make, lambda ids: {"input_ids": ids, "labels": ids})(torch.randint(100, (BATCH, LENGTH)))
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return own + made.most, sizes(model, training, tmp_path)


def sizes(model, training, tmp_path):
    counts = [model.num_parameters(), model.num_parameters(only_trainable=True)]
    if training == "full":
        return [*counts, 0]
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    return [*counts, len(header_of(tensors, {})[0]) + sum(tensor.nbytes for tensor in tensors.values())]


ALWAYS = ("full", "lora", "experts", "lean, block, NF4", "encoder and decoder")


@pytest.mark.parametrize("case", often(CASES, ALWAYS))
def test_the_estimate_is_the_peak_of_a_real_step_to_the_byte(case, tmp_path):
    make, options = CASES[case]
    with foreign_code():
        found = estimate(make(), ALL, **options, batch=BATCH, length=LENGTH)
        expected, counts = real_peak(make, tmp_path, **options)
    # bitsandbytes has an offset for each layer, and once in a process a table of its codes for itself.
    spare = (4 * 8, 4 * 8 + 1024) if "quantize" in options else (0,)
    assert found.peak - found.memory["overhead"] - expected in spare
    assert "quantize" in options or [found.parameters, found.trainable, found.adapter_file] == counts


def test_the_items_are_what_they_are_called(tmp_path):
    found = estimate(gpt2(), ALL, training="lora", dtype="float32", batch=BATCH, length=LENGTH)
    model = get_lora_model(gpt2(), ALL)
    assert (found.trainable, found.parameters) == model.get_nb_trainable_parameters()
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    assert found.memory["weights"] == 4 * (found.parameters - found.trainable) + buffers
    assert found.memory["adapters"] == 4 * found.trainable
    layers = sum(p.requires_grad for p in model.parameters())
    assert found.memory["optimizer"] == 8 * found.trainable + 4 * layers  # two averages, and a count of steps each
    assert found.memory["logits"] == 3 * 4 * BATCH * LENGTH * 100
    model.save_pretrained(tmp_path)
    size = (tmp_path / "adapter_model.safetensors").stat().st_size
    metadata = len(json.dumps(minipeft.files.tensor_file.open_tensors(tmp_path / "adapter_model.safetensors").metadata))
    assert 0 <= size - found.adapter_file <= metadata + 16


def test_half_of_the_bytes_in_half_precision():
    whole, half = (estimate(llama(), ALL, training="full", dtype=dtype) for dtype in ("float32", "bfloat16"))
    assert half.memory["optimizer"] == pytest.approx(whole.memory["optimizer"] / 2, rel=0.01)
    assert half.memory["weights"] == pytest.approx(whole.memory["weights"] / 2, rel=0.01)


def test_a_model_of_gigabytes_takes_no_memory():
    def resident():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096

    config = LlamaConfig(num_hidden_layers=2, architectures=["LlamaForCausalLM"])  # of 7B
    before = resident()
    found = estimate(config, training="lora", dtype="float32", batch=4, length=2048)
    assert found.peak > 5 * 2**30
    assert resident() - before < 2**28


def test_a_gpu_works_on_larger_pieces_and_the_sizes_are_put_back():
    chunk = CHUNK_BYTES["cpu"]
    small, large = (estimate(llama(), ALL, batch=64, length=64, device=device) for device in ("cpu", "cuda"))
    pieces = [found.memory["temporary"] + found.memory["logits"] for found in (small, large)]
    assert pieces[1] > pieces[0]  # of the block that is computed again, or of the logits
    assert CHUNK_BYTES["cpu"] == chunk


def test_for_a_gpu_products_are_torchs_own(monkeypatch):
    monkeypatch.setattr(matmul, "has_kernels", lambda dtype: False)
    x = torch.ones(2048, 1024, dtype=torch.bfloat16)
    with sized_for("cuda"):
        assert not matmul.through_float32(x, x)
    assert matmul.through_float32(x, x)


def test_fit_proposes_what_fits_and_recomputes_least_first():
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=100,
    )
    setup = Setup(batch=2, length=64, dtype="float32")
    of_blocks = estimate(config, ALL, checkpointing="block", dtype="float32", batch=2, length=64).peak
    memory = int(1.01 * of_blocks / USABLE)
    proposals = fit(config, ALL, setup, memory, get_adapter_model)
    assert all(p.estimate.peak <= USABLE * memory for p in proposals)
    assert [p.recomputed for p in proposals] == sorted(p.recomputed for p in proposals)
    assert all(p.accumulation == math.ceil(2 / p.estimate.setup.batch) for p in proposals)
    assert proposals[-1].accumulation == 1


def test_what_cannot_fit_is_said_with_its_size():
    with pytest.raises(
        ConfigError,
        match=r"nothing fits into 16\.0 KiB.*one sequence of 8 tokens.* takes [\d.]+ MiB, .* are [\d.]+ KiB",
    ):
        fit(llama(), ALL, Setup(length=8, quantize="nf4"), 2**14, get_adapter_model)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nobody here"], "nobody here"),
        (["{empty}"], "no config.json"),
        (["{adapter}"], "is an adapter: give its base"),
        (["no/such/place"], "neither a directory here nor the name"),
        (["{tiny}", "--fit", "1GiB", "--training", "full"], "leave out --training"),
        (["{bare}"], "says no sizes"),
        (["{tiny}", "--dtype", "half"], "dtype must be one of"),
        (["{tiny}", "--training", "qlora"], "training must be one of"),
        (["{tiny}", "--training", "full", "--quantize", "nf4"], "frozen"),
        (["{tiny}", "--training", "lora", "--checkpointing", "block"], "option of training"),
        (["{tiny}", "--length", "4000"], "cannot learn from 8 x 4000 token ids"),
        (["{tiny}", "--batch", "0"], "integer from 1 to 1048576, not 0"),
        (["{tiny}", "--batch", "100000000000000000000000"], "integer from 1 to 1048576"),
        (["{endless}"], "1,000,000,000 layers"),
        (["{tiny}", "--targets", "c_atn"], "closest: 'c_attn'"),
        (["{tiny}", "--fit", "much"], "write it as 24GiB"),
    ],
)
def test_bad_input_is_named(arguments, words, tmp_path):
    names = ("empty", "bare", "tiny", "adapter", "endless")
    for name in names:
        (tmp_path / name).mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    (tmp_path / "bare" / "config.json").write_text('{"model_type": "llama"}')
    gpt2().config.save_pretrained(tmp_path / "tiny")
    (tmp_path / "endless" / "config.json").write_text('{"model_type": "llama", "num_hidden_layers": 1000000000}')
    filled = [argument.format(**{n: tmp_path / n for n in names}) for argument in arguments]
    with pytest.raises(MinipeftError) as caught:
        run("estimate", *filled)
    assert words in str(caught.value)


def test_the_command_prints_what_the_call_returns(tmp_path):
    gpt2().config.save_pretrained(tmp_path)
    arguments = ("--training", "lora", "--batch", "3", "--length", "24", "--r", "4", "--device", "cpu")
    printed = run("estimate", tmp_path, *arguments).output
    found = estimate(gpt2(), ALL, training="lora", batch=BATCH, length=LENGTH)
    assert f"{found.parameters:,}" in printed
    assert f"all          {found.peak / 2**20:.1f} MiB" in printed


def test_what_the_step_leaves_out_is_named():
    found = estimate(llava(), ALL, training="lora", length=8)
    assert any("Not run in this step" in words and "vision_tower" in words for words in found.remarks)
    assert not estimate(gpt2(), ALL, training="lora", length=8).remarks


def test_a_model_that_cannot_be_lean_is_fitted_plain():
    [proposal] = fit(vit(), ALL, Setup(batch=4), 2**30, get_adapter_model)
    assert proposal.code() == ["model = get_lora_model(model, config)"]
    capped = fit(gemma2(), ALL, Setup(batch=4, length=8), 2**30, get_adapter_model)[0]
    assert capped.code()[-1] == "model = lean(model, checkpointing='none', chunked_loss=False)"


def test_what_a_model_reads_must_be_known():
    config = BertConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48, vocab_size=100
    )
    with pytest.raises(ConfigError, match="BertForMultipleChoice reads several texts at a time"):
        estimate(BertForMultipleChoice(config), ALL, training="lora")
