"""Options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[
    str, typer.Option("--model", metavar="DIR|ID", help="A model directory, a package or a hub id.")
]
Corpus = Annotated[
    Path, typer.Option("--corpus", metavar="DIR", help="A corpus written by `halve corpus`.")
]
MaybeCorpus = Annotated[
    Path | None, typer.Option("--corpus", metavar="DIR", help="A corpus written by `halve corpus`.")
]
Out = Annotated[
    Path | None,
    typer.Option(
        "--out", metavar="DIR", help="Where the result goes; a folder under runs/ if not given."
    ),
]

States = Annotated[
    Path | None,
    typer.Option(
        "--states-dir",
        metavar="DIR",
        help="Where the encoded audio is kept; runs on the same audio with the same tower share it.",
    ),
]
