"""`vpt eval` and `vpt compare`: arguments, and what they print."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from vpt.cli.model import (
    add_finders,
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
    EXIT_INTERRUPTED,
    Command,
    add_flag,
    add_path,
    add_value,
    comma_list,
    whole_number,
)
from vpt.errors import PromptError
from vpt.media import is_url
from vpt.protocol.tokens import PERCEPTION_MODES
from vpt.released import DEFAULT_DETECTOR, DEFAULT_SEGMENTER

if TYPE_CHECKING:
    from vpt.evaluation.evaluate import Asker
    from vpt.evaluation.judge_protocol import JudgeSettings

_OF_LOADING = {
    **dict.fromkeys(("revision", "device", "image_resolution", "depth_tokenizer", "workers")),
    "dtype": "auto",
    "detector": DEFAULT_DETECTOR,
    "segmenter": DEFAULT_SEGMENTER,
}
_DECODING = ("max_new_tokens", "max_calls", "constrain", "temperature", "top_p", "top_k", "seed")


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    _add_what(parser.add_argument_group("data and conditions"))
    add_model_arguments(parser)
    how = parser.add_argument_group("generation")
    add_finders(parser)
    add_value(how, "--batch-size", "B", whole_number(1), "samples decoded together", 8)
    words = "run N copies of the model, each on its own device or host (needs the extra `ray`)"
    add_value(how, "--workers", "N", whole_number(1), words)
    add_request_arguments(how, _DECODING, unset={"max_new_tokens": "set by the split"})
    judge = parser.add_argument_group("judge of free-form answers")
    add_value(judge, "--judge", "MODEL", str, "model that also scores the free-form splits")
    words = "OpenAI-compatible endpoint of the judge; the key is read from OPENAI_API_KEY"
    add_value(judge, "--judge-url", "URL", str, words)
    add_value(judge, "--judge-concurrency", "N", whole_number(1), "concurrent judge calls", 8)
    words = "retries of a call after a temporary failure"
    add_value(judge, "--judge-retries", "N", whole_number(0), words, 5)
    output = parser.add_argument_group("output")
    out = Path("results")
    words = f"folder for records, results.json and report.html (default: {out})"
    add_path(output, "--out", "DIR", words, default=out)
    output.add_argument(
        "--resume",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="resume the run in DIR, or refuse a DIR that contains one (default: resume)",
    )
    add_flag(output, "--list", "list the splits and exit")


def _add_what(what: argparse._ArgumentGroup) -> None:
    words = "names from --list, or files of your own (PATH or FORMAT:PATH)"
    add_value(what, "--splits", "A,B", comma_list, words, ())
    words = (
        f"conditions: {', '.join(PERCEPTION_MODES)}; controls: blank (each call returns a gray "
        "image), random (each crop is cut at a random position), truth (first call: the region of "
        "the evidence), phrase (first call: where --detector finds the row's look_for), mask (the "
        "model's own calls, crops narrowed to an object by --segmenter), content-random, "
        "content-repeat, content-empty, content-other, content-truth (what is read in place of the "
        "depth maps and boxes that the model writes); "
        "tool-value: none, auto and the first three controls (default: auto)"
    )
    add_value(what, "--perception", "LIST", comma_list, words, ("auto",))
    add_value(what, "--limit", "N", whole_number(1), "only the first N rows of each split")
    words, data = "folder with the files of the splits (default: datasets)", Path("datasets")
    add_path(what, "--data", "DIR", words, default=data)
    what.add_argument(
        "--images",
        action="append",
        default=[],
        metavar="FROM=TO",
        help="replace FROM at the start of image paths by TO; may be repeated",
    )


def _run(args: argparse.Namespace) -> int:
    if args.list:
        from vpt.evaluation.table import splits_table

        print_out(splits_table(args.data))
        return EXIT_FINE
    if is_server := is_url(args.model or ""):
        _check_server_arguments(args)
    else:
        check_model_arguments(args)
    if not args.splits:
        raise PromptError("--splits is required; --list shows the names")
    from vpt.evaluation.evaluate import evaluate, make_plan
    from vpt.evaluation.records import RunFolder
    from vpt.evaluation.remote import RemoteAsker
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
    asker = RemoteAsker(args.model) if is_server else _asker(args)
    options = {"batch_size": args.batch_size, "resume": args.resume}
    try:
        results = evaluate(asker, plan, decoding, folder, judge=judge, **options)
    except KeyboardInterrupt:
        results = folder.read_results() if folder.has_results() else {}
        if not results.get("interrupted"):
            raise
    print_out(results_table(results))
    for line in shortfalls(results, args.out):
        print_err(line)
    print_err(f"results: {args.out / 'results.json'}, {args.out / 'report.html'}")
    if results["interrupted"]:
        num_asked, num_waiting = (
            sum(e[key] for e in results["splits"]) for key in ("n", "waiting")
        )
        print_err(
            f"interrupted after {num_asked} of {num_asked + num_waiting} samples; the same command "
            "resumes the run"
        )
        return EXIT_INTERRUPTED
    num_failed, num_unfit = (
        sum(sum(entry["failures"].values()) for entry in results["splits"]),
        sum(entry["not_asked"] for entry in results["splits"]),
    )
    if num_failed == sum(entry["n"] for entry in results["splits"]):
        unfit = f", {num_unfit} do not fit their condition" if num_unfit else ""
        print_err(f"error: no sample was answered: {num_failed} failed{unfit}")
        return EXIT_FAULTS
    return EXIT_FINE


def _check_server_arguments(args: argparse.Namespace) -> None:
    """Refuse what a server has settled before it is asked."""
    for name, unset in _OF_LOADING.items():
        if getattr(args, name) != unset:
            option = name.replace("_", "-")
            raise PromptError(f"--{option} is for models in this process; give it to `vpt serve`")
    if urlsplit(args.model).scheme not in ("http", "https"):
        raise PromptError(f"{args.model!r} is not a server; expected http://HOST:PORT/v1")


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
            raise PromptError("--judge-url needs --judge, the name of the judge model")
        return None
    from vpt.evaluation.judge_protocol import JudgeSettings

    url = {} if args.judge_url is None else {"base_url": args.judge_url}
    limits = {"max_concurrency": args.judge_concurrency, "max_retries": args.judge_retries}
    return JudgeSettings(args.judge, **url, **limits)


def _add_compared(parser: argparse.ArgumentParser) -> None:
    for name in ("a", "b"):
        add_path(parser, name, name.upper(), "--out folder of a run")
    add_path(parser, "--html", "FILE", "also write the comparison as an HTML page")


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
        "Run a model over benchmark splits, score its answers, and measure whether looking again\n"
        "helps. After an interruption, the same command resumes the run."
    ),
    examples=(
        "example:\n"
        "  vpt eval --list\n"
        "  vpt eval --splits embedded_heldout --perception tool-value --limit 200\n"
        "  vpt eval --model ./my-model --splits DocVQA,VSR --data ~/vpt-data "
        "--images images=/data/images\n"
        "  vpt eval --model http://127.0.0.1:8000/v1 --splits embedded_heldout"
    ),
    add_arguments=_add_arguments,
    run=_run,
)
COMPARE = Command(
    help="compare two evaluation runs",
    description="Compare two runs sample by sample: scores, paired difference, changed answers.",
    examples="example:\n  vpt compare results-before results-after --html compare.html",
    add_arguments=_add_compared,
    run=_compare,
)
