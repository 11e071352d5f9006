"""C4's rules: which lines go and why, and what the rest of the page counts."""

from ropewalk.clean.c4 import C4
from ropewalk.clean.step import SPANS, Texts

PAGE = """Home

This line stays because it is a sentence. So is this one!
This one has no mark at its end
Too short.
Please enable JavaScript to see it.
We use  Cookies here, and the users agree.
"Is that so?" asked the reader of it...
"Is that so?" asked the reader of it."""


def test_lines_are_left_out_for_the_first_reason_that_holds():
    texts = ["Before.\n", PAGE, "x" * 1001 + " is a word."]
    table = C4().map(Texts(texts))
    assert table.schema.field("c4_lines").type == SPANS
    spans = table["c4_lines"].to_pylist()[1]
    assert [(PAGE[s["start"] : s["end"]], s["kind"]) for s in spans] == [
        ("Home\n", "no_end_mark"),
        ("This one has no mark at its end\n", "no_end_mark"),
        ("Too short.\n", "few_words"),
        ("Please enable JavaScript to see it.\n", "javascript"),
        ("We use  Cookies here, and the users agree.\n", "policy"),
        ('"Is that so?" asked the reader of it...\n', "no_end_mark"),
    ]
    assert table["c4_sentences"].to_pylist() == [0, 3, 0]
    assert [s["kind"] for s in table["c4_lines"].to_pylist()[2]] == ["long_word"]


def test_lorem_ipsum_and_brackets_are_found_in_their_own_text_only():
    table = C4().map(Texts(["Lorem", "ipsum {}", "Lorem\n  IPSUM dolor", "lorem-ipsum", ""]))
    assert table["lorem_ipsum"].to_pylist() == [False, False, True, False, False]
    assert table["curly_brackets"].to_pylist() == [0, 2, 0, 0, 0]
    assert C4().map(Texts([])).num_rows == 0
