"""Which segment goes to train, select or test."""

import hashlib
from collections import defaultdict
from collections.abc import Sequence, Set
from dataclasses import replace
from os.path import commonpath
from pathlib import Path

import numpy as np

from halve.errors import CorpusError
from halve.importers.base import CorpusConfig, Row

PAPER_SEGMENTS = 884
PAPER_TEST = 100


def divide(rows: Sequence[Row], config: CorpusConfig) -> list[Row]:
    """The rows with split and group, in their order.

    Raises:
        CorpusError: they cannot be split as asked.
    """
    groups = own_groups(rows)
    rows = [replace(row, group=row.group or own) for row, own in zip(rows, groups, strict=True)]
    # Where some say it and others do not, none is dealt out anew: what the source holds back for test stays that.
    method = config.split or ("given" if any(row.split for row in rows) else "group")
    if method == "given":
        return _given(rows)
    if method == "paper":
        return _paper(rows, config)
    if method == "segment":
        rows = [_alone(row) for row in rows]
    return _by_group(rows, config)


def own_groups(rows: Sequence[Row]) -> list[str]:
    """Groups of rows that name none: segments of one recording belong together, others stand alone.

    A recording is told by its path from the folder that holds all: speakers' folders may use the same names.
    """
    files = {
        index: row.audio.absolute() for index, row in enumerate(rows) if isinstance(row.audio, Path)
    }
    root = commonpath({path.parent for path in files.values()}) if files else ""
    return [
        files[index].relative_to(root).as_posix() if index in files else _own_group(row)
        for index, row in enumerate(rows)
    ]


def _own_group(row: Row) -> str:
    return row.id if row.duration_s is None else str(getattr(row.audio, "name", row.id))


def _alone(row: Row) -> Row:
    return replace(row, group=row.id, extra={**row.extra, "talk": row.group})


def _given(rows: list[Row]) -> list[Row]:
    faults = [f"{row.where}: the source names no split" for row in rows if row.split is None]
    if faults:
        raise CorpusError(
            f"{len(faults)} segments without a split",
            expected="a split for every segment with --split given",
            mend="name them in the source, or use --split group, which deals out all anew",
            faults=faults,
        )
    return rows


def is_dealt(rows: Sequence[Row], config: CorpusConfig) -> bool:
    """Whether halve says which segment goes where, and not the source."""
    return config.split != "given" and (
        config.split is not None or not any(row.split for row in rows)
    )


def _by_group(rows: list[Row], config: CorpusConfig) -> list[Row]:
    """Whole groups, drawn in an order that only the seed and their names decide; a split without a share has none.

    A group with a segment that stays in train stays there whole; shares are of the others.
    """
    held = {str(row.group) for row in rows if row.stays_in_train}
    dealt = _dealt([row for row in rows if str(row.group) not in held], config, held)
    return [replace(row, split=dealt.get(str(row.group), "train")) for row in rows]


def _dealt(rows: list[Row], config: CorpusConfig, held: Set[str]) -> dict[str, str]:
    """The split of each group, beside groups that are `held` in train."""
    has_train = bool(held)
    shares = [("test", config.test_share), ("select", config.select_share)]
    shares = [(name, share) for name, share in shares if share]
    names = [*(name for name, _ in shares), "train"]
    members: dict[str, int] = defaultdict(int)
    for row in rows:
        members[str(row.group)] += 1
    if len(members) < len(names) - has_train:
        raise CorpusError(
            f"The corpus has {len(members)} groups ({', '.join(sorted(members)[:3])})"
            + (f" beside {len(held)} with untranslated segments, which stay in train" * has_train),
            expected=f"at least {len(names) - has_train}, so that "
            f"{', '.join([*reversed(names)][has_train:])} each get their own",
            mend="name groups in the source, or use --split segment and accept that talks straddle splits",
        )
    drawn = sorted(
        members, key=lambda name: hashlib.sha256(f"{config.seed}\0{name}".encode()).hexdigest()
    )
    split: dict[str, str] = {}
    for place, (name, share) in enumerate(shares):
        taken = 0
        chosen: set[str] = set()
        waiting = iter(drawn)
        while len(drawn) - len(chosen) > (0 if has_train else 1) and (
            taken == 0 or taken < share * len(rows)
        ):
            # One speaker may be most of the corpus: what is twice its share or more goes to train.
            room = 2 * share * len(rows) - taken
            # There is ever less room: who did not fit before does not fit now.
            group = next((each for each in waiting if members[each] <= room), None)
            if group is None and taken:
                break
            group = group or min(drawn, key=lambda each: members[each])
            chosen.add(group)
            split[group] = name
            taken += members[group]
            # One for each that is still to come, train among them.
            if len(drawn) - len(chosen) == len(shares) - place - has_train:
                break
        drawn = [each for each in drawn if each not in chosen]
    return split | dict.fromkeys(drawn, "train")


def _paper(rows: list[Row], config: CorpusConfig) -> list[Row]:
    """Moslem 2025: dev and eval joined, 100 of 884 drawn for test with seed 0, the rest for training.

    The draw is that of `datasets.Dataset.train_test_split(test_size=100, seed=0)`: a permutation by numpy's
    default generator whose first 100 are the test. Layers must not be chosen on what is reported, so
    `select` is taken from the 784, spread evenly. Talks straddle these splits.
    """
    if config.format != "acl6060" or len(rows) != PAPER_SEGMENTS:
        raise CorpusError(
            f"--split paper on {len(rows)} segments of format {config.format}",
            expected=f"the {PAPER_SEGMENTS} segments of ACL 60/60 (dev and eval)",
            mend="use --split group",
        )
    order = np.random.default_rng(0).permutation(len(rows)).tolist()
    split = dict.fromkeys(order[:PAPER_TEST], "test")
    train = sorted(order[PAPER_TEST:])
    count = round(config.select_share * len(rows))
    chosen = {train[index * len(train) // count] for index in range(count)}
    split.update({index: "select" if index in chosen else "train" for index in train})
    return [replace(_alone(row), split=split[index]) for index, row in enumerate(rows)]
