"""How often words of some kinds come up: a signal for looking at data, and a poor judge of it.

A list of words knows no context. It finds medical texts, law reports, novels, quotations and history; it
takes dialects for abuse, and words that the people they are aimed at use for themselves; and it misses
whatever is hateful in polite words. Filtering by such lists takes away what minorities write about themselves
first (Dodge et al. 2021, "Documenting large webtext corpora", on C4's list). So no published rule here uses
them, and nothing is dropped unless a recipe says so. The lists are short, English, and of Ropewalk's choice.
"""

import codecs
from collections.abc import Mapping

import numpy as np
import pyarrow as pa

from ropewalk.clean.lines import share
from ropewalk.clean.step import Step, Texts
from ropewalk.clean.words import hashes_of

_ROT13 = {  # so that nobody has to read them in passing; anybody can: codecs.decode(text, "rot13")
    "profanity": (
        "shpx shpxf shpxrq shpxre shpxref shpxvat zbgureshpxre zbgureshpxref fuvg fuvgf fuvggl "
        "ohyyfuvg ovgpu ovgpurf onfgneq onfgneqf nffubyr nffubyrf qvpxurnq qvpxurnqf nefrubyr jnaxre "
        "jnaxref obyybpxf gjng gjngf cevpx cevpxf penc penccl tbqqnza qnza cvff cvffrq"
    ),
    "sexual": (
        "cbea cbeab cbeabtencul kkk ahqr ahqrf anxrq pbpx pbpxf phag phagf qvpx qvpxf chffl chffvrf "
        "gvgf gvggvrf obbof oybjwbo oybjwbof unaqwbo qvyqb qvyqbf betnfz betnfzf phz phzfubg nany "
        "zvys uragnv ubeal fyhg fyhgf fyhggl juber juberf znfgheongr znfgheongvat znfgheongvba "
        "rebgvp rebgvpn srgvfu vaprfg tnatonat guerrfbzr"
    ),
    "violence": (
        "xvyy xvyyf xvyyrq xvyyvat zheqre zheqref zheqrerq encr encrf encrq encvfg encvfgf fgno "
        "fgnoorq fubbg fubbgvat orurnq orurnqrq orurnqvat gbegher gbegherq znffnper ylapu ylapurq "
        "fynhtugre fynhtugrerq trabpvqr obzo obzovat fgenatyr fgenatyrq"
    ),
    "slurs": (
        "avttre avttref snttbg snttbgf xvxr xvxrf puvax puvaxf fcvp fcvpf jrgonpx jrgonpxf genaal "
        "genaavrf ergneq ergneqf ergneqrq"
    ),
}
IDENTITY = (
    "woman women man men girl girls boy boys female male mother father nurse nurses black white asian latino "
    "latina african european american indian chinese arab arabs muslim muslims islam christian christians "
    "jew jews jewish hindu hindus buddhist atheist gay lesbian bisexual transgender queer straight immigrant "
    "immigrants refugee refugees disabled blind deaf autistic elderly"
)
"""Names of groups of people, none of them bad: who is spoken of at all, before and after a filter."""
LISTS = {**{name: codecs.decode(text, "rot13") for name, text in _ROT13.items()}, "identity": IDENTITY}


class Screening(Step):
    """Words of each list for 1,000 words of the text."""

    name = "screening"
    attributes: Mapping[str, str] = {
        "profanity": "swear words for 1,000 words (English; by a list, which knows no context)",
        "sexual": "sexual words for 1,000 words (likewise)",
        "violence": "words of violence for 1,000 words (likewise; news and history have them too)",
        "slurs": "insulting names of groups for 1,000 words (likewise; some groups use theirs themselves)",
        "identity": "neutral names of groups of people for 1,000 words: to see whom a filter takes away",
    }

    def map(self, texts: Texts) -> pa.Table:
        words = texts.words.only
        columns = {}
        for name, listed in LISTS.items():
            found = words.document[np.isin(words.hashes, hashes_of(listed))]
            columns[name] = share(1000 * np.bincount(found, minlength=len(texts)), words.counts)
        return pa.table(columns)
