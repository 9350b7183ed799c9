"""minipeft.training.report: what a run shows is true, and a wrong adapter is noticed."""

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("transformers")

from tiny_models import gpt2
from tiny_rows import Rows

import minipeft
from minipeft.training.report import check_adapter, logits_of_first, one_line_errors, parameter_table, perplexity_report


@pytest.fixture
def saved(tmp_path):
    """An adapter that changes the model, as trained and as saved."""
    model = minipeft.get_lora_model(gpt2(), minipeft.LoraConfig(r=4, init_lora_weights=False))
    model.save_pretrained(tmp_path)
    return model, tmp_path


def test_the_table_has_the_numbers_of_parameters(saved):
    model, _ = saved
    total = sum(parameter.numel() for parameter in model.parameters())
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    rows = dict(line.split(maxsplit=1) for line in parameter_table(model).splitlines()[1:])
    assert rows.keys() == {"total", "trainable", "frozen"}
    for name, number in {"total": total, "trainable": trainable, "frozen": total - trainable}.items():
        assert rows[name].split() == [f"{number:,}", f"{100 * number / total:.2f}"]


def test_a_saved_adapter_is_that_of_the_trained_model(saved):
    model, directory = saved
    lines = check_adapter(logits_of_first(model, Rows()), gpt2(), directory, Rows(), None).splitlines()
    assert [line.split()[0] for line in lines] == ["reloaded", "merged"]
    assert "differ by 0.0e+00" in lines[0]


def test_another_adapter_than_the_trained_one_is_an_error(saved):
    model, directory = saved
    trained, file = logits_of_first(model, Rows()), directory / "adapter_model.safetensors"
    save_file({name: 1.01 * tensor for name, tensor in load_file(file).items()}, file)
    with pytest.raises(minipeft.StateError, match="the reloaded adapter is not the one that was trained"):
        check_adapter(trained, gpt2(), directory, Rows(), None)


def test_a_merge_that_goes_wrong_is_an_error(saved, monkeypatch):
    model, directory = saved

    def merge_wrongly(self, **options):
        return gpt2()

    monkeypatch.setattr(minipeft.AdaptedModel, "merge_and_unload", merge_wrongly)
    with pytest.raises(minipeft.StateError, match="the merged adapter is not the one that was trained"):
        check_adapter(logits_of_first(model, Rows()), gpt2(), directory, Rows(), None)


def test_the_logits_are_those_of_the_model_in_evaluation_mode(saved):
    model, _ = saved
    ids = torch.tensor(Rows().examples[0].input_ids, dtype=torch.int64)[None]
    with torch.no_grad():
        expected = model.eval()(input_ids=ids).logits
    torch.testing.assert_close(logits_of_first(model.train(), Rows()), expected)


def test_perplexities_are_the_first_and_the_last():
    rows = [{"eval_perplexity": 9.0}, {"loss": 1.0}, {"eval_perplexity": 8.0}, {"eval_perplexity": 7.0}]
    assert perplexity_report(rows) == "perplexity on held-out text: 9.00 before, 7.00 after"


@pytest.mark.parametrize(("rank", "line"), [("0", "train.py: stopped by Ctrl-C\n"), ("1", "")])
def test_ctrl_c_is_one_line(rank, line, monkeypatch, capsys):
    monkeypatch.setenv("RANK", rank)
    with pytest.raises(SystemExit) as stopped, one_line_errors("train.py"):
        raise KeyboardInterrupt
    assert stopped.value.code == 130
    assert capsys.readouterr().err == line
