"""LongBench v2 (Bai et al. 2024, arXiv 2412.15204): multiple-choice questions on contexts of 8k to 2M words."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from .base import Score, register_suite
from .generation import Example
from .longbench import LongBenchData, text

PROMPT = """Please read the following text and answer the question below.

<text>
{context}
</text>

What is the correct answer to this question: {question}
Choices:
(A) {choice_A}
(B) {choice_B}
(C) {choice_C}
(D) {choice_D}

Format your response as follows: "The correct answer is (insert answer here)"."""  # the authors' prompts/0shot.txt
FIELDS = ("context", "question", "choice_A", "choice_B", "choice_C", "choice_D")
CHOICES = {"answer": ("A", "B", "C", "D"), "difficulty": ("easy", "hard"), "length": ("short", "medium", "long")}
MAX_NEW_TOKENS = 128


@register_suite
class LongBench2(LongBenchData):
    """All questions of LongBench v2 in the authors' zero-shot setting, without reasoning.

    Per example "score" in %: 100 for the right letter, 0 for another or none; the same value as one of score_easy and
    score_hard and one of score_short, score_medium and score_long. The authors' server always puts the chat template around
    the prompt, here --chat-template does, and they sample at temperature 0.1, here decoding is greedy.
    """

    name = "longbench2"
    tasks = ("longbench2",)
    hub = ("zai-org/LongBench-v2", "data.json")

    @staticmethod
    def names(task: str) -> tuple[str, ...]:
        return "longbench2.jsonl", "data.json"

    @staticmethod
    def example(task: str, number: int, record: Mapping[str, Any]) -> Example:
        for name, allowed in CHOICES.items():
            if record[name] not in allowed:
                raise ValueError(f"{name!r} is {record[name]!r}, not one of {', '.join(allowed)}")
        prompt = PROMPT.format(**{name: text(record, name).strip() for name in FIELDS})
        about = {name: record[name] for name in ("difficulty", "length")}
        return Example(str(number), prompt, (record["answer"],), MAX_NEW_TOKENS, about=about)

    def score(self, example: Example, answer: str) -> Iterator[Score]:
        value = 100.0 * (chosen_letter(answer) in example.references)
        for metric in ("score", f"score_{example.about['difficulty']}", f"score_{example.about['length']}"):
            yield Score("longbench2", example.id, metric, value, "%")


def chosen_letter(answer: str) -> str | None:
    """The letter that an answer names in the requested form, asterisks aside; None when it names none."""
    answer = answer.replace("*", "")
    for form in (r"The correct answer is \(([A-D])\)", r"The correct answer is ([A-D])"):
        if match := re.search(form, answer):
            return match[1]
    return None
