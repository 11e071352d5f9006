"""Personal data and secrets in texts: places and counts.

Only what has a form of its own can be found so: names and addresses of people cannot. Rather something is
missed than a version number or a date is taken for a telephone: each kind has a check besides its form.
Candidates are found in whole batches, as short runs of words and symbols, and only those are looked at; so
time is linear in the text.
"""

import ipaddress
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from ropewalk.clean.secrets import find_secrets
from ropewalk.clean.step import Step, Texts, spans_of
from ropewalk.clean.words import Words

KINDS = ("email", "ip", "private_ip", "example_ip", "phone", "card", "iban", "secret")
Place = tuple[int, int, int, str]
"""text, start, end, kind"""


class Pii(Step):
    """Where there is personal data, and of which kind."""

    name = "pii"
    attributes: Mapping[str, str] = {
        "pii": f"places of personal data and secrets; kinds: {', '.join(KINDS)}",
        "emails": "e-mail addresses, those of example domains (RFC 2606) left out",
        "ips": "public IPv4 and IPv6 addresses; private and documentation ranges are kinds of their own",
        "phones": "telephone numbers in international form (+ and the country) or North American form",
        "cards": "payment card numbers with a valid check digit (Luhn) of a known issuer",
        "ibans": "bank account numbers with valid check digits (ISO 13616)",
        "secrets": "keys of cloud services, private keys, tokens, random values assigned to such names",
    }

    def map(self, texts: Texts) -> pa.Table:
        all_texts = list(texts.texts)
        found: list[Place] = [(*place, "secret") for place in find_secrets(all_texts, texts.words)]
        for find in (_emails, _ipv4, _ipv6, _phones, _cards, _ibans):
            found.extend(find(all_texts, texts.words))
        places = _apart(found)
        document, starts, ends = (np.array([p[k] for p in places], np.int64) for k in range(3))
        kinds = np.array([KINDS.index(place[3]) for place in places], np.int64)
        columns: dict[str, Any] = {"pii": spans_of(len(texts), document, starts, ends, kinds, KINDS)}
        for name, kind in zip(list(self.attributes)[1:], (0, 1, 4, 5, 6, 7), strict=True):
            columns[name] = np.bincount(document[kinds == kind], minlength=len(texts))
        return pa.table(columns)


def _apart(found: list[Place]) -> list[Place]:
    """In order, without those that lie in another or overlap an earlier one."""
    kept: list[Place] = []
    for place in sorted(set(found), key=lambda p: (p[0], p[1], -p[2], p[3])):
        if not kept or kept[-1][0] != place[0] or kept[-1][2] <= place[1]:
            kept.append(place)
    return kept


_EMAIL = re.compile(
    r"(?<![\w.+%-])([A-Za-z0-9][\w.+%-]{0,63})@([A-Za-z0-9-]{1,63}(?:\.[A-Za-z0-9-]{1,63}){1,8})", re.ASCII
)
_EXAMPLE = re.compile(r"(?:^|\.)(?:example(?:\.(?:com|org|net|edu))?|test|invalid|localhost|local)$", re.I)
_FILES = set("png jpg jpeg gif svg webp ico js css py html json md txt so h c cpp rs go".split())


def _emails(texts: list[str], words: Words) -> Iterator[Place]:
    for number, text in enumerate(texts):
        if "@" not in text:
            continue
        for match in _EMAIL.finditer(text):
            domain = match[2].rstrip("-")
            last = domain.rpartition(".")[2].lower()
            known = last.isalpha() and len(last) > 1 and last not in _FILES
            if known and match[1] != "git" and not _EXAMPLE.search(domain):
                yield number, match.start(), match.start(2) + len(domain), "email"


def _runs(words: Words, lengths: list[tuple[int, int]], between: str) -> np.ndarray:
    """Numbers of the words with which runs of digits begin: of lengths[k][0] to lengths[k][1] digits each,
    between each two one symbol of `between`, nothing else."""
    sizes, codes = words.ends - words.starts, words.codes
    wanted = np.array([ord(c) for c in between], np.uint32)
    at = np.arange(max(len(words) - 2 * len(lengths) + 2, 0))
    for k, (least, most) in enumerate(lengths):
        here = at + 2 * k
        first = codes[words.starts[here]]
        at = at[(sizes[here] >= least) & (sizes[here] <= most) & (first >= ord("0")) & (first <= ord("9"))]
        if k + 1 < len(lengths):
            symbol = at + 2 * k + 1
            joined = (words.starts[symbol] == words.ends[symbol - 1]) & (sizes[symbol] == 1)
            joined &= words.ends[symbol] == words.starts[symbol + 1]
            joined &= np.isin(codes[words.starts[symbol]], wanted)
            at = at[joined]
    return at[words.document[at] == words.document[at + 2 * len(lengths) - 2]]


def _match_at(
    pattern: re.Pattern[str], texts: list[str], words: Words, at: np.ndarray, before: int = 0
) -> Iterator[tuple[int, re.Match[str]]]:
    """(text, match) where the pattern matches at one of the words with these numbers, or so many characters
    before it."""
    documents = words.document[at]
    places = words.starts[at] - words.begins[documents]
    for document, place in zip(documents.tolist(), places.tolist(), strict=True):
        if match := pattern.match(texts[document], max(place - before, 0)):
            yield document, match


_IPV4 = re.compile(r"(?<![\w.-])[0-9]{1,3}\.[0-9]{1,3}\.[0-9]{1,3}\.[0-9]{1,3}(?![\w-]|\.\w)")
_VERSION = re.compile(r"(?:version|release|section|chapter|python|[=<>~])\s{0,2}$", re.I)
_DOCUMENTATION = [
    ipaddress.ip_network(name)
    for name in ("192.0.2.0/24", "198.51.100.0/24", "203.0.113.0/24", "2001:db8::/32")
]


def _ipv4(texts: list[str], words: Words) -> Iterator[Place]:
    for document, match in _match_at(_IPV4, texts, words, _runs(words, [(1, 3)] * 4, ".")):
        parts = [int(part) for part in match[0].split(".")]
        before = texts[document][max(0, match.start() - 12) : match.start()]
        # Four small numbers are likelier a version or a section than an address.
        if max(parts) > 255 or (max(parts) < 20 and parts[0] != 10) or _VERSION.search(before):
            continue
        if any(len(part) > 1 and part[0] == "0" for part in match[0].split(".")):
            continue
        yield document, *match.span(), _kind_of_address(match[0])


def _kind_of_address(text: str) -> str:
    address = ipaddress.ip_address(text)
    if any(address in network for network in _DOCUMENTATION if network.version == address.version):
        return "example_ip"
    return "ip" if address.is_global else "private_ip"


_IPV6 = re.compile(r"(?<![\w:.])[0-9A-Fa-f]{1,4}(?::{1,2}[0-9A-Fa-f]{1,4}){2,7}(?![\w:])")


def _ipv6(texts: list[str], words: Words) -> Iterator[Place]:
    for number, text in enumerate(texts):
        if text.count(":") < 3:
            continue
        for match in _IPV6.finditer(text) if "::" in text or text.count(":") > 6 else ():
            groups = match[0].replace("::", ":").split(":")
            # a::b is a name in many programming languages, 10:20:30 a time
            if sum(len(group) > 2 for group in groups) < 2 or not any(c.isdigit() for c in match[0]):
                continue
            try:
                yield number, *match.span(), _kind_of_address(match[0])
            except ValueError:
                continue


_INTERNATIONAL = re.compile(r"(?<![\w)+.=*/\]-])\+[1-9](?:[ .-]?[\d()]){7,24}(?![\w+*/=]|[.,-]\d)", re.ASCII)
_AMERICAN = re.compile(
    r"(?<![\w.+/-])(?:1[-. ])?\(?([2-9]\d\d)\)?[-. ]\s?([2-9]\d\d)[-. ]\d{4}(?![\w/-]|\.\d)", re.ASCII
)


def _phones(texts: list[str], words: Words) -> Iterator[Place]:
    for number, text in enumerate(texts):
        if "+" in text:
            for match in _INTERNATIONAL.finditer(text):
                digits = sum(c.isdigit() for c in match[0])
                if 8 <= digits <= 15 and (digits >= 10 or match[0][1:].strip("0123456789")):
                    yield number, *match.span(), "phone"
    sizes, first = words.ends - words.starts, words.codes[words.starts]
    digits = (first >= ord("0")) & (first <= ord("9")) & (sizes == 3)
    opened = words.codes[np.maximum(words.starts, 1) - 1] == ord("(")
    for before in (0, 1):
        at = np.flatnonzero(digits & opened) if before else np.flatnonzero(digits)
        for document, match in _match_at(_AMERICAN, texts, words, at, before):
            yield document, *match.span(), "phone"


_CARD = re.compile(
    r"(?<![\w.+-])(?:\d{13,19}|\d{4}([ -])\d{4}\1\d{4}\1\d{4}|\d{4}([ -])\d{6}\2\d{4,5})(?![\w-]|[ .]\d)",
    re.ASCII,
)
_ISSUER = re.compile(
    r"4(?:\d{12}|\d{15}|\d{18})|(?:5[1-5]|2[2-7])\d{14}|3[47]\d{13}|3(?:0[0-5]|[68]\d)\d{11}"
    r"|6(?:011|5\d\d|4[4-9]\d)\d{12}|35\d{14}|62\d{14,17}"
)


def _cards(texts: list[str], words: Words) -> Iterator[Place]:
    sizes, first = words.ends - words.starts, words.codes[words.starts]
    digit = (first >= ord("2")) & (first <= ord("6"))
    at = np.flatnonzero(digit & ((sizes == 4) | (sizes >= 13) & (sizes <= 19)))
    for document, match in _match_at(_CARD, texts, words, at):
        digits = re.sub(r"\D", "", match[0])
        if _ISSUER.fullmatch(digits) and luhn(digits) and len(set(digits)) > 3:
            yield document, *match.span(), "card"


def luhn(digits: str) -> bool:
    """Whether the last digit is the check digit (ISO/IEC 7812-1, annex B)."""
    doubled = [int(d) * 2 for d in digits[-2::-2]]
    return (sum(map(int, digits[-1::-2])) + sum(d - 9 if d > 9 else d for d in doubled)) % 10 == 0


_IBAN = re.compile(
    r"(?<![\w-])[A-Z]{2}\d\d(?:[A-Z0-9]{11,30}|(?: [A-Z0-9]{4}){2,7}(?: [A-Z0-9]{1,3})?)(?![A-Za-z0-9])",
    re.ASCII,
)
_LENGTHS = {  # the registry of ISO 13616
    text[:2]: int(text[2:])
    for text in (
        "AD24 AE23 AL28 AT20 AZ28 BA20 BE16 BG22 BH22 BR29 BY28 CH21 CR22 CY28 CZ24 DE22 DK18 DO28 "
        "EE20 EG29 ES24 FI18 FO18 FR27 GB22 GE22 GI23 GL18 GR27 GT28 HR21 HU28 IE22 IL23 IQ23 IS26 "
        "IT27 JO30 KW30 KZ20 LB28 LC32 LI21 LT20 LU20 LV21 LY25 MC27 MD24 ME22 MK19 MR27 MT31 MU30 "
        "NL18 NO15 PK24 PL28 PS29 PT25 QA29 RO24 RS22 SA24 SC31 SE24 SI19 SK24 SM27 ST25 SV28 TL23 "
        "TN24 TR26 UA29 VA22 VG24 XK20"
    ).split()
}


def _ibans(texts: list[str], words: Words) -> Iterator[Place]:
    sizes = words.ends - words.starts
    long = np.flatnonzero((sizes == 4) | (sizes >= 15) & (sizes <= 34))
    code = [words.codes[words.starts[long] + k] for k in range(4)]
    capitals = (code[0] >= 65) & (code[0] <= 90) & (code[1] >= 65) & (code[1] <= 90)
    digits = (code[2] >= 48) & (code[2] <= 57) & (code[3] >= 48) & (code[3] <= 57)
    for document, match in _match_at(_IBAN, texts, words, long[capitals & digits]):
        plain = match[0].replace(" ", "")[: _LENGTHS.get(match[0][:2], 0)]
        turned = "".join(str(int(c, 36)) for c in plain[4:] + plain[:4])
        if turned and len(plain) == _LENGTHS[plain[:2]] and int(turned) % 97 == 1:
            end = match.start() + _place_after(match[0], len(plain))
            yield document, match.start(), end, "iban"


def _place_after(text: str, letters: int) -> int:
    """How far the text's first so many characters that are no spaces go."""
    return [i for i, c in enumerate(text) if c != " "][letters - 1] + 1
