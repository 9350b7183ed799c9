"""Classes whose objects Python lays out in another way than torch's: an abstract or generic base in front of ``nn.Module``."""

import copy
import pickle
from abc import ABC
from typing import ClassVar, Generic, TypeVar

import pytest
import torch
from torch import nn

from minipeft import AdaptedModel, LoraConfig, get_lora_model, load_adapter
from minipeft.python.class_swap import SameFunction, mixed_class, plain_class

Value = TypeVar("Value")


class Slotless:
    __slots__ = ()


class Interface(Slotless):
    """Has a ``__dict__``, unlike its base."""


class AbstractNet(ABC, nn.Sequential):
    pass


class GenericNet(Generic[Value], nn.Sequential):
    pass


class InterfaceNet(Interface, nn.Sequential):
    pass


class AbstractLinear(ABC, nn.Linear):
    pass


class InterfaceLinear(Interface, nn.Linear):
    pass


class SlotlessEmbedding(Slotless, nn.Embedding):
    pass


class Counting(nn.Linear):
    __slots__ = ("calls",)

    def forward(self, x):
        return super().forward(x)


class Registered:
    known: ClassVar[dict[str, type]] = {}

    def __init_subclass__(cls, *, kind):
        Registered.known[kind] = Registered.known[cls.__name__] = cls


class RegisteredNet(nn.Sequential, Registered, kind="net"):
    pass


class Unique(type):
    known: ClassVar[dict[str, type]] = {}

    def __new__(mcs, name, bases, names):
        if name in Unique.known:
            raise ValueError(f"there are two classes {name}")
        Unique.known[name] = super().__new__(mcs, name, bases, names)
        return Unique.known[name]


class UniqueNet(nn.Sequential, metaclass=Unique):
    pass


class Announced:
    subclasses: ClassVar[list[type]] = []

    def __init_subclass__(cls):
        Announced.subclasses.append(cls)


class AnnouncedNet(Announced, ABC, nn.Sequential):
    pass


NETS = [AbstractNet, GenericNet, InterfaceNet, RegisteredNet, UniqueNet, AnnouncedNet]
LINEARS = [AbstractLinear, InterfaceLinear, Counting]
CONFIG = LoraConfig(r=2, target_modules=["0", "1"], init_lora_weights=False)


@pytest.mark.each_value
@pytest.mark.parametrize("linear", LINEARS)
@pytest.mark.parametrize("net", NETS)
def test_a_model_of_such_classes_is_adapted_copied_pickled_saved_and_given_back(net, linear, tmp_path):
    torch.manual_seed(0)
    base = net(SlotlessEmbedding(8, 4), linear(4, 4))
    plain, x = nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 4)), torch.arange(8)
    plain.load_state_dict(base.state_dict())
    model = get_lora_model(copy.deepcopy(base), CONFIG)
    assert isinstance(model, net)
    assert isinstance(model, AdaptedModel)
    model.save_pretrained(tmp_path)
    expected = load_adapter(plain, tmp_path)(x)
    for same in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model)), load_adapter(base, tmp_path)):
        torch.testing.assert_close(same(x), expected)
    torch.testing.assert_close(copy.deepcopy(model).merge_and_unload()(x), expected)
    unloaded = model.unload()
    assert [type(unloaded), type(unloaded[0]), type(unloaded[1])] == [net, SlotlessEmbedding, linear]


def test_a_class_that_lists_its_subclasses_hears_of_none():
    for net in (RegisteredNet, UniqueNet, AnnouncedNet):
        get_lora_model(net(nn.Linear(4, 4)), LoraConfig(target_modules=["0"]))
        nn.Module.__setattr__(module := net(nn.Linear(2, 2)), "__class__", mixed_class(Mixin, net))
        assert isinstance(module, net)
    assert Registered.known == {"net": RegisteredNet, "RegisteredNet": RegisteredNet}
    assert Unique.known == {"UniqueNet": UniqueNet}
    assert Announced.subclasses == [AnnouncedNet]


def test_a_part_of_such_a_class_trains_in_full():
    model = get_lora_model(
        AbstractNet(nn.Linear(4, 4), AbstractLinear(4, 4)), LoraConfig(target_modules=["0"], modules_to_save=["1"])
    )
    model(torch.randn(2, 4)).sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is not None and name.startswith("1.")] == [
        "1.adapters.default.weight",
        "1.adapters.default.bias",
    ]


class Mixin(SameFunction):
    pass


@pytest.mark.parametrize("net", NETS)
def test_a_mixin_in_front_of_such_a_class_is_found_again(net):
    module = net(nn.Linear(2, 2))
    module.__class__ = mixed_class(Mixin, net)
    assert plain_class(type(module)) is net
    same = pickle.loads(pickle.dumps(module))
    assert type(same) is type(module)
