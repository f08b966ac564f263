"""`vpt eval` and `vpt eval compare`: arguments, and what they print."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from vpt.cli.model import (
    add_model_arguments,
    add_request_arguments,
    check_model_arguments,
    load_options,
    load_runtime,
    print_loading,
    quieten,
)
from vpt.cli.output import print_err, print_out, write_file
from vpt.cli.parser import (
    EXIT_FAULTS,
    EXIT_FINE,
    Command,
    add_flag,
    add_path,
    add_value,
    comma_list,
    whole_number,
)
from vpt.errors import PromptError
from vpt.protocol.tokens import PERCEPTION_MODES

if TYPE_CHECKING:
    from vpt.evaluation.evaluate import Asker
    from vpt.evaluation.judge_protocol import JudgeSettings

_DECODING = ("max_new_tokens", "max_calls", "constrain", "temperature", "top_p", "top_k", "seed")


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    _add_what(parser.add_argument_group("what to ask"))
    add_model_arguments(parser)
    how = parser.add_argument_group("how")
    add_value(how, "--batch-size", "B", whole_number(1), "at once", 8)
    words = "models at once, on as many devices or hosts, by Ray (extra `ray`)"
    add_value(how, "--workers", "N", whole_number(1), words)
    add_request_arguments(how, _DECODING, unset={"max_new_tokens": "as the split says"})
    judge = parser.add_argument_group("judge of free-form answers")
    add_value(judge, "--judge", "MODEL", str, "have this model score the free-form splits")
    words = "of any OpenAI-compatible endpoint; the key comes from OPENAI_API_KEY"
    add_value(judge, "--judge-url", "URL", str, words)
    add_value(judge, "--judge-concurrency", "N", whole_number(1), "concurrent calls", 8)
    words = "of a call that failed temporarily"
    add_value(judge, "--judge-retries", "N", whole_number(0), words, 5)
    output = parser.add_argument_group("output")
    out = Path("results")
    words = f"records, results.json and report.html (default: {out})"
    add_path(output, "--out", "DIR", words, default=out)
    output.add_argument(
        "--resume",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="resume the run that DIR holds, or refuse to (default: resume)",
    )
    add_flag(output, "--list", "show the splits, and end")


def _add_what(what: argparse._ArgumentGroup) -> None:
    words = "names from --list, or own files: a path, or FORMAT:PATH"
    add_value(what, "--splits", "A,B", comma_list, words, ())
    words = (
        f"{', '.join(PERCEPTION_MODES)}; blank, random, truth: own calls that "
        "return a gray image or a random crop, the true region; tool-value: all it takes to see "
        "whether looking again helps (default: auto)"
    )
    add_value(what, "--perception", "LIST", comma_list, words, ("auto",))
    add_value(what, "--limit", "N", whole_number(1), "the first N rows of each split only")
    words, data = "folder of the splits' files (default: datasets)", Path("datasets")
    add_path(what, "--data", "DIR", words, default=data)
    what.add_argument(
        "--images",
        action="append",
        default=[],
        metavar="FROM=TO",
        help="images whose path begins with FROM are in TO; may be given several times",
    )


def _run(args: argparse.Namespace) -> int:
    if args.list:
        from vpt.evaluation.table import splits_table

        print_out(splits_table(args.data))
        return EXIT_FINE
    check_model_arguments(args)
    if not args.splits:
        raise PromptError("--splits names what to ask; see --list")
    from vpt.evaluation.evaluate import evaluate, make_plan
    from vpt.evaluation.records import RunFolder
    from vpt.evaluation.runner import Decoding
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
    decoding = Decoding(**{name: getattr(args, name) for name in _DECODING})
    asker = _asker(args)
    options = {"batch_size": args.batch_size, "resume": args.resume}
    results = evaluate(asker, plan, decoding, folder, judge=judge, **options)
    print_out(results_table(results))
    for line in shortfalls(results, args.out):
        print_err(line)
    print_err(f"results in {args.out}: results.json, report.html and the records")
    if not any(entry["n"] > sum(entry["failures"].values()) for entry in results["splits"]):
        print_err("error: no sample was answered: each one failed or does not fit the condition")
        return EXIT_FAULTS
    return EXIT_FINE


def _asker(args: argparse.Namespace) -> Asker:
    """The model, in this process or in others."""
    print_loading(args)
    if args.workers is None:
        from vpt.evaluation.runner import LocalAsker

        return LocalAsker(load_runtime(args))
    from vpt.evaluation.workers import RayAsker

    quieten(args)
    return RayAsker(load_options(args), args.workers)


def _judge_settings(args: argparse.Namespace) -> JudgeSettings | None:
    if args.judge is None:
        if args.judge_url is not None:
            raise PromptError("--judge-url needs --judge, the name of the model there")
        return None
    from vpt.evaluation.judge_protocol import JudgeSettings

    url = {} if args.judge_url is None else {"base_url": args.judge_url}
    limits = {"max_concurrency": args.judge_concurrency, "max_retries": args.judge_retries}
    return JudgeSettings(args.judge, **url, **limits)


def _add_compared(parser: argparse.ArgumentParser) -> None:
    for name in ("a", "b"):
        add_path(parser, name, name.upper(), "--out folder of a run")
    add_path(parser, "--html", "FILE", "write a page to look at")


def _compare(args: argparse.Namespace) -> None:
    from vpt.evaluation.compare import compare_folders
    from vpt.evaluation.report import write_comparison

    comparison = compare_folders(args.a, args.b)
    print_out(comparison.table())
    if args.html is not None:
        write_file(partial(write_comparison, comparison), args.html)
        print_err(f"saved {args.html}")


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
