"""A model whose answers do not end is refused; chance, long references and the base's own habit refuse nothing."""

import math
from dataclasses import replace

import pytest

from sft_core.evaluate import EvaluationReport, Score
from sft_core.register import Endings, endings_of, endings_words, unfinished_answers
from sft_core.register.endings import binomial_tail

LIMIT, INCREASE = 48, 0.1
SCORE = Score(row_id="a", dataset="d", tokens=2, correct_tokens=1, loss_sum=3.0, num_bytes=4, prompt="", reference="")


def report(ended: int, unfinished: int, reference_tokens: int = 12, silent: int = 1) -> EvaluationReport:
    """So many answers of each kind, and `silent` rows without one."""
    answered = replace(SCORE, answer="x", ended=True, reference_tokens=reference_tokens)
    cut = replace(answered, ended=False)
    return EvaluationReport((answered,) * ended + (cut,) * unfinished + (SCORE,) * silent)


def refused(tuned: EvaluationReport, base: EvaluationReport, *champion: EvaluationReport, most: float = 0.1) -> bool:
    reports = {"tuned": tuned, "base": base, **dict(zip(["champion"], champion, strict=False))}
    found = unfinished_answers(reports, LIMIT, most)
    assert [finding.name for finding in found] in ([], ["answers_do_not_end"])
    return bool(found)


NEVER, ALWAYS = report(0, 72), report(72, 0)


def test_a_model_that_never_ends_is_refused_whatever_the_base_does() -> None:
    assert refused(NEVER, ALWAYS)
    assert refused(NEVER, NEVER)
    assert refused(NEVER, NEVER, ALWAYS)


def test_a_model_that_ends_passes_beside_a_base_that_never_does() -> None:
    assert not refused(ALWAYS, NEVER)
    assert not refused(report(70, 2), ALWAYS)


@pytest.mark.parametrize(
    ("tuned", "base", "champion", "expected"),
    [
        ((52, 20), (72, 0), None, True),  # 28 % where 10 % may
        ((60, 12), (72, 0), None, False),  # 17 %: not surely above 10 %
        ((52, 20), (58, 14), None, False),  # the base leaves 19 % unfinished
        ((52, 20), (0, 72), (72, 0), True),  # the better of the two is the measure
        ((52, 20), (72, 0), (0, 72), True),
        ((51, 21), (0, 72), None, True),  # a base that does not chat is no measure: 10 % may
        ((60, 12), (0, 72), None, False),
        ((51, 21), (0, 72), (52, 20), False),  # and the champion is one
        ((34, 38), (20, 52), None, False),  # about half, and the base is worse
        ((10, 62), (20, 52), None, True),  # most of them
        ((10, 62), (10, 62), None, True),
    ],
)
def test_the_better_of_base_and_champion_is_the_measure(
    tuned: tuple[int, int], base: tuple[int, int], champion: tuple[int, int] | None, expected: bool
) -> None:
    others = [report(*counts) for counts in (base, champion) if counts is not None]
    assert refused(report(*tuned), *others) is expected


def test_few_answers_refuse_nothing_by_chance() -> None:
    assert not refused(report(0, 2), report(2, 0), most=0.2)
    assert not refused(report(0, 6), report(36, 36))
    assert refused(report(0, 7), report(36, 36))  # 0.5 ** 7 is the first below 0.01
    assert not refused(report(8, 4), NEVER)  # P(4 or more of 12, one in ten) = 0.026
    assert refused(report(7, 5), NEVER)  # 0.0043


def test_the_bound_is_the_recipes_and_1_switches_it_off() -> None:
    assert not refused(report(52, 20), ALWAYS, most=0.3)
    assert not refused(NEVER, ALWAYS, most=1.0)


def test_an_answer_counts_where_its_reference_leaves_it_room() -> None:
    assert endings_of(report(3, 5, reference_tokens=24), LIMIT) == Endings(8, 5)
    assert endings_of(report(3, 5, reference_tokens=25), LIMIT) == Endings(0, 0)
    too_long = report(0, 72, reference_tokens=25)
    assert not refused(too_long, ALWAYS)
    words = endings_words({"tuned": too_long, "base": ALWAYS}, LIMIT)
    assert words.startswith(
        "answers that ended by themselves: tuned 0 of 72, base 72 of 72 (not judged: every reference"
    )
    assert "evaluate.max_new_tokens 48" in words


def test_no_answers_are_no_finding_and_said_in_words() -> None:
    silent = report(0, 0, silent=9)
    assert not refused(silent, silent)
    assert endings_words({"tuned": silent, "base": silent}, LIMIT) == (
        "whether answers end is not judged: none was generated (evaluate.max_generated_rows)"
    )


def test_reports_of_earlier_versions_are_no_measure() -> None:
    old = EvaluationReport((replace(SCORE, answer="x"),) * 72)
    assert not refused(ALWAYS, old)
    assert refused(NEVER, old)
    assert endings_words({"tuned": ALWAYS, "base": old}, LIMIT) == "answers that ended by themselves: tuned 72 of 72"


def test_the_finding_says_what_was_counted_and_what_to_set() -> None:
    (finding,) = unfinished_answers({"tuned": report(2, 70), "base": report(50, 22)}, LIMIT, INCREASE)
    assert "70 of 72 answers of the tuned model do not end within evaluate.max_new_tokens 48" in finding.words
    assert "of the base's 22 of 72; 41% may" in finding.words
    assert "train.lora.trainable_tokens" in finding.words
    assert "register.max_unfinished_increase (0.1)" in finding.words


@pytest.mark.parametrize("chance", [0.1, 0.5, 0.93])
def test_the_tail_is_the_sum_of_its_terms(chance: float) -> None:
    for trials, count in ((1, 1), (7, 3), (40, 37)):
        terms = [math.comb(trials, k) * chance**k * (1 - chance) ** (trials - k) for k in range(count, trials + 1)]
        assert binomial_tail(count, trials, chance) == pytest.approx(sum(terms), rel=1e-9)
    assert binomial_tail(3000, 5000, 0.5) == pytest.approx(6.501155e-46, rel=1e-5)  # by exact fractions
