from __future__ import annotations

import functools
import itertools
import math
import time
from collections.abc import Sequence

import pytest

from raytrain.data import synthetic
from raytrain.data.synthetic import Slot, Template

DOCUMENTS_OF_SEED_0 = [
    "Thanks for the follow, have a great Saturday... ❤️ #thankyou url",
    "@userid What a goal from the captain! 4-3! #life",
    "Happy birthday to my cat Biscuit, 8 today.",
]


def derivations(template: Template, text: bytes) -> list[float]:
    """Probabilities of every derivation of ``text``: backwards over suffixes, unlike the module's parser."""

    @functools.cache
    def rest(slot: int, position: int) -> tuple[float, ...]:
        if slot == len(template.slots):
            return (1.0,) if position == len(text) else ()
        choice = template.slots[slot]
        return tuple(
            probability * tail
            for option, probability in zip(choice.options, choice.probabilities, strict=True)
            if text[position : position + len(option)] == option
            for tail in rest(slot + 1, position + len(option))
        )

    return [template.probability * probability for probability in rest(0, 0)]


def test_each_generated_document_has_one_derivation_of_the_stated_probability() -> None:
    for text, nats in synthetic.documents(seed=11, num=150):
        found = [probability for template in synthetic.templates() for probability in derivations(template, text)]
        assert len(found) == 1, text
        assert -math.log(sum(found)) == pytest.approx(nats, abs=1e-9)
        assert synthetic.nll(text) == pytest.approx(nats, abs=1e-9)


def share_a_text(one: Sequence[Slot], two: Sequence[Slot]) -> bool:
    """Whether two sequences of slots can make the same text: both are walked, the one behind moving on."""
    sides = (one, two)

    @functools.cache
    def common(positions: tuple[int, int], ahead: bytes, leader: int) -> bool:
        if positions == (len(one), len(two)):
            return not ahead
        mover = 1 - leader if ahead or positions[leader] == len(sides[leader]) else leader
        if positions[mover] == len(sides[mover]):
            return False
        after = (positions[0] + (mover == 0), positions[1] + (mover == 1))
        for option in sides[mover][positions[mover]].options:
            if ahead.startswith(option) and common(after, ahead[len(option) :], leader):
                return True
            if option.startswith(ahead) and option != ahead and common(after, option[len(ahead) :], mover):
                return True
        return False

    return common((0, 0), b"", 0)


def ambiguities(slots: Sequence[Slot]) -> list[tuple[bytes, bytes]]:
    """Pairs of options of one slot after which the slots can still go on to the same text."""
    return [
        (short, long)
        for number, slot in enumerate(slots)
        for short, long in itertools.permutations(slot.options, 2)
        if long.startswith(short)
        and share_a_text([Slot(((long[len(short) :].decode(), 1.0),)), *slots[number + 1 :]], slots[number + 1 :])
    ]


def test_the_grammar_is_unambiguous() -> None:
    """A proof, not a sample: no two templates, and no two choices within one, can make the same text."""
    all_templates = synthetic.templates()
    opening = all_templates[0].slots[:2]
    starts = [option for slot in opening for option in slot.options if option]
    assert not any(a != b and a.startswith(b) for a, b in itertools.product(starts, starts))
    by_first: dict[int, set[int]] = {}
    for number, template in enumerate(all_templates):
        assert ambiguities(template.slots) == []
        assert template.slots[:2] == opening
        for body in template.slots[2].options:
            assert body
            assert not any(start.startswith(body) or body.startswith(start) for start in starts)
            by_first.setdefault(body[0], set()).add(number)
    # All templates open alike and no body can begin like an opening: two texts are the same only if their
    # bodies are, which then share the first byte.
    pairs = {pair for group in by_first.values() for pair in itertools.combinations(sorted(group), 2)}
    for one, two in pairs:
        assert not share_a_text(all_templates[one].slots[2:], all_templates[two].slots[2:])


def slots(*choices: str) -> list[Slot]:
    return [Slot(tuple((item, 1.0) for item in choice.split("|"))) for choice in choices]


def test_the_proof_finds_ambiguities() -> None:
    assert share_a_text(slots("a|ab", "c|bc"), slots("ab", "d|c"))
    assert share_a_text(slots("ab", "x", "|y"), slots("a", "bx|bz", "y"))
    assert share_a_text(slots("a", "|b"), slots("|b", "a"))
    assert share_a_text(slots("a"), slots("a", "", "|b"))
    assert not share_a_text(slots("ab", "x", "|y"), slots("a", "bx|bz", "z"))
    assert not share_a_text(slots("a", "b"), slots("a", "bb|c"))
    assert ambiguities(slots("a|ab", "c|bc")) == [(b"a", b"ab")]
    assert ambiguities(slots("x", "| #a", "| #a")) == [(b"", b" #a")]
    assert ambiguities(slots("1|12", ":")) == []


def test_every_slot_is_a_distribution_over_distinct_options() -> None:
    assert math.fsum(template.probability for template in synthetic.templates()) == pytest.approx(1, abs=1e-12)
    for template in synthetic.templates():
        for slot in template.slots:
            assert math.fsum(slot.probabilities) == pytest.approx(1, abs=1e-12)
            assert len(set(slot.options)) == len(slot.options)
            assert all(probability > 0 for probability in slot.probabilities)


def test_no_document_can_be_longer_than_127_bytes() -> None:
    for template in synthetic.templates():
        longest = b"".join(max(slot.options, key=len) for slot in template.slots)
        assert len(longest) <= 127
        longest.decode("utf-8")
        assert b"\n" not in longest


def test_the_closed_forms_agree_with_50000_documents() -> None:
    drawn = list(synthetic.documents(seed=5, num=50_000))
    for expected, values in (
        (synthetic.entropy(), [nats for _, nats in drawn]),
        (synthetic.mean_bytes(), [float(len(text)) for text, _ in drawn]),
    ):
        mean = math.fsum(values) / len(values)
        variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
        assert abs(mean - expected) < 4 * math.sqrt(variance / len(values))
    assert synthetic.bits_per_byte() == pytest.approx(synthetic.entropy() / math.log(2) / synthetic.mean_bytes())
    assert 0.5 < synthetic.bits_per_byte() < 1.3


def test_rank_probabilities_are_as_stated() -> None:
    city = next(slot for template in synthetic.templates() for slot in template.slots if b"London" in slot.options)
    total = sum(1 / (rank + 4) for rank in range(1, len(city.options) + 1))
    assert city.probabilities == pytest.approx([1 / (rank + 4) / total for rank in range(1, len(city.options) + 1)])


def test_what_the_grammar_cannot_make_is_impossible() -> None:
    text = next(iter(synthetic.documents(seed=0, num=1)))[0]
    assert synthetic.nll(text) < math.inf
    for other in (b"", b"x", text + b"\n", text[:-1] + b"\xff", b" " + text):
        assert synthetic.nll(other) == math.inf


def test_the_same_seed_gives_the_same_documents() -> None:
    some = [text for text, _ in synthetic.documents(seed=3, num=100)]
    assert some == [text for text, _ in itertools.islice(synthetic.documents(seed=3, num=9_000), 100)]
    assert some != [text for text, _ in synthetic.documents(seed=4, num=100)]
    assert len(list(synthetic.documents(seed=3, num=4_097))) == 4_097
    assert list(synthetic.documents(seed=3, num=0)) == []


def test_the_documents_of_a_seed_are_these() -> None:
    """Written down, so that another machine or library version that draws others is noticed."""
    assert [text.decode() for text, _ in synthetic.documents(seed=0, num=3)] == DOCUMENTS_OF_SEED_0


def test_at_least_30000_documents_a_second() -> None:
    synthetic.templates()
    started = time.process_time()
    assert sum(1 for _ in synthetic.documents(seed=1, num=30_000)) == 30_000
    assert time.process_time() - started < 1
