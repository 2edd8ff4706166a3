"""The errors this package raises on purpose, all one-line messages: where, what was expected, what to do.

::

    LoraAnalysisError
    ├── CheckpointError            a file of tensors cannot be read: missing, truncated, foreign, unsafe
    ├── AdapterFormatError         an adapter breaks the rules of its own format
    ├── UnsupportedAdapterError    a known format or kind of update that is not read, named
    │   ├── MutatedBaseError       its initialisation moved the base, and the initial factors are not given
    │   └── AmbiguousAdapterError  its tensors allow two readings, and nothing given decides
    ├── BaseWeightsError           the base model lacks a matrix, or its shape does not fit the update
    └── UndefinedUpdateError       a number was asked for that the update does not define:
                                   its scale is unknown, or its factors hold NaN or infinities

Wrong arguments are ``ValueError`` and ``TypeError``, as everywhere in Python.
"""


class LoraAnalysisError(Exception):
    """Any error of this package; catch it to report a bad input in one line."""


class CheckpointError(LoraAnalysisError):
    """A file of tensors cannot be read: missing, truncated, foreign or unsafe."""


class AdapterFormatError(LoraAnalysisError):
    """An adapter breaks the rules of the format it claims or was read as."""


class UnsupportedAdapterError(LoraAnalysisError):
    """A format or kind of update that is recognised, named, and not read."""


class MutatedBaseError(UnsupportedAdapterError):
    """The update needs the factors that training started from, because they were subtracted from the base."""


class AmbiguousAdapterError(UnsupportedAdapterError):
    """The tensors allow more than one reading, and neither the file nor the caller decides."""


class BaseWeightsError(LoraAnalysisError):
    """The base model lacks a matrix, or its shape does not fit the update."""


class UndefinedUpdateError(LoraAnalysisError):
    """The update does not define the number asked for: unknown scale, NaN or infinities."""
