"""The README and docs/ are true: their code runs, their commands work, and the tests that they name are there."""

import importlib.util
import re
import sys
import types
from pathlib import Path

import pytest
import torch
from tiny_models import foreign_code

from minipeft.injection import default_targets as families
from minipeft.registry import registry

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text("utf-8")
PAGES = (ROOT / "README.md", ROOT / "benchmarks" / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
TRANSLATIONS = ROOT / "docs" / "zh-TW"  # their code is that of the English pages, see test_docs_site.py
TRAINING = "# ... train it with what you train models with ..."
TRAINED = "[p.data.add_(0.01) for p in model.parameters() if p.requires_grad]"


def python_blocks(page):
    return re.findall(r"```python\n(.*?)```", page.read_text("utf-8"), flags=re.DOTALL)


@pytest.fixture(scope="module")
def models(small_base, tmp_path_factory):
    """The hub's models that the pages name -> a small local one of the same family."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    llama = tmp_path_factory.mktemp("models") / "llama"
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    tokenizer = AutoTokenizer.from_pretrained(small_base)
    LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=len(tokenizer))).save_pretrained(llama)
    tokenizer.save_pretrained(llama)
    return {"openai-community/gpt2": str(small_base), "meta-llama/Llama-3.2-1B": str(llama)}


def run_page(page, folder, models):
    """All Python blocks of a page, run in order as one program in a folder; returns its variables."""
    program = types.ModuleType("program")
    values = vars(program)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setitem(sys.modules, "program", program)  # its classes can be pickled
        for block in python_blocks(page):
            needs = re.match(r"# needs (\w+)", block)
            if needs and importlib.util.find_spec(needs[1]) is None:
                continue
            code = block.replace(TRAINING, TRAINED)
            for name, small in models.items():
                code = code.replace(name, small)
            with foreign_code():  # transformers warns of a machine without an accelerator
                exec(compile(code, page.name, "exec"), values)
    return values


@pytest.fixture(scope="module")
def namespace(tmp_path_factory, models):
    """The variables of the README's program."""
    folder = tmp_path_factory.mktemp("readme")
    with registry.isolated():
        yield run_page(ROOT / "README.md", folder, models) | {"folder": folder}


RUN = [page for page in PAGES[1:] if python_blocks(page) and TRANSLATIONS not in page.parents]


@pytest.mark.parametrize("page", RUN, ids=lambda page: page.stem)
def test_the_code_of_each_page_runs(page, tmp_path, models):
    with registry.isolated():
        run_page(page, tmp_path, models)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_of_a_page_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text("utf-8")):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_first_code_stands_in_the_first_ten_lines():
    assert "```python" in "\n".join(README.splitlines()[:10])


def test_the_code_of_the_readme_runs(namespace):
    assert len(python_blocks(ROOT / "README.md")) == 4
    assert TRAINING in README
    assert (namespace["folder"] / "my-adapter" / "adapter_model.safetensors").exists()


def test_the_method_of_the_readme_keeps_what_it_promises(namespace, small_base, tmp_path):
    from transformers import AutoModelForCausalLM

    from minipeft import load_adapter

    model, ids = namespace["model"].eval(), torch.arange(12)[None]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".v"):
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
        expected = model(ids).logits
        model.save_pretrained(tmp_path)
        loaded = load_adapter(AutoModelForCausalLM.from_pretrained(small_base), tmp_path)
        assert torch.equal(loaded(ids).logits, expected)
        torch._dynamo.reset()
        block, x = loaded.transformer.h[0], torch.randn(1, 12, loaded.config.n_embd)
        compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), block(x))
        loaded.merge_adapter()
        torch.testing.assert_close(loaded(ids).logits, expected, atol=1e-4, rtol=1e-4)
        loaded.unmerge_adapter()
        assert torch.equal(loaded(ids).logits, expected)
        torch.testing.assert_close(loaded.merge_and_unload()(ids).logits, expected, atol=1e-4, rtol=1e-4)


def test_the_layer_of_the_readme_keeps_what_it_promises(namespace):
    net, x = namespace["net"], torch.randn(3, 8)
    base = net[0].base_layer
    with torch.no_grad():
        assert torch.equal(net(x), base(x))
        net[0].adapters["default"].lora_B.normal_()
        expected = net(x)
        net.merge_adapter()
        torch.testing.assert_close(net(x), expected)
        net.unmerge_adapter()
        assert net[0].base_layer is base
        assert torch.equal(net(x), expected)
        torch.testing.assert_close(net.merge_and_unload()(x), expected)
    assert type(net[0]) is torch.nn.Linear


def test_the_number_of_families_is_the_number_of_families():
    claimed = int(re.search(r"the defaults of (\d+) transformers families", README)[1])
    known = sum(len(types.split()) for _, types in families.DEFAULTS)
    assert claimed <= known < claimed + 20


def test_the_published_counts_are_those_of_gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    from minipeft import LoraConfig, get_lora_model

    with torch.device("meta"):
        model = get_lora_model(GPT2LMHeadModel(GPT2Config()), LoraConfig(r=8))
    trainable, total = model.get_nb_trainable_parameters()
    assert (
        f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {100 * trainable / total:.4f}"
        in README
    )
    assert f"# {trainable * 4 / 1e6:.1f} MB in PEFT's format" in README


def test_ci_calls_the_test_command_of_the_readme():
    commands = [line for line in README.splitlines() if line.endswith("&& pytest")]
    assert len(commands) == 1
    assert "grep -m 1 '&& pytest$' README.md" in (ROOT / ".ci" / "run").read_text("utf-8")
    assert ".ci/constraints.txt" in commands[0]
    assert "torch==2.13.0" in (ROOT / ".ci" / "constraints.txt").read_text("utf-8").splitlines()


def test_the_tests_that_the_pages_name_are_there():
    named = {
        match for page in PAGES for match in re.findall(r"`(test_\w+\.py)(?:::(test_\w+))?`", page.read_text("utf-8"))
    }
    assert len(named) > 10
    for file, function in named:
        text = (ROOT / "tests" / file).read_text("utf-8")
        assert not function or f"def {function}(" in text, f"{file} has no {function}"


def test_the_files_that_the_pages_name_are_there():
    named = {
        match
        for page in PAGES
        for match in re.findall(r"`((?:minipeft|examples|benchmarks|tests)/[\w/.]+)`", page.read_text("utf-8"))
    }
    assert len(named) > 10
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


def test_the_page_on_architecture_has_the_rooms_on_their_floors():
    from test_architecture import FLOOR

    page = (ROOT / "docs" / "architecture.md").read_text("utf-8")
    floor, told = 0, {}
    for height, room in re.findall(r"^\| (\d*) ?\| `(\w+)(?:\.py|/)` \|", page, flags=re.MULTILINE):
        floor = int(height) if height else floor
        told[room] = floor
    assert told == {room: height + 1 for room, height in FLOOR.items()}
