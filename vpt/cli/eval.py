"""`vpt eval` and `vpt eval compare`: arguments, and what they print."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from vpt.cli.model import (
    add_model_arguments,
    add_request_arguments,
    check_model_arguments,
    load_options,
    load_runtime,
    quieten,
)
from vpt.cli.output import print_err, print_out
from vpt.cli.parser import Command, comma_list, whole_number
from vpt.errors import PromptError
from vpt.protocol.tokens import PERCEPTION_MODES

if TYPE_CHECKING:
    from vpt.evaluation.evaluate import Asker
    from vpt.evaluation.judge_protocol import JudgeSettings
    from vpt.evaluation.runner import Decoding

_DEFAULT_OUT = Path("results")
_DECODING = ("max_new_tokens", "max_calls", "constrain", "temperature", "top_p", "top_k", "seed")
_FINE, _NOTHING_ANSWERED = 0, 1


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    _add_what(parser.add_argument_group("what to ask"))
    add_model_arguments(parser)
    _add_how(parser.add_argument_group("how"))
    _add_judge(parser.add_argument_group("judge of free-form answers"))
    output = parser.add_argument_group("output")
    output.add_argument(
        "--out",
        type=Path,
        default=_DEFAULT_OUT,
        metavar="DIR",
        help=f"records, results.json and report.html (default: {_DEFAULT_OUT})",
    )
    output.add_argument(
        "--resume",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="resume the run that DIR holds, or refuse to (default: resume)",
    )
    output.add_argument("--list", action="store_true", help="show the splits, and end")


def _add_what(what: argparse._ArgumentGroup) -> None:
    what.add_argument(
        "--splits",
        type=comma_list,
        default=(),
        metavar="A,B",
        help="names from --list, or own files: a path, or FORMAT:PATH",
    )
    what.add_argument(
        "--perception",
        type=comma_list,
        default=("auto",),
        metavar="LIST",
        help=f"{', '.join(PERCEPTION_MODES)}; blank, random, truth: own calls that "
        "bring a gray picture or a random crop, the true region; tool-value: all it takes to see "
        "whether looking again helps (default: auto)",
    )
    what.add_argument(
        "--limit", type=whole_number(1), metavar="N", help="the first N rows of each split only"
    )
    what.add_argument(
        "--data",
        type=Path,
        default=Path("datasets"),
        metavar="DIR",
        help="folder of the splits' files (default: datasets)",
    )
    what.add_argument(
        "--images",
        action="append",
        default=[],
        metavar="FROM=TO",
        help="images whose path begins with FROM are in TO; may be given several times",
    )


def _add_how(how: argparse._ArgumentGroup) -> None:
    how.add_argument("--batch-size", type=whole_number(1), default=8, metavar="B", help="at once")
    how.add_argument(
        "--workers",
        type=whole_number(1),
        metavar="N",
        help="models at once, on as many devices or hosts, by Ray (extra `ray`)",
    )
    add_request_arguments(how, _DECODING, unset={"max_new_tokens": "as the split says"})


def _add_judge(judge: argparse._ArgumentGroup) -> None:
    judge.add_argument(
        "--judge", metavar="MODEL", help="have this model score the free-form splits"
    )
    judge.add_argument(
        "--judge-url",
        metavar="URL",
        help="of any OpenAI-compatible endpoint; the key comes from OPENAI_API_KEY",
    )
    judge.add_argument(
        "--judge-concurrency",
        type=whole_number(1),
        default=8,
        metavar="N",
        help="concurrent calls (default: 8)",
    )
    judge.add_argument(
        "--judge-retries",
        type=whole_number(0),
        default=5,
        metavar="N",
        help="of a call that failed temporarily (default: 5)",
    )


def _run(args: argparse.Namespace) -> int:
    if args.list:
        from vpt.evaluation.table import splits_table

        print_out(splits_table(args.data))
        return _FINE
    check_model_arguments(args)
    if not args.splits:
        raise PromptError("--splits names what to ask; see --list")
    from vpt.evaluation.evaluate import evaluate, make_plan
    from vpt.evaluation.records import RunFolder
    from vpt.evaluation.table import results_table, shortfalls

    judge = _judge_settings(args)
    plan = make_plan(
        splits=args.splits,
        conditions=args.perception,
        data=args.data,
        image_roots=args.images,
        limit=args.limit,
    )
    folder = RunFolder(args.out)
    if folder.path.exists():
        with folder.held():  # report a run under way there before a model is loaded
            pass
    results = evaluate(
        _asker(args),
        plan,
        _decoding(args),
        folder,
        batch_size=args.batch_size,
        resume=args.resume,
        judge=judge,
    )
    print_out(results_table(results))
    for line in shortfalls(results, args.out):
        print_err(line)
    print_err(f"results in {args.out}: results.json, report.html and the records")
    if not any(entry["n"] > sum(entry["failures"].values()) for entry in results["splits"]):
        print_err("error: no sample was answered: each one failed or does not fit the condition")
        return _NOTHING_ANSWERED
    return _FINE


def _asker(args: argparse.Namespace) -> Asker:
    """The model, in this process or in others."""
    if args.workers is None:
        from vpt.evaluation.runner import LocalAsker

        return LocalAsker(load_runtime(args))
    from vpt.evaluation.workers import RayAsker

    quieten(args)
    return RayAsker(load_options(args), args.workers)


def _decoding(args: argparse.Namespace) -> Decoding:
    from vpt.evaluation.runner import Decoding

    return Decoding(**{name: getattr(args, name) for name in _DECODING})


def _judge_settings(args: argparse.Namespace) -> JudgeSettings | None:
    if args.judge is None:
        if args.judge_url is not None:
            raise PromptError("--judge-url needs --judge, the name of the model there")
        return None
    from vpt.evaluation.judge_protocol import JudgeSettings

    url = {} if args.judge_url is None else {"base_url": args.judge_url}
    return JudgeSettings(
        model=args.judge,
        max_concurrency=args.judge_concurrency,
        max_retries=args.judge_retries,
        **url,
    )


def _add_compared(parser: argparse.ArgumentParser) -> None:
    for name in ("a", "b"):
        parser.add_argument(name, type=Path, metavar=name.upper(), help="--out folder of a run")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page to look at")


def _compare(args: argparse.Namespace) -> None:
    from vpt.evaluation.compare import compare_folders
    from vpt.evaluation.report import write_comparison

    comparison = compare_folders(args.a, args.b)
    print_out(comparison.table())
    if args.html is not None:
        write_comparison(comparison, args.html)


RUN = Command(
    help="run a model over benchmark splits",
    description=(
        "Run a model over benchmark splits, score its answers, and see whether looking again\n"
        "helped. Killed at any moment, the same command resumes where it was."
    ),
    examples=(
        "example:\n"
        "  evaluation.py --list\n"
        "  evaluation.py --splits embedded_heldout --perception tool-value --limit 200\n"
        "  evaluation.py --model ./my-model --splits DocVQA,VSR --data ~/vpt-data "
        "--images images=/data/images"
    ),
    add_arguments=_add_arguments,
    run=_run,
)
COMPARE = Command(
    help="set two evaluations side by side",
    description="Set two runs side by side: which samples one got right and the other did not.",
    examples="example:\n  evaluation.py compare results-before results-after --html compare.html",
    add_arguments=_add_compared,
    run=_compare,
)
