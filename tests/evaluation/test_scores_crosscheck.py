"""Our scores beside those of lmms-eval and VLMEvalKit: equal where these are right.

Neither is needed for the other tests. To run this file:

    uv pip install --no-deps --target lmms lmms-eval==0.7.3
    export PYTHONPATH=.:lmms:VLMEvalKit
    pytest -m slow tests/evaluation/test_scores_crosscheck.py

Of lmms-eval single files are loaded, since importing the package would need all its dependencies.
"""

import importlib.util
import random
import string
import sys
from pathlib import Path
from types import ModuleType

import pytest

from vpt.evaluation.scores import (
    anls,
    extract_choice,
    extract_yes_no,
    normalize_vqa,
    pope,
    relaxed_accuracy,
    texts,
    vqa_accuracy,
)

pytestmark = pytest.mark.slow

NUM = 200
WORDS = ("the", "a", "red", "Bus", "two", "none", "dont", "its", "o'clock", "couldnt've", "York")
MARKS = ("", "", "", "!", "-", "/", ".", ";", '"', ":", " .", " -")


def load_lmms_eval(monkeypatch: pytest.MonkeyPatch, path: str) -> ModuleType:
    """Load one file of lmms-eval without its package; decorators and loggers do nothing there."""
    spec = importlib.util.find_spec("lmms_eval")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("lmms-eval is not on the path")
    registry = ModuleType("lmms_eval.api.registry")
    for name in ("register_aggregation", "register_metric"):
        setattr(registry, name, lambda *_, **__: lambda function: function)
    monkeypatch.setitem(sys.modules, "lmms_eval.api.registry", registry)
    file = Path(next(iter(spec.submodule_search_locations))) / path
    module_spec = importlib.util.spec_from_file_location(f"lmms_{file.stem}", file)
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    return module


@pytest.fixture
def lmms_anls(monkeypatch):
    pytest.importorskip("sacrebleu")
    metrics = load_lmms_eval(monkeypatch, "api/metrics.py")
    return lambda prediction, references: metrics.anls(references, [prediction])["anls"]


@pytest.fixture
def vlm_vqa():
    return pytest.importorskip("vlmeval.dataset.utils.vqa_eval")


@pytest.fixture
def vlm_anls(vlm_vqa):
    def score(prediction, references):
        line = {"answer": repr(references), "prediction": prediction}
        return vlm_vqa.hit_calculate([vlm_vqa.process_line(line, "anls")], "DocVQA")[0]

    return score


def mistyped(text: str, num_edits: int, rng: random.Random) -> str:
    chars = list(text)
    for _ in range(num_edits):
        place = rng.randrange(len(chars) + 1)
        chars[place : place + rng.randint(0, 1)] = rng.choice(["", "x", "Y", "7"])
    return "".join(chars)


def anls_cases() -> list[tuple[str, list[str]]]:
    rng = random.Random(0)
    cases = []
    for _ in range(NUM):
        num_words = rng.randint(1, 4)
        truth = " ".join(
            "".join(rng.choices("abcDE", k=rng.randint(2, 6))) for _ in range(num_words)
        )
        references = [truth, *(mistyped(truth, 2, rng) for _ in range(rng.randint(0, 2)))]
        prediction = mistyped(truth, rng.randint(0, len(truth) // 2), rng)
        cases.append(
            (" ".join(prediction.split()), [" ".join(text.split()) for text in references])
        )
    return cases


@pytest.mark.parametrize("other", ["lmms_anls", "vlm_anls"])
def test_anls_agrees_but_for_a_distance_of_one_half(other, request):
    theirs = request.getfixturevalue(other)
    cases = anls_cases()
    differing = [case for case in cases if anls(*case) != pytest.approx(theirs(*case))]
    # The paper gives 0 to a distance of one half, they give 0.5.
    assert all(theirs(*case) == 0.5 and anls(*case) == 0 for case in differing)
    assert len(differing) < NUM // 20
    assert sum(0.5 < anls(*case) < 1 for case in cases) > NUM // 4  # they are no trivial cases


def test_anls_of_lmms_eval_rises_with_padding(lmms_anls):
    # It takes blanks away before the distance, 1, but not before the length: 1/9 and not 1/3.
    assert lmms_anls("   cat   ", ["car"]) == pytest.approx(1 - 1 / 9)
    assert anls("   cat   ", ["car"]) == pytest.approx(1 - 1 / 3)
    # With enough blanks a wrong answer becomes an almost right one.
    assert lmms_anls("cat" + " " * 97, ["dog"]) == pytest.approx(0.97)
    assert anls("cat" + " " * 97, ["dog"]) == 0


def test_anls_of_lmms_eval_takes_the_best_of_several_references(lmms_anls):
    # The metric of 0.7.3 does; only the padding of a reference may make the wrong one best.
    assert lmms_anls("abcd", ["xyz", "abce"]) == anls("abcd", ["xyz", "abce"]) == 0.75
    assert lmms_anls("abcd", ["abce", "abxy" + " " * 16]) == pytest.approx(0.9)
    assert anls("abcd", ["abce", "abxy" + " " * 16]) == 0.75


def answers(seed: int, *, commas: bool) -> list[str]:
    rng = random.Random(seed)
    marks = (*MARKS, ",", "?", "1,000") if commas else MARKS
    return [
        "".join(
            rng.choice(WORDS) + rng.choice(marks) + rng.choice([" ", " ", "3.5 ", ""])
            for _ in range(rng.randint(1, 4))
        )
        for _ in range(NUM)
    ]


def test_vqa_spelling_agrees_with_vlmevalkit(vlm_vqa):
    cases = [text for text in answers(1, commas=True) if vlm_vqa.process_answer(text)]
    assert len(cases) > NUM * 0.8
    assert [normalize_vqa(text) for text in cases] == list(map(vlm_vqa.process_answer, cases))


def test_vqa_spelling_agrees_with_lmms_eval_where_there_is_no_comma(monkeypatch):
    module = load_lmms_eval(monkeypatch, "tasks/_task_utils/vqa_eval_metric.py")
    theirs = module.EvalAIAnswerProcessor()
    cases = [text for text in answers(2, commas=False) if theirs(text)]
    assert len(cases) > NUM * 0.8
    assert [normalize_vqa(text) for text in cases] == list(map(theirs, cases))
    # It takes commas and question marks away first, and parts "'s" from its word, which the VQA
    # evaluation does not; predictions and references are treated alike, so scores rarely differ.
    assert (normalize_vqa("red,blue"), theirs("red,blue")) == ("red blue", "redblue")
    assert (normalize_vqa("mother's"), theirs("mother's")) == ("mother's", "mother 's")


def test_vqa_contractions_are_those_of_the_evaluation(monkeypatch):
    module = load_lmms_eval(monkeypatch, "tasks/_task_utils/vqa_eval_metric.py")
    # Entries with a capital are never met, since words are in lower case by then.
    theirs = {
        word: right
        for word, right in module.EvalAIAnswerProcessor.CONTRACTIONS.items()
        if word == word.lower() and word != right
    }
    assert theirs == texts._CONTRACTIONS


def test_vqa_spelling_differs_where_theirs_slips(vlm_vqa):
    # re.UNICODE, 32, is passed as the number of periods to take away.
    assert vlm_vqa.process_answer("." * 40) == "." * 8
    assert normalize_vqa("." * 40) == ""
    # An option letter that is an article equals silence.
    assert vlm_vqa.process_answer("A") == vlm_vqa.process_answer("") == ""
    assert normalize_vqa("A") == "a"


def test_vqa_accuracy_agrees_with_vlmevalkit(vlm_vqa):
    rng = random.Random(3)
    for _ in range(NUM):
        pool = rng.sample(["yes", "no", "2", "two", "The bus", "bus", "red."], k=3)
        references = rng.choices(pool, k=rng.randint(4, 10))
        line = {"answer": repr(references), "prediction": rng.choice(pool)}
        theirs = vlm_vqa.hit_calculate([vlm_vqa.process_line(line)], "TextVQA")[0]
        assert vqa_accuracy(line["prediction"], references) == pytest.approx(theirs)


def test_vqa_accuracy_differs_for_a_single_reference(vlm_vqa):
    # Nobody is left once the only annotator is left out.
    line = {"answer": repr(["red"]), "prediction": "red"}
    assert vlm_vqa.hit_calculate([vlm_vqa.process_line(line)], "TextVQA") == [0]
    assert vqa_accuracy("red", ["red"]) == 1


@pytest.fixture(params=["lmms-eval", "VLMEvalKit"])
def relaxed(request, monkeypatch):
    if request.param == "lmms-eval":
        return load_lmms_eval(monkeypatch, "tasks/chartqa/utils.py").relaxed_correctness
    module = request.getfixturevalue("vlm_vqa")
    return lambda prediction, target: module.relaxed_correctness(target, prediction)


def test_relaxed_accuracy_agrees_on_plain_numbers_and_words(relaxed):
    rng = random.Random(4)
    for _ in range(NUM):
        target = rng.choice([rng.randint(1, 3000), round(rng.uniform(-50, 50), 2) or 1])
        prediction = round(target * rng.uniform(0.9, 1.1), 3)
        sign = rng.choice(["", "%"])
        case = (f"{prediction}{sign}", f"{target}{sign}")
        if rng.random() < 0.2:
            case = (rng.choice(["Blue", "red", "5"]), rng.choice(["blue", "Red"]))
        assert relaxed_accuracy(case[0], [case[1]]) == relaxed(*case)


@pytest.mark.parametrize(
    ("prediction", "target"),
    [
        ("1,234", "1234"),  # no float for Python
        ("$5", "5"),
        ("5 million", "5000000"),
        ("50%", "50"),  # they read 0.5 only
        ("0.0", "0"),  # a target of 0 is compared as text
        ("1.05", "1"),  # (1.05 - 1) / 1 is a hair above 0.05 in binary
        ("Blue.", "blue"),  # text with its marks
    ],
)
def test_relaxed_accuracy_differs_where_theirs_misses_a_right_number(relaxed, prediction, target):
    assert not relaxed(prediction, target)
    assert relaxed_accuracy(prediction, [target]) == 1


def test_pope_agrees_with_lmms_eval_on_bare_words_but_for_the_yes_ratio(monkeypatch):
    module = load_lmms_eval(monkeypatch, "tasks/pope/utils.py")
    rng = random.Random(5)
    truth = rng.choices(["yes", "no"], k=NUM)
    said = [rng.choice([answer, "Yes", "no"]) for answer in truth]
    ours = pope([extract_yes_no(text) for text in said], truth)
    rows = [
        module.pope_process_results({"answer": b, "question_id": 0}, [a])["pope_accuracy"]
        for a, b in zip(said, truth, strict=True)
    ]
    assert ours["accuracy"] == pytest.approx(module.pope_aggregate_accuracy(rows))
    assert ours["precision"] == pytest.approx(module.pope_aggregate_precision(rows))
    assert ours["recall"] == pytest.approx(module.pope_aggregate_recall(rows))
    assert ours["f1"] == pytest.approx(module.pope_aggregate_f1_score(rows))
    # Theirs is the share of yes among the true answers, whatever the model says.
    assert module.pope_aggregate_yes_ratio(rows) == truth.count("yes") / NUM
    assert ours["yes_ratio"] == sum(text.lower() == "yes" for text in said) / NUM
    assert ours["yes_ratio"] != module.pope_aggregate_yes_ratio(rows)


def test_pope_of_lmms_eval_reads_no_mark_and_rewards_refusal(monkeypatch):
    module = load_lmms_eval(monkeypatch, "tasks/pope/utils.py")

    def theirs(said):
        rows = [
            module.pope_process_results({"answer": "yes", "question_id": 0}, [text])
            for text in said
        ]
        return module.pope_aggregate_recall([row["pope_recall"] for row in rows])

    assert theirs(["Yes.", "no"]) == 0
    assert pope([extract_yes_no("Yes."), "no"], ["yes", "yes"])["recall"] == 0.5
    # One hit, one refusal: the refusal is not counted as missed.
    assert theirs(["yes", "I cannot tell"]) == 1
    assert pope(["yes", extract_yes_no("I cannot tell")], ["yes", "yes"])["recall"] == 0.5


PLAIN = (
    "{}",
    "({})",
    "{}.",
    "The answer is {}.",
    "The answer is ({}).",
    "{}. {text}",
    "({}) {text}",
)
REASONED = (
    "The {other_text} is far away, unlike the {text}. The answer is ({}).",
    "({other}) looks near at first. The answer is {}.",
    "({other}) is the {other_text}. So the correct answer is ({}).",
)
OPTIONS = {"A": "horse", "B": "green cup", "C": "tower", "D": "fence"}


def choice_cases(templates: tuple[str, ...]) -> list[tuple[str, str]]:
    rng = random.Random(6)
    cases = []
    for _ in range(NUM):
        letter, other = rng.sample(sorted(OPTIONS), k=2)
        words = {"other": other, "text": OPTIONS[letter], "other_text": OPTIONS[other]}
        cases.append((rng.choice(templates).format(letter, **words), letter))
    return cases


def count_right(read, templates: tuple[str, ...]) -> int:
    return sum(read(text) == letter for text, letter in choice_cases(templates))


@pytest.fixture
def mcq_readers(monkeypatch):
    mcq = load_lmms_eval(monkeypatch, "tasks/_task_utils/mcq_extract.py")
    mmmu = load_lmms_eval(monkeypatch, "tasks/_task_utils/mmmu_mcq_utils.py")
    return {
        "mcq": lambda text: mcq.extract_mcq_answer(text, sorted(OPTIONS)),
        "mmmu": lambda text: mmmu.parse_mmmu_multi_choice_response(text, sorted(OPTIONS), OPTIONS),
    }


def test_choices_in_plain_answers_agree_with_lmms_eval(mcq_readers):
    choices = tuple(OPTIONS.values())
    assert count_right(lambda text: extract_choice(text, choices), PLAIN) == NUM
    assert {name: count_right(read, PLAIN) for name, read in mcq_readers.items()} == {
        "mcq": NUM,
        "mmmu": NUM,
    }


def test_choices_after_reasoning_are_read_by_us(mcq_readers):
    choices = tuple(OPTIONS.values())
    assert count_right(lambda text: extract_choice(text, choices), REASONED) == NUM
    # Its MMMU parser looks at "(C)" only, wherever it stands, if there is one.
    assert count_right(mcq_readers["mmmu"], REASONED) < NUM


def test_choices_in_plain_answers_agree_with_vlmevalkit():
    matching = pytest.importorskip("vlmeval.utils.matching_util")

    def read(text):
        return matching.can_infer(text, dict(OPTIONS))

    assert count_right(read, PLAIN) == NUM
    # With two letters in the answer it reads none of them.
    assert count_right(read, REASONED) < NUM
    assert read("A dog is closest") == "A"


def test_lmms_eval_takes_an_article_and_capitals_for_options(mcq_readers):
    assert mcq_readers["mcq"]("A dog is closest") == "A"
    assert mcq_readers["mmmu"]("A dog is closest") == "A"
    assert extract_choice("A dog is closest", 4) is None
    assert mcq_readers["mcq"]("The answer is: Cannot tell") == "C"
    assert extract_choice("The answer is: Cannot tell", 4) is None


def test_lmms_eval_draws_an_option_where_it_reads_none(mcq_readers):
    random.seed(0)
    drawn = {mcq_readers["mmmu"]("i cannot tell") for _ in range(50)}
    assert drawn == set(string.ascii_uppercase[:4])
    assert extract_choice("i cannot tell", 4) is None
