"""Requests: the two records of options, and the values that each option permits.

:class:`Request` and :class:`Sampling` declare each option once: default, bounds, help text. The
command line, the demo and the evaluation derive theirs from :data:`OPTIONS`. Nothing here imports
more than the standard library, so that ``--help`` stays quick.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import numbers
import reprlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, ParamSpec, TypeVar

from vpt.boxes import GridBox
from vpt.errors import PromptError
from vpt.protocol.grammar import MOST_REGIONS
from vpt.protocol.tokens import LOOK_AT, PERCEPTION_MODES, canonical_mode

if TYPE_CHECKING:
    from vpt.images import LoadedImage

REPLACED_LOOKS = ("blank", "random")
ROLES = ("user", "assistant")

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class Option:
    """One option of a request: the values it permits, and its texts for people.

    Attributes:
        kind: ``bool``, ``float``, ``int`` or ``str``.
        default: value if none is given.
        help: for the command line; for a ``bool``, of the flag that changes it.
        label: for the demo.
        metavar: placeholder of the value in the help.
        least: smallest number permitted, or with ``excludes_least`` the first that is too small.
        most: largest number permitted.
        choices: texts permitted.
        is_index: whether an index, a number from 0 on, is permitted beside the choices.
        canonical: for other names of the choices: name -> choice.
    """

    kind: type
    default: Any
    help: str
    label: str = ""
    metavar: str | None = None
    least: int = 0
    most: float = math.inf
    excludes_least: bool = False
    choices: Sequence[str] = ()
    is_index: bool = False
    canonical: Callable[[str], str] = str

    def check(self, name: str, value: object) -> Any:
        """Return the value, perhaps of numpy, as Python's; raise ``PromptError`` if unusable."""
        if self.is_index and isinstance(value, numbers.Integral):
            return check_number(name, value, int, 0)
        if self.choices:
            known = self.canonical(value) if isinstance(value, str) else value
            return one_of(name, known, self.choices)
        if self.kind is not bool:
            return check_number(name, value, self.kind, self.least, self.most, self.excludes_least)
        if not isinstance(value, bool):
            import numpy as np

            if not isinstance(value, np.bool_):
                raise _refusal(name, "True or False", value)
        return bool(value)


def _option(kind: type, default: Any, help: str, label: str = "", **about: Any) -> Any:
    """A field of a record that is an option."""
    return field(default=default, metadata={"option": Option(kind, default, help, label, **about)})


def check_options(record: Any, optional: Sequence[str] = ()) -> None:
    """Check the fields of a frozen record that bear the name of an option; see ``Option.check``.

    ``None`` is accepted for ``optional`` fields.
    """
    for name in (one.name for one in dataclasses.fields(record) if one.name in OPTIONS):
        if (value := getattr(record, name)) is not None or name not in optional:
            object.__setattr__(record, name, OPTIONS[name].check(name, value))


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen from its logits.

    Attributes:
        temperature: 0 takes the likeliest token; else logits are divided by it.
        top_k: number of likeliest tokens to keep; 0 for all.
        top_p: keep the likeliest tokens that together have this probability; 1 for all.
        seed: of the random generator, 0 to 2**64 - 1; the same seed yields the same tokens.

    Raises:
        PromptError: naming the attribute that has another type or is out of bounds.
    """

    temperature: float = _option(
        float, 0.0, "0 takes the likeliest token", "Temperature (0: likeliest token)", metavar="T"
    )
    top_k: int = _option(
        int,
        0,
        "number of likeliest tokens to sample from; 0 for all",
        "Top k (0: all)",
        metavar="K",
    )
    top_p: float = _option(
        float,
        1.0,
        "sample from the likeliest tokens that together have this probability",
        "Top p",
        metavar="P",
        most=1,
        excludes_least=True,
    )
    seed: int = _option(int, 0, "seed of sampling", "Seed", metavar="S", most=2**64 - 1)

    def __post_init__(self) -> None:
        check_options(self)


@dataclass(frozen=True)
class Message:
    """An earlier turn of a conversation.

    Attributes:
        role: ``"user"`` or ``"assistant"``.
        images: of a user, in the order they were shown.
    """

    role: str
    text: str
    images: Sequence[LoadedImage] = ()

    def __post_init__(self) -> None:
        one_of("role", self.role, ROLES)
        if not isinstance(self.text, str):
            raise _refusal("text of a message", "text (str)", self.text)
        _check_images("images of a message", self.images)
        if self.images and self.role != "user":
            raise PromptError("images belong to a message of the user, not of the assistant")


@dataclass(frozen=True, repr=False)
class Request:
    """A conversation that ends with a question: about the images of its last turn, or of any.

    Attributes:
        images: of the last turn, in the order they are shown.
        question: plain text.
        history: the turns before, in order.
        perception: one of ``vpt.protocol.tokens.PERCEPTION_MODES``, or another name of it.
        max_calls: perception calls at most; a turn with several regions is one call.
        max_new_tokens: tokens the model may choose in all; its context is another limit.
        constrain: let the grammar permit only well-formed calls within the budget. Without it
            malformed calls are recorded and read as text; a call beyond the budget ends the run.
        look_at: which image a call concerns: the ``"first"`` one given with the latest turn that
            has any, as released; the ``"latest"`` in the stream, which makes a crop of a crop
            possible; or that with this index, counted from the conversation's first on.
        sampling: greedy by default.
        system: the system turn; ``None`` for the released one.
        region: cells of the grid for the first call, in place of the model's choice: to correct it,
            or to measure the effect of the true region.
        point: ``(x, y)`` in pixels of the image; the first call shows its cell, and ``mask`` the
            object there.
        look_for: a phrase; where a detector finds it in the image, the first call looks.
        max_boxes: boxes of a phrase to look at in the first call, best first.
        mask: whether a segmenter narrows a crop to the object of its box, or of its region: the
            rest is dimmed. Looks that ``replace_looks`` replaces stay as they are.
        replace_looks: one of ``REPLACED_LOOKS``, to measure whether the results of calls matter:
            ``"blank"`` appends a gray image of the same size, ``"random"`` a crop of the same
            size from another place (re-encodings, which have no place, stay as they are).
        replace_content: to measure whether it matters what the model draws before it answers: what
            is read in place of its depth maps and boxes: ``"random"``, ``"repeat"``, ``"empty"``,
            or a text of content tokens; see :mod:`vpt.inference.content`.

    Raises:
        PromptError: naming the attribute that has another type or is out of bounds.
    """

    images: Sequence[LoadedImage]
    question: str
    perception: str = _option(
        str,
        "auto",
        "auto: as the model chooses; none: never; crop: at a region; grounding: for a phrase; "
        "reencode: with any branch; or with the one named",
        "Look again",
        choices=PERCEPTION_MODES,
        canonical=canonical_mode,
    )
    max_calls: int = _option(int, 4, "maximum number of calls", "Calls at most", metavar="N")
    max_new_tokens: int = _option(
        int, 256, "maximum number of tokens to write", "Tokens at most", metavar="N", least=1
    )
    constrain: bool = _option(
        bool,
        True,
        "let the model write malformed calls; they are recorded and read as text",
        "Permit well-formed calls only",
    )
    look_at: str | int = _option(
        str,
        "first",
        "look at the first image, or the latest, which may be a crop",
        choices=LOOK_AT,
        is_index=True,
    )
    max_boxes: int = _option(
        int,
        1,
        "boxes of a phrase to look at, best first",
        "Boxes of a phrase",
        metavar="N",
        least=1,
        most=MOST_REGIONS,
    )
    mask: bool = _option(
        bool, False, "dim what is not the object in a crop, by --segmenter", "Dim around objects"
    )
    sampling: Sampling = field(default_factory=Sampling)
    system: str | None = None
    region: GridBox | None = None
    look_for: str | None = None
    point: tuple[int, int] | None = None
    replace_looks: str | None = None
    replace_content: str | None = None
    history: Sequence[Message] = ()
    kept: ClassVar[Any] = None
    """The conversation that a runtime made to check this request, until it is answered."""

    def __repr__(self) -> str:
        changed = [f"{k}={v!r}" for k, v in self.options.items() if v != _DEFAULTS[k]]
        return f"Request({', '.join([repr(list(self.images)), repr(self.question), *changed])})"

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles have their fields only."""
        return {one.name: getattr(self, one.name) for one in dataclasses.fields(self)}

    def __post_init__(self) -> None:
        if not isinstance(self.question, str):
            raise _refusal("question", "text (str)", self.question)
        check_options(self)
        if not isinstance(self.system, str | None):
            raise _refusal("system", "text (str)", self.system)
        if self.replace_looks is not None:
            one_of("replace_looks", self.replace_looks, REPLACED_LOOKS)
        if self.replace_content is not None:
            self._check_replaced_content(self.replace_content)
        _instance("sampling", self.sampling, Sampling)
        self._check_messages()
        if self.look_for is not None:
            self._check_look_for(self.look_for)
        if self.region is not None:
            self._check_region(self.region)
        if self.point is not None:
            self._check_point(self.point)

    def _check_replaced_content(self, how: str) -> None:
        if not isinstance(how, str):
            raise _refusal("replace_content", "text (str)", how)
        if not self.constrain:
            raise PromptError("replace_content needs constrain=True: content as the grammar has it")

    def _check_messages(self) -> None:
        _check_images("images", self.images)
        for index, message in enumerate(self.history):
            _instance(f"history[{index}]", message, Message)
        if not self.has_images and self.perception not in ("auto", "none"):
            raise PromptError(f"perception={self.perception!r} needs an image to look at")

    @property
    def messages(self) -> tuple[Message, ...]:
        """All turns, the question as the last."""
        return (*self.history, Message("user", self.question, self.images))

    @property
    def all_images(self) -> list[LoadedImage]:
        """Images of all turns, in order."""
        return [image for message in self.messages for image in message.images]

    @property
    def has_images(self) -> bool:
        """Whether there is an image to look at."""
        return any(message.images for message in self.messages)

    def _check_look_for(self, phrase: str) -> None:
        if not isinstance(phrase, str) or not phrase.strip():
            raise _refusal("look_for", "a phrase such as 'the blue tag'", phrase)
        self._check_first_call("look_for")

    def _check_region(self, region: GridBox) -> None:
        _instance("region", region, GridBox)
        cells = [check_number("region", cell, int, 0) for cell in astuple(region)]
        object.__setattr__(self, "region", GridBox(*cells))
        self._check_first_call("region")

    def _check_point(self, point: tuple[int, int]) -> None:
        if not isinstance(point, tuple | list) or len(point) != 2:
            raise _refusal("point", "x and y in pixels", point)
        x, y = (check_number("point", side, int, 0) for side in point)
        object.__setattr__(self, "point", (x, y))
        self._check_first_call("point")

    def _check_first_call(self, name: str) -> None:
        given = [one for one in ("region", "look_for", "point") if getattr(self, one) is not None]
        if len(given) > 1:
            raise PromptError(f"{' and '.join(given)} both name the first look; pass one of them")
        if self.perception not in ("auto", "crop") or not self.has_images or not self.max_calls:
            raise PromptError(
                f"{name} needs an image, a call (max_calls) and perception 'auto' or 'crop'; "
                f"got perception={self.perception!r}, max_calls={self.max_calls}"
            )

    @classmethod
    def of(
        cls,
        images: Sequence[LoadedImage],
        question: str,
        options: Mapping[str, Any],
        history: Sequence[Message] = (),
    ) -> Request:
        """Make a request of options by name, those of :class:`Sampling` among them."""
        _refuse_unknown(options, _DEFAULTS)
        of_sampling = Sampling.__dataclass_fields__.keys()
        sampling = Sampling(**{name: options[name] for name in options.keys() & of_sampling})
        rest = {name: options[name] for name in options.keys() - of_sampling}
        return cls(images, question, sampling=sampling, history=history, **rest)

    @property
    def options(self) -> dict[str, Any]:
        """The options by name, as :meth:`of` takes them."""
        return {
            name: getattr(self.sampling if name in Sampling.__dataclass_fields__ else self, name)
            for name in _DEFAULTS
        }


OPTIONS: Mapping[str, Option] = {
    one.name: one.metadata["option"]
    for record in (Request, Sampling)
    for one in dataclasses.fields(record)
    if "option" in one.metadata
}
"""The options that every door offers, by name."""

_DEFAULTS = {
    one.name: one.default
    for record in (Request, Sampling)
    for one in dataclasses.fields(record)
    if one.name not in ("images", "question", "sampling", "history")
}


def _check_images(name: str, images: object) -> None:
    from vpt.images import LoadedImage

    if not isinstance(images, list | tuple):
        raise PromptError(f"{name} must be a list, not {type(images).__name__}")
    for index, image in enumerate(images):
        _instance(f"{name}[{index}]", image, LoadedImage)


def lists_options(function: Callable[P, R]) -> Callable[P, R]:
    """Refuse an unknown option of a function with a ``PromptError`` that lists those it has."""
    parameters = inspect.signature(function).parameters
    names = [name for name, one in parameters.items() if one.kind is one.KEYWORD_ONLY]

    @functools.wraps(function)
    def checked(*args: P.args, **options: P.kwargs) -> R:
        _refuse_unknown(options.keys() - parameters, names)
        return function(*args, **options)

    return checked


def _refuse_unknown(options: Iterable[str], known: Iterable[str]) -> None:
    if unknown := sorted(set(options) - set(known)):
        available = ", ".join(sorted(known))
        raise PromptError(f"unknown option {unknown[0]!r}; available: {available}")


def check_number(
    name: str,
    value: object,
    kind: type,
    least: float,
    most: float = math.inf,
    excludes_least: bool = False,
) -> Any:
    """Return a finite number within bounds, perhaps of numpy, as ``int`` or ``float`` (``kind``).

    Other values, ``bool`` among them, raise ``PromptError``.
    """
    is_whole, number = kind is int, math.nan
    if isinstance(value, numbers.Integral if is_whole else numbers.Real):
        try:
            number = kind(value)
        except OverflowError:  # an integer of hundreds of digits
            number = math.inf
    is_within = least <= number <= most and number < math.inf
    if isinstance(value, bool) or not is_within or (excludes_least and number == least):
        bound = f"above {least}" if excludes_least else f"of at least {least}"
        limit = f" and at most {most}" if most < math.inf else ""
        raise _refusal(name, f"a {'whole' if is_whole else 'finite'} number {bound}{limit}", value)
    return number


def one_of(name: str, value: object, choices: Sequence[str]) -> str:
    """Return a text that is one of ``choices``; raise ``PromptError`` otherwise."""
    if not isinstance(value, str) or value not in choices:
        raise _refusal(name, f"one of {', '.join(map(repr, choices))}", value)
    return value


def _instance(name: str, value: object, kind: type) -> None:
    if not isinstance(value, kind):
        raise PromptError(f"{name} must be {kind.__name__}, not {type(value).__name__}")


def _refusal(name: str, expected: str, value: object) -> PromptError:
    try:
        shown = reprlib.repr(value)
    except ValueError:  # an integer with too many digits to write
        shown = "a very large number"
    return PromptError(f"{name} must be {expected}, not {shown}")
