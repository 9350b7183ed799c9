"""Traced, exported, and differentiated by torch.func or in forward mode: torch's own operations compute what we do."""

import pytest
import torch
from rotation import thinned
from tiny_models import disturb
from torch import nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

import minipeft
from minipeft.kernels.transformed import is_traced, is_transformed

TARGETS = {"target_modules": ["0", "3"]}
CONFIGS = {
    "lora": minipeft.LoraConfig(r=4, **TARGETS),
    "dora": minipeft.LoraConfig(r=4, use_dora=True, **TARGETS),
    "ia3": minipeft.IA3Config(feedforward_modules=["3"], **TARGETS),
    "vera": minipeft.VeraConfig(r=4, init_weights=False, **TARGETS),
    "adalora": minipeft.AdaLoraConfig(init_r=4, target_r=2, total_step=10, **TARGETS),
    "loha": minipeft.LoHaConfig(r=3, **TARGETS),
    "lokr": minipeft.LoKrConfig(r=3, **TARGETS),
    "oft": minipeft.OFTConfig(oft_block_size=4, **TARGETS),
}
# What torch does on the way is not ours.
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore:`torch.jit:FutureWarning", "ignore::torch.jit.TracerWarning"
)
every_method = pytest.mark.parametrize("method", CONFIGS)


def net(method):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.LayerNorm(24), nn.Linear(24, 8))
    return disturb(minipeft.get_adapter_model(base, CONFIGS[method])).eval()


def batch(rows, seed=1):
    return torch.randn(rows, 16, generator=torch.Generator().manual_seed(seed))


MODES = [torch.no_grad, torch.enable_grad]  # of tracing and of calling: each pair, with every other method
EACH_PAIR = [
    (method, traced, MODES[(row + place) % 2])
    for row, method in enumerate(CONFIGS)
    for place, traced in enumerate(MODES)
]


@pytest.mark.each_value
@pytest.mark.parametrize(("method", "traced", "called"), thinned((CONFIGS, MODES, MODES), EACH_PAIR))
def test_a_traced_model_computes_the_same_on_any_batch(method, traced, called):
    model = net(method)
    with traced():
        trace = torch.jit.trace(model, (batch(3),))
    with called():
        for rows in (1, 3, 7):
            torch.testing.assert_close(trace(batch(rows)), model(batch(rows)))


class Attending(nn.Module):
    """Attention, whose weights are read and not called, and a layer."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.out = nn.Linear(8, 3)

    def forward(self, x):
        return self.out(self.attention(x, x, x)[0])


class ByRow(nn.Module):
    """The net, with a batch of three rows that have an adapter each, one of them none."""

    def __init__(self):
        super().__init__()
        self.net = net("lora")
        self.net.add_adapter("other", minipeft.LoraConfig(r=2, init_lora_weights=False, **TARGETS))
        self.eval()

    def forward(self, x):
        return self.net(x, adapter_names=["other", "__base__", "default"])


@pytest.mark.parametrize("mode", MODES)
def test_a_batch_of_several_adapters_is_exported(mode):
    model = ByRow()
    with mode():
        exported = torch.export.export(model, (batch(3),), strict=False).module()
        torch.testing.assert_close(exported(batch(3, seed=2)), model(batch(3, seed=2)))


@pytest.mark.parametrize("mode", MODES)
def test_a_trace_of_several_adapters_writes_into_no_tensor(mode):
    """ONNX, which is made from it, would leave out what is written into a view, and has no ``mT``."""
    model = ByRow()
    with mode():
        trace = torch.jit.trace(model, (batch(3),))
    torch.testing.assert_close(trace(batch(3, seed=2)), model(batch(3, seed=2)))
    called = {node.kind() for node in trace.inlined_graph.nodes()}
    assert "aten::bmm" in called
    assert not [name for name in called if name.startswith("aten::") and name.endswith(("_", "mT"))]


@every_method
def test_a_symbolic_trace_has_each_adapted_layer_as_one_call(method):
    model = net(method)
    graph = torch.fx.symbolic_trace(model)
    assert [node.target for node in graph.graph.nodes if node.op == "call_module"] == ["0", "1", "2", "3"]
    torch.testing.assert_close(graph(batch(7)), model(batch(7)), rtol=0, atol=0)


def test_so_has_one_of_attention_and_of_a_trained_copy():
    torch.manual_seed(0)
    config = minipeft.LoraConfig(r=2, target_modules=["attention"], modules_to_save=["out"])
    model = disturb(minipeft.get_lora_model(Attending(), config)).eval()
    x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1))
    graph = torch.fx.symbolic_trace(model)
    torch.testing.assert_close(graph(x), model(x), rtol=0, atol=0)
    with model.disable_adapter():
        torch.testing.assert_close(graph(x), model(x), rtol=0, atol=0)


class Reading(nn.Sequential):
    """Uses the weight of a layer without calling that."""

    def forward(self, x):
        return nn.functional.linear(x, self[0].weight)


def test_a_symbolic_trace_of_a_weight_that_is_read_is_refused_while_an_adapter_acts_on_it():
    model = minipeft.get_lora_model(
        Reading(nn.Linear(16, 8)), minipeft.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    )
    with pytest.raises(
        minipeft.StateError, match=r"symbolic_trace: .* the weight of an adapted Linear .*merge_and_unload"
    ):
        torch.fx.symbolic_trace(model)
    with model.disable_adapter():
        torch.testing.assert_close(torch.fx.symbolic_trace(model)(batch(3)), model(batch(3)), rtol=0, atol=0)
    merged = model.merge_and_unload()
    torch.testing.assert_close(torch.fx.symbolic_trace(merged)(batch(3)), merged(batch(3)), rtol=0, atol=0)


def by_differences(model, x, direction):
    """The derivative along a direction in float64, from two values."""
    exact, step = model.double(), 1e-5
    with torch.no_grad():
        ends = [exact(x.double() + sign * step * direction.double()) for sign in (1, -1)]
    return (ends[0] - ends[1]) / (2 * step)


@every_method
def test_forward_mode_gives_the_derivative(method):
    model, x, direction = net(method), batch(5), batch(5, seed=2)
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(model(forward_ad.make_dual(x, direction))).tangent
    by_jvp = torch.func.jvp(model, (x,), (direction,))[1]
    expected = by_differences(model, x, direction)
    torch.testing.assert_close(tangent.double(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(by_jvp.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", [m for m in CONFIGS if m != "dora"])  # which holds its norm fixed, see test_dora.py
def test_forward_mode_in_the_adapters_parameters_gives_the_derivative(method):
    model, x = net(method), batch(5)
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    state = {name: parameter.detach() for name, parameter in model.named_parameters() if name in names}
    along = {
        name: torch.randn(value.shape, generator=torch.Generator().manual_seed(3)) for name, value in state.items()
    }
    tangent = torch.func.jvp(lambda p: torch.func.functional_call(model, p, (x,)), (state,), (along,))[1]
    exact, ends = model.double(), []
    for step in (1e-5, -1e-5):
        moved = {name: state[name].double() + step * along[name].double() for name in names}
        ends.append(torch.func.functional_call(exact, moved, (x.double(),)).detach())
    torch.testing.assert_close(tangent.double(), (ends[0] - ends[1]) / 2e-5, rtol=1e-3, atol=1e-4)


@every_method
def test_function_transforms_go_through(method):
    model, x = net(method), batch(4)
    torch.testing.assert_close(torch.func.vmap(model)(x), model(x))
    each = torch.func.vmap(torch.func.grad(lambda row: model(row).square().sum()))(x)
    (together,) = torch.autograd.grad(model(x.requires_grad_()).square().sum(), x)
    torch.testing.assert_close(each, together)
    hessian = torch.func.hessian(lambda row: model(row).square().sum())(x[0].detach())
    torch.testing.assert_close(hessian, hessian.t(), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(make_fx(model)(x.detach())(batch(4)), model(batch(4)))


def test_an_ordinary_call_is_not_taken_for_a_traced_one():
    seen = []

    def function(x):
        seen.append((is_traced(), is_transformed()))
        return x * 2

    function(batch(2))
    torch.func.vmap(function)(batch(2))
    with forward_ad.dual_level():
        function(batch(2))
    assert seen == [(False, False), (True, True), (True, True)]


class ReadsIt(nn.Module):
    """Reads weights instead of calling layers: those of an attention, of a layer, of a table, and a parameter."""

    def __init__(self):
        super().__init__()
        self.attention, self.layer, self.table = nn.MultiheadAttention(8, 2), nn.Linear(8, 8), nn.Embedding(5, 8)
        self.inner = nn.Bilinear(8, 8, 8)

    def forward(self, x):
        y = self.attention(x, x, x, need_weights=False)[0]
        return nn.functional.linear(self.inner(y, y), self.layer.weight, self.layer.bias) @ self.table.weight.t()


READ = {
    "lora": minipeft.LoraConfig(
        r=2, target_modules=["attention", "layer", "table"], target_parameters=["inner.weight"]
    ),
    "dora": minipeft.LoraConfig(r=2, use_dora=True, target_modules=["layer", "table"]),
    "loha": minipeft.LoHaConfig(r=2, target_modules=["attention", "layer", "table"]),
    "trained": minipeft.LoraConfig(r=2, target_modules=["attention"], modules_to_save=["layer", "table"]),
}


def exported(model, x):
    return torch.export.export(model, (x,)).module()(x)


def traced(model, x):
    with torch.no_grad():
        return torch.jit.trace(model, (x,))(x)


def called_with_tensors(model, x):
    return torch.func.functional_call(model, {name: p * 1 for name, p in model.named_parameters()}, (x,))


@pytest.mark.each_value
@pytest.mark.parametrize(
    ("run", "method"),
    [(exported, "lora"), (traced, "lora"), (traced, "trained"), *((called_with_tensors, method) for method in READ)],
)
def test_weights_that_are_read_have_the_adapter_in_them(run, method):
    torch.manual_seed(0)
    model = disturb(minipeft.get_adapter_model(ReadsIt(), READ[method])).eval()
    x = torch.randn(3, 2, 8)
    torch.testing.assert_close(run(model, x), model(x), rtol=1e-4, atol=1e-5)


def test_gradients_reach_the_tensors_in_the_place_of_parameters():
    """And where they cannot, since the backward pass would read others, that is an error."""
    torch.manual_seed(0)
    model, x = disturb(minipeft.get_adapter_model(ReadsIt(), READ["lora"])), torch.randn(3, 2, 8)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    wanted = torch.autograd.grad(model(x).square().sum(), [model.get_parameter(name) for name in names])
    tensors = {name: model.get_parameter(name).detach().clone().requires_grad_() for name in names}
    found = torch.autograd.grad(torch.func.functional_call(model, tensors, (x,)).square().sum(), [*tensors.values()])
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    parameters = {name: nn.Parameter(value.detach()) for name, value in tensors.items()}
    loss = torch.func.functional_call(model, parameters, (x,)).square().sum()
    with pytest.raises(minipeft.MinipeftError, match="Give functional_call tensors"):
        loss.backward()
