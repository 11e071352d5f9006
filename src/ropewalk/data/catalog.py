"""The cleaning steps there are, and what the words of the recipe's data.clean ask of them."""

from collections.abc import Mapping
from typing import Any

from ropewalk.clean.quality import Quality
from ropewalk.clean.repetition import Repetition
from ropewalk.clean.step import Step
from ropewalk.data.cleaning import Plan, rules_of


def steps_of() -> list[Step]:
    return [Quality(), Repetition()]


def plan_of(clean: Mapping[str, Any]) -> Plan:
    """Raises UserError for what cannot be."""
    return Plan(
        clean["repair"], tuple(steps_of()), rules_of(clean["rules"], clean["keep"]), {}, clean["prefer"]
    )
