"""A method of your own: LoRA-FA, in twenty lines, checked and trained.

    python examples/tutorial/11_a_method_of_your_own.py

LoRA-FA (Zhang et al., 2023, arXiv:2308.03303) freezes A and trains B alone:

    y = W x + s B A x,   A random and fixed,   B (out, r) trained

Half of the parameters are gone, and the backward pass keeps A x instead of x. The class below says what the method holds,
what it adds to the output, and what it adds to the weight. Files, merging and compiling follow from that.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from material import TARGETS, blocks, check, evaluate, figure, options, save, smooth, tiny_model, train
from torch import nn
from transformers.pytorch_utils import Conv1D

from minipeft import Adapter, AdapterConfig, LoraConfig, get_adapter_model, load_adapter, register_method
from minipeft.testing import check_pair


@dataclass(frozen=True, kw_only=True)
class LoraFaConfig(AdapterConfig):
    method = "lora_fa"
    r: int = 8
    lora_alpha: float = 16


@register_method("lora_fa")
class LoraFa(Adapter):
    config_class = LoraFaConfig

    def __init__(self, base, ops, config, shared):
        super().__init__(base, ops, config, shared)
        weight = ops.read_weight(base)  # always (out, in), whatever the layer stores
        out_features, in_features = weight.shape
        A = torch.randn(config.r, in_features, dtype=weight.dtype, device=weight.device) / in_features**0.5
        self.register_buffer("lora_A", A)
        self.lora_B = nn.Parameter(weight.new_zeros(out_features, config.r))
        self.scaling = config.lora_alpha / config.r

    def forward(self, base, ops, x, y):
        h = ops.project_in(base, x, self.lora_A.to(y.dtype))  # A x, also where x is token ids or an image
        return y + self.scaling * ops.project_out(base, h, self.lora_B.to(y.dtype))

    def factors(self):  # merging and unmerging follow from these
        return self.scaling * self.lora_B, self.lora_A.to(self.lora_B.dtype)

    def file_tensors(self):  # A too: another machine's random numbers may differ
        return {"lora_fa_A": self.lora_A, "lora_fa_B": self.lora_B}


def main(argv: Sequence[str] | None = None) -> None:
    args = options(__doc__, argv)
    for layer in (Conv1D,) if args.quick else (nn.Linear, Conv1D, nn.Embedding, nn.Conv2d):
        print(check_pair("lora_fa", layer))

    steps, size = (8, 2) if args.quick else (100, 8)
    train_text = "code-eval" if args.quick else "code-train"
    rows, unseen = blocks(train_text, 64), blocks("code-eval", 64)[: 4 if args.quick else 48]
    curves, losses, trainable = {}, {"base": evaluate(tiny_model(), unseen)}, {}
    for name, config in {
        "LoRA": LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS),
        "LoRA-FA": LoraFaConfig(target_modules=TARGETS),
    }.items():
        torch.manual_seed(0)
        model = get_adapter_model(tiny_model(), config)
        trainable[name], _ = model.get_nb_trainable_parameters()
        curves[name] = train(model, rows, steps=steps, lr=5e-3, size=size)
        losses[name] = evaluate(model, unseen)
        print(f"{name}: {trainable[name]:,} parameters, evaluation loss {losses[name]:.3f}")
    check("B alone has fewer parameters", trainable["LoRA-FA"] < 0.7 * trainable["LoRA"])
    check("the method learns", losses["LoRA-FA"] < losses["base"])

    with TemporaryDirectory() as folder, torch.no_grad():
        model.save_pretrained(folder)
        size = (Path(folder) / "adapter_model.safetensors").stat().st_size
        adapted = model.eval()(unseen[:2]).logits
        loaded = load_adapter(tiny_model(), folder).eval()
        check(f"its file ({size:,} bytes) gives the same logits", torch.equal(loaded(unseen[:2]).logits, adapted))
        merged = loaded.merge_and_unload()
        check("and so does the merged model", torch.allclose(merged(unseen[:2]).logits, adapted, atol=1e-3))

    drawn, [axes] = figure()
    for name, curve in curves.items():
        axes.plot(smooth(curve, 10), label=f"{name}: {trainable[name]:,} parameters")
    axes.set(xlabel="step", ylabel="training loss (nats per token)", title="A method of twenty lines beside LoRA")
    axes.legend()
    save(drawn, args, __file__)


if __name__ == "__main__":
    main()
