"""A package of somebody else's, installed by pip and found by its entry point: it works, and a broken one harms nothing.

And those packages that minipeft works with are not imported before they are needed.
"""

import importlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import warm
from warm import Warm

ROOT = Path(__file__).resolve().parents[1]
USE = """
import json, sys, warnings
warnings.simplefilter("error")
import torch
from torch import nn
torch.set_num_threads(1)
torch.manual_seed(0)
import minipeft
from minipeft import LoraConfig, get_adapter_model, load_adapter
from minipeft.registry import registry
from minipeft.testing import check_layer, check_method, check_pair, register_example, report

def int8(in_features, out_features):
    return sys.modules["minipeft_sample"].Int8Linear(nn.Linear(in_features, out_features))

register_example("minipeft_sample.int8.Int8Linear", int8)
said = {"pytest": "pytest" in sys.modules, "at import": "rank_one" in registry.method_names()}
own = check_pair("rank_one", "minipeft_sample.int8.Int8Linear")
said["own"] = sorted({check.__name__ for check in report.CHECKS} - {*own.passed, *own.skipped})
said["compiled"] = "one_graph" in own.passed
# With every other layer and method of this package they are tried, too, but not by all checks.
report.CHECKS = tuple(c for c in report.CHECKS if c.__name__ in ("identity_at_init", "gradients", "merge_float32", "files"))
from minipeft_sample import Int8Linear, RankOneConfig
said["where"] = sys.modules["minipeft_sample"].__file__
said["method"] = {pair.layer: pair.served for pair in check_method("rank_one").pairs}
said["layer"] = {pair.method: pair.served for pair in check_layer(Int8Linear).pairs}

def net():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 8), nn.GELU(), Int8Linear(nn.Linear(8, 4)))

model, x = get_adapter_model(net(), RankOneConfig(target_modules=["0", "2"])), torch.randn(3, 6)
torch.nn.init.normal_(model[0].adapters["default"].u)
torch.nn.init.normal_(model[2].adapters["default"].u)
model.save_pretrained(sys.argv[1])
said["changed"] = not torch.equal(model(x), net()(x))
said["loaded"] = torch.equal(load_adapter(net(), sys.argv[1])(x), model(x))
said["peft_type"] = json.load(open(sys.argv[1] + "/adapter_config.json"))["peft_type"]
expected = model(x)
said["merged"] = torch.allclose(model.merge_and_unload()(x), expected, atol=1e-5)
print(json.dumps(said))
"""
LOAD = """
import json, sys, warnings
from minipeft import RegistryError, load_adapter
from minipeft.registry import registry
from torch import nn
before = {"methods": registry.method_names(), "layers": list(registry.layers()), "lora": registry.method_class("lora")}
def net():
    return nn.Sequential(nn.Linear(6, 8))
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    try:
        load_adapter(nn.Sequential(nn.Linear(6, 8)), sys.argv[1])
    except Exception as error:
        refused = str(error)
added = set(registry.method_names()) - set(before["methods"]), set(registry.layers()) - set(before["layers"])
print(json.dumps({
    "warnings": [str(w.message) for w in caught if "plugin" in str(w.message)],
    "methods": sorted(added[0]), "layers": sorted(added[1]), "refused": refused,
    "lora": registry.method_class("lora") is before["lora"],
}))
"""
HEAD = "from minipeft import register_layer, register_method\nfrom minipeft.methods.lora import Lora\nfrom torch import nn\n"
BROKEN = {
    "raises": HEAD + "register_method('half_way')(Lora)\nraise RuntimeError('half way through')",
    "exits": HEAD + "register_method('half_way')(Lora)\nraise SystemExit(3)",
    "imports": "import a_package_that_is_not_there",
    "loose": HEAD + "register_method('loose')(nn.Linear)",
    "untyped": HEAD + "register_layer(nn.Bilinear)(Lora)",
    "twice": HEAD + "@register_method('lora')\nclass Mine(Lora):\n    pass",
}
FOREIGN = {"transformers", "peft", "datasets", "accelerate", "bitsandbytes", "torchao", "matplotlib"}


def run(code, target, *arguments):
    """What the code says in a process that has the target's packages."""
    (target / "program.py").write_text(code)
    process = Warm(target / "output", warm.script, target / "program.py", *arguments)
    assert process.wait() == 0, process.stdout + process.stderr
    return json.loads(process.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder into which pip has installed the package, and nothing else."""
    pytest.importorskip("setuptools", reason="pip builds the package with setuptools")
    folder = tmp_path_factory.mktemp("plugins")
    shutil.copytree(ROOT / "tests" / "plugin_package", folder / "source")  # a build leaves files beside the source
    options = ["--quiet", "--no-index", "--no-deps", "--no-build-isolation", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "install", *options, "--target", folder / "site", folder / "source"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return folder / "site"


def test_an_installed_plugin_works_saves_loads_and_keeps_the_contract(installed, tmp_path):
    said = run(USE, installed, tmp_path / "adapter")
    assert said["pytest"] is False, "the contract is checked without pytest"
    assert said["at import"] is False, "importing minipeft imports no plugin"
    assert Path(said["where"]).is_relative_to(installed)
    assert said["own"] == []
    assert said["compiled"]
    assert said["method"]["minipeft_sample.int8.Int8Linear"]
    assert said["method"]["torch.nn.modules.linear.Linear"]
    assert said["layer"]["lora"]
    assert said["layer"]["rank_one"]
    assert said["changed"]
    assert said["loaded"]
    assert said["merged"]
    assert said["peft_type"] == "RANK_ONE"


def test_a_broken_plugin_is_named_in_a_warning_and_harms_nothing(installed, tmp_path):
    target = tmp_path / "site"
    shutil.copytree(installed, target)
    for name, code in BROKEN.items():
        (target / f"{name}_plugin.py").write_text(code)
        info = target / f"{name}_plugin-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}_plugin\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[minipeft.plugins]\n{name} = {name}_plugin\n")
    said = run(LOAD, target, tmp_path / "nowhere")
    for name in BROKEN:
        assert sum(f"plugin '{name}' ({name}_plugin) failed to load" in text for text in said["warnings"]) == 1, name
    assert len(said["warnings"]) == len(BROKEN)
    shown = " ".join(said["warnings"])
    assert "half way through" in shown
    assert "Linear does not derive from minipeft.Adapter" in shown
    assert "method 'lora' is already registered to minipeft.methods.lora.Lora" in shown
    assert said["methods"] == ["rank_one"], "what a broken plugin had registered is taken back"
    assert said["layers"] == ["minipeft_sample.int8.Int8Linear"]
    assert said["lora"]
    assert "not a directory" in said["refused"], "the call that loaded them goes on"


def import_anew(file):
    """minipeft, in a process that has imported everything, forgets it, and writes down what came back."""
    for name in list(sys.modules):
        if name.partition(".")[0] in {"minipeft", *FOREIGN}:
            del sys.modules[name]
    importlib.import_module("minipeft.api")
    file.write_text(json.dumps(sorted(sys.modules)))


def test_nothing_foreign_is_imported_at_once(tmp_path):
    file = tmp_path / "modules"
    process = Warm(tmp_path / "output", import_anew, file)
    assert process.wait() == 0, process.stderr
    loaded = json.loads(file.read_text())
    assert "minipeft.methods.lora" in loaded
    assert not FOREIGN & set(loaded)
