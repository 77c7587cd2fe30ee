"""Runs a function when somebody else's module is imported, so that `import lowfat` need not import it."""
import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec


def when_imported(name: str, call: Callable[[], None]) -> None:
    """Calls `call()` once, right after module `name` was imported: now, if that has happened already."""
    if name in sys.modules:
        call()
    else:
        sys.meta_path.insert(0, _Watch(name, call))


class _Watch(MetaPathFinder):
    """Lets the other finders find the module, and makes its loader report when it is done."""

    def __init__(self, name: str, call: Callable[[], None]):
        self.name, self.call = name, call

    def find_spec(self, name, path=None, target=None) -> ModuleSpec | None:
        if name != self.name:
            return None
        others = [finder for finder in sys.meta_path if finder is not self]
        spec = next((spec for finder in others if (spec := finder.find_spec(name, path, target)) is not None), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module):
                execute(module)
                if self in sys.meta_path:  # a spec may be asked for, and even executed, more than once
                    sys.meta_path.remove(self)
                    self.call()

            spec.loader.exec_module = exec_module
        return spec
