"""From documents to verdicts: the steps that the rules need are run, and the rules say what is kept.

A rule is an expression over attributes, and what is not false is kept: an attribute that is unknown (null)
drops nothing. The first rule that is false is the document's verdict. Rules come in an order in which no
step that compares documents sees one that an earlier rule has dropped.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ropewalk.clean.rules import PRESETS, Rule, columns_of, steps_for
from ropewalk.clean.step import Joined, Step
from ropewalk.data.attributes import OWN, Attributes, JoinedParts
from ropewalk.data.edits import Action
from ropewalk.data.evaluation_sets import EvaluationSet
from ropewalk.data.part_files import PART
from ropewalk.data.parts import key
from ropewalk.data.verdicts import SCHEMA, edits_column
from ropewalk.errors import UserError
from ropewalk.files import atomic_file

DUPLICATE_OF = ("exact_duplicate_of", "near_duplicate_of", "similar_of")
PREFER, SCORE = "data.clean.prefer", "data.clean.score"


@dataclass(frozen=True)
class Plan:
    """How documents are cleaned: in which order steps may run, the rules that say what is kept, what becomes
    of places that steps name (attribute -> action), and attributes that are asked for besides. `prefer`: of
    duplicates the one with its highest value is kept; `score` is kept with each document. Both, and rules,
    are SQL expressions over attributes."""

    repair: bool = False
    steps: tuple[Step, ...] = ()
    rules: tuple[Rule, ...] = ()
    edits: Mapping[str, Action] = field(default_factory=dict)
    asked: tuple[str, ...] = ()
    prefer: str | None = None
    score: str | None = None
    sets: tuple[EvaluationSet, ...] = ()
    """what `contamination_items` are of"""

    def __bool__(self) -> bool:
        """Whether there is anything to be looked at."""
        return bool(self.rules or self.edits or self.asked or self.score)

    def needed(self) -> list[Step]:
        """The steps that rules and edits ask for, those that compare documents last. Raises UserError for an
        expression that is none, or has an attribute that there is not, or not yet when it is asked for."""
        own = [Rule("", expression, "", "") for expression in (self.prefer, self.score) if expression]
        wanted = {step.name for step in steps_for([*self.rules, *own], self.steps, OWN)}
        names = {*self.edits, *self.asked}
        steps = [s for s in self.steps if s.name in wanted or names & s.attributes.keys()]
        joined = [step for step in steps if isinstance(step, Joined)]
        asked = columns_of(self.prefer) if self.prefer else frozenset()
        late = [name for step in joined for name in step.attributes if name in asked]
        if late:
            raise UserError(
                f"{PREFER}: {late[0]} is known only when documents have been compared, which is what it is "
                "for; use what is known of a document by itself, such as words"
            )
        return [step for step in steps if step not in joined] + joined

    def made_from(self) -> Any:
        """All that the result depends on, JSON-able."""
        steps = [[step.name, step.version, step.settings()] for step in self.needed()]
        rules = [[rule.name, rule.expression] for rule in self.rules]
        return [self.repair, steps, rules, dict(self.edits), self.prefer, self.score]


class Cleaner:
    """Runs those steps of a plan that its rules and edits need, over all units: of an empty plan none."""

    def __init__(self, attributes: Attributes, plan: Plan) -> None:
        self.attributes, self.plan = attributes, plan
        self.units = attributes.units
        self.failed: list[np.ndarray] = [np.zeros((size, 0), bool) for size in attributes.sizes]
        """for each unit [documents, rules so far]"""
        self.done: list[Rule] = []
        self.steps = plan.needed()

    def run(self) -> None:
        """All steps and all rules."""
        for step in self.steps:
            if isinstance(step, Joined):
                self._judge()
            self.attributes.add(step, self._parts)
        self._judge()

    def _parts(self, files: list[Path]) -> JoinedParts:
        alive = [np.logical_not(failed.any(axis=1)) for failed in self.failed]
        return JoinedParts(self.units, self.attributes.sizes, files, alive, self._preferences)

    @cached_property
    def _preferences(self) -> list[np.ndarray]:
        """Of all units: the same for every step that compares documents."""
        return [self._preference(i) for i in range(len(self.units))]

    def _preference(self, unit: int) -> np.ndarray:
        """Validation before all training data: what is in both is to be left out of training."""
        size = self.attributes.sizes[unit]
        if self.units[unit].held_out:
            return np.full(size, -np.inf)
        if not self.plan.prefer:
            return np.zeros(size)
        (values,) = self._evaluate(unit, {PREFER: self.plan.prefer}, "DOUBLE")
        return -values.fill_null(-np.inf).to_numpy()

    def _judge(self) -> None:
        """The rules whose attributes are there by now and that were not asked yet."""
        there = self.attributes.available | set(OWN)
        rules = [r for r in self.plan.rules if r not in self.done and columns_of(r.expression) <= there]
        if not rules:
            return
        asked = {f"data.clean.keep.{rule.name}": rule.expression for rule in rules}
        for i, unit in enumerate(self.units):
            if unit.held_out:
                new = np.zeros((self.attributes.sizes[i], len(rules)), bool)
            else:
                columns = self._evaluate(i, asked, "BOOLEAN")
                kept = [column.fill_null(True).to_numpy(zero_copy_only=False) for column in columns]
                new = ~np.stack(kept, axis=1)
            self.failed[i] = np.concatenate([self.failed[i], new], axis=1)
        self.done += rules

    def _evaluate(self, unit: int, expressions: Mapping[str, str], kind: str) -> list[pa.Array]:
        names = sorted(set().union(*(columns_of(e) for e in expressions.values())))
        return evaluate(self.attributes.table(unit, names or ["id"]), expressions, kind)

    @cached_property
    def verdicts(self) -> list[Path | None]:
        """A file for each unit (see verdicts.py), or None where nothing is asked; after `run`."""
        if not self.plan:
            return [None] * len(self.units)
        names = {*self.plan.edits, *self._duplicate_of}
        for expression in [rule.expression for rule in self.done] + [self.plan.score or "0"]:
            names |= columns_of(expression) - set(OWN)
        asked = [[[rule.name, rule.expression] for rule in self.done], self.plan.score, dict(self.plan.edits)]
        paths: list[Path | None] = []
        for i, files in enumerate(self.attributes.files(sorted(names))):
            unit = self.units[i]
            made_from = [unit.documents.name, unit.held_out, [f.name for f in files], *asked]
            path = self.attributes.store / f"verdicts-{key(made_from)}.parquet"
            if not path.exists():
                with atomic_file(path) as temporary:
                    pq.write_table(self._verdicts(i), temporary, **PART)
            paths.append(path)
        return paths

    @property
    def _duplicate_of(self) -> list[str]:
        return [name for name in DUPLICATE_OF if name in self.attributes.available]

    def _verdicts(self, unit: int) -> pa.Table:
        size = self.attributes.sizes[unit]
        rules = np.array([rule.name for rule in self.done], dtype=object)
        failed = [rules[row].tolist() for row in self.failed[unit]]
        edits = {} if self.units[unit].held_out else self.plan.edits  # what is measured on stays as it is
        said = self.attributes.table(unit, [*edits, *self._duplicate_of])
        duplicate_of = np.full(size, -1)
        for name in self._duplicate_of:
            duplicate_of = np.where(duplicate_of < 0, said[name].to_numpy(), duplicate_of)
        scores: Any = pa.nulls(size, pa.float64())
        if self.plan.score:
            (scores,) = self._evaluate(unit, {SCORE: self.plan.score}, "DOUBLE")
            if not np.isfinite(scores.fill_null(np.nan).to_numpy()).all():
                raise UserError(f"{SCORE}: is no number for some documents; put a coalesce(..., 0) around it")
        columns = {
            "verdict": [row[0] if row else None for row in failed],
            "failed": failed,
            "duplicate_of": duplicate_of,
            "score": scores,
            "edits": edits_column({name: (action, said[name]) for name, action in edits.items()}, size),
        }
        return pa.table([columns[name] for name in SCHEMA.names], schema=SCHEMA)

    def report(self) -> dict[str, Any]:
        """For each rule: how many documents it drops, alone or first of all; JSON-able."""
        alive = np.concatenate([np.zeros((0, len(self.done)), bool), *self.failed])
        count = alive.sum(axis=1)
        first = np.argmax(alive, axis=1) if len(self.done) else np.zeros(0, int)
        rules = [
            {
                "rule": rule.name,
                "keeps": rule.expression,
                "reason": rule.reason,
                "dropped": int(((first == i) & (count > 0)).sum()),
                "failed": int(alive[:, i].sum()),
                "failed_alone": int((alive[:, i] & (count == 1)).sum()),
            }
            for i, rule in enumerate(self.done)
        ]
        return {"documents": len(alive), "kept": int((count == 0).sum()), "rules": rules}


def rules_of(
    presets: Sequence[str], keep: Mapping[str, str | None], more: Sequence[Rule] = ()
) -> tuple[Rule, ...]:
    """The presets' rules, changed or left out (None) by `keep`, then the rest of it, then `more`.

    Raises UserError for a name to leave out that no rule has.
    """
    rules = {rule.name: rule for preset in presets for rule in PRESETS[preset]}
    rules |= {rule.name: rule for rule in more}
    for name, expression in keep.items():
        if expression is not None:
            known = rules.get(name)
            reason, source = (
                (known.reason, known.source) if known else ("the recipe's own rule", "data.clean.keep")
            )
            rules[name] = Rule(name, expression, reason, source)
        elif name in rules:
            del rules[name]
        else:
            raise UserError(
                f"data.clean.keep.{name}: there is no such rule to leave out; there are {', '.join(rules)}"
            )
    return tuple(rules.values())


def evaluate(table: pa.Table, expressions: Mapping[str, str], kind: str) -> list[pa.Array]:
    """Each expression (name for messages -> SQL) over the table's rows, cast to a type of SQL.

    Raises UserError with the database's words for one that is wrong.
    """
    import duckdb

    with duckdb.connect(config={"enable_external_access": False, "threads": 1}) as connection:
        connection.register("attributes", table)
        asked = {name: f"CAST((\n{expression}\n) AS {kind})" for name, expression in expressions.items()}
        try:
            result = connection.sql(f"SELECT {', '.join(asked.values())} FROM attributes").to_arrow_table()
        except duckdb.Error:
            for name, expression in asked.items():  # which of them it was
                try:
                    connection.sql(f"SELECT {expression} FROM attributes").to_arrow_table()
                except duckdb.Error as error:
                    raise UserError(f"{name}: {str(error).splitlines()[0]}") from None
            raise
    return [column.combine_chunks() for column in result.columns]
