"""Finding items of evaluation sets in training texts. In: items and texts. Out: attributes, an account.

May import: numpy, pyarrow, the rest of `clean`, files, errors; model inside a function.
"""

from ropewalk.clean.contamination.account import Account
from ropewalk.clean.contamination.items import EvaluationItem
from ropewalk.clean.contamination.paraphrase import Paraphrases
from ropewalk.clean.contamination.step import Contamination

__all__ = ["Account", "Contamination", "EvaluationItem", "Paraphrases"]
