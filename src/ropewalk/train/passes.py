"""How often a run sees each of its sources, in words."""

from ropewalk.data import Loader

MOST_PASSES = 4.0
"""Up to here repeated text is worth nearly what new text is (Muennighoff et al. 2023, arXiv 2305.16264)."""


def stated(loader: Loader, samples: int) -> str:
    """One clause for each source of a mixture; nothing where every document comes once in an epoch."""
    if not loader.mixture.parts:
        return ""
    each, whole = loader.mixture.repeats(), loader.passes(samples)
    return "; ".join(f"{name} {each[name]:.3g} times an epoch, {whole[name]:.3g} in the run" for name in each)


def warnings(loader: Loader, samples: int) -> list[str]:
    """A sentence for each source that is seen more than MOST_PASSES times."""
    return [
        f"{name or 'the training data'}: seen {times:.3g} times in this run; text repeated more than about "
        f"{MOST_PASSES:.0f} times teaches less and less (arXiv 2305.16264): train for less, "
        + ("give this source less weight, or add documents to it" if name else "or add documents")
        for name, times in loader.passes(samples).items()
        if times > MOST_PASSES
    ]
