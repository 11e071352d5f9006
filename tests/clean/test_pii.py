"""Personal data is found where it is, few other things are taken for it, and time is linear in the text."""

import random
import time

import pytest

from ropewalk.clean.pii import Pii, luhn
from ropewalk.clean.step import SPANS, Texts

from .samples import ODD, pages

HIGH = "q7Zx" + "2mK9pL4vR8tW1nB6"
"""Looks random, is nobody's."""


def found(text: str) -> list[tuple[str, str]]:
    spans = Pii().map(Texts(["before 1.2", text, "after"]))["pii"].to_pylist()[1]
    return [(text[s["start"] : s["end"]], s["kind"]) for s in spans]


@pytest.mark.parametrize(
    ("text", "expected", "kind"),
    [
        ("Write to jane.doe+x@mail.ropewalk.org.", "jane.doe+x@mail.ropewalk.org", "email"),
        ("ping 74.125.224.84!", "74.125.224.84", "ip"),
        ("at 192.168.1.17:8080", "192.168.1.17", "private_ip"),
        ("digits of two scripts: 25\u0662.103.14.99", None, ""),
        ("at 192.0.2.17", "192.0.2.17", "example_ip"),
        ("host 2001:4860:4860::8888 up", "2001:4860:4860::8888", "ip"),
        ("2001:db8:85a3::8a2e:370:7334", "2001:db8:85a3::8a2e:370:7334", "example_ip"),
        ("Call +41 44 668 18 00 now", "+41 44 668 18 00", "phone"),
        ("Call +49 (0)30 1234567.", "+49 (0)30 1234567", "phone"),
        ("Call (415) 555-2671 or", "(415) 555-2671", "phone"),
        ("Call 415-555-2671.", "415-555-2671", "phone"),
        ("card 4111 1111 1111 1111x", None, ""),
        ("card 4242 4242 4242 4242", None, ""),  # two digits only: a test number
        ("card 4539-1488-0343-6467.", "4539-1488-0343-6467", "card"),
        ("card 378282246310005", "378282246310005", "card"),
        ("card 4539-1488-0343-6468", None, ""),
        ("DE89 3704 0044 0532 0130 00 is it", "DE89 3704 0044 0532 0130 00", "iban"),
        ("GB82WEST12345698765432.", "GB82WEST12345698765432", "iban"),
        ("GB83WEST12345698765432.", None, ""),
        (f'API_KEY = "{HIGH}"', HIGH, "secret"),
        (f"password: {HIGH}", HIGH, "secret"),
        ("AKIA" + "Q7ZX2MK3PL4VR5TW", "AKIA" + "Q7ZX2MK3PL4VR5TW", "secret"),
        ("token ghp_" + "a1B2" * 9, "ghp_" + "a1B2" * 9, "secret"),
    ],
)
def test_each_kind_is_found_in_its_place(text, expected, kind):
    assert found(text) == ([(expected, kind)] if expected else [])


def test_private_keys_are_found_whole():
    block = "-----BEGIN RSA PRIVATE KEY-----\n" + "abcd\n" * 20 + "-----END RSA PRIVATE KEY-----"
    assert found(f"see\n{block}\nend") == [(block, "secret")]


@pytest.mark.parametrize(
    "text",
    [
        "Python 3.14.0.1, version 1.22.33.44, 2.0.0.1 and section 4.3.2.1",
        "On 2024-01-02 at 12:30:45, or 12:30:45:99, 02/03/2024, in 1998-2004",
        "std::fs::File a::b::c dead::beef ffff::add",
        "user@example.com, a@b.test, @decorator, git@github.com:x/y, icon@2x.png, x @ y",
        "1+23456789012, +0200, (2+3)*4, i += 1234567, 123-4567, 111-222-3333 x",
        "ISBN 978-3-16-148410-0, 1234567890123456, 0000 0000 0000 0000",
        "token = get_token_from_environment_variable1, secret: 1234567890123456789",
        "sha256: 0123456789 key=value password = hunter2",
    ],
)
def test_what_only_looks_like_it_is_left(text):
    assert found(text) == []


def test_real_documentation_has_addresses_and_little_else(shared):
    """700 pages of PEPs, the Rust book and prose: names of lists and authors, addresses in examples."""
    texts = pages(shared, 700)
    kinds = [s["kind"] for row in Pii().map(Texts(texts))["pii"].to_pylist() for s in row]
    assert kinds.count("email") > 50
    assert sum(kind not in ("email", "private_ip", "example_ip") for kind in kinds) <= 3


def test_places_are_apart_and_neighbours_do_not_matter(shared):
    texts = [*ODD, f"password=jane@mail.ropewalk.org 4539-1488-0343-6467 key: {HIGH}", *pages(shared, 40)]
    whole = Pii().map(Texts(texts))
    assert whole.schema.field("pii").type == SPANS
    assert set(whole.column_names) == set(Pii.attributes)
    for text, row in zip(texts, whole.to_pylist(), strict=True):
        ends = [0, *(s["end"] for s in row["pii"])]
        assert all(s["start"] >= end for s, end in zip(row["pii"], ends, strict=False))
        assert Pii().map(Texts([text])).to_pylist() == [row]
    assert Pii().map(Texts([])).num_rows == 0


def test_the_check_digit_notices_every_wrong_digit():
    valid = "4539148803436467"
    assert luhn(valid)
    others = [(i, str((int(c) + k) % 10)) for i, c in enumerate(valid) for k in range(1, 10)]
    wrong = [valid[:i] + c + valid[i + 1 :] for i, c in others]
    assert not any(map(luhn, wrong))


UNITS = [
    "a", "1", "1.", "1:", "a.", "@", "a@", "a@b", "a@b.", "a@b.c", "a@b.cd-", "+1", "+1 ", "1 ", "1-", "(1",
    "(123) ", "123-", "4111 ", "4" * 4 + "-", "+12345678", "AKIA", "ghp_", "eyJaaaaaaaaa.", "sk-", "xoxb-",
    "eyJaaaaaaaaa.eyJ", "GB82 ", "GB82", "DE89 3704 0044 ", "token=", "key:", "secret", "password = 'a1",
    "-----BEGIN PRIVATE KEY-----", "-----BEGIN A ", "PRIVATE KEY", "::", "a::", "1::", "a1:", "=", "1.1.1.1.",
    "255.", "_", "\n", "🙂@",
]  # fmt: skip


def seconds(text: str) -> float:
    texts = Texts([text])
    assert len(texts.words)
    start = time.process_time()
    Pii().map(texts)
    return time.process_time() - start


@pytest.mark.parametrize("unit", UNITS)
def test_time_is_linear_in_hostile_texts(unit):
    """A megabyte takes under 3 seconds of the processor: a quadratic search of it would take hours."""
    assert seconds("x" + unit * (1_000_000 // len(unit))) < 3


def test_time_is_linear_in_mixtures_of_hostile_parts():
    rng = random.Random(0)
    for _ in range(4):
        parts = rng.sample(UNITS, 4)
        assert seconds("x" + "".join(rng.choices(parts, k=200_000))[:1_000_000]) < 4, parts
