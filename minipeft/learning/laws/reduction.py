"""Exercise 02: the counts, each compared with what a usual mistake gives."""

from __future__ import annotations

from types import SimpleNamespace

from minipeft.learning.law import Broken, Laws, as_number

LAWS = Laws()
Layers = dict[str, tuple[int, int]]
LAYERS: Layers = {"wide": (2304, 768), "square": (768, 768), "tall": (768, 3072)}


def _compare(call: str, given: object, right: float, mistakes: dict[float, str]) -> None:
    number = as_number(given, call)
    if abs(number - right) > 1e-6 * right:
        why = next((said for value, said in mistakes.items() if abs(number - value) <= 1e-6 * abs(value)), "")
        raise Broken(f"{call} gives {number:,.10g}, not {right:,.10g}" + (f": {why}." if why else "."))


@LAWS.law("A has r numbers for each input feature, B has r for each output feature")
def _counts_both_factors(work: SimpleNamespace) -> None:
    out, within, r = 20, 30, 4
    _compare(
        f"lora_parameters({out}, {within}, {r})",
        work.lora_parameters(out, within, r),
        r * (out + within),
        {
            r * within: "that is A alone",
            r * out: "that is B alone",
            r * out * within: "r times the whole weight; the factors are thin, so their sizes are added",
            out * within: "that is the weight itself, or the product B A, which is never stored",
            out + within: "r is missing",
            r * (out + within) + out: "a bias is in it, which LoRA does not train",
            r * (out + within) + r * r: "there is no matrix between A and B",
            r * r * out * within: "the factors' sizes are added, not multiplied",
        },
    )


@LAWS.law("the reduction is the weight's numbers divided by LoRA's")
def _divides(work: SimpleNamespace) -> None:
    out, within, r = 1000, 1150, 8
    right = out * within / (r * (out + within))
    _compare(
        f"times_fewer({out}, {within}, {r})",
        work.times_fewer(out, within, r),
        right,
        {
            1 / right: "it is the other way round",
            float(int(right)): "the fraction is cut off, as // does",
            float(round(right)): "it is rounded",
            100 / right: "that is a percentage",
            out * within - r * (out + within): "that is the difference; how many times smaller is it?",
        },
    )


@LAWS.law("a model's count is that of all of its layers, in all of its blocks")
def _counts_a_model(work: SimpleNamespace) -> None:
    r, blocks = 8, 12
    counts = [r * (out + within) for out, within in LAYERS.values()]
    right = blocks * sum(counts)
    _compare(
        f"model_parameters(layers, {r}, {blocks})",
        work.model_parameters(LAYERS, r, blocks),
        right,
        {
            sum(counts): "that is one block",
            blocks * counts[0]: "that is the first layer alone; return after the loop, not in it",
            blocks * counts[-1]: "that is the last layer alone; add them up",
            blocks * sum(out * within for out, within in LAYERS.values()): "those are the weights' own numbers",
            right / r: "r is missing",
        },
    )
    _compare(
        "model_parameters(layers, 8, 2)",
        work.model_parameters(LAYERS, r, 2),
        2 * sum(counts),
        {right: "it ignores `blocks`"},
    )


@LAWS.law("memory: every weight once, and three more numbers for each that trains")
def _adds_up_memory(work: SimpleNamespace) -> None:
    total, trainable = 1_000_000, 10_000
    _compare(
        f"training_bytes({total}, {trainable})",
        work.training_bytes(total, trainable),
        4 * total + 12 * trainable,
        {
            total + 3 * trainable: "those are numbers; each takes 4 bytes in float32",
            16 * total: "that is full fine-tuning; what is frozen has neither a gradient nor averages",
            4 * total: "what trains has a gradient and AdamW's averages besides its weight",
            12 * trainable: "the weights themselves are missing",
            16 * trainable: "the frozen weights must be in memory, too",
            4 * total + 8 * trainable: "two of three: a gradient, and two averages",
            4 * total + 4 * trainable: "one of three: a gradient, and two averages",
            4 * total + 16 * trainable: "the trainable weights are among all weights, so you counted them twice",
            2 * total + 6 * trainable: "that is half precision; float32 takes 4 bytes",
        },
    )
