"""Settings of policy training: what is wrong with a file is said in words."""

import pytest

from vpt.errors import DataError, PromptError
from vpt.policy.settings import load_settings

GOOD = """
model_name_or_path: model
output_dir: out
train_split: questions.jsonl
rewards: {exact_match: 1.0, num_calls: -0.1}
max_steps: 3
learning_rate: 1e-4
"""


@pytest.fixture
def read(tmp_path):
    def read_text(text, *overrides):
        file = tmp_path / "policy.yaml"
        file.write_text(text)
        return load_settings(file, overrides)

    return read_text


def test_a_file_is_read_and_its_values_can_be_replaced(read):
    settings = read(GOOD, "max_steps=9", "rewards={format: 1}")
    assert (settings.max_steps, settings.learning_rate) == (9, 1e-4)
    assert settings.rewards == {"format": 1.0} and not settings.asks_blind
    assert settings.num_questions == 2


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("lerning_rate: 1", r"unknown key 'lerning_rate'; did you mean 'learning_rate'\?"),
        ("learning_rate: 0", r"given twice"),
        ("num_generations: 1", r"num_generations: .*greater than or equal to 2, got 1"),
        ("num_generations: 7", r"a step has 16 answers .*not a multiple of num_generations=7"),
        ("lr_scheduler_type: wavy", r"lr_scheduler_type: Input should be 'constant'"),
        ("score: taste", r"score: Input should be 'anls'"),
        ("bf16: perhaps", r"bf16: .*boolean.*, got 'perhaps'"),
    ],
)
def test_a_wrong_setting_is_named(read, more, message):
    with pytest.raises((PromptError, DataError), match=message):
        read(f"{GOOD}{more}\n")


def test_what_is_missing_or_unknown_is_named(read, tmp_path):
    with pytest.raises(PromptError, match=r"unknown reward 'taste'; available: anls, .*num_tokens"):
        read(GOOD, "rewards={taste: 1}")
    with pytest.raises(PromptError, match=r"rewards: Dictionary should have at least 1 item"):
        read(GOOD, "rewards={}")
    with pytest.raises(PromptError, match=r"output_dir is the folder of the model; choose another"):
        read(GOOD, "output_dir=model")
    with pytest.raises(PromptError, match=r"the key 'max_steps' is missing"):
        read(GOOD.replace("max_steps: 3", ""))
    with pytest.raises(PromptError, match=r"expected KEY=VALUE after the file, got 'max_steps'"):
        read(GOOD, "max_steps")
    with pytest.raises(DataError, match=r"holds no settings; expected lines"):
        read("- a")
    with pytest.raises(DataError, match=r"cannot read .*policy.yaml"):
        read("a: [")
    with pytest.raises(DataError, match=r"no.yaml does not exist; check the path"):
        load_settings(tmp_path / "no.yaml")
