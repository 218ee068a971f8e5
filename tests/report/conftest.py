"""Pages that several files look at, written once."""

from pathlib import Path

import pytest
from summaries import many, quickstart, write_run

from cola.report.page import write_report


@pytest.fixture(scope="session")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A finished run of four arms and one seed, and an unfinished one of twelve arms and six."""
    folder = tmp_path_factory.mktemp("pages")
    found = {"quickstart": quickstart(), "many": many(12)}
    return {name: write_report(write_run(folder / name, summary)) for name, summary in found.items()}
