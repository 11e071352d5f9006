"""Looking at documents: the right ones are found, for the reason that is said, prepared or not."""

import re

import pytest

from ropewalk.data.encode import tokenization
from ropewalk.data.view import View
from ropewalk.errors import UserError
from ropewalk.look.documents import Question, judgement, look, places_of, tokens_of

from .looked_at import all_texts, prepared, words_in


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("look")


@pytest.fixture(scope="module")
def view(folder, tokenizers):
    return View.open(prepared(folder, tokenizers["chatml"]).directory)


@pytest.fixture(scope="module")
def texts(view, folder):
    return dict(all_texts(folder))


def ids(view, **asked):
    found = look(view, Question(**asked), count=1000)
    assert found["matching"] == len(found["documents"])
    return {document["id"] for document in found["documents"]}


def test_a_search_finds_what_has_the_text(view, texts):
    assert ids(view, search="hemp7") == {id for id, text in texts.items() if "hemp7" in text} != set()
    assert ids(view, search="/(?i)ROPE\\d+ walk/") == {
        id for id, text in texts.items() if re.search(r"(?i)ROPE\d+ walk", text)
    }
    assert ids(view, search="1.5") == set(), "a text is no regular expression"


def test_places_of_a_search_are_marked(view, texts):
    found = look(view, Question(search="/tar\\d+/"), count=20)
    for document in found["documents"]:
        text = document["text"]
        assert text == texts[document["id"]]
        assert [(a, b) for a, b in document["marks"]] == [m.span() for m in re.finditer(r"tar\d+", text)]
    assert places_of("aXbXc", "X") == [(1, 2), (3, 4)]
    assert places_of("aaa", "/x*/") == []


def test_rules_and_expressions_choose(view, texts):
    counts = {id: len(words_in(text)) for id, text in texts.items()}
    assert ids(view, rule="short") == {id for id, n in counts.items() if n < 8}
    assert ids(view, without="short") == ids(view, rule="short")
    assert ids(view, fate="kept") == {id for id, n in counts.items() if 8 <= n <= 50}
    assert ids(view, fate="dropped") == texts.keys() - ids(view, fate="kept")
    assert ids(view, where="words = 20 or words = 21") == {id for id, n in counts.items() if n in (20, 21)}
    assert ids(view, where="tokens > 100 and source = 'two.jsonl'") <= {i for i in counts if i[:3] == "two"}
    assert ids(view, id="one.jsonl:7") == {"one.jsonl:7"}
    shown = look(view, Question(rule="short"))["documents"][0]
    assert (shown["values"], shown["reason"]) == ({"words": counts[shown["id"]]}, "too short")


def test_a_sample_depends_on_the_seed_alone(view):
    first, again, other = (
        [d["id"] for d in look(view, Question(), 10, seed)["documents"]] for seed in (0, 0, 1)
    )
    assert first == again
    assert set(first) != set(other)
    assert len(first) == 10
    assert look(view, Question(), 10, 10**30)["matching"] > 10


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"rule": "shrt"}, r"--rule shrt: there is no such rule; there are short, long"),
        ({"where": "word > 3"}, r"--where: unknown column word; did you mean words\?"),
        ({"where": "count(*) > 1"}, r"--where .count\(\*\) > 1.: .* not allowed"),
        ({"where": "words > 'x'"}, r"--where: Conversion Error"),
        ({"search": "/(/"}, r"--search /\(/: Invalid regular expression"),
    ],
)
def test_mistakes_are_said(view, asked, message):
    with pytest.raises(UserError, match=message):
        look(view, Question(**asked))


def test_tokens_are_those_of_the_shards(view, folder, tokenizers):
    """Of an edited document too."""
    tokenizer = tokenizers["chatml"]
    shards = prepared(folder, tokenizer).train
    by_id = {shards.document(i).id: shards.document(i) for i in range(len(shards))}
    wanted = [d for d in look(view, Question(fate="kept"), 50)["documents"] if d["id"] in by_id]
    assert any("@" in document["text"] for document in wanted)
    from ropewalk.data.encode import Options

    made = tokenization(tokenizer, Options(128))
    for document in wanted:
        tokens = list(tokens_of(view, document["part"], document["row"], tokenizer, made))
        stored = by_id[document["id"]]
        assert [scored for _, scored, _ in tokens] == stored.scored.tolist()
        assert "".join(text for text, _, _ in tokens) == tokenizer.decode(stored.tokens)
        assert [special for *_, special in tokens] == [False] * (len(tokens) - 1) + [True]


def test_a_judgement_counts_what_is_kept(view, texts):
    found = judgement(view)
    counts = [len(words_in(text)) for text in texts.values()]
    assert (found["documents"], found["kept"]) == (len(texts), sum(8 <= n <= 50 for n in counts))
    assert [rule["rule"] for rule in found["rules"]] == ["short", "long"]


def test_duplicates_are_called_by_their_names(view, texts):
    names = [*texts]
    assert view.named({"near_duplicate_of": 205, "duplicate_of": -1, "words": 3}) == {
        "near_duplicate_of": names[205],
        "duplicate_of": -1,
        "words": 3,
    }


@pytest.mark.parametrize(
    "content", ["[]", '{"report": null}', '{"report": {}, "parts": {"attributes": {}, "units": [{}]}}']
)
def test_a_folder_that_does_not_hold_prepared_data_is_one_message(tmp_path, content):
    (tmp_path / "prepared.json").write_text(content)
    with pytest.raises(UserError, match=r"prepared\.json: not of this version"):
        View.open(tmp_path)
