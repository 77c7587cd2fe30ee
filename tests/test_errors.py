"""Every error is one of ours and also the builtin that users expect to catch."""
import pytest

from lowfat import errors

BUILTINS = {
    "ArgumentError": (ValueError,), "ShapeError": (ValueError,), "DtypeError": (TypeError,), "DeviceError": (RuntimeError,),
    "IndexRangeError": (IndexError,), "NumericsError": (ArithmeticError,), "UnsupportedError": (NotImplementedError,),
    "FormatError": (ValueError,), "IntegrityError": (ValueError,), "CompatibilityError": (RuntimeError, ImportError),
    "StorageError": (OSError,),
}


def test_the_table_is_complete():
    ours = {name for name, c in vars(errors).items() if isinstance(c, type)}
    assert ours == BUILTINS.keys() | {"LowfatError"}


@pytest.mark.parametrize("name", BUILTINS)
def test_caught_as_ours_and_as_the_builtin(name):
    for caught in (errors.LowfatError, *BUILTINS[name]):
        with pytest.raises(caught, match="^the text$"):
            raise getattr(errors, name)("the text")
