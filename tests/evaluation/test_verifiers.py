import pytest
from pydantic import TypeAdapter

from persyn_jax.config import ConfigError, config_class, validate
from persyn_jax.evaluation.verifiers import VERIFIERS, VerifierName


@pytest.mark.parametrize(
    ("name", "answer", "score"),
    [
        ("exact_match", "42", 1.0),
        ("exact_match", " 42\n", 1.0),
        ("exact_match", "42.", 0.0),
        ("exact_match", "The answer is 42", 0.0),
        ("exact_match", "42\n\nBecause 6 * 7.", 0.0),
        ("exact_match", "", 0.0),
        ("first_line_match", "42", 1.0),
        ("first_line_match", "\n  42 \n\nBecause 6 * 7.", 1.0),
        ("first_line_match", "42 is the answer\n42", 0.0),
        ("first_line_match", "Let me see:\n42", 0.0),
        ("first_line_match", "", 0.0),
    ],
)
def test_a_reference_of_42(name, answer, score):
    assert VERIFIERS[name](answer, " 42 ") == score


def test_case_counts():
    assert VERIFIERS["exact_match"]("yes", "Yes") == 0.0


def test_an_unknown_verifier_is_refused_when_the_config_is_read():
    @config_class
    class Config:
        verifier: VerifierName

    with pytest.raises(ConfigError, match=r"run\.yaml: verifier: no such verifier: 'exact'.*first"):
        validate(Config, {"verifier": "exact"}, "run.yaml")
    assert TypeAdapter(Config).validate_python({"verifier": "exact_match"}).verifier
