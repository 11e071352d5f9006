"""In: a model (loaded or by name) and a recipe's evaluate section. Out: an `Evaluation`, kept in two files.

May import: data, serve, model, ops, files; `recipe` in the entry function only.
"""

from ropewalk import make_callable
from ropewalk.evaluate.clean_subset import CleanSubset, clean_subset, read_account
from ropewalk.evaluate.entry import Evaluation, check_files, evaluate
from ropewalk.evaluate.panel import Sample, panel_markdown, run_panel
from ropewalk.evaluate.perplexity import PerplexityResult, perplexity
from ropewalk.evaluate.tasks import TaskResult, run_task

__all__ = [
    "CleanSubset",
    "Evaluation",
    "PerplexityResult",
    "Sample",
    "TaskResult",
    "check_files",
    "clean_subset",
    "evaluate",
    "panel_markdown",
    "perplexity",
    "read_account",
    "run_panel",
    "run_task",
]

make_callable(__name__)  # rw.evaluate is this module and the function
