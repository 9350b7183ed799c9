"""Exercise 01: the answers, and what the usual wrong ones come from."""

from __future__ import annotations

import math
from types import SimpleNamespace

from minipeft.learning.law import Broken, Laws, Look, as_number

LAWS = Laws(independent=True)
# Name -> (question in short, right answer, usual wrong answer -> where it comes from, hint for any other).
QUESTIONS: dict[str, tuple[str, float, dict[float, str], str]] = {
    "full_numbers": (
        "the numbers that full fine-tuning trains",
        1024 * 1024,
        {2048: "you added the sides; a matrix has rows times columns numbers", 1024: "that is a single row"},
        "every number of the weight trains",
    ),
    "lora_numbers": (
        "the numbers in A and B",
        16 * 1024,
        {
            8 * 1024: "that is one of the two factors",
            8 * 1024 * 1024: "r is not multiplied by the whole weight; A and B each have r numbers a row or a column",
            (8 * 1024) ** 2: "the factors' sizes are added, not multiplied",
            1024 * 1024: "that is the size of the product B A, which is never stored",
        },
        "add the sizes of A and of B",
    ),
    "times_fewer": (
        "the reduction",
        64,
        {
            1 / 64: "it is the other way round: how many times does the small number go into the large one?",
            128: "that counts only one of the two factors",
            0.125: "you took r times the weight for LoRA's numbers",
        },
        "divide the first answer by the second",
    ),
    "scaling": (
        "the scaling",
        4,
        {
            0.25: "that is r / lora_alpha; a larger lora_alpha must make the update larger",
            256: "that is the product of the two",
            32: "that is lora_alpha alone; where is r?",
            32 / math.sqrt(8): "that is rank-stabilised LoRA (rsLoRA), which divides by the root of r",
        },
        "see the formula at the top of the file",
    ),
    "scaling_after_doubling_r": (
        "the scaling, with r doubled",
        0.5,
        {
            2: "r stands below the line in s = lora_alpha / r",
            1: "only if lora_alpha were doubled, too",
            1 / math.sqrt(2): "that is so for rank-stabilised LoRA (rsLoRA)",
        },
        "compare lora_alpha / (2 r) with lora_alpha / r",
    ),
    "largest_rank": (
        "the largest rank of B A",
        2,
        {
            5: "every column of B A is a combination of the columns of B: how many has it?",
            6: "every column of B A is a combination of the columns of B: how many has it?",
            30: "that is how many numbers B A has",
            10: "that is how many numbers A has",
        },
        "a product has no higher rank than any of its factors",
    ),
    "first_difference": (
        "the difference of the first output",
        0,
        {1: "what is B A x if B is zero?", 4: "the scaling multiplies B A x; what is that if B is zero?"},
        "what is B A x if B is zero?",
    ),
    "gradient_of_B": (
        "the first number of B's gradient",
        6,
        {
            3: "s is missing: the output is s B A x",
            0: "B is zero, but its gradient is not: it needs A x, and A is not zero",
            2: "A x is missing: how large is [1, 1] times [1, 2]?",
            -6: "that is the second number; the gradient in y is [1, -1]",
            12: "s is in it twice",
        },
        "y = s B h with h = A x, so the gradient in B is s times the gradient in y times h",
    ),
    "gradient_of_A": (
        "the first number of A's gradient",
        0,
        {
            2: "the way from y to A leads through B: what does B do to it now?",
            6: "that is B's; the way from y to A leads through B",
            1: "the way from y to A leads through B: what does B do to it now?",
        },
        "the way from y to A leads through B: what does B do to it now?",
    ),
    "merged": (
        "the merged weight",
        5,
        {
            3.5: "the scaling is missing: it belongs to the update when you merge, too",
            3: "that is the update alone; where is W?",
            1.5: "that is B A alone",
            2.75: "you took r / lora_alpha for the scaling",
            14: "you took lora_alpha for the scaling, without r",
            10: "W is not scaled, only the update is",
            7: "the scaling multiplies B A, not W and B A",
        },
        "W + s B A",
    ),
}


def _asked(name: str) -> Look:
    _, right, wrong, hint = QUESTIONS[name]

    def look(work: SimpleNamespace) -> None:
        answer = getattr(work, name, None)
        if answer is None:
            raise Broken(f"{name} has no answer yet.")
        given = as_number(answer, name)
        if math.isclose(given, right, rel_tol=1e-3, abs_tol=1e-9):
            return
        near = next((why for value, why in wrong.items() if math.isclose(given, value, rel_tol=5e-3)), hint)
        raise Broken(f"{name} is not {given:g}: {near}.")

    return look


for _name, (_promise, *_) in QUESTIONS.items():
    LAWS.law(_promise)(_asked(_name))
