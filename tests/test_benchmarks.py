"""The benchmarks run, check what they time, and their committed rows say where they come from."""

import csv
import importlib
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
import warm
from warm import Warm

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def main():
    """The main function of a benchmark by name; they import each other as programs of one folder do."""
    names = {path.stem for path in BENCHMARKS.glob("*.py")}
    assert not names & sys.modules.keys()
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        patch.setattr(importlib.import_module("timing"), "gc", Mock())  # it collects garbage before each call
        yield lambda name: importlib.import_module(name).main
    for name in names:
        sys.modules.pop(name, None)


@pytest.fixture(params=[1, pytest.param(2, marks=pytest.mark.slow)])
def models(request, main, monkeypatch):
    """How many of the two models a benchmark goes over."""
    known = importlib.import_module("subjects").MODELS
    for name in list(known)[request.param :]:
        monkeypatch.delitem(known, name)
    return request.param


def read(path):
    return list(csv.DictReader(path.read_text("utf-8").splitlines()))


@pytest.mark.filterwarnings("ignore")  # PEFT's and transformers'
def test_the_scale_benchmark_compares_each_verb_at_each_size_and_its_growth(main, tmp_path):
    main("scale")(["--quick", "--output", str(tmp_path)])
    rows = read(tmp_path / "scale.csv")
    verbs = ["inject", "save", "load a second adapter", "switch, one trains", "switch, neither trains"]
    verbs += ["disable and enable", "merge_and_unload"]
    assert [row["measure"] for row in rows] == [*verbs, *verbs, *verbs, *(f"growth: {verb}" for verb in verbs)]
    assert all(float(row["ours"]) > 0 for row in rows)
    assert {row["case"] for row in rows} >= {"7 layers", "14 layers", "tiny GPT-2"}
    assert (tmp_path / "scale.png").stat().st_size > 0


@pytest.mark.filterwarnings("ignore")
def test_the_serving_benchmark_reports_throughput_and_latencies_beside_one_at_a_time(main, tmp_path):
    pytest.importorskip("aiohttp")
    main("serve")(["--quick", "--output", str(tmp_path)])
    rows = read(tmp_path / "serve.csv")
    measures = ["requests a second", "latency, median", "latency, 95 %", "latency, 99 %"]
    assert [row["measure"] for row in rows[::2]] == measures
    assert [row["peer_name"] for row in rows[:2]] == ["PEFT, set_adapter, one at a time", "minipeft, one at a time"]
    assert all(float(row["ours"]) > 0 < float(row["peer"]) for row in rows)


@pytest.mark.filterwarnings("ignore")
def test_the_layer_benchmark_reports_overheads_and_draws_them(main, tmp_path):
    main("speed")(["--quick", "--part", "layer", "--output", str(tmp_path)])
    rows = read(tmp_path / "speed_layer.csv")
    assert [row["measure"] for row in rows[:3]] == [
        "overhead over the frozen layer",
        "overhead, same products",
        "whole layer",
    ]
    assert {row["case"].split(",")[0] for row in rows} == {"Conv1D 48x96", "Linear 64x64"}
    assert any("dropout 0.1" in row["case"] for row in rows)
    assert (tmp_path / "speed_layer.png").stat().st_size > 0


@pytest.mark.filterwarnings("ignore")
def test_the_step_benchmark_compares_every_subject_with_peft_and_the_bound(main, models, tmp_path):
    main("speed")(["--quick", "--part", "step", "--output", str(tmp_path)])
    rows = read(tmp_path / "speed_step.csv")
    steps = {row["subject"]: row for row in rows if row["peer_name"] == "PEFT"}
    assert steps.keys() >= {"frozen base", "full fine-tuning", "PEFT, tuned", "minipeft", "minipeft, lean"}
    assert {row["subject"] for row in rows if row["measure"] == "share of the step"} == {
        "matrix products, minipeft.kernels.matmul",
        "matrix products, torch.mm",
        "matrix products, minipeft.kernels.matmul, and other work",
    }
    assert {"GFLOP/s", "GB/s"} <= {row["unit"] for row in rows}
    assert (tmp_path / "speed_step.png").stat().st_size > 0


@pytest.mark.filterwarnings("ignore")
def test_the_benchmark_of_calls_counts_fewer_than_peft_makes(main, models, tmp_path):
    main("speed")(["--quick", "--part", "calls", "--output", str(tmp_path)])
    rows = [row for row in read(tmp_path / "speed_calls.csv") if row["measure"] == "operations"]
    ratios = {(row["case"].split()[0], row["subject"]): float(row["ratio"]) for row in rows}
    for kind in ("GPT-2", "Llama")[:models]:
        assert ratios[kind, "frozen base"] < ratios[kind, "minipeft"] < 0.9
        assert ratios[kind, "minipeft, lean"] < 0.9


@pytest.mark.filterwarnings("ignore")
def test_the_benchmark_for_a_gpu_is_tried_out_on_a_cpu(main, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(main("gpu").__globals__, "gc", Mock())  # it collects garbage after each subject
    main("gpu")(["--quick", "--base", "bf16", "--output", str(tmp_path)])
    found = {(row["subject"], row["peer_name"]): float(row["ratio"]) for row in read(tmp_path / "gpu_step.csv")}
    subjects = ["full fine-tuning", "PEFT", "minipeft", "minipeft, lean", "PEFT, autocast"]
    assert [subject for subject, peer in found if peer == "PEFT"] == [each for each in subjects if each != "PEFT"]
    assert found["minipeft", "PEFT, autocast"] > 0
    assert "differ" not in capsys.readouterr().out
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit, match="torch sees none"):
            main("gpu")([])


@pytest.mark.filterwarnings("ignore")
def test_the_decode_and_merge_benchmarks_run(main, models, capsys):
    main("speed")(["--quick", "--part", "decode", "--part", "merge"])
    output = capsys.readouterr().out
    assert output.count("greedy decoding") == 8 * models  # two sizes of batch
    assert output.count("merge_and_unload |") == 4 * models  # two dtypes


@pytest.mark.slow  # three compilations
@pytest.mark.filterwarnings("ignore")
def test_the_compile_benchmark_counts_graphs_and_compares_with_compiled_peft(main, tmp_path):
    main("speed")(["--quick", "--part", "compile", "--output", str(tmp_path)])
    rows = read(tmp_path / "speed_compile.csv")
    value = {(row["subject"], row["measure"]): float(row["ours"]) for row in rows}
    for subject in ("frozen base", "PEFT", "minipeft, lean"):
        assert value[f"{subject}, compiled", "training step"] > 0
        assert value[f"{subject}, compiled", "graphs for three lengths"] <= 2  # one is for lengths that vary
    assert value["minipeft, lean, compiled", "graph breaks"] == 0
    kept = {
        subject: value[subject, "kept for backward"] for subject, measure in value if measure == "kept for backward"
    }
    assert kept["minipeft, lean, compiled"] < kept["PEFT, compiled"]
    assert {row["fast_products"] for row in rows} <= {"oneDNN", "torch's", "torch's, halves in float32"}


@pytest.mark.filterwarnings("ignore")
def test_the_benchmark_of_mixed_batches_compares_with_peft_and_with_one_adapter(main, tmp_path):
    main("speed")(["--quick", "--part", "many", "--output", str(tmp_path)])
    rows = read(tmp_path / "speed_many.csv")
    assert {row["case"].split(",")[0] for row in rows} == {"tiny GPT-2", "tiny Llama"}
    peers = {"PEFT", "base", "minipeft, one adapter", "minipeft, one after the other"}
    assert {row["peer_name"] for row in rows} == peers
    assert ("base", "PEFT") in {(row["subject"], row["peer_name"]) for row in rows}
    assert {row["measure"] for row in rows} == {"one forward pass", "4 tokens decoded", "forward and backward"}


@pytest.mark.filterwarnings("ignore")
def test_the_packing_benchmark_compares_packed_rows_with_padding(main, tmp_path):
    main("speed")(["--quick", "--part", "packing", "--output", str(tmp_path)])
    rows = read(tmp_path / "speed_packing.csv")
    assert [row["peer_name"] for row in rows] == ["padded as they come", "padded, sorted by length"]
    assert {(row["subject"], row["unit"]) for row in rows} == {("packed", "tokens/s")}


@pytest.mark.filterwarnings("ignore")
def test_the_methods_benchmark_holds_every_method_of_both_libraries_against_peft(main, tmp_path):
    main("speed")(["--quick", "--part", "methods", "--output", str(tmp_path)])
    rows = read(tmp_path / "speed_methods.csv")
    methods = {row["case"].split(",")[0] for row in rows}
    assert methods >= {"LoRA", "DoRA", "IA3", "VeRA", "AdaLoRA", "LoHa", "LoKr", "OFT", "LoRA and 8 tokens"}
    assert {row["measure"] for row in rows} == {"training step", "one token", "kept for backward"}
    assert len(rows) == 3 * len(methods)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_experts_benchmark_compares_time_and_memory_with_peft_and_the_frozen_base(main, tmp_path):
    main("speed")(["--quick", "--part", "experts", "--output", str(tmp_path)])
    rows = read(tmp_path / "speed_experts.csv")
    assert {tuple(row["case"].split(", ")[:2]) for row in rows} == {
        (model, way) for model in ("tiny Mixtral", "tiny Qwen3-MoE") for way in ("grouped_mm", "eager")
    }
    assert {row["measure"] for row in rows} == {"training step", "kept for backward", "peak memory over the model"}
    kept = [row for row in rows if row["measure"] == "kept for backward" and row["subject"] == "minipeft"]
    assert all(float(row["ratio"]) < (2 if row["peer_name"] == "frozen base" else 1) for row in kept)


@pytest.mark.filterwarnings("ignore")
def test_no_time_is_reported_of_a_method_that_computes_something_else(main, tmp_path, monkeypatch):
    methods = main("speed").__globals__["methods_part"].__globals__
    monkeypatch.setitem(methods, "METHODS", {"LoRA": methods["METHODS"]["LoRA"]})
    right = methods["ours"]

    def wrong(base, adapter):
        model = right(base, adapter)
        next(p for p in model.parameters() if p.requires_grad).data.add_(0.1)
        return model

    monkeypatch.setitem(methods, "ours", wrong)
    with pytest.raises(SystemExit, match="LoRA: loss or gradients differ"):
        main("speed")(["--quick", "--part", "methods", "--output", str(tmp_path)])


def test_a_refused_case_is_said_by_the_exit_code(main, monkeypatch, capsys):
    speed = main("speed")
    compare = sys.modules["rows"].compare
    measured = [compare("speed_decode", "a model", "greedy decoding", "ms", [2.0], [3.0], "base")]
    for part, found in (("decode", measured), ("merge", None)):
        monkeypatch.setitem(speed.__globals__["PARTS"], part, lambda options, found=found: iter([found]))
    with pytest.raises(SystemExit, match="some cases were refused"):
        speed(["--quick", "--part", "decode", "--part", "merge"])
    assert "greedy decoding" in capsys.readouterr().out


@pytest.mark.slow  # each subject is a process
def test_the_memory_benchmark_measures_each_subject_in_its_own_process(tmp_path):
    process = Warm(
        tmp_path, warm.script, BENCHMARKS / "memory.py", "--quick", "--model", "Llama 134M", "--output", tmp_path
    )
    assert process.wait() == 0, process.stderr
    rows = read(tmp_path / "memory.csv")
    net = [row for row in rows if row["measure"] == "peak resident memory, net" and row["peer_name"] == "PEFT"]
    assert [row["subject"] for row in net] == [
        "full fine-tuning",
        "PEFT",
        "minipeft, lean, checkpointing block",
        "PEFT, NF4 base",
        "minipeft, NF4 base",
        "PEFT, bf16 base",
        "minipeft, lean, checkpointing sqrt, bf16 base",
    ]
    weights = {row["subject"]: float(row["ours"]) for row in rows if row["measure"] == "base weights"}
    assert weights["minipeft, NF4 base"] == weights["PEFT, NF4 base"] < weights["PEFT"] == weights["full fine-tuning"]
    assert weights["PEFT, bf16 base"] == pytest.approx(weights["PEFT"] / 2, rel=1e-4)
    assert all(float(row["ours"]) > 0 for row in net)
    kept = {row["subject"]: float(row["ours"]) for row in rows if row["unit"] == "u"}
    assert kept["minipeft, lean, checkpointing sqrt, bf16 base"] < kept["minipeft, lean, checkpointing block"]
    assert kept["minipeft, lean, checkpointing block"] < kept["PEFT"]
    peers = {(row["subject"], row["peer_name"]) for row in rows if row["measure"] == "peak resident memory, net"}
    assert ("minipeft, NF4 base", "PEFT, NF4 base") in peers
    assert (tmp_path / "memory.png").stat().st_size > 0


def test_saved_bytes_counts_a_storage_once_and_no_parameters(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from saved import saved_bytes

    layer, x = torch.nn.Linear(4, 4), torch.ones(8, 4)
    assert saved_bytes(lambda: (layer(x), layer(x)), layer) == x.nbytes


@pytest.mark.slow  # two processes that import everything
def test_the_benchmark_of_merging_on_disk_compares_with_peft(main, capsys):
    main("merge_memory")(["--quick"])
    assert capsys.readouterr().out.count("peak resident memory") == 2


@pytest.mark.slow  # four processes that import everything
def test_the_benchmark_of_dpo_compares_with_peft(main, capsys):
    main("dpo_memory")(["--quick"])
    lines = [line for line in capsys.readouterr().out.splitlines() if "peak resident memory" in line]
    assert len(lines) == 4


def test_every_committed_row_names_its_device_versions_and_commit():
    files = sorted((BENCHMARKS / "results").glob("*.csv"))
    assert files
    for path in files:
        rows = read(path)
        assert rows
        for row in rows:
            assert all(
                row[name]
                for name in (
                    *["device", "threads", "torch", "peft", "commit", "ratio", "rounds"],
                    *["instructions", "matrix_library", "fast_products"],
                )
            )
            assert row["dirty"] == "False", f"{path.name} was measured on uncommitted code"
            assert float(row["ratio_low"]) <= float(row["ratio"]) <= float(row["ratio_high"])
