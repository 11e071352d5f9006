"""Finding items of evaluation sets in training texts. In: items and texts. Out: attributes, an account.

May import: numpy, pyarrow, the rest of `clean`, files, errors.
"""

from ropewalk.clean.contamination.account import Account
from ropewalk.clean.contamination.items import EvaluationItem
from ropewalk.clean.contamination.step import Contamination

__all__ = ["Account", "Contamination", "EvaluationItem"]
