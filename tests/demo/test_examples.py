"""The examples: each is answered right by the model that ships, in the way it is said to be."""

from vpt.demo.runs import read_examples

WAYS = {
    "the first look": [],
    "a region": ["crop"],
    "its own tower again": ["reencode"],
    "its own tower again, then boxes": ["reencode"],
    "its own tower again, then a depth map": ["reencode"],
    "DINOv2": ["dino"],
    "SAM": ["sam"],
}


def test_each_kind_of_look_has_one(picture):
    kinds = {one.takes for one in read_examples(picture.parent)}
    assert kinds == set(WAYS)


def test_a_folder_without_questions_has_no_examples(tmp_path):
    assert read_examples(tmp_path) == []


def test_each_example_is_answered_right(embedded, picture):
    examples = read_examples(picture.parent)
    for one in examples:
        answer = embedded.ask(picture.parent / one.picture, one.question)
        assert (one, answer.text) == (one, one.answer)
        assert [call.branch for call in answer.trace.calls] == WAYS[one.takes]
        drawn = {content.kind for content in answer.trace.content}
        assert ("depth" in drawn) == ("depth map" in one.takes)
        assert bool(drawn) == ("then" in one.takes)
