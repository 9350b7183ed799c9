"""The table of default targets, held against the modules of the installed transformers."""

import contextlib

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from minipeft import LoraConfig, get_lora_model
from minipeft.injection.default_targets import DEFAULTS
from minipeft.injection.plan import plan

try:
    from transformers.initialization import no_init_weights
except ModuleNotFoundError:  # before transformers 5
    from transformers.modeling_utils import no_init_weights

MODEL_TYPES = [model_type for _, types in DEFAULTS for model_type in types.split()]
COMMON = (
    "gpt2 gpt_neox gpt_bigcode opt bloom falcon llama mistral mixtral qwen2 qwen3 qwen3_moe gemma gemma2 gemma3_text phi "
    "phi3 stablelm starcoder2 bert roberta distilbert electra albert deberta-v2 modernbert mpnet t5 bart mbart pegasus "
    "whisper vit clip wav2vec2"
)
NO_MODEL_OF_ITS_OWN = {
    "chatglm",  # its code comes with the checkpoint
    "emu3_text_model",  # the text parts of composite models, tested through these
    "mllama_text_model",
}
KINDS = (
    (modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM),
    (modeling_auto.MODEL_FOR_MASKED_LM_MAPPING, AutoModelForMaskedLM),
    (modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING, AutoModelForSeq2SeqLM),
    (modeling_auto.MODEL_MAPPING, AutoModel),
)


DEPTHS = ("num_hidden_layers", "n_layer", "num_layers", "encoder_layers", "decoder_layers", "n_layers", "depth")


def shorten(config):
    """Give a configuration and its parts four layers, where they name their depth in the usual way."""
    for name in DEPTHS:
        if isinstance(getattr(config, name, None), int) and not hasattr(config, "layer_types"):
            with contextlib.suppress(NotImplementedError):  # some compute their depth from other options
                setattr(config, name, 4)
    if hasattr(config, "num_frames"):
        config.num_frames = 2  # VideoMAE computes its table of positions in Python
    for part in config.sub_configs:
        if getattr(config, part, None) is not None:
            shorten(getattr(config, part))


def model_on_meta(model_type):
    """A model of the family without weights."""
    config = AutoConfig.for_model(model_type)
    shorten(config)
    auto = next(auto for mapping, auto in KINDS if type(config) in mapping)
    with torch.device("meta"), no_init_weights():
        return auto.from_config(config)


def check_family(model_type):
    model = model_on_meta(model_type)
    chosen = plan(model, LoraConfig())
    head = model.get_output_embeddings()
    assert chosen.adapters
    assert all(site.candidate.module is not head for site in chosen.adapters)


def test_no_model_type_stands_twice():
    assert len(MODEL_TYPES) == len(set(MODEL_TYPES))


@pytest.mark.filterwarnings("ignore")  # what constructing a foreign model warns about is not ours
@pytest.mark.parametrize("model_type", COMMON.split())
def test_the_default_targets_of_a_common_family_exist(model_type):
    check_family(model_type)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "model_type", [m for m in MODEL_TYPES if m not in COMMON.split() and m not in NO_MODEL_OF_ITS_OWN]
)
def test_the_default_targets_of_every_family_exist(model_type):
    if model_type not in CONFIG_MAPPING:
        pytest.skip(f"{model_type} is not in this transformers")
    check_family(model_type)


def test_gpt2_has_the_published_number_of_trainable_parameters():
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.device("meta"):
        attention, both = GPT2LMHeadModel(GPT2Config()), GPT2LMHeadModel(GPT2Config())
    assert get_lora_model(attention, LoraConfig(r=8)).get_nb_trainable_parameters()[0] == 294_912
    config = LoraConfig(r=8, target_modules=["c_attn", "c_proj"])
    assert get_lora_model(both, config).get_nb_trainable_parameters()[0] == 811_008
