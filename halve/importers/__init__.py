"""Corpora in: each importer reads one layout; `run_corpus` checks, splits and writes a complete corpus."""

import os
import re
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from halve import artefact
from halve.artefact import Artefact
from halve.corpus import Segment, check_segments, write_manifest
from halve.errors import CorpusError
from halve.families import FAMILIES
from halve.importers.acl6060 import import_acl6060
from halve.importers.base import CorpusConfig, Importer, Row, Rows, Sound
from halve.importers.iwslt import import_iwslt
from halve.importers.splits import divide
from halve.importers.tables import import_halve, import_hf, import_tsv
from halve.audio import probe
from halve.progress import SILENT, Progress

__all__ = ["IMPORTERS", "CorpusConfig", "Row", "Rows", "Sound", "read_source", "run_corpus"]

IMPORTERS: dict[str, Importer] = {
    "iwslt": import_iwslt,
    "acl6060": import_acl6060,
    "hf": import_hf,
    "tsv": import_tsv,
    "halve": import_halve,
}
