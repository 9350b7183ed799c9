"""A frozen base stays what it was: statistics do not move, and what changes all the same is named when it is saved."""

import copy
import functools
import pickle
import threading
import warnings

import pytest
import torch
from tiny_models import adapted, gpt2
from torch import nn
from torch.nn.utils import parametrize, prune

from minipeft import IA3Config, LoraConfig, get_adapter_model, get_lora_model, load_adapter

NORMS = {
    "BatchNorm2d": lambda: nn.BatchNorm2d(8),
    "without parameters": lambda: nn.BatchNorm2d(8, affine=False),
    "InstanceNorm2d": lambda: nn.InstanceNorm2d(8, affine=True, track_running_stats=True),
    "SyncBatchNorm": lambda: nn.SyncBatchNorm(8),
}


class Net(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.conv, self.norm, self.lin = nn.Conv2d(3, 8, 3), norm(), nn.Linear(8, 4)

    def forward(self, x):
        return self.lin(torch.relu(self.norm(self.conv(x))).mean((2, 3)))


def net(norm="BatchNorm2d"):
    torch.manual_seed(0)
    model = Net(NORMS[norm])
    model.norm.running_mean.add_(torch.randn(8))
    return model


def images():
    return 3 * torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(1)) + 1


def train(model, steps=3):
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(images()).square().mean().backward()
        optimizer.step()
    return model.eval()


def lora(model, **options):
    return get_lora_model(model, LoraConfig(**{"r": 2, "target_modules": ["lin"], **options}))


@pytest.mark.parametrize("norm", NORMS)
def test_training_leaves_the_statistics_of_a_frozen_norm_alone(norm, tmp_path):
    base = net(norm)
    before = copy.deepcopy(base.state_dict())
    expected = base.eval()(images())
    model = train(lora(base.train()))
    output = model(images())
    assert not torch.equal(output, expected)
    with model.disable_adapter():
        assert torch.equal(model(images()), expected)
    model.save_pretrained(tmp_path)
    assert torch.equal(load_adapter(net(norm), tmp_path).eval()(images()), output)
    assert all(torch.equal(value, before[name]) for name, value in model.unload().state_dict().items())


def half(part, name):
    parametrize.register_parametrization(part, name, Half())


class Half(nn.Module):
    def forward(self, weight):
        return weight / 2

    def right_inverse(self, weight):
        return 2 * weight


COMPUTED = {
    "pruned": (lambda part, name: prune.l1_unstructured(part, name, 0.5), prune.remove),
    "parametrized": (half, parametrize.remove_parametrizations),
}
TRAINED = {
    "lora": (LoraConfig(r=2, target_modules=["lin"], init_lora_weights=False), "lora_A"),
    "in full": (LoraConfig(r=2, target_modules=["conv"], modules_to_save=["lin"]), "weight"),
    "ia3": (IA3Config(target_modules=["lin"], feedforward_modules=[], init_ia3_weights=False), "ia3_l"),
}


@pytest.mark.parametrize("how", COMPUTED)
@pytest.mark.parametrize("what", TRAINED)
def test_what_is_computed_since_it_was_adapted_is_named_when_it_is_saved_unless_the_file_is_right(what, how, tmp_path):
    config, name = TRAINED[what]
    put_on, take_off = COMPUTED[how]
    model = get_adapter_model(net(), config).eval()
    part = model.lin.adapters["default"]
    put_on(part, name)
    if (what, how) == ("lora", "parametrized"):  # which is read anew, and saved as it is
        model.save_pretrained(tmp_path)
        torch.testing.assert_close(load_adapter(net(), tmp_path)(images()), model(images()))
    else:
        with pytest.warns(UserWarning, match="what trains at 'lin' is computed"):
            model.save_pretrained(tmp_path)
    take_off(part, name)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(load_adapter(net(), tmp_path)(images()), model(images()))


class Recorder:
    def __init__(self):
        self.lock, self.outputs = threading.Lock(), []  # a lock cannot be copied

    def hook(self, module, args, output):
        self.outputs.append(output)


class Doubled(nn.Linear):
    """A layer whose hook is a method of its own."""

    def __init__(self, *args):
        super().__init__(*args)
        self.factor = 2
        self.register_forward_hook(self.scaled)

    def scaled(self, module, args, output):
        assert module is self
        return self.factor * output


@pytest.mark.parametrize("hooked", [lambda r: r.hook, lambda r: functools.partial(r.hook)], ids=["method", "partial"])
def test_a_hook_on_a_layer_that_trains_in_full_hears_of_the_copy(hooked):
    model, recorder = net(), Recorder()
    handle = model.lin.register_forward_hook(hooked(recorder))
    lora(model, modules_to_save=["lin"], target_modules=["conv"])
    assert model(images()) is recorder.outputs[-1]
    handle.remove()


def test_a_copy_of_a_layer_calls_its_own_hook():
    model = net()
    model.lin = Doubled(8, 4)
    expected = model.eval()(images())
    lora(model, modules_to_save=["lin"], target_modules=["conv"])
    torch.testing.assert_close(model(images()), expected)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_it_does_however_training_mode_is_entered(copied):
    model = lora(net().train())
    assert model.training
    assert not model.norm.training  # though nobody called train()
    outer = nn.Sequential(copied(model)).train()
    assert outer[0].training
    assert not outer[0].norm.training
    outer[0] = nn.SyncBatchNorm.convert_sync_batchnorm(outer[0])
    assert not outer.train()[0].norm.training


@pytest.mark.parametrize("leave", ["unload", "merge_and_unload"])
def test_without_its_adapters_a_norm_has_the_mode_of_its_model_again(leave):
    model = lora(net().train())
    assert getattr(model, leave)().norm.training
    model = lora(net().eval())
    assert not getattr(model, leave)().norm.training


def test_a_norm_that_the_user_holds_still_is_left_so():
    model = net().train()
    model.norm.eval()
    assert not lora(model).unload().norm.training


def test_a_trained_norm_brings_its_statistics_with_the_counter(tmp_path):
    model = train(lora(net(), modules_to_save=["norm"]))
    assert int(model.norm.adapters["default"].num_batches_tracked) == 3
    assert torch.equal(model.norm.base_layer.running_mean, net().norm.running_mean)
    model.save_pretrained(tmp_path)
    loaded = load_adapter(net(), tmp_path).train()
    assert not loaded.norm.adapters[
        "default"
    ].training  # it does not train here, so its statistics must not move either
    loaded(images())
    assert torch.equal(loaded.eval()(images()), model(images()))
    resumed = load_adapter(net(), tmp_path, is_trainable=True)
    assert resumed.train().norm.adapters["default"].training
    assert torch.equal(model.merge_and_unload().norm.running_mean, resumed.norm.adapters["default"].running_mean)


def test_a_bias_trained_alone_leaves_the_statistics_alone(tmp_path):
    model = train(lora(net(), bias="all"))
    assert torch.equal(model.norm.adapters["default"].running_mean, net().norm.running_mean)
    model.save_pretrained(tmp_path)
    assert torch.equal(load_adapter(net(), tmp_path).eval()(images()), model(images()))


def test_a_file_of_peft_with_a_batchnorm_is_read(tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["lin"], modules_to_save=["norm"])
    model = train(peft.get_peft_model(net(), config))
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(load_adapter(net(), tmp_path).eval()(images()), model(images()))


def test_what_is_unfrozen_by_hand_is_named_when_the_adapter_is_saved(tmp_path):
    model = adapted(gpt2())
    model.transformer.ln_f.weight.requires_grad_(True)
    with pytest.warns(
        UserWarning, match=r"'transformer.ln_f.weight' of the base train.*modules_to_save: 'transformer.ln_f'"
    ):
        model.save_pretrained(tmp_path)


def test_a_norm_unfrozen_by_hand_trains_as_ever_and_is_named(tmp_path):
    model = lora(net())
    model.norm.requires_grad_(True)
    assert model.train().norm.training
    train(model)
    with (
        pytest.warns(UserWarning, match="'norm.weight', 'norm.bias' of the base train"),
        pytest.warns(UserWarning, match="'norm.running_mean'.* changed since it was adapted"),
    ):
        model.save_pretrained(tmp_path)


class Counter(nn.Module):
    """A buffer that the model writes in training, as spectral norms, observers and codebooks do."""

    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(8, 8)
        self.register_buffer("seen", torch.zeros(3))
        self.register_buffer("cache", torch.zeros(3), persistent=False)

    def forward(self, x):
        if self.training:
            self.seen += x.detach().mean()
            self.cache += 1
        return self.lin(x) + self.seen.sum()


@pytest.mark.parametrize(
    "make", [Counter, lambda: nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8)), nn.Linear(8, 8))]
)
def test_a_buffer_that_training_moves_is_named(make, tmp_path):
    torch.manual_seed(0)
    model = make()
    model = get_lora_model(model, LoraConfig(r=2, target_modules=["lin" if make is Counter else "1"]))
    model.save_pretrained(tmp_path)
    model.train()(torch.randn(4, 8))
    with pytest.warns(UserWarning, match="'(seen|0.parametrizations.weight.0._u)'.* changed since it was adapted"):
        model.save_pretrained(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_conversions_and_moves_are_no_change(dtype, tmp_path):
    for convert in (nn.Module.half, nn.Module.double, lambda m: m.to(torch.bfloat16)):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            convert(lora(moved_statistics(net()).to(dtype))).save_pretrained(tmp_path)


def moved_statistics(model):
    """With values that half precision has to round."""
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.copy_(torch.rand(buffer.shape, generator=torch.Generator().manual_seed(0)) + 0.1)
    return model


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_scripted_parts_of_the_base_are_left_alone():
    norm = nn.BatchNorm1d(4)
    model = nn.Sequential(torch.jit.script(nn.Linear(4, 4)), nn.Linear(4, 4), torch.jit.script(norm))
    get_lora_model(model, LoraConfig(r=2, target_modules=["1"])).train()
    model(torch.randn(3, 4)).sum().backward()
    assert torch.equal(model[2].running_mean, torch.zeros(4))
    assert model[1].adapters["default"].lora_B.grad.any()


def test_an_adapted_layer_that_was_replaced_is_missed_when_the_adapter_is_saved(tmp_path):
    model = adapted()
    model.transformer.h[0].attn.c_attn = copy.deepcopy(gpt2().transformer.h[0].attn.c_attn).requires_grad_(False)
    with pytest.warns(UserWarning, match="1 of the 2 parts of adapter 'default' are no longer in the model"):
        model.save_pretrained(tmp_path)
