"""A live adapter gets the weights of another file in its own memory, beside PEFT's hot swap and under torch.compile."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import adapted, disturb, foreign_code, gpt2, logits, refuses, token_ids
from torch import nn

from minipeft import (
    AdaLoraConfig,
    CheckpointError,
    ConfigError,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    StateError,
    VeraConfig,
    get_adapter_model,
    get_lora_model,
    hotswap_adapter,
    load_adapter,
)

LORA = {
    "rank 4": LoraConfig(r=4, lora_alpha=16),
    "rank 2": LoraConfig(r=2, lora_alpha=3),
    "rank-stabilised": LoraConfig(r=8, lora_alpha=4, use_rslora=True),
    "patterns": LoraConfig(r=4, rank_pattern={"h.0.attn.c_attn": 7}, alpha_pattern={"h.1.attn.c_attn": 5}),
}
OTHERS = {
    "DoRA": [LoraConfig(r=4, use_dora=True), LoraConfig(r=2, lora_alpha=5, use_dora=True)],
    "biases": [LoraConfig(r=4, bias="lora_only"), LoraConfig(r=2, bias="lora_only")],
    "bias of B": [LoraConfig(r=4, lora_bias=True), LoraConfig(r=3, lora_alpha=1, lora_bias=True)],
    "PiSSA": [LoraConfig(r=4, init_lora_weights="pissa"), LoraConfig(r=3, init_lora_weights="pissa")],
    "in full": [LoraConfig(r=4, modules_to_save=["ln_f"]), LoraConfig(r=2, modules_to_save=["ln_f"])],
    "tokens": [LoraConfig(r=4, trainable_token_indices=[1, 2]), LoraConfig(r=2, trainable_token_indices=[7, 5])],
    "embedding": [LoraConfig(r=4, target_modules=["wte", "c_fc"]), LoraConfig(r=2, target_modules=["wte", "c_fc"])],
    "tied": [LoraConfig(r=r, target_modules=["wte", "lm_head"], ensure_weight_tying=True) for r in (4, 2)],
    "IA3": [IA3Config(), IA3Config()],
    "LoHa": [LoHaConfig(r=2, target_modules=["c_attn"])] * 2,
    "LoKr": [LoKrConfig(r=2, target_modules=["c_attn"])] * 2,
    "VeRA": [VeraConfig(r=4, target_modules=["c_attn"])] * 2,
    "OFT": [OFTConfig(target_modules=["c_attn"])] * 2,
    "AdaLoRA": [AdaLoraConfig(init_r=4, target_r=4, total_step=10, target_modules=["c_attn"])] * 2,
}


def saved(config, folder, seed=1, base=None):
    """A folder with an adapter, and what a model with it computes."""
    torch.manual_seed(seed)
    model = disturb(get_adapter_model(base or gpt2(), config), seed)
    model.save_pretrained(folder)
    return folder, logits(model)


def places(model, name="default"):
    return {key: (id(p), p.data_ptr()) for key, p in model.named_parameters() if f".{name}." in key}


def weights(folder):
    return load_file(folder / "adapter_model.safetensors")


def same_file(one, other):
    """The same tensors, bit for bit, and the same configuration."""
    torch.testing.assert_close(weights(one), weights(other), rtol=0, atol=0)
    first, second = (json.loads((folder / "adapter_config.json").read_text()) for folder in (one, other))
    return first == second


@pytest.mark.parametrize("prepared", [True, False])
def test_every_swap_gives_what_a_fresh_model_with_the_file_computes_and_saves(prepared, tmp_path):
    files = {name: saved(config, tmp_path / name, seed) for seed, (name, config) in enumerate(LORA.items())}
    model = load_adapter(gpt2(), files["patterns"][0])
    if prepared:
        model.prepare_hotswap(8)
    torch.testing.assert_close(logits(model), files["patterns"][1], rtol=0, atol=1e-6)
    before = places(model)
    order = ["rank 4", "rank 2", "patterns"] + (["rank-stabilised", "rank 4"] if prepared else [])
    for name in order:
        folder, output = files[name]
        if not prepared and name == "rank 4":
            continue  # one layer has room for it, the others have none to spare
        model.hotswap_adapter(folder)
        torch.testing.assert_close(logits(model), output, rtol=0, atol=1e-5)
        assert places(model) == before
        model.save_pretrained(tmp_path / "again")
        assert same_file(tmp_path / "again", folder)
        assert model.adapter_configs["default"].r == LORA[name].r
        shutil.rmtree(tmp_path / "again")


@pytest.mark.parametrize("kind", OTHERS)
def test_other_methods_and_parts_are_swapped_in_place(kind, tmp_path):
    files = [saved(config, tmp_path / str(seed), seed) for seed, config in enumerate(OTHERS[kind])]
    model = load_adapter(gpt2(), files[0][0], is_trainable=True)
    model.prepare_hotswap(6)
    before, trains = places(model), [n for n, p in model.named_parameters() if p.requires_grad]
    for folder, output in (files[1], files[0], files[1]):
        model.hotswap_adapter(folder)
        torch.testing.assert_close(logits(model), output, rtol=0, atol=2e-5)
        assert places(model) == before
        assert [n for n, p in model.named_parameters() if p.requires_grad] == trains
    model.save_pretrained(tmp_path / "again")
    assert same_file(tmp_path / "again", files[1][0])


@pytest.mark.parametrize("kind", ["biases", "LoHa", "LoKr", "VeRA", "AdaLoRA"])
def test_a_swap_into_an_adapter_with_a_scale_gives_the_file_at_full_strength(kind, tmp_path):
    files = [saved(config, tmp_path / str(seed), seed) for seed, config in enumerate(OTHERS[kind])]
    model = load_adapter(gpt2(), files[0][0])
    model.prepare_hotswap(4)
    model.set_scale("default", 0.5)
    model.hotswap_adapter(files[1][0])
    torch.testing.assert_close(logits(model), files[1][1], rtol=0, atol=2e-5)
    assert model.adapter_status()[0].scale == "1"
    model.set_scale("default", 0.25, r"h\.0\..*")
    model.set_scale("default", 1.0)
    torch.testing.assert_close(logits(model), files[1][1], rtol=0, atol=2e-5)


def test_the_result_is_that_of_pefts_hot_swap(tmp_path):
    import peft
    from peft.utils.hotswap import hotswap_adapter as pefts
    from peft.utils.hotswap import prepare_model_for_compiled_hotswap

    configs = {"rank 4": LORA["rank 4"], "rank 2": LORA["rank 2"], "rank 8": LoraConfig(r=8, lora_alpha=5)}
    names = list(configs)
    for seed, (name, config) in enumerate(configs.items()):
        saved(config, tmp_path / name, seed)
    ours = load_adapter(gpt2(), tmp_path / names[0])
    ours.prepare_hotswap(8)
    with foreign_code():
        theirs = peft.PeftModel.from_pretrained(gpt2(), tmp_path / names[0]).eval()
        prepare_model_for_compiled_hotswap(theirs, target_rank=8)
        for name in (*names[1:], names[0]):
            pefts(theirs, str(tmp_path / name), "default", torch_device="cpu")
            ours.hotswap_adapter(tmp_path / name)
            torch.testing.assert_close(logits(ours), logits(theirs), rtol=0, atol=1e-5)


def one_block():
    """To compile: a second block only takes time."""
    model = gpt2()
    del model.transformer.h[1:]
    return model


@pytest.mark.parametrize("dora", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_compiled_model_is_not_compiled_again(dora, tmp_path):
    of_files = ((4, 16, 0), (2, 3, 0.1), (8, 8, 0), (1, 7, 0.2))
    configs = [LoraConfig(r=r, lora_alpha=alpha, use_dora=dora, lora_dropout=p) for r, alpha, p in of_files]
    files = [saved(config, tmp_path / str(seed), seed, one_block()) for seed, config in enumerate(configs)]
    model = load_adapter(one_block(), files[0][0])
    model.prepare_hotswap(8)
    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled, ids = torch.compile(model, backend=counting), token_ids()
    with torch.no_grad():
        torch.testing.assert_close(compiled(ids).logits, files[0][1], rtol=0, atol=1e-5)
        first = len(graphs)
        assert first > 0
        for index in (1, 2, 3, 0, 2):
            hotswap_adapter(compiled, files[index][0])
            torch.testing.assert_close(compiled(ids).logits, files[index][1], rtol=0, atol=1e-5)
        if not dora:
            model.set_scale("default", 0.5)
            expected = load_adapter(one_block(), files[2][0])
            expected.set_scale("default", 0.5)
            torch.testing.assert_close(compiled(ids).logits, logits(expected), rtol=0, atol=1e-5)
            model.hotswap_adapter(files[0][0])  # which starts at full strength
            torch.testing.assert_close(compiled(ids).logits, files[0][1], rtol=0, atol=1e-5)
    assert len(graphs) == first
    torch._dynamo.reset()


def test_a_scale_of_a_trained_bias_is_read_anew_too():
    torch.manual_seed(0)
    model = get_lora_model(nn.Sequential(nn.Linear(4, 3)), LoraConfig(r=2, target_modules=["0"], bias="lora_only"))
    disturb(model)
    model.prepare_hotswap(4)
    graphs, x = [], torch.randn(5, 4)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=lambda graph, inputs: graphs.append(graph) or graph.forward)
    with torch.no_grad():
        with model.disable_adapter():
            base = model(x)
        update = compiled(x) - base
        for scale in (0.5, -2.0, 0.3):
            model.set_scale("default", scale)
            torch.testing.assert_close(compiled(x), base + scale * update)
    assert len(graphs) == 1
    torch._dynamo.reset()


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.weights = nn.Parameter(torch.randn(2, 8, 8))

    def forward(self, x):
        return (x @ self.weights).tanh().sum(0)


class Reads(nn.Module):
    """It reads the weight of a layer and those of two experts, and calls neither."""

    config = None

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.head, self.experts = nn.Linear(8, 8), Experts()

    def forward(self, x):
        return self.experts(x) @ self.head.weight.t()


def test_a_compiled_model_that_reads_weights_is_not_compiled_again(tmp_path):
    files, x = [], torch.ones(3, 8)
    for alpha in (3, 5):
        config = LoraConfig(r=2, lora_alpha=alpha, target_modules=["head"], target_parameters=["weights"])
        model = disturb(get_lora_model(Reads(), config), alpha, 0.3)
        model.save_pretrained(tmp_path / str(alpha))
        files.append((tmp_path / str(alpha), model(x).detach()))
    model, graphs = load_adapter(Reads(), files[0][0]), []
    model.prepare_hotswap(2)
    compiled = torch.compile(model, backend=lambda graph, _: graphs.append(graph) or graph.forward)
    with torch.no_grad():
        compiled(x)
        first = len(graphs)
        for folder, output in (files[1], files[0]):
            hotswap_adapter(compiled, folder)
            torch.testing.assert_close(compiled(x), output, rtol=0, atol=1e-5)
        model.set_scale("default", 0.5)
        torch.testing.assert_close(compiled(x), model(x), rtol=0, atol=1e-5)
    assert len(graphs) == first
    torch._dynamo.reset()


def test_a_layer_that_the_file_lacks_does_nothing_until_a_file_has_it(tmp_path):
    config = {"r": 4, "target_modules": ["c_attn", "c_fc"]}
    both, output = saved(LoraConfig(**config, use_dora=True), tmp_path / "both")
    one, without = saved(LoraConfig(r=2, target_modules=["c_attn"], use_dora=True), tmp_path / "one", 2)
    model = load_adapter(gpt2(), both)
    model.hotswap_adapter(one)
    torch.testing.assert_close(logits(model), without, rtol=0, atol=1e-5)
    model.save_pretrained(tmp_path / "again")
    assert same_file(tmp_path / "again", one)
    model.hotswap_adapter(both)
    torch.testing.assert_close(logits(model), output, rtol=0, atol=1e-5)


def test_the_scale_of_a_layer_that_the_file_lacks_is_that_of_the_file_too(tmp_path):
    folder, _ = saved(LoraConfig(r=2, target_modules=["c_attn"]), tmp_path)
    model = get_lora_model(gpt2(), LoraConfig(r=2, target_modules=["c_attn", "c_fc"]))
    model.set_scale("default", 0.3)
    model.hotswap_adapter(folder)
    assert [row.scale for row in model.adapter_status()] == ["1"]


def test_zeros_beyond_the_rank_stay_zeros_in_training_and_other_adapters_are_left_alone(tmp_path):
    folder, _ = saved(LORA["rank 2"], tmp_path / "two", 2)
    model = adapted(r=4)
    model.load_adapter(folder, "other")
    model.set_adapter("other")
    other = logits(model)
    model.set_adapter("default")
    model.prepare_hotswap(8, "default")
    model.hotswap_adapter(folder)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
    for _ in range(3):
        model(token_ids(), labels=token_ids()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    adapter = model.transformer.h[0].attn.c_attn.adapters["default"]
    assert not adapter.lora_A[2:].any()
    assert not adapter.lora_B[:, 2:].any()
    assert adapter.lora_A[:2].any()
    model.set_adapter("other")
    assert torch.equal(logits(model), other)
    plain = gpt2()
    model.set_adapter("default")
    expected = logits(model)
    model.save_pretrained(tmp_path / "trained", "default")
    torch.testing.assert_close(logits(load_adapter(plain, tmp_path / "trained")), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(logits(model.merge_and_unload()), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("init", [True, "pissa"])
def test_zeros_beyond_the_rank_are_no_rank_of_what_is_made_of_an_adapter(init, tmp_path):
    model = adapted(r=2, init_lora_weights=init)
    model.add_adapter("b", LoraConfig(r=3, init_lora_weights=False))
    without = model.add_weighted_adapter(["default", "b"], [1.0, 0.5], "without", "cat").rank
    expected = logits(model)
    model.prepare_hotswap(7, "default")
    assert model.add_weighted_adapter(["default", "b"], [1.0, 0.5], "with", "cat").rank == without
    assert model.add_weighted_adapter(["default", "b"], [1.0, 0.5], "svd").rank == max(3, without - 3)
    model.save_pretrained(tmp_path, convert_to_lora=True)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == without - 3
    torch.testing.assert_close(logits(load_adapter(gpt2(), tmp_path)), expected, rtol=0, atol=1e-5)


def test_convolutions_have_room_too_and_stacked_experts_keep_their_rank(tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.layer = nn.Conv2d(4, 6, 3, groups=2)
            self.bank = nn.Parameter(torch.randn(3, 4, 5))

        def forward(self, x):
            return self.layer(x).sum((2, 3)) + self.bank.sum((0, 1, 2))

    x, outputs = torch.randn(2, 4, 5, 5), []
    for seed, r in enumerate((4, 2)):
        torch.manual_seed(seed)
        model = get_lora_model(Net(), LoraConfig(r=r, target_modules=["layer"], init_lora_weights=False))
        outputs.append(model(x))
        model.save_pretrained(tmp_path / str(seed))
    model.prepare_hotswap(5)
    for seed in (0, 1):
        model.hotswap_adapter(tmp_path / str(seed))
        torch.testing.assert_close(model(x), outputs[seed], rtol=0, atol=1e-5)


def with_nan(folder):
    tensors = weights(folder)
    tensors[next(iter(tensors))][0] = torch.nan
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})


def cut(folder):
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])


def on_another_base(config, folder):
    disturb(get_adapter_model(gpt2(seed=5), config)).save_pretrained(folder)


MISFITS = {
    "rank": (LoraConfig(r=5), None, "room for a larger one"),
    "method": (IA3Config(target_modules=["c_attn"], feedforward_modules=[]), None, "IA3"),
    "DoRA": (LoraConfig(r=4, use_dora=True), None, "Dora there and Lora here"),
    "layers": (LoraConfig(r=4, target_modules=["c_attn", "c_fc"]), None, "which this adapter does not"),
    "in full": (LoraConfig(r=4, modules_to_save=["ln_f"]), None, "ln_f"),
    "NaN": (LoraConfig(r=4), with_nan, "NaN"),
    "cut": (LoraConfig(r=4), cut, "damaged"),
    "start": (LoraConfig(r=4, init_lora_weights="pissa"), None, "init_lora_weights"),
}


@pytest.mark.parametrize("kind", MISFITS)
def test_a_file_that_does_not_fit_leaves_the_old_one_acting(kind, tmp_path):
    config, damage, word = MISFITS[kind]
    folder, _ = saved(config, tmp_path / "new", 3)
    if damage:
        damage(folder)
    model = adapted(r=4)
    output = logits(model)
    refuses(CheckpointError, model, lambda: model.hotswap_adapter(folder), word, "Nothing was changed.")
    assert torch.equal(logits(model), output)
    assert model.adapter_configs["default"].r == 4


def test_what_is_merged_unknown_or_of_another_base_is_refused(tmp_path):
    folder, output = saved(LoraConfig(r=4), tmp_path / "new", 3)
    on_another_base(LoraConfig(r=4), tmp_path / "base")
    model = adapted(r=4)
    refuses(CheckpointError, model, lambda: model.hotswap_adapter(tmp_path / "base"), "another base")
    model.hotswap_adapter(tmp_path / "base", allow_base_mismatch=True)
    refuses(StateError, model, lambda: model.hotswap_adapter(folder, "defualt"), "closest: 'default'")
    model.merge_adapter()
    refuses(StateError, model, lambda: model.hotswap_adapter(folder), "merged")
    model.unmerge_adapter()
    model.hotswap_adapter(folder)
    torch.testing.assert_close(logits(model), output, rtol=0, atol=1e-5)
    with pytest.raises(StateError, match="is not adapted"):
        hotswap_adapter(nn.Linear(2, 2), folder)


def test_room_is_refused_where_there_cannot_be_any():
    model = adapted(r=4)
    refuses(ConfigError, model, lambda: model.prepare_hotswap(3), "max_rank=3 for an adapter of rank 4")
    refuses(ConfigError, model, lambda: model.prepare_hotswap(0), "max_rank")
    model(token_ids(), labels=token_ids()).loss.backward()
    refuses(StateError, model, lambda: model.prepare_hotswap(8), "Prepare before training")
