"""What rounds the factors of products, and that nothing of the kind reaches what must be exact."""

import pytest
import torch
from fake_tf32 import tf32_allowed
from tiny_models import llama
from torch import nn

from minipeft import LoraConfig, get_lora_model, lean
from minipeft.kernels.full_precision import full_precision

MATMUL = torch.backends.cuda.matmul


def old_flag():
    MATMUL.allow_tf32 = True


def old_precision():
    torch.set_float32_matmul_precision("high")


def of_products():
    MATMUL.fp32_precision = "tf32"


def of_everything():  # as the Trainer's tf32=True has it
    torch.backends.fp32_precision = "tf32"


@pytest.fixture
def as_before():
    yield
    torch.backends.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")
    for backend in (MATMUL, torch.backends.mkldnn.matmul):
        backend.fp32_precision = "none"


@pytest.mark.usefixtures("as_before")
@pytest.mark.parametrize("allow", [old_flag, old_precision, of_products, of_everything])
def test_what_the_caller_allows_is_allowed_again_afterwards(allow):
    allow()
    with full_precision():
        assert MATMUL.fp32_precision == "ieee"
    assert MATMUL.fp32_precision == "tf32"
    with pytest.raises(ZeroDivisionError), full_precision():
        1 / 0  # noqa: B018
    assert MATMUL.fp32_precision == "tf32"
    if allow is of_everything:
        torch.backends.fp32_precision = "ieee"
        assert MATMUL.fp32_precision == "ieee"


def test_the_emulation_rounds_factors_where_it_is_allowed():
    torch.manual_seed(0)
    layer, x = nn.Linear(64, 64), torch.randn(16, 64)
    with torch.no_grad(), tf32_allowed():
        rounded = layer(x)
        with full_precision():
            exact = layer(x)
    assert torch.equal(exact, layer(x))
    assert 1e-4 < (rounded - exact).norm() / exact.norm() < 1e-2


def test_lean_is_proved_in_full_precision():
    model = get_lora_model(llama(), LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    with tf32_allowed():
        lean(model)
