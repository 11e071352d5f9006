"""The account of what evaluation sets were found in the data: of all of it, or of what is trained on."""

from typing import Any

import numpy as np
import pyarrow.compute as pc

from ropewalk.clean.contamination import Account, Contamination
from ropewalk.data.cleaning import Cleaner

CONTAMINATION = "contamination.json"
"""Name of the account in a folder of prepared data, by which an evaluation knows what to leave out."""


def contamination(cleaner: Cleaner, trained: bool = False) -> dict[str, Any]:
    """JSON-able. `trained`: only of documents that are kept, and not of items whose tokens are not scored."""
    sets, attributes = cleaner.plan.sets, cleaner.attributes
    step = next(step for step in cleaner.steps if isinstance(step, Contamination))
    files = {one.name: {"path": one.path, "sha256": one.sha256} for one in sets}
    account = Account([item for one in sets for item in one.items], step.too_short, files)
    masked = trained and "contamination_spans" in cleaner.plan.edits
    for i, unit in enumerate(attributes.units):
        if unit.held_out:
            continue
        table = attributes.table(i, ["contamination_items"])
        kept = np.ones(len(table), bool)
        if trained:
            kept = np.logical_not(cleaner.failed[i].any(axis=1) | masked)
        found = np.flatnonzero(kept & (pc.list_value_length(table["contamination_items"]).to_numpy() > 0))
        records = unit.read().at(found)
        texts, ids = [record.plain for record in records], [record.id for record in records]
        account.add(table.take(found), texts, ids)
        account.documents += int(kept.sum()) - len(found)
    return account.report()
