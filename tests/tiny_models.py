"""Tiny random models, and the few measurements that several test files make on them."""

import contextlib
import hashlib
import warnings

import pytest
import torch
import transformers
from fast_copy import Template
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from minipeft import LoraConfig, get_lora_model

VOCABULARY = 100
_models = {}


@contextlib.contextmanager
def foreign_code():
    """What other packages warn about is not ours; our own calls stay outside, where a warning is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def gpt2(cls=GPT2LMHeadModel, seed=0, **options):
    return _made(
        cls,
        seed,
        GPT2Config,
        n_layer=2,
        n_embd=32,
        n_head=2,
        vocab_size=VOCABULARY,
        n_positions=64,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        **options,
    )


def gpt2_classifier(seed=0):
    return gpt2(GPT2ForSequenceClassification, seed, num_labels=3)


def llama(seed=0, **options):
    return _made(
        LlamaForCausalLM,
        seed,
        LlamaConfig,
        num_hidden_layers=2,
        hidden_size=32,
        intermediate_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=64,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=None,
        **options,
    )


def bert_classifier(seed=0):
    return _made(
        BertForSequenceClassification,
        seed,
        BertConfig,
        num_hidden_layers=2,
        hidden_size=32,
        intermediate_size=48,
        num_attention_heads=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=64,
        num_labels=3,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )


def t5(seed=0):
    return _made(
        T5ForConditionalGeneration,
        seed,
        T5Config,
        num_layers=2,
        d_model=32,
        d_kv=16,
        d_ff=48,
        num_heads=2,
        vocab_size=VOCABULARY,
        decoder_start_token_id=0,
        dropout_rate=0.0,
    )


def _made(cls, seed, config_class, **options):
    """A model in eval mode, always the same; a copy takes a tenth of the time of making it."""
    key = cls, seed, config_class, repr(options), torch.get_default_dtype(), torch.get_default_device()
    if key not in _models:
        _models[key] = Template(_new(cls, config_class(**options), seed))
    return _models[key].copy()


def _new(cls, config, seed):
    """Weights and biases all matter: none is zero, as a fresh bias would be."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = cls(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape), alpha=0.1)
    return model.eval()


def disturb(model, seed=1, scale=0.1):
    """Move every trainable parameter, as training would, so that each of them shows in the output."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter), alpha=scale)
    return model


def adapted(model=None, seed=1, scale=0.1, adapter_name="default", **options):
    """A model, GPT-2 unless one is given, with a LoRA adapter moved by `disturb(seed, scale)` from a start that is always the same."""
    model = gpt2() if model is None else model
    torch.manual_seed(0)
    return disturb(get_lora_model(model, LoraConfig(**{"r": 4, **options}), adapter_name), seed, scale)


def token_ids(rows=2, length=12, seed=2):
    return torch.randint(1, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model, ids=None):
    """Output of the model on a fixed batch of tokens, shape (batch, seq, vocabulary) or (batch, labels)."""
    ids = token_ids() if ids is None else ids
    decoder = {"decoder_input_ids": ids} if getattr(model.config, "is_encoder_decoder", False) else {}
    return model(input_ids=ids, **decoder).logits


def saved_and_loaded(model, directory):
    """The model that transformers saves in a directory and loads from it; it computes the same to the bit."""
    with foreign_code():
        model.save_pretrained(directory)
        loaded = getattr(transformers, model.config.architectures[0]).from_pretrained(directory).eval()
    assert torch.equal(logits(loaded), logits(model))
    return loaded


def state_digest(model):
    """Digest of all that an error must leave alone: values, names, classes, modes and what requires a gradient."""
    digest = hashlib.sha256()
    for name, module in model.named_modules():
        digest.update(f"{name} {type(module).__qualname__} {module.training}".encode())
    for name, parameter in model.named_parameters(remove_duplicate=False):
        digest.update(f"{name} {parameter.requires_grad} {parameter.dtype} {parameter.data_ptr()}".encode())
    for name, tensor in model.state_dict().items():
        digest.update(name.encode() + tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def trainable(model):
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def refuses(error, model, action, *named):
    """The action raises this error, its message has these words, and the model is what it was."""
    before = state_digest(model)
    with pytest.raises(error) as caught:
        action()
    for word in named:
        assert word in str(caught.value)
    assert state_digest(model) == before
