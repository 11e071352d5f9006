"""MinHash: sets of shingles as a few numbers that agree as often as the sets do."""

import math

import numpy as np

from ropewalk.clean.arrays import opens
from ropewalk.clean.words import Words, mix
from ropewalk.errors import UserError

EMPTY = np.uint64(2**64 - 1)
PERMUTATIONS = 512
"""At most: a signature of 4 kB."""
TEXTS_AT_ONCE = 512
"""Their sketches should stay in the cache of a core."""
_ROUND = np.uint64(0x9E3779B97F4A7C15)


def shingles_of(words: Words, n: int) -> tuple[np.ndarray, np.ndarray]:
    """(hashes uint64 [m], text int64 [m]) of all runs of n words in each of the texts, which rise. A text of
    fewer words has them all as its one shingle. `words` should be without symbols."""
    found, first = words.ngrams(n)
    hashes, documents = [found], [words.document[first]]
    short = words.where((words.counts < n)[words.document])
    for count in range(1, n) if len(short) else ():
        some = short.where((short.counts == count)[short.document])
        found, first = some.ngrams(count)
        hashes.append(found)
        documents.append(some.document[first])
    document = np.concatenate(documents)
    order = np.argsort(document, kind="stable") if len(short) else slice(None)
    return np.concatenate(hashes)[order], document[order]


def signatures(hashes: np.ndarray, document: np.ndarray, texts: int, size: int) -> np.ndarray:
    """[texts, size] uint64 from shingles (hashes uint64 [m], document int64 [m], which rises). For two texts
    each place is equal with a probability of the Jaccard similarity J of their sets, and the share of equal
    places lies as close to J as with `size` independent permutations, or closer. EMPTY everywhere where there
    is no shingle.

    Fast similarity sketching (Dahlgaard, Knudsen, Thorup, FOCS 2017): in round i every shingle falls into one
    place and leaves there (i, value), unless something lower is there, until no place is empty. After `size`
    rounds every shingle goes to place i - size. That is about size * ln(size) hashes of a text, and at least
    one of each shingle, instead of size for each shingle.
    """
    found = np.full((texts, size), EMPTY)
    for begin in range(0, texts, TEXTS_AT_ONCE):
        some = found[begin : begin + TEXTS_AT_ONCE]
        here = slice(*np.searchsorted(document, [begin, begin + TEXTS_AT_ONCE]))
        _sketch(hashes[here], document[here] - begin, some)
    return found


def _sketch(hashes: np.ndarray, document: np.ndarray, found: np.ndarray) -> None:
    """Lowers `found` [texts, size], which is EMPTY. Several rounds at once, ever more of them, as ever fewer
    texts need more: what a round leaves in a full place is too high to matter."""
    size = found.shape[1]
    begin, end = 0, 1
    while len(hashes) and begin < 2 * size:
        rounds = np.arange(begin, end, dtype=np.uint64)[:, None]
        drawn = mix(hashes ^ mix(rounds * _ROUND + np.uint64(1)))
        high, low = drawn >> np.uint64(32), drawn & np.uint64(0xFFFFFFFF)
        if begin < size:
            place = (high * np.uint64(size)) >> np.uint64(32)
        else:
            place = np.broadcast_to(rounds - np.uint64(size), drawn.shape)
        cell = document * size + place.astype(np.int64)
        np.minimum.at(found.reshape(-1), cell.ravel(), ((rounds << np.uint64(32)) | low).ravel())
        open_ = (found == EMPTY).any(axis=1)[document]
        hashes, document = hashes[open_], document[open_]
        if end == 4:  # one word a thousand times would be drawn in every round as often
            order = np.lexsort((hashes, document))
            order = order[opens(hashes[order], document[order])]
            hashes, document = hashes[order], document[order]
        begin, end = end, min(2 * end, size if end < size else 2 * size)


def band_hashes(signature: np.ndarray, bands: int) -> np.ndarray:
    """[bands, texts] uint64: equal where a band of a signature [texts, bands * rows] is."""
    texts, size = signature.shape
    cut = signature.reshape(texts, bands, size // bands)
    found = np.zeros((texts, bands), np.uint64)
    for row in range(size // bands):
        found = mix(found ^ cut[:, :, row]) + np.uint64(row + 1)
    return found.T


def candidate_probability(similarity: float, bands: int, rows: int) -> float:
    """That two sets agree in some band: 1 - (1 - s^r)^b (Leskovec, Rajaraman, Ullman, Mining of Massive
    Datasets, 3.4)."""
    return 1 - (1 - similarity**rows) ** bands


def bands_for(threshold: float, recall: float, noise: float = 0.02) -> tuple[int, int]:
    """(bands, rows) with the fewest permutations, bands * rows, such that two texts at the threshold are
    compared with a probability of `recall`, and two that are half as similar with one of `noise` at most.

    Without the second one row would always do: everything would be compared with everything. For low
    thresholds, where it would take more than PERMUTATIONS, it is as low as these allow. Raises UserError.
    """
    if not (0 < threshold < 1 and 0 < recall < 1):
        raise UserError(
            f"near duplicates: threshold and recall must lie between 0 and 1, not be {threshold} and {recall}"
        )
    shapes = []
    for rows in range(1, PERMUTATIONS + 1):
        missed = 1 - threshold**rows
        bands = math.ceil(math.log1p(-recall) / math.log(missed) - 1e-9) if missed < 1 else PERMUTATIONS
        if rows == 1 or bands * rows <= PERMUTATIONS:
            above = max(0.0, candidate_probability(threshold / 2, bands, rows) - noise)
            shapes.append((above, bands * rows, rows))
    _, permutations, rows = min(shapes)
    return permutations // rows, rows
