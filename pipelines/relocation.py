"""The embedded tracking store follows its folder: MLflow writes absolute places of files into its database.

A project that was moved, or copied, would not find its models any more, and would write new ones into the old place.
"""

from __future__ import annotations

import sqlite3
import sys
from contextlib import closing
from pathlib import Path

ARTIFACTS = "artifacts"  # beside the database
# Where MLflow keeps places of files.
PLACES = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)


def follow(database: Path) -> None:
    """Let a store's database name the files beside it where they are now, if its experiments say that they were elsewhere.

    Says so on stderr. A store whose files lie elsewhere on purpose has none beside it, and stays as it is.
    """
    files = database.parent / ARTIFACTS
    if not (database.exists() and files.is_dir()):
        return
    here = files.as_uri()
    with closing(sqlite3.connect(database, timeout=60)) as store, store:
        tables = {name for (name,) in store.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        if "experiments" not in tables:
            return
        places = {place for (place,) in store.execute("SELECT artifact_location FROM experiments") if place}
        before = {place for place in places if place.startswith("file://") and place.endswith(f"/{ARTIFACTS}")}
        if here in before or len(before) != 1:
            return
        (old,) = before
        changed = 0
        for table, column in PLACES:
            if table in tables:
                change = f"UPDATE {table} SET {column} = ? || substr({column}, ?)"
                which = f"{column} = ? OR substr({column}, 1, ?) = ?"
                values = (here, len(old) + 1, old, len(old) + 1, f"{old}/")
                changed += store.execute(f"{change} WHERE {which}", values).rowcount
        print(
            f"the tracking store was beside {old} and is beside {here} now: {changed} places in {database} say so",
            file=sys.stderr,
        )
