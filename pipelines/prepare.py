"""Stage `prepare`: official REFER files, or a dataset of one's own, -> checked records (Parquet) and an audit report.

python -m pipelines.prepare --dataset refcoco_unc
"""

from __future__ import annotations

import os
from typing import Annotated

import typer

from pipelines import paths
from pipelines.stage import check_names, params, run
from ris_core import files
from ris_core.data.own.reader import read_any
from ris_core.data.records import write_records
from ris_core.data.refer.audit import prepare


def main(dataset: Annotated[str, typer.Option(help="refcoco_unc, refcocog_umd, shapes, ...")]) -> None:
    """Read a dataset, check everything about it, and write records and the audit report."""
    name = check_names(dataset)
    chosen = params("prepare").prepare
    records, report = prepare(
        paths.raw(dataset),
        name,
        on_bad=chosen.on_bad,
        strict=chosen.strict,
        exclude={name: paths.raw(name) for name in chosen.exclude_images_of},
        check_images=chosen.check_images,
        workers=os.cpu_count() or 1,
        read=read_any,
    )
    write_records(paths.records(dataset), records, dataset)
    files.write_json(paths.audit(dataset), report)
    typer.echo(f"{paths.records(dataset)}: {len(records)} images")


if __name__ == "__main__":
    run(main)
