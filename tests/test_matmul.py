"""The matrix products against float64, by either library, and the rule that chooses between them."""

import pytest
import torch

from minipeft.kernels import matmul


@pytest.fixture(params=["oneDNN", "MKL"])
def library(request, monkeypatch):
    """Every product goes through this library, however small."""
    if request.param == "oneDNN" and not torch.backends.mkldnn.is_available():
        pytest.skip("torch was built without oneDNN")
    monkeypatch.setattr(matmul, "WORTH_IT", 0)
    monkeypatch.setattr(matmul, "onednn_is_faster", lambda: request.param == "oneDNN")
    return request.param


def layouts(rows, columns):
    yield torch.randn(rows, columns)
    yield torch.randn(columns, rows).t()
    yield torch.randn(rows, 2 * columns)[:, ::2]
    yield torch.randn(()).expand(rows, columns)


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("bias", [True, False])
def test_linear_is_the_product_in_float64_for_any_layout(bias):
    for x in layouts(40, 24):
        for weight in layouts(31, 24):
            b = torch.randn(31) if bias else None
            expected = x.double() @ weight.double().t() + (0 if b is None else b)
            for function in (matmul.linear, matmul.torch_linear):
                y = function(x, weight, b)
                torch.testing.assert_close(y, expected.float(), rtol=1e-5, atol=1e-5)
                assert y.is_contiguous()


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("few", [1, 2, 8, 16, 17])
def test_narrow_is_the_product_in_float64_for_any_layout(few):
    for left in layouts(40, 24):
        for right in layouts(24, few):
            expected = (left.double() @ right.double()).float()
            torch.testing.assert_close(matmul.narrow(left, right), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("shape", [(), (6,), (2, 3), (2, 3, 4), (0,), (2, 0)])
@torch.no_grad()
def test_linear_keeps_the_leading_shape_and_gives_no_view(shape):
    x, weight = torch.randn(*shape, 5), torch.randn(7, 5)
    y = matmul.linear(x, weight)
    assert y.shape == (*shape, 7)
    assert not y._is_view()
    torch.testing.assert_close(y, torch.nn.functional.linear(x, weight))


def test_torch_linear_has_the_bits_of_torch():
    x, weight, bias = torch.randn(300, 96), torch.randn(160, 96), torch.randn(160)
    assert torch.equal(matmul.torch_linear(x, weight, bias), torch.nn.functional.linear(x, weight, bias))


@pytest.mark.parametrize(
    ("maker", "capability", "faster"),
    [
        ("vendor_id : AuthenticAMD", "AVX512", True),
        ("vendor_id : GenuineIntel", "AVX512", False),
        ("vendor_id : AuthenticAMD", "AVX2", False),
    ],
)
def test_the_rule_is_avx512_of_another_maker(maker, capability, faster, monkeypatch, tmp_path):
    info = tmp_path / "cpuinfo"
    info.write_text(maker)
    monkeypatch.setattr(matmul, "CPU_INFO", info)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    matmul.onednn_is_faster.cache_clear()
    assert matmul.onednn_is_faster() is (faster and torch.backends.mkldnn.is_available())
    matmul.onednn_is_faster.cache_clear()


HALF = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("out", "features"), [(310, 24), (40, 310)])
def test_without_kernels_for_a_dtype_the_product_is_made_in_float32_and_rounded_once(
    dtype, bias, out, features, monkeypatch
):
    monkeypatch.setattr(matmul, "WORTH_IT", 0)
    monkeypatch.setattr(matmul, "BLOCK", 500)
    monkeypatch.setattr(matmul, "has_kernels", lambda dtype: dtype not in HALF)
    for x in layouts(150, features):
        for weight in layouts(out, features):
            x, weight, b = x.to(dtype), weight.to(dtype), torch.randn(out).to(dtype) if bias else None
            assert matmul.beats_torch(x, weight)
            exact = x.double() @ weight.double().t() + (0 if b is None else b)
            for room in (None, torch.empty(150, out, dtype=dtype)):
                y = matmul.linear(x, weight, b, room=room)
                assert y.dtype is dtype
                assert y.is_contiguous()
                assert room is None or y.data_ptr() == room.data_ptr()
                # Half a unit in the last place, and what float32 rounds before.
                assert ((y.double() - exact).abs() <= exact.abs() * 0.502 * torch.finfo(dtype).eps + 1e-5).all()
            wide = matmul.in_float32(x, weight, b, torch.empty(150, out))
            assert torch.equal(wide, matmul.linear(x, weight, b).float())
            narrow = matmul.narrow(x, weight[:5].t())
            assert narrow.dtype is dtype
            torch.testing.assert_close(
                narrow.double(), exact[:, :5] - (0 if b is None else b[:5]), rtol=1e-2, atol=1e-2
            )


@pytest.mark.parametrize(("out", "features"), [(310, 24), (40, 310)])
def test_torchs_default_dtype_changes_nothing(out, features):
    x, weight = torch.randn(150, features).bfloat16(), torch.randn(out, features).bfloat16()
    expected = matmul.in_float32(x, weight, None, torch.empty(150, out, dtype=torch.bfloat16))
    torch.set_default_dtype(torch.float64)
    try:
        found = matmul.in_float32(x, weight, None, torch.empty(150, out, dtype=torch.bfloat16))
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [*HALF, torch.float32])
def test_a_narrow_product_is_added_in_place(dtype, monkeypatch):
    monkeypatch.setattr(matmul, "WORTH_IT", 0)
    monkeypatch.setattr(matmul, "BLOCK", 500)
    monkeypatch.setattr(matmul, "has_kernels", lambda dtype: dtype not in HALF)
    y, left, right = (torch.randn(*shape).to(dtype) for shape in ((300, 24), (300, 4), (4, 24)))
    exact = y.double() + 0.5 * left.double() @ right.double()
    assert matmul.add_product(y, left, right, 0.5) is y
    assert ((y.double() - exact).abs() <= exact.abs() * 0.502 * torch.finfo(dtype).eps + 1e-5).all()


def test_what_torch_has_kernels_for_is_asked_of_onednn(monkeypatch):
    assert matmul.has_kernels(torch.float32)
    assert matmul.has_kernels(torch.float64)
    for dtype, ask in matmul.HALF.items():
        assert matmul.has_kernels(dtype) is bool(getattr(torch.ops.mkldnn, ask)())
    few = torch.randn(4, 8).bfloat16()
    assert not matmul.through_float32(few, few)  # not worth it


def test_small_double_and_half_products_stay_with_torch(monkeypatch):
    monkeypatch.setattr(matmul, "onednn_is_faster", lambda: True)
    large, small = torch.randn(256, 128), torch.randn(8, 128)
    weight = torch.randn(64, 128)
    assert matmul.through_onednn(large, weight)
    assert not matmul.through_onednn(small, weight)
    assert not matmul.through_onednn(large.double(), weight.double())
    assert not matmul.through_onednn(large.bfloat16(), weight.bfloat16())
    assert not matmul.through_float32(large, weight)
    assert not matmul.through_float32(large.double(), weight.double())
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    assert not matmul.through_onednn(large, weight)


def test_a_weight_with_gaps_between_its_rows_goes_through_torch():
    """Through oneDNN a product of half a millisecond would take a second."""
    x, wide = torch.randn(512, 768), torch.randn(256, 2048)
    for weight in (wide[:, :768], torch.randn(768, 512)[:, :256].t()):
        assert not matmul.through_onednn(x, weight)
        torch.testing.assert_close(matmul.linear(x, weight), x @ weight.t(), rtol=1e-4, atol=1e-4)
    assert matmul.through_onednn(x, wide[:, :768].contiguous()) == matmul.onednn_is_faster()
    assert matmul.through_onednn(x, wide[:, :768].t().contiguous().t()) == matmul.onednn_is_faster()
