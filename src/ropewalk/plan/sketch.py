"""Memory of very many layouts at once, near enough to leave out what cannot fit: the search asks it first.

What a device keeps all the time depends on how weights are divided; what it holds of tokens, on how tokens
are. So each is counted once by `step_memory`, on models of two layers and of three, and grows by the
difference.
"""

from dataclasses import dataclass, field, replace
from typing import Any

from ropewalk.plan.hardware import Cluster
from ropewalk.plan.memory import FRAGMENTS, first_stage, of_first_stage, some_layers
from ropewalk.plan.step_memory import step_memory
from ropewalk.plan.work import Work

KEPT = ("weights", "gradients", "optimizer", "masters", "gathered", "sums")
"""First words of the terms that tokens have no part in."""


@dataclass
class Sketch:
    """Remembers what it has counted, of one model."""

    where: Cluster
    _known: dict[tuple[Any, ...], tuple[float, float]] = field(default_factory=dict)

    def bytes(self, work: Work) -> float:
        """What the fullest device holds, with the runtime and half of what may be lost; to a few percent."""
        layout = work.layout
        layers, held = first_stage(work)
        tied = work.config.tie_word_embeddings or layout.pipeline > 1
        divided = (layout.tensor, layout.context)
        weights = (
            *divided,
            layout.shard,
            layout.replicate > 1,
            layout.stage,
            layout.expert,
            tied,
            work.offload,
        )
        tokens = (*divided, work.micro_batch_size, work.checkpointing, work.activation_offload)
        kept = self._of("kept", weights, work, layers)
        activations = self._of("activations", tokens, work, layers)
        passing = self._of("passing", tokens, work, layers)
        total = kept + held * activations + passing
        return total * (1 + FRAGMENTS / 2) + self.where.accelerator.context

    def _of(self, part: str, key: tuple[Any, ...], work: Work, layers: int) -> float:
        if (part, *key) not in self._known:
            stage, _ = of_first_stage(work)
            few, more = (self._counted(stage, count) for count in (2, 3))
            for name in ("kept",) if part == "kept" else ("activations", "passing"):
                grows = more[name] - few[name]
                self._known[name, *key] = (few[name] - 2 * grows, grows)
        fixed, each = self._known[part, *key]
        return fixed + layers * each

    @staticmethod
    def _counted(stage: Work, layers: int) -> dict[str, float]:
        # the last ones: of a model with some mixtures those are more often mixtures than the first
        first = max(0, stage.config.num_hidden_layers - layers)
        terms = step_memory(replace(stage, config=some_layers(stage.config, first, layers))).terms
        found = {"kept": 0.0, "activations": 0.0, "passing": 0.0}
        for name, size in terms.items():
            part = "kept" if name.startswith(KEPT) else "activations" if name == "activations" else "passing"
            found[part] += size
        return found
