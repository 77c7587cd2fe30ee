"""Derives three real language tasks from a Debian 12 machine: `python bench/tasks.py [OUT] [--tasks sections,pairs,lm]`.

    sections   package synopsis -> one of 22 archive sections         OUT/sections/{train,validation,test}.jsonl
    pairs      synopsis, description -> does it belong?               OUT/pairs/...
    lm         man pages, manuals and dictionaries as running text    OUT/lm/... and OUT/lm/tokenizer.json; needs --debs

Nothing is downloaded. `sections` and `pairs` read apt's lists of bookworm/main, the part of the archive that hardly moves;
container images leave the English descriptions out, so run `apt-get -o Acquire::Languages=en update` first. `lm` reads nine
packages (corpus.py): `mkdir debs && cd debs && apt-get download $(python ../bench/tasks.py --list-packages)`. The texts are
under their packages' own licences: derive them, do not ship them. The same lists always give the same bytes, and the SHA-256
of what came out is compared with the one that published numbers were measured on.
"""
from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

import corpus
from archive import Missing, read_packages

SPLITS = ("train", "validation", "test")
SALT = "v1"  # of every hash below: another salt is another split
LARGEST_CLASS = 3000  # sections: examples a class may have
DESCRIPTION_WORDS = 32  # pairs: words kept of a description
FEWEST_WORDS = 12  # pairs: shorter descriptions say too little

# What the published numbers were measured on.
SHA256 = {
    "sections/train.jsonl": "dacb41e51f873120a684cce342a0d755e4ed39fbb3c1e99d51225ea78f8aece9",
    "sections/validation.jsonl": "b3499caa4837dbd5759000fbd331cf1bebbc3d8dc7986e41ad6cacfcdc424c61",
    "sections/test.jsonl": "130fd7d6759e16fc8b832c0cde0f916564135d29d14ab591ccf019079072ec49",
    "pairs/train.jsonl": "6cea4d873395a33a2b75f0c90a3fd83e876cf1cba10c67e08a533168385a6845",
    "pairs/validation.jsonl": "9b54cd9c26163289531e277bd566f492f15e198f34282a7bc1a963bbbe2601a5",
    "pairs/test.jsonl": "4ad26a9bf465ea9c959ac250acadb6f1db401cbc6d74292de786a6000fd923e1",
    "lm/train.jsonl": "34f030f1ff736daa455a455c5bd6521c3fb20cf8f4f61051b2a721c3ae37ac98",
    "lm/validation.jsonl": "968a6b31464ae2a0757b71c106e997cdde631eacd8d2e02b3dd22b7acda1a338",
    "lm/test.jsonl": "3d8f17d5e20ae51db521a0e9b591bd341565b0ec22b70067b330bbbb2bebf2cf",
    "lm/tokenizer.json": "e1335a347f5b2f18c7949643e7fb1987b9ab32f4defad7ae037f5a3924dda33e",
}

# Sections that say how a package is built or used up by apt, not what it is about (debug, oldlibs, misc...), are left out.
CLASSES = {
    "admin": "admin kernel shells",
    "desktop": "x11 gnome kde xfce gnustep",
    "devel": "devel vcs embedded interpreters cli-mono",
    "doc": "doc",
    "fonts": "fonts",
    "functional": "haskell ocaml lisp",
    "games": "games education",
    "golang": "golang",
    "graphics": "graphics",
    "java": "java",
    "libs": "libs libdevel",
    "multimedia": "sound video",
    "net": "net comm mail news",
    "perl": "perl",
    "python": "python",
    "r": "gnu-r",
    "ruby": "ruby",
    "rust": "rust",
    "science": "science math electronics hamradio",
    "text": "text tex editors",
    "utils": "utils database",
    "web": "web httpd javascript php",
}
CLASS_OF = {section: name for name, sections in CLASSES.items() for section in sections.split()}
LABELS = sorted(CLASSES)


# ------------------------------------------------------------------------------------------------ hashes and files
def stable_hash(salt: str, key: str) -> int:
    """60 bits that do not change from run to run, as Python's own hash does."""
    return int(hashlib.sha256(f"{salt}\0{key}".encode()).hexdigest()[:15], 16)


def split_of(source: str) -> str:
    """80 / 10 / 10 by the source package: binary packages of one source have nearly the same text."""
    percent = stable_hash(SALT, source) % 100
    return "train" if percent < 80 else "validation" if percent < 90 else "test"


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write_rows(path: Path, rows: Iterable[dict]) -> None:
    staged = path.with_name(path.name + ".tmp")
    with open(staged, "w", encoding="utf-8", newline="\n") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False, sort_keys=True) + "\n")
    os.replace(staged, path)


def write_splits(folder: Path, rows: dict[str, list[dict]]) -> None:
    """Sorts each split by hash, so that the first N lines of its file are a random sample of it, and writes it."""
    folder.mkdir(parents=True, exist_ok=True)
    for split in SPLITS:
        rows[split].sort(key=lambda row: stable_hash(SALT + "order", row["id"]))
        write_rows(folder / f"{split}.jsonl", rows[split])


# ------------------------------------------------------------------------------------------------ sections
def make_sections(out: Path, lists: Path) -> None:
    by_class, seen = defaultdict(list), set()
    for package in read_packages(lists, descriptions=False):
        key = (package.source, package.synopsis)
        if package.section in CLASS_OF and key not in seen:
            seen.add(key)
            by_class[CLASS_OF[package.section]].append(package)
    rows: dict[str, list[dict]] = {split: [] for split in SPLITS}
    for label, packages in by_class.items():
        # in the order of the sources' hashes, so that the cap takes whole sources
        packages.sort(key=lambda p: (stable_hash(SALT + "cap", p.source), p.source, p.name, p.synopsis))
        for package in packages[:LARGEST_CLASS]:
            row = {"id": package.name, "text": package.synopsis, "label": LABELS.index(label)}
            rows[split_of(package.source)].append(row)
    trained_on = {row["text"].lower() for row in rows["train"]}
    for split in ("validation", "test"):
        rows[split] = [row for row in rows[split] if row["text"].lower() not in trained_on]
    write_splits(out / "sections", rows)
    (out / "sections" / "labels.json").write_text(json.dumps(LABELS) + "\n")


# ------------------------------------------------------------------------------------------------ pairs
WORD = re.compile(r"[a-z0-9][a-z0-9+#.-]*[a-z0-9+#]|[a-z0-9]")
FREQUENT = 300  # a word of more descriptions than this says nothing about likeness, and costs the most to count


def first_words(description: str) -> str:
    """The start of a long description as running text; its first line is the synopsis, a lone dot an empty line."""
    lines = [line.strip() for line in description.split("\n")[1:]]
    return " ".join(" ".join(line for line in lines if line != ".").split()[:DESCRIPTION_WORDS])


def couples(packages: list[tuple[str, str, str]]) -> Iterator[tuple[tuple[str, str, str], tuple[str, str, str]]]:
    """Couples each (name, synopsis, description) with its most similar free one, by words weighted by their rarity."""
    packages = sorted(packages, key=lambda p: stable_hash(SALT + "match", p[0]))
    bags = [sorted(set(WORD.findall(f"{synopsis} {text}".lower()))) for _, synopsis, text in packages]
    frequency = Counter(word for bag in bags for word in bag)
    weight = {word: math.log(len(packages) / count) for word, count in frequency.items()}
    norm = [math.sqrt(sum(weight[word] ** 2 for word in bag)) or 1.0 for bag in bags]
    holders = defaultdict(list)
    for i, bag in enumerate(bags):
        for word in bag:
            if frequency[word] <= FREQUENT:
                holders[word].append(i)
    free = set(range(len(packages)))
    for i in range(len(packages)):
        if i not in free:
            continue
        free.discard(i)
        score: dict[int, float] = defaultdict(float)
        for word in bags[i]:
            for j in holders.get(word, ()):
                if j in free:
                    score[j] += weight[word] ** 2
        if not free:
            break
        # rounded, so that the last bit of a sum does not decide between equals
        partner = min(score, key=lambda j: (-round(score[j] / norm[j], 9), j)) if score else min(free)
        free.discard(partner)
        yield packages[i], packages[partner]


def make_pairs(out: Path, lists: Path) -> None:
    groups, sources, texts = defaultdict(list), set(), set()
    for package in read_packages(lists, descriptions=True):
        text = first_words(package.description)
        if package.section not in CLASS_OF or package.source in sources or len(text.split()) < FEWEST_WORDS:
            continue
        if package.synopsis.lower() in texts or text.lower() in texts:
            continue
        sources.add(package.source)
        texts.update((package.synopsis.lower(), text.lower()))
        groups[split_of(package.source), CLASS_OF[package.section]].append((package.name, package.synopsis, text))
    rows: dict[str, list[dict]] = {split: [] for split in SPLITS}
    for (split, _), packages in sorted(groups.items()):
        for (name_a, a, text_a), (name_b, b, text_b) in couples(packages):
            # Half of the couples keep their descriptions (two matches), half swap them (two hard negatives): every text
            # occurs once, so neither side alone gives the label away.
            if stable_hash(SALT + "swap", f"{name_a}/{name_b}") % 2:
                made = [(name_a, a, text_a, 1), (name_b, b, text_b, 1)]
            else:
                made = [(f"{name_a}+{name_b}", a, text_b, 0), (f"{name_b}+{name_a}", b, text_a, 0)]
            rows[split] += [{"id": i, "text_a": x, "text_b": y, "label": label} for i, x, y, label in made]
    write_splits(out / "pairs", rows)
    (out / "pairs" / "labels.json").write_text(json.dumps(["no match", "match"]) + "\n")


# ------------------------------------------------------------------------------------------------ lm
def make_lm(out: Path, debs: Path | None) -> None:
    if debs is None:
        raise Missing("lm needs --debs FOLDER with the packages of --list-packages")
    rows: dict[str, list[dict]] = {split: [] for split in SPLITS}
    for row in corpus.rows(debs, stable_hash):
        percent = stable_hash(SALT + "lm", row["id"]) % 100
        rows["train" if percent < 96 else "validation" if percent < 98 else "test"].append(row)
    write_splits(out / "lm", rows)
    corpus.train_tokenizer(out / "lm" / "tokenizer.json", (row["text"] for row in rows["train"]))


# ------------------------------------------------------------------------------------------------ command line
def differing(out: Path, task: str) -> dict[str, str]:
    """{file: what was found} for the files of a task that are not the ones of the published numbers."""
    names = [name for name in SHA256 if name.startswith(f"{task}/")]
    found = {name: sha256(out / name) if (out / name).exists() else "missing" for name in names}
    return {name: digest for name, digest in found.items() if digest != SHA256[name]}


def derive(out: Path, task: str, *, lists: Path, debs: Path | None = None) -> dict[str, str]:
    """Writes one task into `out` unless it is there already; returns the files that differ from the published ones."""
    if not differing(out, task):
        return {}
    if task == "sections":
        make_sections(out, lists)
    elif task == "pairs":
        make_pairs(out, lists)
    else:
        make_lm(out, debs)
    return differing(out, task)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="?", default=Path(__file__).parent / "data")
    parser.add_argument("--tasks", default="sections,pairs")
    parser.add_argument("--apt-lists", type=Path, default=Path("/var/lib/apt/lists"))
    parser.add_argument("--debs", type=Path, help="folder with the .deb files that lm reads")
    parser.add_argument("--list-packages", action="store_true", help="print them, as apt-get download takes them, and stop")
    options = parser.parse_args()
    if options.list_packages:
        print(corpus.packages_to_download())
        return 0
    status, wanted = 0, options.tasks.split(",")
    for task in wanted:
        if task not in ("sections", "pairs", "lm"):
            parser.error(f"unknown task {task!r}; there are sections, pairs, lm")
    for task in wanted:
        try:
            different = derive(options.out, task, lists=options.apt_lists, debs=options.debs)
        except Missing as missing:
            print(f"tasks: {missing}", file=sys.stderr)
            return 2
        for name, digest in different.items():
            status = 1
            print(f"{name}: {digest[:16]}, published numbers were measured on {SHA256[name][:16]}", file=sys.stderr)
        print(f"{task}: {'DIFFERS from the published data: the archive moved on' if different else 'as published'}")
    return status


if __name__ == "__main__":
    sys.exit(main())
