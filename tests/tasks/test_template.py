"""The template language and rows in it: what is read, what is refused, where everything stands, what is cut."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from deltune.errors import DataError
from deltune.tasks._template_rows import TemplateFiller, continuation_ids
from deltune.tasks.template import FIRST_PSEUDO_TOKEN, Column, Mask, PseudoTokens, Template, Text
from tests.tasks.tiny import byte_tokenizer, word_tokenizer

MASKED = {"mask_token": "[MASK]"}


def filler(template, tokenizer=None, masked=True, max_length=64):
    tokenizer = tokenizer or word_tokenizer(**MASKED)
    return TemplateFiller(Template.parse(template), tokenizer, masked=masked, max_length=max_length)


def fill(template, tokenizer=None, masked=True, max_length=64, **values):
    (row,) = filler(template, tokenizer, masked, max_length).fill([values])
    return row


def tokens(row, tokenizer):
    return [
        f"P{ident - FIRST_PSEUDO_TOKEN}" if ident >= FIRST_PSEUDO_TOKEN else tokenizer.convert_ids_to_tokens(ident)
        for ident in row.input_ids
    ]


# -- reading -------------------------------------------------------------------------------------------------


def test_reads_text_columns_pseudo_tokens_and_the_mask():
    template = Template.parse("[P3] {first}, {second}? [P] Answer: [MASK].")
    assert template.pieces == (
        PseudoTokens(3),
        Text(" "),
        Column("first"),
        Text(", "),
        Column("second"),
        Text("? "),
        PseudoTokens(1),
        Text(" Answer: "),
        Mask(),
        Text("."),
    )
    assert template.columns == ("first", "second")
    assert template.pseudo_tokens == 4
    assert template.has_mask


def test_a_column_may_stand_twice_and_is_read_once():
    assert Template.parse("{text} [MASK] {text}").columns == ("text",)


def test_doubled_braces_and_brackets_are_text():
    assert Template.parse("[[P]] {{text}} {text}]]").pieces == (Text("[P] {text} "), Column("text"), Text("]"))


@given(st.text(alphabet="ab {}[]\n,", max_size=12))
@settings(max_examples=200, deadline=None)
def test_any_text_can_be_written(text):
    written = "".join(2 * character if character in "{}[]" else character for character in text)
    pieces = Template.parse(f"{written}{{column}}").pieces
    assert pieces == ((Text(text), Column("column")) if text else (Column("column"),))


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("It was [MASK].", "reads no column"),
        ("{text} [MSK]", r"unknown marker \[MSK\]. Did you mean '\[MASK\]'"),
        ("{text} [P 3]", r"unknown marker \[P 3\]. Did you mean .*'\[P3\]'.*written twice: \[\[P 3\]\]"),
        ("{text} [P0]", "makes 0 pseudo tokens"),
        ("{text} [mask]", r"Did you mean '\[MASK\]'"),
        ("{text} [MASK] [MASK]", r"has 2 \[MASK\]"),
        ("{text", "position 1 .* is never closed"),
        ("{text} [MASK", "position 8 .* is never closed"),
        ("{text}} [MASK]", r"Position 7 .* has '\}' without a partner"),
        ("{text} a] [MASK]", r"Position 9 .* has '\]' without a partner"),
        ("{} [MASK]", "names no column"),
        ("{te{xt} [MASK]", "names no column"),
    ],
)
def test_malformed_templates_are_refused(template, message):
    with pytest.raises(DataError, match=message):
        Template.parse(template)


def test_what_is_no_text_is_no_template():
    with pytest.raises(DataError, match="A template is text such as"):
        Template.parse(3)


def test_a_masked_model_needs_a_mask_and_a_decoder_ends_there():
    with pytest.raises(DataError, match=r"has no \[MASK\]"):
        Template.parse("{text} It was").for_masked()
    with pytest.raises(DataError, match=r"something follows \[MASK\]"):
        Template.parse("{text} It was [MASK].").for_causal()
    for template in ("{text} It was [MASK]", "{text} It was [MASK] "):
        assert Template.parse(template).for_causal().pieces == (Column("text"), Text(" It was "))
    assert Template.parse("{text} It was").for_causal() == Template.parse("{text} It was")


# -- encoding ------------------------------------------------------------------------------------------------


def test_everything_stands_where_the_template_says():
    tokenizer = word_tokenizer(**MASKED)
    row = fill("[P2] {text} was [P][MASK] and", tokenizer, text="the film")
    assert tokens(row, tokenizer) == ["[CLS]", "P0", "P1", "the", "film", "was", "P2", "[MASK]", "and", "[SEP]"]
    assert row.pseudo_positions == (1, 2, 6)
    assert row.answer == 7
    assert not row.truncated


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("[P] {text} [MASK]", ["[CLS]", "P0", "good", "[MASK]", "[SEP]"]),
        ("{text} [MASK] [P2]", ["[CLS]", "good", "[MASK]", "P0", "P1", "[SEP]"]),
        ("[MASK] [P] {text}", ["[CLS]", "[MASK]", "P0", "good", "[SEP]"]),
        (" [P] [P] {text}[MASK]", ["[CLS]", "P0", "P1", "good", "[MASK]", "[SEP]"]),
        ("{text}\n[MASK] {text}", ["[CLS]", "good", "[MASK]", "good", "[SEP]"]),
    ],
)
def test_pseudo_tokens_and_masks_may_stand_anywhere(template, expected):
    tokenizer = word_tokenizer(**MASKED)
    assert tokens(fill(template, tokenizer, text="good"), tokenizer) == expected


def test_a_decoder_answers_behind_the_last_token():
    tokenizer = byte_tokenizer(start=True, ends=True)
    row = fill("[P] {text} is [MASK]", tokenizer, masked=False, text="a")
    assert tokens(row, tokenizer) == ["<start>", "P0", "Ġ", "a", "Ġ", "i", "s"]  # no end token
    assert row.answer == len(row.input_ids)


def sentencepiece_like():
    """Puts a mark of a word's beginning before every text, whether white space precedes it or not."""
    pieces = ["<unk>", "▁", "a", "b", ".", "▁a", "▁b"]
    merges = [("▁", "a"), ("▁", "b")]
    tokenizer = Tokenizer(models.BPE(vocab={piece: place for place, piece in enumerate(pieces)}, merges=merges))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def byte_pairs():
    """Words with their white space, as in GPT-2."""
    return byte_tokenizer(merges=[("Ġ", "b"), ("Ġ", "a"), ("b", "a")])


@pytest.mark.parametrize(
    ("make", "text", "expected"),
    [
        (sentencepiece_like, " b", ["▁b"]),
        (sentencepiece_like, ".", ["."]),
        (sentencepiece_like, "b", ["b"]),
        (byte_pairs, " b", ["Ġb"]),
        (byte_pairs, "b", ["b"]),
        (lambda: word_tokenizer(**MASKED), " good", ["good"]),
        (lambda: word_tokenizer(**MASKED), "good", ["good"]),
    ],
)
def test_text_behind_a_marker_is_tokenized_as_running_text(make, text, expected):
    tokenizer = make()
    (ids,) = continuation_ids(tokenizer, [text])
    assert tokenizer.convert_ids_to_tokens(ids) == expected


def test_text_between_markers_is_tokenized_as_a_whole():
    """Column and anchor meet without a seam: white space before a column belongs to its first word."""
    tokenizer = byte_pairs()
    row = fill("[P] b {text}[P]", tokenizer, masked=False, text="b a")
    assert tokens(row, tokenizer) == ["P0", "Ġb", "Ġb", "Ġa", "P1"]


def test_words_are_those_of_their_place():
    masked = word_tokenizer(**MASKED)
    assert filler("{text} [MASK]", masked).word_ids(["good"]) == [[4]]
    pairs = byte_pairs()
    for template, expected in (
        ("{text} a [MASK]", [["Ġb"]]),
        ("{text} a", [["Ġb"]]),
        ("{text} a[MASK]", [["b"]]),
        ("{text}[P][MASK]", [["b"]]),
        ("{text} [P] [MASK]", [["Ġb"]]),
    ):
        found = filler(template, pairs, masked=False).word_ids(["b"])
        assert [pairs.convert_ids_to_tokens(ids) for ids in found] == expected, template


# -- cutting -------------------------------------------------------------------------------------------------


def test_the_longest_column_is_cut_first():
    tokenizer = word_tokenizer(**MASKED)
    values = {"one": "good bad fine film plot", "other": "the a"}
    template = "[P2] {one} was [P] {other} not [MASK]"
    whole = fill(template, tokenizer, **values)
    assert len(whole.input_ids) == 15
    for length, one, other in ((14, 4, 2), (12, 2, 2), (11, 1, 2), (10, 1, 1)):
        row = fill(template, tokenizer, max_length=length, **values)
        expected = ["[CLS]", "P0", "P1", *["good", "bad", "fine", "film"][:one], "was", "P2", *["the", "a"][:other]]
        assert tokens(row, tokenizer) == [*expected, "not", "[MASK]", "[SEP]"], length
        assert row.truncated
        assert row.answer == length - 2


def test_a_column_that_stands_twice_is_cut_in_both_places():
    tokenizer = word_tokenizer(**MASKED)
    row = fill("{text} [MASK] {text}", tokenizer, max_length=8, text="good bad fine film")
    assert tokens(row, tokenizer) == ["[CLS]", "good", "bad", "[MASK]", "good", "bad", "[SEP]"]


@pytest.mark.parametrize("fast", [True, False])
def test_slow_tokenizers_cut_alike(fast, monkeypatch):
    tokenizer = byte_tokenizer()
    expected = fill("{text}: [P]", tokenizer, masked=False, max_length=9, text="abcdefghijklm")
    monkeypatch.setattr(type(tokenizer), "is_fast", fast)
    assert fill("{text}: [P]", tokenizer, masked=False, max_length=9, text="abcdefghijklm") == expected
    assert tokens(expected, tokenizer) == [*"abcdefg", ":", "P0"]


def test_letters_of_several_bytes_are_cut_whole_or_not_at_all():
    tokenizer = byte_tokenizer()
    row = fill("{text}[P]", tokenizer, masked=False, max_length=6, text="äöü")
    assert len(row.input_ids) <= 6
    assert tokenizer.decode(row.input_ids[:-1]) == "äö"


@given(
    st.lists(st.sampled_from(["good", "bad", "film", "a"]), min_size=1, max_size=9),
    st.lists(st.sampled_from(["good", "bad", "film", "a"]), min_size=1, max_size=9),
    st.integers(min_value=9, max_value=30),
)
@settings(max_examples=100, deadline=None)
def test_cut_rows_keep_everything_but_the_ends_of_columns(one, other, length):
    tokenizer = word_tokenizer(**MASKED)
    row = fill(
        "[P] {one} was {other} [P] is [MASK]", tokenizer, max_length=length, one=" ".join(one), other=" ".join(other)
    )
    seen = tokens(row, tokenizer)
    assert len(seen) == min(length, 7 + len(one) + len(other))
    was, second = seen.index("was"), seen.index("P1")
    assert seen[:2] == ["[CLS]", "P0"]
    assert seen[2:was] == one[: was - 2]
    assert seen[was + 1 : second] == other[: second - was - 1]
    assert seen[second:] == ["P1", "is", "[MASK]", "[SEP]"]
    cut_one, cut_other = len(one) - (was - 2), len(other) - (second - was - 1)
    if cut_one and cut_other:
        assert abs((was - 2) - (second - was - 1)) <= 1
    assert row.truncated == bool(cut_one or cut_other)


def test_too_little_room_is_said_before_any_row():
    with pytest.raises(DataError, match=r"max_length 6 leaves no room.* has 7. Use 7 at least"):
        filler("[P2] {text} was [MASK]", max_length=6)
    filler("[P2] {text} was [MASK]", max_length=7)


# -- errors --------------------------------------------------------------------------------------------------


def test_unusable_rows_and_tokenizers_are_refused():
    with pytest.raises(DataError, match="The tokenizer has no mask token"):
        filler("{text} [MASK]", word_tokenizer())
    with pytest.raises(DataError, match=r"row 2, column 'text', holds the mask token '\[MASK\]'"):
        list(filler("{text} [MASK]").fill([{"text": "good"}, {"text": "a [MASK]"}]))
    tokenizer = word_tokenizer(**MASKED)
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("#", "")
    with pytest.raises(DataError, match="row 1, column 'text', gives no tokens"):
        list(filler("{text} [MASK]", tokenizer).fill([{"text": "#"}]))


def test_special_tokens_that_cannot_be_told_apart_are_refused():
    class Odd:
        mask_token_id = 1
        is_fast = True

        def __call__(self, texts, add_special_tokens=True, **_):
            ids = [9] if add_special_tokens else [3, 4]
            return {"input_ids": ids if isinstance(texts, str) else [ids for _ in texts]}

    with pytest.raises(DataError, match="where special tokens belong is not clear"):
        filler("{text} [MASK]", Odd())
