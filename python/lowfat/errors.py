"""Every error lowfat raises on purpose: one class per kind of mistake, each also the builtin that users expect to catch.

A message names the argument or file, what was found, and what is needed."""


class LowfatError(Exception):
    """Anything lowfat refuses; catch this to catch all of the below."""


class ArgumentError(LowfatError, ValueError):
    """An option has a value it cannot have: an unknown method, a ratio outside (0, 1), a missing folder."""


class ShapeError(LowfatError, ValueError):
    """Sizes or ranks that do not fit together."""


class DtypeError(LowfatError, TypeError):
    """A dtype that is not supported or not the same everywhere, or no tensor at all."""


class DeviceError(LowfatError, RuntimeError):
    """Tensors on different devices, or a device without what the call needs."""


class IndexRangeError(LowfatError, IndexError):
    """An index tensor whose values are out of range, out of order or repeated."""


class NumericsError(LowfatError, ArithmeticError):
    """NaN or infinity where it is refused, or a solver that failed."""


class UnsupportedError(LowfatError, NotImplementedError):
    """Something torch offers and lowfat does not: refused, so that it never gives a wrong number."""


class FormatError(LowfatError, ValueError):
    """A file whose content is not what its format says."""


class IntegrityError(LowfatError, ValueError):
    """A file that differs from what its manifest recorded."""


class CompatibilityError(LowfatError, RuntimeError, ImportError):
    """Versions that do not work together."""


class StorageError(LowfatError, OSError):
    """A disk that fails while writing: full, gone, read-only. What was there before is unchanged."""
