"""What a verb costs grows with what it changes: not with the adapters that are resident, nor faster than the layers.

Costs are numbers of calls and of bytes, which are the same on every machine.
"""

import contextlib
import copy
import gc
import json
import sys
import weakref
from collections import OrderedDict
from dataclasses import replace

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from minipeft import (
    Adapter,
    LoraConfig,
    TargetError,
    get_adapter_model,
    get_lora_model,
    load_adapter,
    register_method,
)
from minipeft.files import save
from minipeft.files.tensor_bytes import DTYPES, file_of
from minipeft.files.tensor_file import TensorFile
from minipeft.injection.module_tree import adapted_layers
from minipeft.methods.lora import Lora
from minipeft.python.garbage import MANY, no_collection
from minipeft.registry import registry

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CONFIG = LoraConfig(r=2, target_modules=PROJECTIONS, init_lora_weights=False)


def small_layers(blocks, width=4):
    layers = [OrderedDict((name, nn.Linear(width, width)) for name in PROJECTIONS) for _ in range(blocks)]
    return nn.Sequential(*map(nn.Sequential, layers))


def calls(action):
    """How many functions a call of this one calls, Python's and others'."""
    count = 0

    def note(frame, event, argument):
        nonlocal count
        count += event in ("call", "c_call")

    gc.disable()  # what other tests left would be finalized in between
    sys.setprofile(note)
    try:
        action()
    finally:
        sys.setprofile(None)
        gc.enable()
    return count


def off_and_on(model):
    with model.disable_adapter():
        pass


VERBS = {
    "load": lambda model, folder: model.load_adapter(folder, "new"),
    "switch": lambda model, folder: model.set_adapter("new"),
    "switch to what trains": lambda model, folder: model.set_adapter("default"),
    "disable": lambda model, folder: off_and_on(model),
    "save": lambda model, folder: model.save_pretrained(folder),
    "merge": lambda model, folder: model.merge_adapter(["default"]),
    "unmerge": lambda model, folder: model.unmerge_adapter(),
    "delete": lambda model, folder: model.delete_adapter("new"),
    "unload": lambda model, folder: model.unload(),
}


def costs(blocks, residents, folder):
    """The calls that each verb makes in a model with so many blocks, besides which so many adapters are resident."""
    torch.manual_seed(0)  # a merge tries as many ways as the values need
    model = get_lora_model(small_layers(blocks), CONFIG)
    for index in range(residents):
        model.add_adapter(f"resident{index}", CONFIG)
    model.save_pretrained(folder, "default")
    model(torch.ones(1, 4))
    return {name: calls(lambda verb=verb: verb(model, folder)) for name, verb in VERBS.items() if name != "save"}


@pytest.fixture(scope="module", autouse=True)
def warmed_up(tmp_path_factory):
    """Fills the caches of the first call of all."""
    costs(1, 1, tmp_path_factory.mktemp("warm"))


def test_no_verb_does_more_for_the_adapters_that_it_leaves_alone(tmp_path):
    few, many = (costs(2, residents, tmp_path / str(residents)) for residents in (1, 33))
    # Only what lists all names does a little for each of them, and unload() lets go of them all. How often a merge tries
    # depends on values in the last bits.
    room = {verb: few[verb] // 3 if "merge" in verb else 40 for verb in few.keys() - {"unload"}}
    more = {verb: (few[verb], many[verb]) for verb in room if many[verb] > few[verb] + room[verb]}
    assert more == {}


def test_switching_and_disabling_do_the_same_for_any_number_of_layers(tmp_path):
    small, large = (costs(blocks, 1, tmp_path / str(blocks)) for blocks in (2, 8))
    assert small["disable"] == large["disable"] < 100
    trains = {name: cost["switch to what trains"] for name, cost in (("small", small), ("large", large))}
    assert trains["large"] < 4.1 * trains["small"]
    assert trains["large"] < 10 * 8 * 7 * 2  # of its 112 parameters each
    model = get_lora_model(small_layers(2), CONFIG)
    model.add_adapter("one", LoraConfig(**{**vars(CONFIG), "inference_mode": True}))
    model.add_adapter("two", LoraConfig(**{**vars(CONFIG), "inference_mode": True}))
    model.set_adapter("one")
    assert calls(lambda: model.set_adapter("two")) < 50


def test_every_verb_grows_no_faster_than_the_layers(tmp_path):
    small, large = (costs(blocks, 1, tmp_path / str(blocks)) for blocks in (8, 32))
    assert all(large[verb] <= 4.6 * small[verb] for verb in VERBS.keys() - {"save"}), (small, large)


@contextlib.contextmanager
def collections():
    """The generations that Python's garbage collector searches within the block, with a search for each 100 objects."""
    found, threshold = [], gc.get_threshold()
    note = lambda phase, info: found.append(info["generation"]) if phase == "start" else None  # noqa: E731
    gc.set_threshold(100)
    gc.callbacks.append(note)
    try:
        yield found
    finally:
        gc.callbacks.remove(note)
        gc.set_threshold(*threshold)


def test_garbage_is_searched_for_after_and_not_while_many_modules_are_made(tmp_path):
    base = small_layers(3)
    again = copy.deepcopy(base)
    get_lora_model(copy.deepcopy(base), CONFIG).save_pretrained(tmp_path)
    with collections() as found:
        copy.deepcopy(base)
    assert len(found) > 4
    with collections() as found:
        model = get_lora_model(base, CONFIG)
        model.add_adapter("other", CONFIG)
        load_adapter(again, tmp_path)
        model.load_adapter(tmp_path, "third")
        model.save_pretrained(tmp_path / "again")
    assert len(found) <= 7


def test_the_garbage_collector_is_as_it_was_after_a_call():
    with pytest.raises(TargetError):
        get_lora_model(small_layers(1), replace(CONFIG, target_modules=["absent"]))
    assert gc.isenabled()
    gc.disable()
    try:
        get_lora_model(small_layers(1), CONFIG)
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_what_a_call_made_is_not_searched_at_once_and_found_when_it_is_garbage():
    gc.unfreeze()
    try:
        with collections() as found, no_collection():
            found.clear()
            kept, cycle = [[] for _ in range(MANY + 1)], small_layers(1)
            cycle.me, gone = cycle, weakref.ref(cycle)
            del cycle
        assert not found, len(kept)
        assert gone() is not None
        gc.collect()
        assert gone() is None
    finally:
        gc.freeze()


def test_what_the_user_froze_stays_frozen():
    gc.freeze()  # as other tests need
    count = gc.get_freeze_count()
    with no_collection():
        kept = [[] for _ in range(2 * MANY)]
    assert gc.get_freeze_count() > count / 2 > 0, len(kept)


def test_a_loaded_adapter_takes_the_memory_of_what_was_read(tmp_path, monkeypatch):
    base = small_layers(2)
    get_lora_model(copy.deepcopy(base), CONFIG).save_pretrained(tmp_path)
    read, real = set(), TensorFile.read

    def noting(file, *args, **options):
        values = real(file, *args, **options)
        read.update(tensor.data_ptr() for tensor in values.values())
        return values

    monkeypatch.setattr(TensorFile, "read", noting)
    model = load_adapter(base, tmp_path)
    assert {tensor.data_ptr() for tensor in model.adapter_state_dict().values()} == read
    assert len(read) == 2 * 2 * 7


def test_a_load_makes_one_adapter_for_all_layers_that_look_alike(tmp_path, monkeypatch):
    """The others get what it has, and share none of it."""
    base = small_layers(2)
    base[1].q_proj = nn.Linear(4, 8)
    saved = get_lora_model(copy.deepcopy(base), LoraConfig(r=2, lora_dropout=0.5, target_modules=PROJECTIONS))
    saved.save_pretrained(tmp_path)
    made, real = [], Lora.__init__
    monkeypatch.setattr(Lora, "__init__", lambda lora, *args: (made.append(lora), real(lora, *args))[1])
    load_adapter(base, tmp_path, is_trainable=True)
    assert len(made) == 2
    used = [module for _, layer in adapted_layers(base) for module in layer.adapter("default").modules()]
    tables = [value for module in used for value in vars(module).values() if isinstance(value, (dict, set, list))]
    assert len(used) == 2 * 2 * 7
    assert len(set(map(id, (*used, *tables)))) == len(used) + len(tables)
    for (name, ours), (other, theirs) in zip(saved.named_parameters(), base.named_parameters(), strict=True):
        assert (name, ours.requires_grad) == (other, theirs.requires_grad)
        assert torch.equal(ours, theirs)


class Scaled(Adapter):
    def __init__(self, base, ops, config, shared):
        super().__init__(base, ops, config, shared)
        self.factor = nn.Parameter(torch.ones(ops.shape(base)[0], device=ops.read_weight(base).device))

    def forward(self, base, ops, x, y):
        return y * self.factor

    def merge(self, weight, bias):
        return weight * self.factor[:, None], bias * self.factor


class Counts(Scaled):
    """Has more of its own than tensors, numbers and texts."""

    def __init__(self, base, ops, config, shared):
        super().__init__(base, ops, config, shared)
        self.seen = [0]
        self.register_forward_pre_hook(lambda *_: None)

    def forward(self, base, ops, x, y):
        self.seen[0] += 1
        return super().forward(base, ops, x, y)


@contextlib.contextmanager
def saved_and_loaded(method, folder):
    """A model with adapters of this method, and one with the same from its file; both may be used within the context."""
    base = small_layers(1)
    with registry.isolated():
        register_method("own")(method)
        model = get_adapter_model(copy.deepcopy(base), method.config_class(target_modules=PROJECTIONS))
        model.save_pretrained(folder)
        yield model, load_adapter(base, folder)


def test_an_adapter_with_more_than_tensors_is_made_for_each_layer(tmp_path):
    x = torch.ones(1, 4)
    with saved_and_loaded(Counts, tmp_path) as (model, loaded):
        torch.testing.assert_close(loaded(x), model(x))
        assert [layer.adapter("default").seen for _, layer in adapted_layers(loaded)] == [[1]] * 7


class Shared(Scaled):
    """One object for tied layers."""

    def for_tied(self, base, ops):
        return self


def test_an_adapter_that_is_itself_on_a_tied_layer_comes_back(tmp_path):
    base, x = small_layers(1), torch.ones(1, 4)
    base[0].down_proj.weight = base[0].q_proj.weight
    with registry.isolated():
        register_method("shared")(Shared)
        model = get_adapter_model(copy.deepcopy(base), Shared.config_class(target_modules=["q_proj", "down_proj"]))
        with torch.no_grad():
            model[0].q_proj.adapter("default").factor.mul_(3)
        model.save_pretrained(tmp_path)
        loaded = load_adapter(base, tmp_path)
        assert loaded[0].q_proj.adapter("default") is loaded[0].down_proj.adapter("default")
        torch.testing.assert_close(loaded(x), model(x))


@pytest.mark.parametrize("container", [lambda value: value, lambda value: [value], lambda value: {"sums": value}])
def test_what_an_adapter_keeps_of_its_layer_is_there_after_a_load(container, tmp_path):
    """Such an adapter cannot be made from its shapes alone."""

    class Keeper(Adapter):
        def __init__(self, base, ops, config, shared):
            super().__init__(base, ops, config, shared)
            weight = ops.read_weight(base).detach()
            self.factor = nn.Parameter(torch.rand_like(weight[:, 0]))
            self.kept = container(weight.sum(1))

        def shift(self):
            kept = self.kept if isinstance(self.kept, torch.Tensor) else next(iter(self._values()))
            return self.factor * kept

        def _values(self):
            return self.kept.values() if isinstance(self.kept, dict) else self.kept

        def forward(self, base, ops, x, y):
            return y + self.shift()

        def merge(self, weight, bias):
            return weight, bias + self.shift().to(bias.dtype)

    x = torch.ones(1, 4)
    with saved_and_loaded(Keeper, tmp_path) as (model, loaded):
        torch.testing.assert_close(loaded(x), model(x))
        torch.testing.assert_close(loaded.merge_and_unload()(x), model(x))


def test_a_saved_adapter_is_written_from_its_own_memory_as_the_library_writes_it(tmp_path, monkeypatch):
    model, written, real = get_lora_model(small_layers(2), CONFIG), [], save.file_of

    def noting(tensors, metadata):
        pieces = real(tensors, metadata)
        parts = list(pieces.parts)
        written.extend(np.frombuffer(part, np.uint8).ctypes.data for part in parts[1:])
        return replace(pieces, parts=iter(parts))

    monkeypatch.setattr(save, "file_of", noting)
    model.save_pretrained(tmp_path)
    assert sorted(written) == sorted(tensor.data_ptr() for tensor in model.adapter_state_dict().values())


def test_a_file_is_the_librarys_but_for_the_order_of_its_metadata():
    tensors = {f"{name}{dtype}": torch.arange(6).reshape(2, 3).to(dtype) for dtype in DTYPES for name in "ba"}
    tensors |= {"empty": torch.empty(0, 3), "scalar": torch.tensor(2.0), "turned": torch.arange(6.0).reshape(2, 3).t()}
    metadata = {"b": "2", "a": "1"}
    ours = b"".join(file_of(tensors, metadata).parts)
    theirs = safetensors.torch.save({key: tensor.contiguous() for key, tensor in tensors.items()}, metadata)
    length = 8 + int.from_bytes(theirs[:8], "little")
    assert ours[length:] == theirs[length:]
    assert list(json.loads(ours[8:length]).items()) == list(json.loads(theirs[8:length]).items())
    assert len(ours) == file_of(tensors, metadata).nbytes
