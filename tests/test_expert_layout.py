"""LoRA of fused experts in the layouts of PEFT before 0.19.1 and of Unsloth: against float64 algebra of what these computed."""

import itertools
import json

import pytest
import torch
from old_experts import gpt_oss, logits, mixture
from rotation import thinned
from safetensors.torch import load_file, save_file

from minipeft import CheckpointError, load_adapter

PREFIX = "base_model.model.model.layers"
R, ALPHA = 3, 5


MODELS = {
    "(experts, out, in)": lambda: mixture("qwen3_moe"),
    "(experts, in, out)": gpt_oss,
    "square gate and up": lambda: mixture("olmoe"),
    "square": lambda: mixture("qwen3_moe", moe_intermediate_size=16),
    "square, (experts, in, out)": lambda: gpt_oss(intermediate_size=16),
}


def write(directory, model, *, turned, parameters=("gate_up_proj", "down_proj"), order="rank_major", **said):
    """A file, and the update of each parameter as the writer's forward pass computed it from these tensors.

    `turned`: the writer took each (rows, columns) of a stack for the other of (out, in) and (in, out) than it is.
    """
    generator, tensors, updates = torch.Generator().manual_seed(1), {}, {}
    for layer in range(2):
        experts = model.model.layers[layer].mlp.experts
        is_transposed = getattr(experts, "is_transposed", False)
        for height, name in zip(reversed(range(len(parameters))), parameters, strict=True):
            number, rows, columns = getattr(experts, name).shape
            reads_columns = is_transposed == turned  # whether A has a value for each column of a stored matrix
            inner, outer = (columns, rows) if reads_columns else (rows, columns)
            A = torch.randn(R * number, inner, generator=generator) * 0.3
            B = torch.randn(outer, R * number, generator=generator) * 0.3
            key = f"{PREFIX}.{layer}.mlp.experts{'.base_layer' * height}"
            tensors |= {f"{key}.lora_A.weight": A, f"{key}.lora_B.weight": B}
            down = A.double().view(number, R, inner)
            up = B.double().view(outer, R, number) if order == "rank_major" else B.double().view(outer, number, R).mT
            update = torch.einsum("ore,eri->eoi", up, down) * ALPHA / R
            updates[f"model.layers.{layer}.mlp.experts.{name}"] = update if reads_columns else update.mT
    directory.mkdir(exist_ok=True)
    save_file(tensors, directory / "adapter_model.safetensors", {"format": "pt"})
    values = {"peft_type": "LORA", "r": R, "lora_alpha": ALPHA, "target_modules": [], **said}
    values["target_parameters"] = [f"mlp.experts.{name}" for name in parameters]
    (directory / "adapter_config.json").write_text(json.dumps(values))
    return updates


def check(kind, directory, updates):
    """The file computes that, also after it was saved again, without what said its layout."""
    expected = MODELS[kind]()
    with torch.no_grad():
        for name, update in updates.items():
            expected.get_parameter(name).copy_(expected.get_parameter(name).double() + update)
    model = load_adapter(MODELS[kind](), directory)
    torch.testing.assert_close(logits(model), logits(expected), rtol=0, atol=1e-5)
    model.save_pretrained(directory / "again")
    again = load_adapter(MODELS[kind](), directory / "again")
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=1e-6)
    return json.loads((directory / "again" / "adapter_config.json").read_text())


ORDERS = ["rank_major", "grouped_by_expert"]
LAYOUTS = [
    ("(experts, out, in)", "0.18.1", True),
    ("(experts, out, in)", None, True),
    ("(experts, out, in)", "0.21.2", False),
    ("(experts, out, in)", "0.18.0", False),  # written in a process in which transformers had changed PEFT
    ("(experts, in, out)", "0.18.0", False),
    ("(experts, in, out)", "0.19.0", True),
    ("square gate and up", "0.18.1", True),  # the other parameter tells
    ("square gate and up", "0.18.1", False),
    ("square", "0.19.1", False),
    ("square", "0.20.0.dev0", False),
    ("square, (experts, in, out)", "0.18.1", False),
    ("square, (experts, in, out)", None, False),
    ("square, (experts, in, out)", "0.19.0", True),
]


@pytest.mark.parametrize(("layout", "order"), thinned((LAYOUTS, ORDERS), zip(LAYOUTS, itertools.cycle(ORDERS))))
def test_the_layouts_of_other_versions_and_tools_are_told_apart(layout, order, tmp_path):
    kind, version, turned = layout
    said = {} if version is None else {"peft_version": version}
    if order != "rank_major":
        said["lora_B_layout"] = order
    if kind == "square, (experts, in, out)":  # its down_proj is square, and gate_up_proj is not
        said["parameters"] = ("down_proj",)
    updates = write(tmp_path, MODELS[kind](), turned=turned, order=order, **said)
    found = check(kind, tmp_path, updates)
    assert "lora_B_layout" not in found


@pytest.mark.parametrize("version", ["0.18.1", "0.17.0", "0.19.0", "0.19.0.dev0", "0.18.2.dev0@abc", None, 18, "new"])
def test_square_experts_of_an_old_version_are_refused_with_both_readings(version, tmp_path):
    said = {} if version is None else {"peft_version": version}
    updates = write(tmp_path, MODELS["square"](), turned=False, parameters=("down_proj",), **said)
    model = MODELS["square"]()
    with pytest.raises(CheckpointError, match=r"down_proj is square \(16 x 16\).* in two ways.*Nothing was changed"):
        load_adapter(model, tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"peft_version": "0.19.1"}))  # as the message says
    check("square", tmp_path, updates)


def marker(**parameters):
    return {"unsloth_fused_expert_lora": {"lora_A_layout": "grouped_by_expert", "parameters": parameters}}


def test_unsloths_marker_can_differ_by_parameter(tmp_path):
    model, names = MODELS["(experts, out, in)"](), ("gate_up_proj", "down_proj")
    grouped = write(tmp_path / "a", model, turned=False, order="grouped_by_expert")
    plain = write(tmp_path / "b", model, turned=False)
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    save_file(tensors, tmp_path / "b" / "adapter_model.safetensors")
    layouts = {"gate_up_proj": "grouped_by_expert", "down_proj": "rank_major"}
    said = marker(**{name: {"lora_B_layout": layouts[name], "num_experts": 4} for name in names})
    write(tmp_path / "b", model, turned=False, lora_B_layout="mixed", **said)
    check("(experts, out, in)", tmp_path / "b", {n: (grouped if "gate_up" in n else plain)[n] for n in grouped})


@pytest.mark.parametrize(
    "said",
    [
        {"lora_B_layout": "expert_major"},
        {"lora_B_layout": "mixed"},
        {"lora_B_layout": 3},
        {"lora_B_layout": {"a": {}}},
        {"lora_B_layout": "rank_major", **marker(down_proj={"lora_B_layout": "grouped_by_expert", "num_experts": 4})},
        {"lora_B_layout": "rank_major", **marker(down_proj={"lora_B_layout": "rank_major", "num_experts": 8})},
        {"lora_B_layout": "rank_major", **marker(down_proj=[])},
        {"lora_B_layout": "rank_major", "unsloth_fused_expert_lora": {"lora_A_layout": "rank_major"}},
        {"unsloth_fused_expert_lora": {"parameters": 3}},
    ],
    ids=str,
)
def test_a_layout_that_is_unknown_or_contradicts_itself_is_refused(said, tmp_path):
    write(tmp_path, MODELS["(experts, out, in)"](), turned=False, **said)
    with pytest.raises(CheckpointError, match="lora_B_layout .*known: grouped_by_expert, rank_major"):
        load_adapter(MODELS["(experts, out, in)"](), tmp_path)


def test_pairs_of_two_layouts_in_one_file_and_shapes_of_neither_are_refused(tmp_path):
    model = MODELS["(experts, out, in)"]()
    write(tmp_path / "a", model, turned=True)
    write(tmp_path / "b", model, turned=False)
    turned, plain = (load_file(tmp_path / name / "adapter_model.safetensors") for name in "ab")
    mixed = {key: (turned if "base_layer" in key else plain)[key] for key in plain}
    save_file(mixed, tmp_path / "a" / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="One file has one layout"):
        load_adapter(MODELS["(experts, out, in)"](), tmp_path / "a")
    save_file(
        {key: tensor[:5, :5].clone() for key, tensor in plain.items()}, tmp_path / "a" / "adapter_model.safetensors"
    )
    with pytest.raises(CheckpointError, match=r"\[5, 5\] in the file"):
        load_adapter(MODELS["(experts, out, in)"](), tmp_path / "a")


def test_a_layout_said_of_an_adapter_without_experts_changes_nothing(tmp_path):
    model = MODELS["(experts, out, in)"]()
    tensors = {}
    for layer in range(2):
        tensors[f"{PREFIX}.{layer}.self_attn.q_proj.lora_A.weight"] = torch.randn(R, 16)
        tensors[f"{PREFIX}.{layer}.self_attn.q_proj.lora_B.weight"] = torch.randn(16, R)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": R, "target_modules": ["q_proj"], "lora_B_layout": "grouped_by_expert"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    state = load_adapter(model, tmp_path).adapter_state_dict()
    assert all(torch.equal(state[key], tensors[key]) for key in tensors)
