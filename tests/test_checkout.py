"""What a clone of halve takes on a disk."""

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MOST_BYTES = 58_000_000


def test_a_checkout_stays_small() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout
    sizes = {name: (ROOT / name).lstat().st_size for name in listed.split("\0") if name}
    largest = sorted(sizes, key=sizes.__getitem__)[-5:]
    assert 0 < sum(sizes.values()) < MOST_BYTES, largest
