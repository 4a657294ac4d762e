"""Every check passes right answers, and names the mistake of each wrong one."""

import re
import signal
from importlib import import_module
from pkgutil import iter_modules

import answers
import pytest
import torch

MODULES = [
    import_module(f"answers.{module.name}") for module in iter_modules(answers.__path__)
]
RIGHT = [
    pytest.param(check, answer, id=f"{check.__name__}-{number}")
    for module in MODULES
    for check, found in module.RIGHT.items()
    for number, answer in enumerate(found)
]
WRONG = [
    pytest.param(check, answer, words, id=f"{check.__name__}-{number}")
    for module in MODULES
    for check, found in module.WRONG.items()
    for number, (answer, words) in enumerate(found)
]


@pytest.mark.parametrize(("check", "answer"), RIGHT)
def test_a_right_answer_passes(check, answer):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    check(answer)
    assert torch.equal(torch.get_rng_state(), before), "a check draws from its own seed"


@pytest.mark.parametrize(("check", "answer", "words"), WRONG)
def test_a_wrong_answer_is_named(check, answer, words):
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    with pytest.raises(AssertionError, match=re.escape(words)):
        check(answer)
    after = [signal.getsignal(number) for number in numbers]
    assert after == before, "a check leaves no handler of a wrong answer"
