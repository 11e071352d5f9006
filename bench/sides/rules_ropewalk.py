"""The rules of Gopher by Ropewalk: python rules_ropewalk.py DOCUMENTS (JSON lines) time|rules"""

import json
import sys
import time
from pathlib import Path

import duckdb
import pyarrow as pa

from ropewalk.clean.quality import Quality
from ropewalk.clean.repetition import Repetition
from ropewalk.clean.rules import PRESETS
from ropewalk.clean.step import Texts

RULES = [*PRESETS["gopher"], *PRESETS["gopher_repetition"]]
BATCH = 400


def verdicts(connection: duckdb.DuckDBPyConnection, texts: list[str]) -> pa.Table:
    """A row a text, a column a rule: read, measured, decided."""
    batch = Texts(texts)
    table = Quality().map(batch)
    for name, column in zip(
        (repetition := Repetition().map(batch)).column_names, repetition.columns, strict=True
    ):
        table = table.append_column(name, column)
    connection.register("attributes", table)
    columns = ", ".join(f"coalesce({rule.expression}, false) as {rule.name}" for rule in RULES)
    return connection.execute(f"select {columns} from attributes").to_arrow_table()


def main() -> None:
    texts = [json.loads(line)["text"] for line in Path(sys.argv[1]).read_text(encoding="utf-8").splitlines()]
    with duckdb.connect(config={"threads": 1}) as connection:
        verdicts(connection, texts[:10])  # builds the tables of characters
        start = time.process_time()
        tables = [verdicts(connection, texts[i : i + BATCH]) for i in range(0, len(texts), BATCH)]
        seconds = time.process_time() - start
    kept = pa.concat_tables(tables).to_pydict() if sys.argv[2] == "rules" else {}
    print("RESULT " + json.dumps({"documents_per_s": len(texts) / seconds, "kept": kept}), flush=True)


main()
