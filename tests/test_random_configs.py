"""Random configurations of each method on tiny models of ten families: PEFT computes the same, and reads the same files."""

import copy
import random

import pytest
import torch
from test_families_train import close, family, output
from tiny_models import disturb, foreign_code
from torch import nn
from transformers.pytorch_utils import Conv1D

import minipeft

with foreign_code():
    peft = pytest.importorskip("peft")

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # random options are not what one would advise

FAMILIES = ("gpt2", "llama", "gemma2", "phi3", "opt", "bert", "deberta-v2", "t5", "clip", "whisper")
WITH_TOKENS = ("gpt2", "llama", "gemma2", "phi3", "opt")
HEADS = ("lm_head", "cls", "proj_out")
SCALE = 0.05  # of what training adds: larger ones saturate, and rounding shows

# method: its own options, each with the values that are drawn from
METHODS = {
    "LoraConfig": {
        "r": (1, 2, 4),
        "lora_alpha": (1, 7, 16),
        "use_rslora": (False, True),
        "use_dora": (False, False, True),
        "bias": ("none", "none", "lora_only", "all"),
        "lora_bias": (False, False, False, True),
        "init_lora_weights": (True, "gaussian", False),
        "rank_pattern": ({}, {}, {".*1.*": 3}),
    },
    "IA3Config": {"init_ia3_weights": (True, False)},
    "AdaLoraConfig": {"init_r": (2, 4), "target_r": (1, 2), "total_step": (9,), "init_lora_weights": (True, False)},
    "LoHaConfig": {
        "r": (1, 2, 4),
        "alpha": (1, 7),
        "use_effective_conv2d": (False, True),
        "init_weights": (True, False),
    },
    "LoKrConfig": {
        "r": (1, 2, 4),
        "alpha": (1, 7),
        "decompose_both": (False, True),
        "decompose_factor": (-1, 4, 5),
        "use_effective_conv2d": (False, True),
        "init_weights": (True, False, "lycoris"),
    },
    "OFTConfig": {
        "oft_block_size": (2, 5, 8),
        "block_share": (False, True),
        "coft": (False, False, True),
        "eps": (0.5, 0.01),
        "use_cayley_neumann": (False, True),
        "init_weights": (True, False),
    },
    "VeraConfig": {
        "r": (1, 4),
        "projection_prng_key": (0, 3),
        "save_projection": (True, False),
        "d_initial": (0.1, 1.0),
        "init_weights": (True, False),
    },
}
LAYERS = dict.fromkeys(METHODS, (nn.Linear, Conv1D))
LAYERS |= {"LoraConfig": (nn.Linear, Conv1D, nn.Conv2d, nn.Embedding), "OFTConfig": (nn.Linear, Conv1D, nn.Embedding)}
LAYERS |= dict.fromkeys(("IA3Config", "LoHaConfig", "LoKrConfig"), (nn.Linear, Conv1D, nn.Conv2d))
MISSING_IN_PEFT = {"IA3Config": ("layers_to_transform",), "VeraConfig": ("exclude_modules",)}

# Layers that are not drawn, by the last part of their name -> why.
NOT_DRAWN = {
    "shared": "T5's table, which its stacks do not call: PEFT's adapter on it does nothing",
    "rel_embeddings": "DeBERTa reads its weight and does not call it: PEFT's adapter does nothing",
    "embed_positions": "OPT's has a forward of its own: PEFT's adapter stops in it, and ours is refused",
    "conv1": "Whisper asks it for its stride, which PEFT's layer does not have",
    "conv2": "the same",
}
# What one library refuses and the other does not, by a part of what it says -> why.
REFUSED_HERE = {"matches none of": "a pattern without an effect is an error; PEFT passes over it"}
REFUSED_THERE = {
    "Please specify `target_modules`": "PEFT has defaults for fewer families",
    "Target module": "PEFT's methods have fewer types of layers",
}


def draw(seed, model_type, method=None):
    """A method's name and its options."""
    chosen, model = random.Random(f"{model_type} {seed}"), family(model_type)
    method = method or chosen.choice(["LoraConfig", chosen.choice(list(METHODS))])
    options = {name: chosen.choice(values) for name, values in METHODS[method].items()}
    names = [name for name, m in model.named_modules() if isinstance(m, LAYERS[method]) and not name.startswith(HEADS)]
    found = {name: end for name in names if (end := name.rpartition(".")[2]) not in NOT_DRAWN}
    ends = sorted({end for end in found.values() if not end.isdigit()})
    some = chosen.sample(ends, chosen.randint(1, min(4, len(ends))))
    exact, regex = chosen.sample(list(found), 2), rf".*\.({'|'.join(some)})"
    targets = options["target_modules"] = chosen.choice([None, "all-linear", some, some, exact, regex])
    if method == "IA3Config":
        options["feedforward_modules"] = chosen.choice([[], some[:1]]) if targets is some else []
    rare = {
        "layers_to_transform": chosen.choice([0, [1], [0, 1]]) if targets is some else None,
        "exclude_modules": chosen.choice([ends[:1], r".*\.1\..*"]),
        "modules_to_save": [head for head in HEADS if hasattr(model, head)],
        "trainable_token_indices": [3, 5] if method == "LoraConfig" and model_type in WITH_TOKENS else None,
    }
    missing = MISSING_IN_PEFT.get(method, ())
    return method, options | {k: v for k, v in rare.items() if v and k not in missing and chosen.random() < 0.2}


def made(library, method, model_type, options, adapter_name="default"):
    """The adapted model, or what is said against it."""
    adapt = minipeft.get_adapter_model if library is minipeft else peft.get_peft_model
    torch.manual_seed(0)
    try:
        config = getattr(library, method)(**copy.deepcopy(options))
        return adapt(family(model_type), config, adapter_name).eval(), ""
    except (minipeft.MinipeftError, ValueError, TypeError) as error:
        return None, f"{type(error).__name__}: {error}"


@torch.no_grad()
def files_agree(ours, theirs, model_type, tmp_path):
    """Each reads what the other writes and computes the same; returns our model of their file, and its output."""
    for model in (ours, theirs):
        disturb(model, scale=SCALE)
    ours.save_pretrained(tmp_path / "ours")
    with foreign_code():
        theirs.save_pretrained(tmp_path / "theirs")
        read = peft.PeftModel.from_pretrained(family(model_type), tmp_path / "ours").eval()
    close(output(read, model_type), output(ours, model_type), 1e-4)
    model = minipeft.load_adapter(family(model_type), tmp_path / "theirs").eval()
    expected = output(model, model_type)
    close(expected, output(theirs, model_type), 1e-4)
    return model, expected


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("model_type", FAMILIES)
@torch.no_grad()
def test_a_random_configuration_is_what_it_is_in_peft(model_type, seed, tmp_path):
    method, options = draw(seed, model_type)
    ours, said = made(minipeft, method, model_type, options)
    with foreign_code():
        theirs, said_there = made(peft, method, model_type, options)
    if ours is None or theirs is None:
        said, reasons = (said_there, REFUSED_THERE) if theirs is None else (said, REFUSED_HERE)
        assert ours is theirs is None or any(part in said for part in reasons), said
        return
    base = family(model_type)
    plain, before = output(base, model_type), base.state_dict()
    starts = next((value for name, value in options.items() if name.startswith("init_") and "weights" in name), True)
    if starts:
        close(output(ours, model_type), plain, 1e-6)
    assert ours.get_nb_trainable_parameters()[0] == theirs.get_nb_trainable_parameters()[0]
    model, expected = files_agree(ours, theirs, model_type, tmp_path)
    with ours.disable_adapter():
        close(output(ours, model_type), plain, 1e-6)
    after = ours.unload().state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    if not options.get("lora_bias"):  # a layer without a bias cannot hold B's
        close(output(model.merge_and_unload(untie=True), model_type), expected, 1e-3)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("model_type", FAMILIES)
@torch.no_grad()
def test_two_random_adapters_act_alone_and_together_as_in_peft(model_type, seed, tmp_path):
    drawn = [draw(f"{seed} {name}", model_type, "LoraConfig")[1] for name in ("first", "second")]
    for options in drawn:
        for name in ("layers_to_transform", "exclude_modules", "modules_to_save", "trainable_token_indices"):
            options.pop(name, None)
        options |= {"target_modules": options["target_modules"] or "all-linear", "bias": "none", "lora_bias": False}
    with foreign_code():
        theirs, _ = made(peft, "LoraConfig", model_type, drawn[0], "first")
        theirs.add_adapter("second", peft.LoraConfig(**drawn[1]))
        theirs.set_requires_grad(["first", "second"])
        disturb(theirs, scale=SCALE).eval().save_pretrained(tmp_path)
    model = minipeft.load_adapter(family(model_type), tmp_path / "first", adapter_name="first")
    model.load_adapter(tmp_path / "second", "second")
    for names in (["first"], ["second"], ["first", "second"], ["second", "first"]):
        model.set_adapter(names)
        theirs.base_model.set_adapter(names)
        expected = output(model, model_type)
        close(expected, output(theirs, model_type), 1e-4)
        model.merge_adapter(untie=True)
        close(output(model, model_type), expected, 1e-3)
        model.unmerge_adapter()
        assert torch.equal(output(model, model_type), expected)
