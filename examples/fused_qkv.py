"""GPT-2 packs query, key and value into one `c_attn`: here q gets rank 8, v rank 2, and k no adapter at all."""

import math
import tempfile

import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from minipeft import Adapter, LoraConfig, get_lora_model, load_adapter, register_adapter


@register_adapter("lora", pattern=r"attn\.c_attn")  # every other module keeps the LoRA it would have had
class FusedQKV(Adapter):
    """y = W x + b, and to each third of y its own B A x; the factors lie together, so it is still two products."""

    config_class = LoraConfig
    ranks = (8, 0, 2)  # of q, k and v

    def __init__(self, base, ops, config, shared):
        super().__init__(base, ops, config, shared)
        (rows, columns), weight, total = ops.shape(base), ops.read_weight(base), sum(self.ranks)
        self.lora_alpha = config.lora_alpha
        self.lora_A = nn.Parameter(weight.new_empty(total, columns))
        self.lora_B = nn.Parameter(weight.new_zeros(rows // len(self.ranks), total))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def up(self):
        """The scaled B of all three as one block-diagonal matrix, shape (3 * embed_dim, sum of ranks)."""
        blocks = self.lora_B.split(self.ranks, dim=1)
        return torch.block_diag(*(B * (self.lora_alpha / max(r, 1)) for r, B in zip(self.ranks, blocks, strict=True)))

    def forward(self, base, ops, x, y):
        return y + ops.project_out(base, ops.project_in(base, x, self.lora_A.to(x.dtype)), self.up().to(x.dtype))

    def factors(self):
        return self.up(), self.lora_A


def main():
    config = GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=64, n_positions=16, bos_token_id=0, eos_token_id=0)
    base, fresh, ids = GPT2LMHeadModel(config).eval(), GPT2LMHeadModel(config).eval(), torch.arange(16)[None]
    fresh.load_state_dict(base.state_dict())
    model = get_lora_model(base, LoraConfig(lora_alpha=16, target_modules=["c_attn", "c_proj"]))
    model(ids, labels=ids).loss.backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0).step()
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        model.save_pretrained(folder)
        logits, loaded, merged = model(ids).logits, load_adapter(fresh, folder), model.merge_and_unload()
        results = logits, loaded(ids).logits, merged(ids).logits
    change = (
        merged.transformer.h[0].attn.c_attn.weight - fresh.transformer.h[0].attn.c_attn.base_layer.weight
    ).detach()
    print("size of the change of q, k, v:", *(f"{float(part.norm()):.3f}" for part in change.chunk(3, dim=1)))
    return change, *results


if __name__ == "__main__":
    main()
