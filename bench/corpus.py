"""The `lm` task of tasks.py: documentation and dictionaries of Debian as running text, and a tokenizer trained on it.

Reads the .deb files of nine packages, about 40 MB (`tasks.py --list-packages` names them for apt-get download). Their licences are
a mix of copyleft ones: derive the texts, do not ship them.
"""
from __future__ import annotations

import gzip
import html
import io
import re
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import manpage
from archive import SUITE, Missing

# package: (files to read, how)
PACKAGES = {
    "manpages": (r"usr/share/man/man[1-8]/.*\.gz", "roff"),
    "manpages-dev": (r"usr/share/man/man[1-8]/.*\.gz", "roff"),
    "python3.11-doc": (r"usr/share/doc/python3\.11/html/_sources/.*\.rst\.txt", "text"),
    "git-doc": (r"usr/share/doc/git-doc/(?!RelNotes/).*\.txt", "text"),
    "debian-reference-en": (r"usr/share/debian-reference/debian-reference\.en\.txt\.gz", "text"),
    "debian-policy": (r"usr/share/doc/debian-policy/policy\.txt\.gz", "text"),
    "developers-reference": (r"usr/share/developers-reference/_sources/.*\.rst\.txt", "text"),
    "dict-foldoc": (r"usr/share/dictd/foldoc\.dict\.dz", "dictionary"),
    "dict-gcide": (r"usr/share/dictd/gcide\.dict\.dz", "dictionary"),
}
GCIDE_PERCENT = 30  # of that dictionary, which would otherwise be most of the corpus
DOCUMENT_CHARACTERS = 16_000  # longer files are cut at the next blank line
FEWEST_CHARACTERS = 300
ENTRIES = 12  # of a dictionary, to a document
VOCABULARY = 8192


def packages_to_download() -> str:
    """As apt-get download takes them."""
    return " ".join(f"{package}/{SUITE}" for package in PACKAGES)


def rows(debs: Path, stable_hash: Callable[[str, str], int]) -> Iterator[dict]:
    """{"id", "source", "text"} of every document, each text once."""
    found = {package: sorted(debs.glob(f"{package}_*.deb")) for package in PACKAGES}
    missing = [package for package, files in found.items() if len(files) != 1]
    if missing:
        raise Missing(f"lm needs one .deb each of {', '.join(missing)} in {debs}: run  apt-get download "
                      f"{packages_to_download()}  there")
    seen = set()
    for package, (pattern, kind) in PACKAGES.items():
        for name, text in _documents(package, kind, _files(found[package][0], pattern), stable_hash):
            text = tidy(text)
            if len(text) >= FEWEST_CHARACTERS and text not in seen:
                seen.add(text)
                yield {"id": f"{package}:{name}", "source": package, "text": text}


def train_tokenizer(path: Path, texts: Iterator[str]) -> None:
    """A byte-level BPE; digits stand alone."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True),
                                                       pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=["<pad>", "<s>", "</s>"], show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(path))


def _files(deb: Path, pattern: str) -> list[tuple[str, bytes]]:
    """(path, unpacked content) of the package's files that match, by path."""
    unpacked = subprocess.run(["dpkg-deb", "--fsys-tarfile", deb], check=True, stdout=subprocess.PIPE).stdout
    with tarfile.open(fileobj=io.BytesIO(unpacked)) as archive:
        members = {member.name.removeprefix("./"): member for member in archive.getmembers() if member.isfile()}
        names = [name for name in sorted(members) if re.fullmatch(pattern, name)]
        found = [(name, archive.extractfile(members[name]).read()) for name in names]
    return [(name, gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content) for name, content in found]


def _documents(package: str, kind: str, files: list[tuple[str, bytes]], stable_hash) -> Iterator[tuple[str, str]]:
    for path, content in files:
        if kind == "dictionary":
            for number, text in enumerate(_entries(content)):
                if package != "dict-gcide" or stable_hash("gcide", str(number)) % 100 < GCIDE_PERCENT:
                    yield str(number), text
        elif not re.search(r"changelog|copyright|license", path, re.IGNORECASE):
            text = manpage.text_of(content) if kind == "roff" else content.decode("utf-8", errors="replace")
            for number, piece in enumerate(_pieces(tidy(text))):
                yield f"{path}#{number}", piece


def _entries(content: bytes) -> Iterator[str]:
    """A dictionary in the format of dictd, in blocks of consecutive entries; a headword starts its line."""
    text = content.decode("utf-8", errors="replace").replace("\r", "")
    entries = [entry for entry in re.split(r"\n(?=\S)", text) if not entry.startswith("00-database")]
    return ("\n".join(entries[start:start + ENTRIES]) for start in range(0, len(entries), ENTRIES))


def _pieces(text: str) -> Iterator[str]:
    piece, size = [], 0
    for paragraph in text.split("\n\n"):
        piece.append(paragraph)
        size += len(paragraph) + 2
        if size >= DOCUMENT_CHARACTERS:
            yield "\n\n".join(piece)
            piece, size = [], 0
    if piece:
        yield "\n\n".join(piece)


def tidy(text: str) -> str:
    """Without HTML entities, tabs, trailing blanks, underlines of headings, deep indents and tags of dictionary entries."""
    text = html.unescape(text).replace("\r", "").replace("\t", "    ").replace("\f", "\n")
    text = re.sub(r"\n *\[(1913 Webster|PJC|WordNet 1\.5|Webster 1913 Suppl\.|[^\]\n]{1,30}PJC)\] *(?=\n)", "", text)
    text = re.sub(r" +\n", "\n", text)
    text = re.sub(r"(?m)^([-=~^*+#_.`\"'])\1{3,}$\n?", "", text)
    text = re.sub(r"\n +(?=\S)", lambda match: "\n" + " " * min(len(match[0]) - 1, 4), text)
    return re.sub(r"\n{3,}", "\n\n", text).strip()
