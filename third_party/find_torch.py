"""Prints "folder;version" of the torch to build against, for CMake. Never imports torch: that takes seconds and may fail in a build."""
import importlib.util
import os
import re
import sys
import sysconfig
from pathlib import Path

OLDEST = (2, 11)


def candidates():
    if os.environ.get("LOWFAT_TORCH_DIR"):
        yield Path(os.environ["LOWFAT_TORCH_DIR"])
    spec = importlib.util.find_spec("torch")
    if spec and spec.origin:
        yield Path(spec.origin).parent
    # pip's isolated build hides site-packages from imports, but sys.prefix is still the target environment.
    yield from (Path(sysconfig.get_path(scheme)) / "torch" for scheme in ("purelib", "platlib"))


def version_of(folder):
    text = folder / "version.py"
    found = re.search(r"__version__ = '([^']+)'", text.read_text()) if text.is_file() else None
    return found and found.group(1)


def main():
    too_old = []
    for folder in candidates():
        version = version_of(folder)
        if version is None:
            continue
        if tuple(int(part) for part in version.split(".")[:2]) >= OLDEST:
            sys.stdout.write(f"{folder.as_posix()};{version}")
            return
        too_old.append(f"{version} in {folder}")
    sys.exit(f"lowfat needs torch >= {'.'.join(map(str, OLDEST))} to build; found {', '.join(too_old) or 'none'}. Install torch first "
             "(pip install torch). If it is installed and hidden by an isolated build, pass --no-build-isolation, "
             "or set LOWFAT_TORCH_DIR to the folder that holds torch/version.py.")


main()
