"""The report's numbers are those of the clusters, and what it shows are their texts."""

import json
import random
from collections import Counter

from ropewalk.clean.duplicates.exact import ExactDuplicates
from ropewalk.clean.duplicates.minhash import NearDuplicates
from ropewalk.clean.duplicates.report import LINE, cluster_lines, cluster_report, first_line

from .parts import MemoryParts
from .real import changed, jaccard, pages, shingles


def test_sizes_members_and_similarities(shared):
    rng = random.Random(0)
    originals = pages(shared, 40)
    texts = originals + [changed(rng.choice(originals[:8]), 0.01, rng) for _ in range(60)]
    rng.shuffle(texts)
    preference = [float(rng.randrange(3)) for _ in texts]
    step = NearDuplicates()
    parts = MemoryParts(step, texts, [0, 70, 30], preference=preference)
    tables = list(step.reduce(parts))
    report = json.loads(json.dumps(cluster_report(parts, tables, clusters=3, members=4)))
    of = [value for table in tables for value in table["near_duplicate_of"].to_pylist()]
    sizes = Counter(value for value in of if value >= 0)
    assert report["rows"] == 100
    assert report["duplicates"] == sum(value >= 0 for value in of) > 40
    assert report["clusters"] == len(sizes)
    assert report["sizes"] == {str(n + 1): count for n, count in sorted(Counter(sizes.values()).items())}
    assert [cluster["size"] for cluster in report["largest"]] == sorted(n + 1 for n in sizes.values())[:-4:-1]
    for cluster in report["largest"]:
        kept, *others = cluster["members"]
        assert len(others) == min(4, cluster["size"]) - 1
        assert kept["similarity"] == 1
        for member in cluster["members"]:
            assert of[member["row"]] == (-1 if member is kept else kept["row"])
            assert member["row"] == [0, 0, 70][member["part"]] + member["place"]
            assert member["first_line"] == first_line(texts[member["row"]])
            true = jaccard(shingles(texts[kept["row"]], 5), shingles(texts[member["row"]], 5))
            assert abs(member["similarity"] - true) < 1e-3
    lines = cluster_lines(report)
    assert "100 rows" in lines[0]
    assert len(lines) == 1 + sum(1 + len(cluster["members"]) for cluster in report["largest"])


def test_without_duplicates_there_is_nothing_to_show():
    step = ExactDuplicates()
    parts = MemoryParts(step, ["a", "b"])
    report = cluster_report(parts, list(step.reduce(parts)), column="exact_duplicate_of")
    assert report == {"rows": 2, "duplicates": 0, "clusters": 0, "sizes": {}, "largest": []}


def test_first_line():
    assert first_line("\n  \n a title \nmore") == "a title"
    assert first_line(" \n") == ""
    assert len(first_line("x" * 1000)) == LINE
