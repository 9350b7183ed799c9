"""LoHa and LoKr on convolutions, with and without a core for the kernel: against PEFT, and LyCORIS's formula in float64."""

import copy

import pytest
import torch
from tiny_models import disturb, foreign_code
from torch import nn

from minipeft import CheckpointError, LoHaConfig, LoKrConfig, get_adapter_model, load_adapter

with foreign_code():
    peft = pytest.importorskip("peft")

LAYERS = {
    "1d": (lambda: nn.Conv1d(4, 6, 3), (2, 4, 9)),
    "1d pointwise": (lambda: nn.Conv1d(8, 6, 1), (2, 8, 9)),
    "2d": (lambda: nn.Conv2d(8, 12, (3, 2), stride=2, padding=1), (2, 8, 7, 7)),
    "2d pointwise": (lambda: nn.Conv2d(8, 12, 1), (2, 8, 5, 5)),
    "2d groups": (lambda: nn.Conv2d(8, 12, 3, groups=2, dilation=2), (2, 8, 7, 7)),
    "3d": (lambda: nn.Conv3d(4, 6, (1, 2, 3)), (2, 4, 3, 4, 4)),
    "linear": (lambda: nn.Linear(8, 12), (2, 8)),
}
METHODS = {
    "loha": (LoHaConfig, "LoHaConfig", {"r": 2, "alpha": 3}),
    "lokr": (LoKrConfig, "LoKrConfig", {"r": 1, "alpha": 3, "decompose_factor": 2}),
    "lokr whole": (LoKrConfig, "LoKrConfig", {"r": 16, "alpha": 3}),
    "lokr both": (LoKrConfig, "LoKrConfig", {"r": 1, "alpha": 3, "decompose_both": True, "decompose_factor": 4}),
}
# (layer, method, with a core). Of LoKr on Conv1d PEFT 0.21.2 joins the factors along the wrong dimensions, or stops.
AS_PEFT = [
    *[("2d", method, core) for method in METHODS for core in (True, False)],
    *[("2d groups", "loha", True), ("2d groups", "lokr", True), ("2d pointwise", "loha", True)],
    *[("2d pointwise", "lokr whole", True), ("1d", "loha", True), ("1d", "loha", False), ("1d", "lokr", False)],
    *[("1d pointwise", "loha", True), ("linear", "loha", True), ("linear", "lokr", True)],
]


class Net(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = copy.deepcopy(layer)

    def forward(self, x):
        return self.layer(x)


def options(method, core):
    return {**METHODS[method][2], "target_modules": ["layer"], "use_effective_conv2d": core, "init_weights": False}


@pytest.mark.each_value
@pytest.mark.parametrize(("name", "method", "core"), AS_PEFT)
def test_files_are_those_of_peft_in_both_directions(name, method, core, tmp_path):
    make, shape = LAYERS[name]
    layer, x = make().double(), torch.randn(shape, dtype=torch.float64)
    ours, theirs, _ = METHODS[method]
    model = get_adapter_model(Net(layer), ours(**options(method, core)))
    model.save_pretrained(tmp_path / "ours")
    with foreign_code():
        loaded = peft.PeftModel.from_pretrained(Net(layer), tmp_path / "ours", autocast_adapter_dtype=False)
        torch.testing.assert_close(loaded(x), model(x))
        reference = peft.get_peft_model(
            Net(layer), getattr(peft, theirs)(**options(method, core)), autocast_adapter_dtype=False
        )
        disturb(reference).save_pretrained(tmp_path / "theirs")
    found = load_adapter(Net(layer), tmp_path / "theirs")
    torch.testing.assert_close(found(x), reference(x))
    assert not torch.allclose(found(x), layer(x), atol=1e-5)


@pytest.mark.parametrize("name", ["1d", "1d pointwise"])
def test_a_whole_factor_of_peft_that_is_joined_along_other_dimensions_is_refused(name, tmp_path):
    layer = LAYERS[name][0]()
    with foreign_code():
        config = peft.LoKrConfig(**options("lokr whole", False))
        peft.get_peft_model(Net(layer), config).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="lokr_w2"):
        load_adapter(Net(layer), tmp_path)


def along(core, up, down):
    """rebuild_tucker of lycoris/functional/general.py, written out: out p, in q, position k."""
    return torch.einsum("ij...,ip,jq->pq...", core, up, down)


@pytest.mark.parametrize("name", ["1d", "2d", "2d groups", "3d"])
def test_the_update_is_that_of_lycoris(name):
    layer = LAYERS[name][0]().double()
    kernel = layer.weight.shape[2:]
    own = get_adapter_model(Net(layer), LoHaConfig(**options("loha", True))).layer.adapter("default")
    p = {key: value.view(*value.shape[:2], *kernel) if "_t" in key else value for key, value in own.named_parameters()}
    one, two = (along(p[f"hada_t{i}"], p[f"hada_w{i}_a"], p[f"hada_w{i}_b"]) for i in "12")
    torch.testing.assert_close(own.delta(own.hada_w2_b), 3 / 2 * (one * two).flatten(1))
    for method, core in (("lokr", True), ("lokr", False), ("lokr whole", True)):
        own = get_adapter_model(Net(layer), LoKrConfig(**options(method, core))).layer.adapter("default")
        p = dict(own.named_parameters())
        if method == "lokr whole":
            right = p["lokr_w2"].view(*p["lokr_w2"].shape[:2], *kernel)
        elif core:
            right = along(p["lokr_t2"].view(1, 1, *kernel), p["lokr_w2_a"], p["lokr_w2_b"])
        else:
            right = (p["lokr_w2_a"] @ p["lokr_w2_b"]).view(p["lokr_w2_a"].shape[0], -1, *kernel)
        left = p["lokr_w1"].view(*p["lokr_w1"].shape, *(1,) * len(kernel))
        torch.testing.assert_close(own.delta(left), own.scaling * torch.kron(left, right).flatten(1))


@pytest.mark.parametrize("method", ["loha", "lokr"])
def test_a_core_starts_as_the_base_trains_and_merges(method):
    make, shape = LAYERS["2d"]
    layer, x = make(), torch.randn(shape)
    model = get_adapter_model(Net(layer), METHODS[method][0](**{**options(method, True), "init_weights": True}))
    assert torch.equal(model(x), layer(x))
    disturb(model)(x).square().mean().backward()
    assert all(p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)
    y = model.eval()(x)
    torch.testing.assert_close(model.merge_and_unload()(x), y)
