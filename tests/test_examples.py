"""The short examples run and do what they say."""

import runpy
from pathlib import Path

import pytest
import torch

from minipeft import registry

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.fixture
def isolated():
    with registry.isolated():
        yield


@pytest.mark.usefixtures("isolated")
def test_query_key_and_value_in_one_layer_get_ranks_of_their_own():
    path = EXAMPLES / "fused_qkv.py"
    change, logits, loaded, merged = runpy.run_path(str(path))["main"]()
    q, k, v = change.chunk(3, dim=1)
    # After one step of B from zero the change has the rank of the adapter; k has no adapter.
    assert [int(torch.linalg.matrix_rank(part, rtol=1e-3)) for part in (q, k, v)] == [8, 0, 2]
    assert torch.equal(loaded, logits)
    torch.testing.assert_close(merged, logits, rtol=1e-5, atol=1e-5)
    assert len(path.read_text("utf-8").splitlines()) <= 60
