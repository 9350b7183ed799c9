"""A new method for minipeft, from the paper to a checked result: LoRA-XS (Bałazy et al., 2024, arXiv:2405.17604).

    y = W x + b + B R A x,  with W = U S V^T,  A = V_r^T (r, in) and B = U_r S_r (out, r) frozen, R (r, r) trained

So a layer of any size trains r * r numbers. A method is one class, and a configuration if it has options. It says what
it holds, what it adds to the output, and what it adds to the weight. Files, merging and compiling follow from that.
"""

from dataclasses import dataclass

import torch
from torch import nn

from minipeft import Adapter, AdapterConfig, get_adapter_model, register_method
from minipeft.testing import check_method


@dataclass(frozen=True, kw_only=True)
class LoraXsConfig(AdapterConfig):
    method = "lora_xs"  # the name it is registered under, and what a saved file says
    r: int = 4


@register_method("lora_xs")
class LoraXs(Adapter):
    config_class = LoraXsConfig

    def __init__(self, base, ops, config, shared):
        super().__init__(base, ops, config, shared)
        weight = ops.read_weight(base).detach()  # always (out, in), whatever the layer stores
        u, s, vt = torch.linalg.svd(weight.to(torch.promote_types(weight.dtype, torch.float32)), full_matrices=False)
        self.register_buffer("A", vt[: config.r].contiguous())
        self.register_buffer("B", u[:, : config.r] * s[: config.r])
        self.R = nn.Parameter(torch.zeros(len(self.A), len(self.A), dtype=weight.dtype, device=weight.device))

    def forward(self, base, ops, x, y):
        h = ops.project_in(base, x, self.A.to(y.dtype))  # A x, also where x is token ids or an image
        return y + ops.project_out(base, h, (self.B @ self.R.to(self.B.dtype)).to(y.dtype))

    def factors(self):  # merging and unmerging follow from the update's two factors, (out, r) and (r, in)
        return self.B @ self.R.to(self.B.dtype), self.A

    def file_tensors(self):  # A and B too: another machine's SVD may differ in sign
        return {"lora_xs_A": self.A, "lora_xs_B": self.B, "lora_xs_R": self.R}


if __name__ == "__main__":
    print(check_method("lora_xs"))  # every promise, on every layer type that is registered
    net = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))
    get_adapter_model(net, LoraXsConfig(target_modules=["0", "2"])).print_trainable_parameters()
