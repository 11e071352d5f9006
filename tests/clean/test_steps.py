"""What every step promises: its attributes, a row for each text, the same in any batch, whatever the text."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ropewalk.clean.c4 import C4
from ropewalk.clean.classifier import Classifier, QualityClassifier
from ropewalk.clean.code import Code
from ropewalk.clean.language import Language
from ropewalk.clean.pii import Pii
from ropewalk.clean.quality import Quality
from ropewalk.clean.repair import Repair
from ropewalk.clean.repetition import Repetition
from ropewalk.clean.screening import Screening
from ropewalk.clean.step import SPANS, Texts

WEIGHTS = np.random.default_rng(0).normal(size=1 << 12).astype(np.float32)
STEPS = [
    Quality(), Repetition(), C4(), Language(), Pii(), Screening(), Code(), Repair(),
    QualityClassifier(Classifier(WEIGHTS, 1.0, 0.0, {})),
]  # fmt: skip
PIECES = [
    "the", "a", "Word", " ", "  ", "\n", "\n\n", "\r\n", ".", "...", "…", "#", "- ", "• ", "日本", "é",
    "e\u0301", "\ud800", "\x00", "\x85", "🙂", "1", "12.5", "{", "};", "()", "=", "@", "a@b.io", "key=",
    "4539148803436467", "+41446681800", "lorem ipsum", "javascript", "SPDX-License-Identifier: ",
    "Ð¿Ñ€", "\ufeff", "ǅ", "İ", "\u3000", "word " * 9,
]  # fmt: skip
ANY_TEXT = st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=5)), max_size=12).map("".join)


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.name)
@settings(max_examples=40, deadline=None)
@given(st.lists(ANY_TEXT, max_size=6))
def test_any_texts_get_a_row_each_which_the_others_do_not_change(step, texts):
    whole = step.map(Texts(texts))
    assert whole.column_names == list(step.attributes)
    assert whole.to_pylist() == [step.map(Texts([text])).to_pylist()[0] for text in texts]
    for name in whole.column_names:
        if whole.schema.field(name).type == SPANS:
            for text, spans in zip(texts, whole[name].to_pylist(), strict=True):
                ends = [0, *(span["end"] for span in spans)]
                assert all(s["start"] >= end for s, end in zip(spans, ends, strict=False))
                assert all(s["start"] < s["end"] <= len(text) for s in spans)


def test_no_two_steps_say_the_same_attribute_and_settings_are_json():
    import json

    names = [name for step in STEPS for name in step.attributes]
    assert len(names) == len(set(names))
    assert len({step.name for step in STEPS}) == len(STEPS)
    for step in STEPS:
        assert json.loads(json.dumps(step.settings())) == step.settings()
        types = {field.name: field.type for field in step.map(Texts([])).schema}
        assert types == {field.name: field.type for field in step.map(Texts(["a b"])).schema}, step.name
