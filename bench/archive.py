"""Debian's package index as apt keeps it on disk: names, sections and descriptions of bookworm/main."""
from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

SUITE = "bookworm"


class Missing(Exception):
    """A source that is not on this machine; the text says what to run."""


class Package(NamedTuple):
    name: str
    source: str
    section: str
    synopsis: str
    description: str  # as it stands in the list, or empty


def read_list(lists: Path, tail: str) -> str:
    """The text of the one list of bookworm/main that ends in `tail`, plain or compressed."""
    names = re.compile(rf".*_dists_{SUITE}_main_{tail}(\.lz4|\.gz|\.xz|\.bz2|\.zst)?")
    found = sorted(path for path in lists.glob("*") if names.fullmatch(path.name))
    if not found:
        raise Missing(f"no '{tail}' list of {SUITE}/main in {lists}: run  apt-get -o Acquire::Languages=en update  as root")
    if not names.fullmatch(found[0].name)[1]:
        return found[0].read_text(encoding="utf-8", errors="replace")
    unpacked = subprocess.run(["/usr/lib/apt/apt-helper", "cat-file", found[0]], check=True, stdout=subprocess.PIPE)
    return unpacked.stdout.decode("utf-8", errors="replace")


def stanzas(text: str) -> Iterator[dict[str, str]]:
    """The fields of each paragraph; a continuation line keeps its newline."""
    for block in text.split("\n\n"):
        fields: dict[str, str] = {}
        name = ""
        for line in block.split("\n"):
            if line[:1] in (" ", "\t"):
                if name:
                    fields[name] += "\n" + line
            elif ":" in line:
                name, value = line.split(":", 1)
                fields[name] = value.strip()
        if fields:
            yield fields


def architecture() -> str:
    try:
        return subprocess.run(["dpkg", "--print-architecture"], check=True, stdout=subprocess.PIPE, text=True).stdout.strip()
    except OSError:
        return "amd64"


def read_packages(lists: Path, *, descriptions: bool) -> list[Package]:
    """Every package of the archive that has a synopsis, by name; long descriptions only where asked for (they take 2 s)."""
    long_of = {}
    if descriptions:
        for fields in stanzas(read_list(lists, "i18n_Translation-en")):
            if "Description-md5" in fields:
                long_of[fields["Description-md5"]] = fields.get("Description-en", "")
    packages: dict[str, Package] = {}
    for fields in stanzas(read_list(lists, f"binary-{architecture()}_Packages")):
        name, own = fields.get("Package", ""), fields.get("Description", "")
        synopsis = own.split("\n", 1)[0].strip()
        if not name or not synopsis or name in packages:
            continue
        source = fields.get("Source", name).split(" ")[0]
        section = fields.get("Section", "").rsplit("/", 1)[-1]
        long = long_of.get(fields.get("Description-md5", ""), own if "\n" in own else "")
        packages[name] = Package(name, source, section, synopsis, long)
    return [packages[name] for name in sorted(packages)]
