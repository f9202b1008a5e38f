from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from raytrain.data.cutting import LONGEST, PIECE, cut_position, pieces
from tests.support.examples import examples


@given(st.text(min_size=1, max_size=60), st.integers(2, 3))
@settings(deadline=None, max_examples=examples(100))
def test_pieces_are_all_of_the_text(part: str, times: int) -> None:
    text = (
        (part.encode() * (times * LONGEST // len(part.encode()) + 1))[: times * LONGEST]
        .decode(errors="ignore")
        .encode()
    )
    found = list(pieces(text))
    assert all(len(piece) <= PIECE and piece.decode() for piece in found if piece), "no character is cut"
    assert b"".join(b"".join(piece.split()) for piece in found) == b"".join(text.split())


def test_a_document_of_ordinary_length_stays_whole() -> None:
    text = b"word " * (LONGEST // 5)
    assert list(pieces(text)) == [text]
    assert list(pieces(b"")) == [b""]


def test_a_cut_is_behind_the_last_space_of_the_second_half() -> None:
    assert cut_position(b"abcd efgh", 8) == 5
    assert cut_position(b"abcd efgh", 20) == 9
    assert cut_position(b"abcdefgh ij", 8) == 8
    assert cut_position(b"a bcdefghij", 8) == 8, "half a piece at least"
    assert cut_position("abcdefg😀".encode(), 8) == 7
