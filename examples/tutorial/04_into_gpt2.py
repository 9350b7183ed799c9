"""Into GPT-2: why replacing every nn.Linear adapts nothing, and what to do instead.

    python examples/tutorial/04_into_gpt2.py

The sizes are those of the published GPT-2 of 124 million parameters, built without its weights. The layers are then put
into the embedded GPT-2, which has the same architecture, and compared with the library's.
"""

from collections.abc import Sequence

import torch
from material import blocks, check, figure, options, save, tiny_model
from my_lora import add_lora
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from minipeft import LoraConfig, TargetError, get_lora_model

CHOICES = {
    "c_attn": (["c_attn"], 294_912),
    "all of attention": (["attn.c_attn", "attn.c_proj"], 442_368),
    "and the way up": (["attn.c_attn", "attn.c_proj", "c_fc"], 811_008),
    "every block layer": (["c_attn", "c_proj", "c_fc"], 1_179_648),
}


def gpt2() -> nn.Module:
    """GPT-2 with shapes and without values."""
    with torch.device("meta"):
        return GPT2LMHeadModel(GPT2Config())


def where_the_weights_are() -> None:
    model = gpt2()
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    conv1d = [name for name, module in model.named_modules() if isinstance(module, Conv1D)]
    print(f"GPT-2 has {model.num_parameters():,} parameters, {len(linear)} nn.Linear and {len(conv1d)} Conv1D")
    check(
        "its only nn.Linear is the head, whose weight is the embedding's",
        linear == ["lm_head"] and model.lm_head.weight is model.transformer.wte.weight,
    )
    block = model.transformer.h[0]
    for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"):
        print(
            f"{name:>12}: {type(block.get_submodule(name)).__name__} weight {tuple(block.get_submodule(name).weight.shape)}"
        )
    check(
        "Conv1D stores its weight as (in, out), nn.Linear as (out, in)",
        block.mlp.c_fc.weight.shape == (768, 3072) and nn.Linear(768, 3072).weight.shape == (3072, 768),
    )


def the_silent_mistake() -> None:
    """A square Conv1D taken for a Linear raises nothing, and computes something else."""
    layer, x = tiny_model().transformer.h[0].attn.c_proj, torch.randn(10, 128)
    right = layer(x)
    wrong = nn.functional.linear(x, layer.weight, layer.bias)
    off = ((wrong - right).norm() / right.norm()).item()
    print(f"attn.c_proj is square: taken for a Linear it raises nothing, and its output is wrong by {100 * off:.0f} %")
    check(
        "with the weight turned it is right",
        torch.allclose(nn.functional.linear(x, layer.weight.T, layer.bias), right, atol=1e-5),
    )


def counts() -> dict[str, int]:
    found = {}
    for name, (targets, _) in CHOICES.items():
        trained, total = get_lora_model(gpt2(), LoraConfig(r=8, target_modules=targets)).get_nb_trainable_parameters()
        found[name] = trained
        print(f"r = 8 on {name:>17}: {trained:>9,} of {total:,} ({100 * trained / total:.2f} %)")
    check("8 x (768 + 2304) x 12 blocks = 294,912", found["c_attn"] == 8 * (768 + 2304) * 12 == 294_912)
    check(
        "+ 8 x ((768 + 768) + (768 + 3072)) x 12 = 811,008",
        found["and the way up"] == 294_912 + 8 * (1536 + 3840) * 12 == 811_008,
    )
    check("the suffix c_proj means two layers in each block: 1,179,648", found["every block layer"] == 1_179_648)
    return found


def the_same_model() -> None:
    """The forty lines and the library in one model: logits and gradients."""
    ids, targets = blocks("code-train", 32)[:2], CHOICES["and the way up"][0]
    ours, library = tiny_model().double(), tiny_model().double()
    add_lora(ours, targets, r=8, alpha=16)
    ours.double()
    get_lora_model(library, LoraConfig(r=8, lora_alpha=16, target_modules=targets))
    mine = [p for p in ours.parameters() if p.requires_grad]
    theirs = [p for p in library.parameters() if p.requires_grad]
    with torch.no_grad():
        for own, other in zip(mine, theirs, strict=True):  # both are in the order A, B of each layer
            own.copy_(other.normal_(std=0.05))
    logits = [model(ids, labels=ids) for model in (ours, library)]
    for each in logits:
        each.loss.backward()
    check(
        f"{len(mine) // 2} layers by hand give the library's logits",
        torch.allclose(logits[0].logits, logits[1].logits, atol=1e-9),
    )
    check(
        "and its gradients",
        all(torch.allclose(own.grad, other.grad, atol=1e-9) for own, other in zip(mine, theirs, strict=True)),
    )


def what_the_library_says() -> None:
    said = ""
    try:
        get_lora_model(gpt2(), LoraConfig(target_modules=["q_proj", "v_proj"]))
    except TargetError as error:
        said = str(error)
    print(f"with Llama's names: {said}")
    check("a name that GPT-2 does not have is an error, not an adapter on nothing", "c_proj" in said)
    found = get_lora_model(gpt2(), LoraConfig(r=8))
    check("without names it knows those of GPT-2", found.get_nb_trainable_parameters()[0] == 294_912)


def main(argv: Sequence[str] | None = None) -> None:
    args = options(__doc__, argv)
    torch.manual_seed(0)
    where_the_weights_are()
    the_silent_mistake()
    found = counts()
    the_same_model()
    what_the_library_says()
    drawn, [axes] = figure()
    bars = axes.barh(list(found), [count / 1e6 for count in found.values()])
    axes.bar_label(bars, [f"{count:,}" for count in found.values()], padding=3)
    axes.invert_yaxis()
    axes.set(xlabel="million parameters to train at r = 8", title="GPT-2 124M: four choices of layers", xlim=(0, 1.5))
    save(drawn, args, __file__)


if __name__ == "__main__":
    main()
