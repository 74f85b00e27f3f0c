import re
from pathlib import Path

import pytest

BLOCKS = re.findall(r"```python\n(.*?)```", (Path(__file__).parents[1] / "README.md").read_text(), flags=re.DOTALL)


def test_the_first_example_says_how_robust_a_model_is(monkeypatch, capsys):
    monkeypatch.delenv("GUARDIANS_DATA", raising=False)
    exec(compile(BLOCKS[0], "README.md", "exec"), names := {})
    assert f"robust accuracy {names['found'].robust_accuracy:.1%}" in capsys.readouterr().out
    assert 0 < names["found"].robust_accuracy < names["found"].clean_accuracy


@pytest.mark.parametrize("block", BLOCKS[1:], ids=["ART", "torchattacks", "defences"])
def test_the_readme_examples_run_and_lower_the_accuracy(block, monkeypatch, capsys):
    monkeypatch.delenv("GUARDIANS_DATA", raising=False)
    exec(compile(block, "README.md", "exec"), {})
    printed = [float(number) for number in re.findall(r"\d+\.\d+", capsys.readouterr().out)]
    assert printed
    assert max(printed) < 0.25
