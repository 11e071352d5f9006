"""Training. In: a recipe, or a run to go on with. Out: a run directory with checkpoints and metrics.

May import: recipe and track at the entry, data, serve, model, ops, adapt.
"""

from ropewalk import make_callable
from ropewalk.train.autopsy import Autopsy, DocumentLoss, spike
from ropewalk.train.checkpoint import best_checkpoint, newest_valid_checkpoint
from ropewalk.train.entry import TrainResult, resume, train
from ropewalk.train.layout_parity import Parity, parity, parity_steps

__all__ = [
    "Autopsy",
    "DocumentLoss",
    "Parity",
    "TrainResult",
    "best_checkpoint",
    "newest_valid_checkpoint",
    "parity",
    "parity_steps",
    "resume",
    "spike",
    "train",
]

make_callable(__name__)  # rw.train is this module and the function
