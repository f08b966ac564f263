"""The judge's prompt is the released one, and a score is read from a reply or refused."""

import pytest

from vpt.evaluation.judge import JudgeItem
from vpt.evaluation.judge_protocol import PROMPT, PROMPT_HASH, read_score


def test_the_message_is_the_released_one_to_the_letter():
    # evaluation_prompt of evaluation.py, then genquery of gpt.py, at commit fb5aa5c.
    item = JudgeItem("What colour?", "red", "dark red")
    assert PROMPT.format(**vars(item)) == (
        "You are responsible for proofreading the answers, you need to give a score to the "
        "model's answer by referring to the standard answer, based on the given question. The "
        "full score is 1 point and the minimum score is 0 points. Please output the score in the "
        "form 'score: <score>'. The evaluation criteria require that the closer the model's "
        "answer is to the standard answer, the higher the score.\n\nQuestion: What colour?\n"
        "Standard answer: red\nModel's answer: dark red\n"
    )
    assert PROMPT_HASH == "e151ebb749587fba1c2a527081ce09dc193603e75a505dd926d203b41ef2585b"


def test_braces_in_an_item_stay_as_they_are():
    item = JudgeItem("{prediction} {0}", "a", "b")
    assert "Question: {prediction} {0}\n" in PROMPT.format(**vars(item))


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        ("score: 0.8", 0.8),
        ("Score: 1", 1.0),
        ("SCORE:0", 0.0),
        ("score: 1.", 1.0),
        ("score: .5", 0.5),
        ("score: -0.0", 0.0),
        ("score: <0.8>", 0.8),
        ("**Score:** 0.8", 0.8),
        ("**Score: 0.8**", 0.8),
        ("score: _0.8_", 0.8),
        ('{"score": 0.25}', 0.25),
        ("score: 0.8/1", 0.8),
        ("score: 0.8 out of 1.0 points", 0.8),
        ("The answers agree.\nscore: 1.0\n- as they should", 1.0),
        ("score: 0.5. So, again, score: 0.50", 0.5),
        ("In the form 'score: <score>' this is score: 0.3", 0.3),
        ("0.8", 0.8),
        (" **1.0** \n", 1.0),
        ("'0.5'.", 0.5),
    ],
)
def test_a_score_is_read(reply, score):
    assert read_score(reply) == score


@pytest.mark.parametrize(
    ("reply", "problem"),
    [
        ("", "no 'score"),
        ("I cannot say.", "no 'score"),
        ("score: high", "no 'score"),
        ("score: nan", "no 'score"),
        ("score: <score>", "no 'score"),
        ("The model's answer names 1 of 2 birds", "no 'score"),
        ("underscore: 1", "no 'score"),
        ("score: 50%", "no 'score"),
        ("score: 0.5-0.7", "no 'score"),
        ("score: 0.5 to 0.7", "no 'score"),
        ("score: 0,5", "no 'score"),
        ("score: 1e-1", "no 'score"),
        ("score: 1st", "no 'score"),
        ("0.5 0.7", "no 'score"),
        ("score: 0.2, no, score: 0.9", r"several scores: \[0.2, 0.9\]"),
        ("score: 1.5", "from 0 to 1: 'score: 1.5'"),
        ("score: 10", "from 0 to 1: 'score: 10'"),
        ("score: -0.5", "from 0 to 1: 'score: -0.5'"),
        ("score: 8/10", "from 0 to 1: 'score: 8/10'"),
        ("score: 1/10", "from 0 to 1: 'score: 1/10'"),
        ("score: 1 out of 5", "from 0 to 1: 'score: 1 out of 5'"),
        ("1/10", "from 0 to 1: '1/10'"),
        ("7", "from 0 to 1: '7'"),
    ],
)
def test_a_reply_without_one_clear_score_has_none(reply, problem):
    with pytest.raises(ValueError, match=problem):
        read_score(reply)
