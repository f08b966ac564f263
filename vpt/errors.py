"""The errors this package raises on purpose.

::

    VPTError
    ├── ImageError              a picture cannot be used
    ├── RegionError             a region cannot be placed on a grid or an image
    ├── PromptError             a question, message list or option cannot be turned into a prompt
    ├── PositionError           token, feature or position counts of one input disagree
    │   └── FeatureCountError   placeholders and features differ in number
    ├── DataError               a file of rows or annotations, or one of them, cannot be used
    ├── CheckpointError         a model folder is missing something, or holds something unknown
    ├── BudgetError             a request needs more room than it was given
    ├── RunError                a request failed in the middle, by no fault of its own
    │   └── NonFiniteError      the model's logits, or a loss, are NaN or infinite
    ├── ServiceError            another program, asked over the network, does not do its work
    └── TrainingError           LLaMA-Factory is not as it was tested, or asked for what cannot be

Each message says what was expected, what came, and what to do about it.
"""

from collections.abc import Sequence
from typing import Any


class VPTError(Exception):
    """Base class of every error raised on purpose by this package.

    Attributes:
        answers: of an error that ``Runtime.ask_many`` raises: for each request its ``Answer``, or
            the error in its place; else empty.
    """

    answers: Sequence[Any] = ()


class ImageError(VPTError, ValueError):
    """A picture is missing, unreadable, too large or of an unknown kind."""


class RegionError(VPTError, ValueError):
    """A region or box cannot be placed on its grid or image."""


class PromptError(VPTError, ValueError):
    """A question, a message list or an option cannot be turned into a prompt."""


class DataError(VPTError, ValueError):
    """A file of rows or annotations, or one of them, cannot be used."""


class PositionError(VPTError, ValueError):
    """Tokens, images and calls of one input do not fit each other."""


class FeatureCountError(PositionError):
    """The number of placeholder tokens differs from the number of features."""


class CheckpointError(VPTError):
    """A model folder lacks a file, a weight or a setting, or holds unknown ones."""


class BudgetError(VPTError, ValueError):
    """A request does not fit the room (tokens, calls, slots) it was given."""


class RunError(VPTError):
    """The run of a request failed by a fault of model, code or machine; see its ``__cause__``."""


class NonFiniteError(RunError):
    """The model's logits, or the loss of a training, are NaN or infinite."""


class ServiceError(VPTError):
    """A service that was asked for, such as a judge, is down, or refuses the key or the request."""


class TrainingError(VPTError):
    """LLaMA-Factory is not the one that was tested, or a setting of it cannot be honoured."""


def as_vpt_error(exc: Exception) -> VPTError:
    """Return the error if it is one of this package, else a ``RunError`` caused by it."""
    if isinstance(exc, VPTError):
        return exc
    error = RunError(f"the run failed with {type(exc).__name__}: {exc}")
    error.__cause__ = exc
    return error


def is_out_of_memory(exc: BaseException) -> bool:
    """Whether an error, or its cause, says that memory ran out, on a GPU or in the machine."""
    if isinstance(exc, RunError) and exc.__cause__ is not None:
        return is_out_of_memory(exc.__cause__)
    words = ("out of memory", "can't allocate memory", "not enough memory")
    named = type(exc).__name__ in ("OutOfMemoryError", "MemoryError")
    return named or (isinstance(exc, RuntimeError) and any(w in str(exc).lower() for w in words))
