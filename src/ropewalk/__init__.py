"""Ropewalk: a language model from raw text to a measured, served model, from one typed recipe.

    import ropewalk as rw
    rw.run("recipes/quickstart.yaml")

Every command of the command line is a function of the same name here. Nothing heavy is imported
before it is used.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ropewalk.cli.chat import chat as chat
    from ropewalk.data import prepare as prepare
    from ropewalk.lane import run as run
    from ropewalk.model import load_model as load_model
    from ropewalk.model import load_tokenizer as load_tokenizer
    from ropewalk.model import save_model as save_model
    from ropewalk.plan import estimate as estimate
    from ropewalk.plan import plan as plan
    from ropewalk.recipe import load_recipe as load_recipe
    from ropewalk.serve import generate as generate
    from ropewalk.train import parity as parity
    from ropewalk.train import resume as resume
    from ropewalk.train import spike as spike

__version__ = "0.1.0"

_HOME = {
    "load_recipe": "recipe",
    "prepare": "data",
    "train": "train",
    "resume": "train",
    "launch": "launch",
    "parity": "train",
    "spike": "train",
    "evaluate": "evaluate",
    "generate": "serve",
    "chat": "cli.chat",
    "load_model": "model",
    "load_tokenizer": "model",
    "save_model": "model",
    "doctor": "doctor",
    "plan": "plan",
    "estimate": "plan",
    "run": "lane",
    "ablate": "ablate",
}
__all__ = sorted(_HOME)


class _CommandModule(ModuleType):
    """A module that is also the command of its name: `rw.train(...)` is `ropewalk.train.train(...)`.

    Importing a submodule binds its name in the package, over any function put there; so the six
    modules that share their name with a command (train, launch, evaluate, doctor, plan, ablate) can be called
    themselves.
    """

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return getattr(self, self.__name__.rpartition(".")[2])(*arguments, **options)


def make_callable(module: str) -> None:
    """Called at the end of a module that shares its name with its command, with its `__name__`."""
    sys.modules[module].__class__ = _CommandModule


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'ropewalk' has no attribute {name!r}")
    module = import_module(f"ropewalk.{_HOME[name]}")
    return module if module.__name__ == f"ropewalk.{name}" else getattr(module, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
