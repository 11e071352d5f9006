"""What was done, kept on the disk.

In: records, texts and facts about a run. Out: a run directory, and its history read back.
May import: the standard library, yaml and `ropewalk.files`; never torch.
"""

from ropewalk.track.environment import environment
from ropewalk.track.history import RunSummary, diff_runs, list_runs, summarize
from ropewalk.track.run import RunDirectory

__all__ = ["RunDirectory", "RunSummary", "diff_runs", "environment", "list_runs", "summarize"]
