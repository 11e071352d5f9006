"""What is in the data twice. In: texts, and what `map` wrote of all of them. Out: `duplicate_of` and spans.

May import: numpy, pyarrow, the room's words and steps; other libraries inside functions.
"""

from ropewalk.clean.duplicates.exact import ExactDuplicates
from ropewalk.clean.duplicates.minhash import NearDuplicates
from ropewalk.clean.duplicates.pieces import DuplicateLines, DuplicateParagraphs
from ropewalk.clean.duplicates.report import cluster_lines, cluster_report
from ropewalk.clean.duplicates.substrings import DuplicateSubstrings
from ropewalk.clean.duplicates.vectors import SimilarVectors

__all__ = [
    "DuplicateLines",
    "DuplicateParagraphs",
    "DuplicateSubstrings",
    "ExactDuplicates",
    "NearDuplicates",
    "SimilarVectors",
    "cluster_lines",
    "cluster_report",
]
