import pytest
from hypothesis import given
from hypothesis import strategies as st

from guardians.experiments.names import parsed, written


@pytest.mark.parametrize(
    ("text", "name", "arguments"),
    [
        ("PGD-40", "PGD-40", {}),
        (" C&W ", "C&W", {}),
        ("mi-ol()", "mi-ol", {}),
        ("torchattacks:APGD(steps=20, eps=8/255)", "torchattacks:APGD", {"steps": 20, "eps": 8 / 255}),
        (
            "a(norm='Linf', top=inf, flag=True, none=None)",
            "a",
            {"norm": "Linf", "top": float("inf"), "flag": True, "none": None},
        ),
        ("a(b=-1, c=(1, 2), d=2 * 3)", "a", {"b": -1, "c": (1, 2), "d": 6}),
    ],
)
def test_parsed(text, name, arguments):
    assert parsed(text) == (name, arguments)


@pytest.mark.parametrize(
    "text", ["", "(", "a(", "a(1)", "a(**b)", "a(b=c)", "a(b=c())", "a(b=1", "a(b=1) c", "a(b=1/0)"]
)
def test_what_is_no_name_is_refused(text):
    with pytest.raises(ValueError, match="must be a name, or a name and arguments"):
        parsed(text)


values = st.one_of(st.integers(), st.floats(allow_nan=False), st.text(), st.booleans(), st.none())


@given(st.dictionaries(st.from_regex(r"[a-z][a-z_0-9]*_", fullmatch=True), values))
def test_written_is_parsed(arguments):
    assert parsed(written("a-name", arguments)) == ("a-name", arguments)
