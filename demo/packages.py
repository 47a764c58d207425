"""The Debian packages that the demo corpus is made from and with."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from halve.errors import InputError

PACKAGE_VERSION = "4:7.4.7-1+deb12u14"
PACKAGES_SHA256 = {
    "libreoffice-help-en-us": "8faa840285734d6cfe1ed25537b48f07e74bd6412e3917bf8e5f8a653f7b3712",
    "libreoffice-help-de": "00490b63c509ac96f7f212d6a6e40452d3e0d1f97ccf4b824dd5ec4c01e8277f",
    "libreoffice-help-zh-cn": "db867cdece4c2f9c7eebe65e519c6cf386fdcf49d6e061db3dffec893b3e1dee",
}
HELP_ROOT = Path("usr/share/libreoffice/help")
# The translations of LibreOffice's own interface: text for the teacher's warm-up alone.
INTERFACE_SHA256 = {
    "libreoffice-l10n-de": "aee22c8e3b3c0431f6e1b0bc66f757ba36c860e2651a05eb050fde4897f06548",
    "libreoffice-l10n-zh-cn": "06b2800923811a11ddadc9e1e09ef8bda2a89ba118470403b2f6a897152e0809",
}
INTERFACE_ROOT = Path("usr/lib/libreoffice/program/resource")
# English text that no demo model was trained on (GFDL); nothing of it is committed.
GIMP_VERSION = "2.10.34-2"
GIMP_SHA256 = {
    "gimp-help-en": "a2deec76763aaf2fcdd197bac0736cdcb0770ba993d48d233329e1c92b0bfe36",
}
GIMP_ROOT = Path("usr/share/gimp/2.0/help/en")
RECORDED_VERSION = "0.8+5prealpha+1-15"
RECORDED_SHA256 = {
    "pocketsphinx-testdata": "eaeb7a01d54f20b799d1a81ef110ec544b2cb47ea006614078220737a33019f0",
}
RECORDED_ROOT = Path("usr/share/pocketsphinx/test/data/librivox")
COMMAND_PACKAGES = {"espeak-ng": "espeak-ng", "flite": "flite", "opusenc": "opus-tools"}


def missing_packages() -> list[str]:
    """Debian packages of the speech commands that are not installed."""
    return [package for name, package in COMMAND_PACKAGES.items() if shutil.which(name) is None]


def fetch_help(cache: Path) -> Path:
    """Unpacks the three help packages under `cache`; returns the folder of en-US, de and zh-CN.

    Nothing is installed. Raises InputError if a package cannot be had or is another one.
    """
    _fetch(cache, PACKAGES_SHA256)
    return cache / "unpacked" / HELP_ROOT


def fetch_interface(cache: Path) -> Path:
    """Unpacks the interface's translations under `cache`; returns the folder of de and zh_CN.

    Raises InputError as `fetch_help` does.
    """
    _fetch(cache, INTERFACE_SHA256)
    return cache / "unpacked" / INTERFACE_ROOT


def fetch_gimp_help(cache: Path) -> Path:
    """Unpacks the English GIMP help under `cache`; returns the folder of its pages.

    Raises InputError as `fetch_help` does.
    """
    _fetch(cache, GIMP_SHA256, GIMP_VERSION)
    return cache / "unpacked" / GIMP_ROOT


def fetch_recorded(cache: Path) -> Path:
    """Unpacks people's recorded speech under `cache`; returns the folder of the LibriVox sentences.

    Raises InputError as `fetch_help` does.
    """
    _fetch(cache, RECORDED_SHA256, RECORDED_VERSION)
    return cache / "unpacked" / RECORDED_ROOT


def _fetch(cache: Path, packages: dict[str, str], version: str = PACKAGE_VERSION) -> None:
    cache.mkdir(parents=True, exist_ok=True)
    for package, sha256 in packages.items():
        archive = cache / f"{package}_{version.replace(':', '%3a')}_all.deb"
        if not archive.is_file():
            _run_apt(["apt-get", "download", f"{package}={version}"], cache)
        found = hashlib.sha256(archive.read_bytes()).hexdigest() if archive.is_file() else "no file"
        if found != sha256:
            raise InputError(
                f"{archive}: sha256 {found}",
                f"sha256 {sha256}",
                f"put {package} {version} there, for example from snapshot.debian.org",
            )
        if not (cache / "unpacked" / f".{package}").exists():
            subprocess.run(["dpkg-deb", "-x", archive, cache / "unpacked"], check=True)
            (cache / "unpacked" / f".{package}").touch()


def _run_apt(command: Sequence[str], folder: Path) -> None:
    """Runs apt-get; where that fails, once more after apt-get update if we are root."""
    for attempt in (1, 2):
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        if result.returncode == 0:
            return
        if attempt == 1 and os.geteuid() == 0:
            subprocess.run(["apt-get", "update"], capture_output=True, check=False)
    raise InputError(
        f"{' '.join(command)} failed: {result.stderr.strip().splitlines()[-1:]}",
        "a Debian 12 machine with its package lists",
        "run apt-get update as root, then try again",
    )


def require_voices() -> None:
    """Sees to it that the synthesisers are installed; only root installs them here."""
    missing = missing_packages()
    if missing and os.geteuid() == 0:
        _run_apt(["apt-get", "install", "-y", "--no-install-recommends", *missing], Path.cwd())
    if missing_packages():
        raise InputError(
            f"not installed: {', '.join(missing)}",
            "the commands espeak-ng, flite and opusenc",
            f"apt-get install {' '.join(missing)}",
        )
