"""A function that waits for somebody else's import: called once, in time, and for an import only."""
import importlib
import importlib.util
import sys

import pytest

from lowfat.on_import import when_imported


@pytest.fixture
def other(tmp_path, monkeypatch):
    """The name of a module that nobody has imported; it is gone again afterwards."""
    (tmp_path / "some_other_module.py").write_text("ready = True")
    monkeypatch.syspath_prepend(tmp_path)
    finders = list(sys.meta_path)
    yield "some_other_module"
    sys.meta_path[:] = finders
    sys.modules.pop("some_other_module", None)


def test_called_once_after_the_import(other):
    calls, finders = [], len(sys.meta_path)
    when_imported(other, lambda: calls.append(sys.modules[other].ready))
    importlib.util.find_spec(other)
    assert calls == []
    module = importlib.import_module(other)
    assert calls == [True]  # the module was complete
    importlib.reload(module)
    assert calls == [True]
    assert len(sys.meta_path) == finders


def test_called_at_once_for_an_imported_module(other):
    importlib.import_module(other)
    calls, finders = [], len(sys.meta_path)
    when_imported(other, lambda: calls.append(1))
    assert calls == [1]
    assert len(sys.meta_path) == finders


def test_module_that_fails_does_not_call(other, tmp_path):
    (tmp_path / "some_other_module.py").write_text("1 / 0")
    calls = []
    when_imported(other, lambda: calls.append(1))
    with pytest.raises(ZeroDivisionError):
        importlib.import_module(other)
    assert calls == []


def test_missing_module_stays_missing(other, tmp_path):
    (tmp_path / "some_other_module.py").unlink()
    when_imported(other, lambda: pytest.fail("called"))
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module(other)
