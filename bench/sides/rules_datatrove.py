"""The rules of Gopher by datatrove: python rules_datatrove.py DOCUMENTS (JSON lines) MODE

MODE `time`: both filters as a pipeline calls them. MODE `rules`: what each rule says alone, with datatrove's
own words (spaCy's English tokenizer). MODE `rules-same-words`: the same with Ropewalk's words.
"""

import json
import sys
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import numpy as np
from datatrove.data import Document
from datatrove.pipeline.filters import GopherQualityFilter, GopherRepetitionFilter
from datatrove.pipeline.filters import gopher_quality_filter as quality
from datatrove.pipeline.filters import gopher_repetition_filter as repetition
from datatrove.utils.text import split_into_words

np.seterr(all="ignore")
QUALITY = {
    "gopher_words": {"min_doc_words": 50, "max_doc_words": 100000},
    "gopher_word_length": {"min_avg_word_length": 3, "max_avg_word_length": 10},
    "gopher_symbols": {"max_symbol_word_ratio": 0.1},
    "gopher_bullets": {"max_bullet_lines_ratio": 0.9},
    "gopher_ellipsis_lines": {"max_ellipsis_lines_ratio": 0.3},
    "gopher_letters": {"max_non_alpha_words_ratio": 0.8},
    "gopher_stop_words": {"min_stop_words": 2},
}
REPETITION = {
    "gopher_duplicate_lines": {"dup_line_frac": 0.3},
    "gopher_duplicate_paragraphs": {"dup_para_frac": 0.3},
    "gopher_duplicate_line_characters": {"dup_line_char_frac": 0.2},
    "gopher_duplicate_paragraph_characters": {"dup_para_char_frac": 0.2},
    **{
        f"gopher_top_{n}gram_characters": {"top_n_grams": ((n, limit),)}
        for n, limit in ((2, 0.2), (3, 0.18), (4, 0.16))
    },
    **{
        f"gopher_duplicate_{n}gram_characters": {"dup_n_grams": ((n, limit),)}
        for n, limit in zip(range(5, 11), (0.15, 0.14, 0.13, 0.12, 0.11, 0.10), strict=True)
    },
}
NO_LIMIT = {"top_n_grams": (), "dup_n_grams": ()}


def main() -> None:
    texts = [json.loads(line)["text"] for line in Path(sys.argv[1]).read_text(encoding="utf-8").splitlines()]
    documents = [Document(text=text, id=str(i)) for i, text in enumerate(texts)]
    filters = (GopherQualityFilter(), GopherRepetitionFilter())
    [one.filter(documents[0]) for one in filters]  # loads the tokenizer
    if sys.argv[2] == "time":
        start = time.process_time()
        for document in documents:  # both always: one that has failed already still costs the other side
            for one in filters:
                one.filter(document)
        seconds = time.process_time() - start
        print("RESULT " + json.dumps({"documents_per_s": len(documents) / seconds}), flush=True)
        return
    use_words(split_into_words if sys.argv[2] == "rules" else our_words)
    print("RESULT " + json.dumps({"kept": {name: kept(name, documents) for name in (*QUALITY, *REPETITION)}}))


def use_words(split: Callable[..., list[str]]) -> None:
    """Each text is split once, not once a rule."""
    quality.split_into_words = cache(partial(split, symbols=False) if split is our_words else split)
    repetition.split_into_words = cache(split)


def our_words(text: str, language: str, symbols: bool = True) -> list[str]:
    """Words without symbols where words are counted, and with them, case folded, in n-grams."""
    from ropewalk.clean.words import words_of

    words = words_of([text]) if symbols else words_of([text]).only
    return [text[a:b].lower() for a, b in zip(words.starts, words.ends, strict=True)]


def kept(name: str, documents: list[Document]) -> list[bool]:
    if name in QUALITY:
        off = dict.fromkeys((key for limits in QUALITY.values() for key in limits), 0)
        one = GopherQualityFilter(**{**off, **QUALITY[name]})
    else:
        off = dict.fromkeys((key for limits in REPETITION.values() for key in limits), 0)
        one = GopherRepetitionFilter(**{**off, **NO_LIMIT, **REPETITION[name]})
    result = []
    for document in documents:
        try:
            result.append(one.filter(document) is True)
        except ZeroDivisionError:  # no words or no lines
            result.append(False)
    return result


main()
