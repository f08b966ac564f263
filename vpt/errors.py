"""The errors this package raises on purpose.

::

    VPTError
    ├── ImageError              an image cannot be used
    ├── RegionError             a region cannot be placed on a grid or an image
    ├── PromptError             a question, message list or option cannot be turned into a prompt
    ├── PositionError           token, feature or position counts of one input disagree
    │   └── FeatureCountError   placeholders and features differ in number
    ├── DataError               a file of rows or annotations, or one of them, cannot be used
    ├── CheckpointError         a model folder lacks a part, or contains an unknown one
    ├── BudgetError             a request exceeds a limit of tokens, calls or slots
    ├── RunError                a valid request failed: model, code or machine
    │   └── NonFiniteError      the model's logits, or a loss, are NaN or infinite
    ├── ServiceError            another program, called over the network, fails
    └── TrainingError           an untested LLaMA-Factory, or a setting that is not supported

Each message states what was expected, what came, and what to do.
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
    """An image is missing, unreadable, too large or of an unknown kind."""


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
    """A model folder lacks a file, a weight or a setting, or contains unknown ones."""


class BudgetError(VPTError, ValueError):
    """A request exceeds its limits of tokens, calls or slots."""


class RunError(VPTError):
    """A request failed through model, code or machine; see the ``__cause__``."""


class NonFiniteError(RunError):
    """The model's logits, or the loss of a training, are NaN or infinite."""


class ServiceError(VPTError):
    """A service, such as a judge, is down, or refuses the key or the request."""


class TrainingError(VPTError):
    """LLaMA-Factory is not the tested version, or one of its settings is not supported."""


def as_vpt_error(exc: Exception) -> VPTError:
    """Return the error if it is one of this package, else a ``RunError`` caused by it."""
    if isinstance(exc, VPTError):
        return exc
    error = RunError(f"the run failed with {type(exc).__name__}: {exc}")
    error.__cause__ = exc
    return error


def is_out_of_memory(exc: BaseException) -> bool:
    """Whether an error, or its cause, reports that memory ran out, on a GPU or in the machine."""
    if isinstance(exc, RunError) and exc.__cause__ is not None:
        return is_out_of_memory(exc.__cause__)
    words = ("out of memory", "can't allocate memory", "not enough memory")
    named = type(exc).__name__ in ("OutOfMemoryError", "MemoryError")
    return named or (isinstance(exc, RuntimeError) and any(w in str(exc).lower() for w in words))
