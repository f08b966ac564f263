"""The benchmark of the grammar runs and reports every contestant; its times are not tested."""

import json

import grammar_cost
import pytest


def test_every_contestant_is_measured_in_every_round(tmp_path, monkeypatch):
    monkeypatch.setattr(grammar_cost, "WIDTH", 2048)
    monkeypatch.setattr(grammar_cost, "STREAM_LENGTHS", (5, 9))
    file = tmp_path / "out.json"
    options = ["--tokens", "110", "--repeats", "2", "--size", "tiny", "--json", str(file)]
    grammar_cost.main(options)
    report = json.loads(file.read_text())
    assert report["step_us"] > 0 and report["generate_us_per_token"].keys() == {"5", "9"}
    assert all(len(times) == 2 for times in report["us_per_token"].values())
    assert report["ratio"][grammar_cost.CALLS_ONLY] == 1
    names = report["us_per_token"].keys()
    for kind in ("depth", "boxes", "depth and boxes"):
        assert {f"text, {kind} on", f"text, {kind} forbidden"} <= names
    assert {"depth maps", "boxes", "no grammar"} <= names


def test_scripts_keep_to_the_grammar():
    contestants = grammar_cost.make_contestants(300)
    for name in ("depth maps", "boxes", "regions, a model of calls only"):
        one, state = contestants[name], grammar_cost.TurnState()
        for token_id in one.ids:
            rule = one.grammar.rule(state, one.permitted)
            allowed = rule.only is None or token_id in rule.only
            assert allowed and token_id not in rule.banned, (name, state)
            state = one.grammar.advance(state, token_id)
            if state.name == "after_region":
                state = grammar_cost.TurnState()


def test_numbers_below_one_are_refused(capsys):
    with pytest.raises(SystemExit):
        grammar_cost.main(["--tokens", "0"])
    assert "numbers must be at least 1" in capsys.readouterr().err
