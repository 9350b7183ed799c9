"""Modules that are trained in full and share their weights, as the heads of a detector do: one copy for all of them."""

import copy
import pickle

import pytest
import torch
from tiny_models import disturb
from torch import nn

from minipeft import CheckpointError, LoraConfig, get_lora_model, load_adapter


class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 2)])

    def forward(self, x):
        return self.layers[1](torch.relu(self.layers[0](x)))


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(6, 6) for _ in range(3)])
        self.box_embed = None


class Detector(nn.Module):
    """As Deformable DETR: a head for each layer, all tied, and the boxes' heads once more in the decoder."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.decoder = Decoder()
        self.class_embed = nn.ModuleList([nn.Linear(6, 4) for _ in range(3)])
        self.box_embed = nn.ModuleList([Head() for _ in range(3)])
        for head in self.class_embed:
            head.weight, head.bias = self.class_embed[0].weight, self.class_embed[0].bias
        self.decoder.box_embed = copy.deepcopy(self.box_embed)
        for own, other in zip(self.decoder.box_embed.modules(), self.box_embed.modules(), strict=True):
            if isinstance(own, nn.Linear):
                own.weight, own.bias = other.weight, other.bias

    def forward(self, x):
        found = []
        for layer, refine, label, box in zip(
            self.decoder.layers, self.decoder.box_embed, self.class_embed, self.box_embed, strict=True
        ):
            x = layer(x)
            x = x + refine(x).sum(-1, keepdim=True)
            found += [label(x), box(x)]
        return torch.cat(found, -1)


X = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))
HEADS = ["class_embed", "box_embed"]


def adapted(model=None, saved=HEADS, **options):
    config = LoraConfig(r=2, target_modules=["decoder.layers.1"], modules_to_save=saved, **options)
    return get_lora_model(Detector() if model is None else model, config)


def leaf(model, name):
    return model.get_submodule(name).adapters["default"]


def test_tied_heads_train_as_in_the_plain_model():
    model, plain = adapted(), Detector()
    for optimized in (model, plain):
        heads = [p for name, p in optimized.named_parameters() if "embed" in name and p.requires_grad]
        optimizer = torch.optim.SGD(heads, lr=0.05)
        for _ in range(2):
            optimizer.zero_grad()
            optimized(X).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(model(X), plain(X))
    weights = {id(leaf(model, f"class_embed.{place}").weight) for place in range(3)}
    assert len(weights) == 1


def test_tied_biases_train_as_one():
    model, plain = adapted(saved=None, bias="all"), Detector()
    for each in (model, plain):
        each(X).square().sum().backward()
    torch.testing.assert_close(leaf(model, "class_embed.0").bias.grad, plain.class_embed[0].bias.grad)


def test_they_are_saved_copied_merged_and_unloaded(tmp_path):
    model = disturb(adapted())
    expected = model(X)
    model.save_pretrained(tmp_path)
    loaded = load_adapter(Detector(), tmp_path, is_trainable=True)
    for same in (loaded, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(same(X), expected)
        assert leaf(same, "class_embed.2").weight is leaf(same, "class_embed.0").weight
    merged = copy.deepcopy(model).merge_and_unload()
    torch.testing.assert_close(merged(X), expected)
    assert merged.class_embed[2].weight is merged.class_embed[0].weight
    assert all(torch.equal(value, Detector().state_dict()[name]) for name, value in model.unload().state_dict().items())


def test_peft_reads_every_head(tmp_path):
    peft = pytest.importorskip("peft")
    model = disturb(adapted())
    model.save_pretrained(tmp_path)
    assert torch.allclose(peft.PeftModel.from_pretrained(Detector(), tmp_path)(X), model(X), atol=1e-6)


def test_a_file_whose_heads_differ_is_refused(tmp_path):
    untied = Detector()
    for head in untied.class_embed:
        head.weight, head.bias = (nn.Parameter(own.detach().clone()) for own in (head.weight, head.bias))
    disturb(adapted(untied, ["class_embed"])).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"class_embed\.1\.\w+' and .*should be equal, and differ"):
        load_adapter(Detector(), tmp_path)


def test_a_tied_head_that_is_not_named_is_told():
    with pytest.warns(
        UserWarning, match=r"class_embed\.0 shares its weight with 'class_embed\.1\.weight', 'class_embed\.2"
    ):
        adapted(saved=["class_embed.0"])
