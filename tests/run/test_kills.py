"""Few of the kills that `make kills` makes. Run: pytest tests/run/test_kills.py"""

from pathlib import Path

import pytest
from kills import kill

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


@pytest.mark.parametrize("variant", ["chains", "search"])
def test_what_is_killed_at_random_ends_with_the_bits_of_what_is_not(tmp_path: Path, variant: str) -> None:
    came = kill(8, 0, tmp_path, [variant])
    assert len(came.kills) == 8
    assert came.faults == []
