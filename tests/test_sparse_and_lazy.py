"""Models with weights that are sparse, have no shape yet, or belong to a script."""

import pytest
import torch
from torch import nn

from minipeft import LoraConfig, TargetError, get_lora_model, load_adapter

# By torch: CSR tensors are in beta, scripts are deprecated.
pytestmark = [pytest.mark.filterwarnings("ignore:Sparse CSR"), pytest.mark.filterwarnings("ignore:.torch.jit")]
LAYOUTS = pytest.mark.parametrize("layout", ["to_sparse", "to_sparse_csr"])


class Graph(nn.Module):
    """Y = A B X W^T + b with matrices of a graph."""

    def __init__(self, layout):
        super().__init__()
        self.A = nn.Parameter(getattr(torch.eye(4).roll(1, 0), layout)(), requires_grad=False)
        self.register_buffer("B", getattr(torch.eye(4).roll(2, 0), layout)())
        self.layer = nn.Linear(3, 5)

    def forward(self, x):
        return self.A @ (self.B @ self.layer(x))


@LAYOUTS
def test_a_model_with_sparse_matrices_is_adapted_saved_loaded_and_merged(layout, tmp_path):
    base, x = Graph(layout), torch.randn(4, 3)
    weight, bias = base.layer.weight.detach().clone(), base.layer.bias.detach().clone()
    model = get_lora_model(base, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    adapter = model.layer.adapters["default"]
    update = adapter.scaling * adapter.lora_B @ adapter.lora_A
    expected = (x @ (weight + update).T + bias).roll(3, 0).detach()
    torch.testing.assert_close(model(x), expected)
    model(x).sum().backward()
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(model.merge_and_unload()(x), expected)
    plain = Graph(layout)
    plain.layer.weight.data, plain.layer.bias.data = weight, bias
    torch.testing.assert_close(load_adapter(plain, tmp_path)(x), expected)


@LAYOUTS
def test_a_layer_with_a_sparse_weight_is_refused_and_passed_over(layout):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].weight = nn.Parameter(getattr(model[0].weight.detach(), layout)(), requires_grad=False)
    with pytest.raises(TargetError, match="0: .* is refused"):
        get_lora_model(model, LoraConfig(target_modules=["0"]))
    with pytest.warns(UserWarning, match="its weight is sparse"):
        get_lora_model(model, LoraConfig(target_modules="all-linear"))


def test_a_lazy_layer_without_a_weight_is_named_and_adapted_after_a_call():
    model = nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 4))
    with pytest.raises(TargetError, match=r"^0: this lazy layer has no weight yet\. Call the model once"):
        get_lora_model(model, LoraConfig(target_modules=["1"]))
    model(torch.randn(2, 3))
    assert get_lora_model(model, LoraConfig(target_modules="all-linear"))(torch.randn(2, 3)).shape == (2, 4)


def test_a_layer_in_a_script_is_refused():
    model = nn.Sequential(nn.Linear(4, 4), torch.jit.script(nn.Sequential(nn.Linear(4, 4))))
    with pytest.raises(TargetError, match=r"1\.0: no LayerOps for .*RecursiveScriptModule"):
        get_lora_model(model, LoraConfig(target_modules=["0"]))
