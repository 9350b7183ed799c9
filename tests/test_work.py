"""How work grows with the number of modules, counted in function calls: the same on any machine."""

import sys

import pytest
import torch
from torch import nn

from minipeft import LoraConfig, get_lora_model, load_adapter


class Many(nn.Module):
    def __init__(self, layers):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(2, 2) for _ in range(layers))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def work(action):
    """Number of function calls, Python's and C's, that an action takes: the same on a fast machine and a slow one."""
    count = 0

    def profile(frame, event, argument):
        nonlocal count
        count += event in ("call", "c_call")

    previous = sys.getprofile()
    sys.setprofile(profile)
    try:
        action()
    finally:
        sys.setprofile(previous)
    return count


EVERY_LAYER = LoraConfig(r=1, target_modules="all-linear")


def test_a_further_adapter_costs_as_much_as_the_first():
    model = Many(100)
    first = work(lambda: get_lora_model(model, EVERY_LAYER))
    for name in ("second", "third", "fourth", "fifth"):
        assert work(lambda name=name: model.add_adapter(name, EVERY_LAYER)) < 1.5 * first


@pytest.mark.parametrize("options", [{}, {"target_modules": ["0", "1"]}, {"bias": "all", "target_modules": ["0", "1"]}])
def test_injecting_a_second_adapter_is_linear_in_the_number_of_modules(options):
    costs = []
    for layers in (25, 100):
        model = get_lora_model(Many(layers), EVERY_LAYER)
        config = LoraConfig(**{"r": 1, "target_modules": "all-linear", **options} | {"bias": "none"})
        costs.append(work(lambda model=model, config=config: model.add_adapter("second", config)))
    assert costs[1] < 4.2 * costs[0]


@pytest.mark.filterwarnings("ignore:.*every update is zero")
def test_loading_a_second_adapter_is_linear_in_the_number_of_modules(tmp_path):
    costs = []
    for layers in (25, 100):
        model = get_lora_model(Many(layers), EVERY_LAYER)
        model.save_pretrained(tmp_path / str(layers))
        costs.append(work(lambda model=model, layers=layers: model.load_adapter(tmp_path / str(layers), "second")))
    assert costs[1] < 4.2 * costs[0]


def test_one_rank_a_module_is_linear_in_the_number_of_modules():
    """EVA and AdaLoRA write such tables: a key a module."""
    costs = []
    for layers in (25, 100):
        ranks = {f"layers.{index}": 1 + index % 2 for index in range(layers)}
        config = LoraConfig(target_modules="all-linear", rank_pattern=ranks)
        costs.append(work(lambda config=config, layers=layers: get_lora_model(Many(layers), config)))
    assert costs[1] < 6 * costs[0]


def switch_off_and_on(model):
    with model.disable_adapter():
        pass


@pytest.mark.filterwarnings("ignore:.*every update is zero")
@pytest.mark.parametrize("switch", [switch_off_and_on, lambda model: model.set_adapter("second")])
def test_switching_costs_the_same_for_any_number_of_modules(switch, tmp_path):
    costs = []
    for layers in (10, 50):
        get_lora_model(Many(layers), EVERY_LAYER).save_pretrained(tmp_path / str(layers))
        model = load_adapter(Many(layers), tmp_path / str(layers))
        model.load_adapter(tmp_path / str(layers), "second")
        costs.append(work(lambda model=model: switch(model)))
    assert costs[0] == costs[1]
