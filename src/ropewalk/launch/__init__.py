"""The launch room: starts a recipe's processes with torchrun: here, by SLURM, or by Kubernetes.

In: a recipe, a place, how many machines and processes. Out: a script or manifest, which is run or handed in.
May import: recipe in the entry; what renders takes plain values. No torch.
"""

from ropewalk import make_callable
from ropewalk.launch.entry import Launched, launch

__all__ = ["Launched", "launch"]

make_callable(__name__)  # rw.launch is this module and the function
