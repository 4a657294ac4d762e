# Written by tools/tangle.py from book/02_tokens.ipynb: change it there.
"""Run a check on an attempt, and say in words what it found."""

from collections.abc import Callable
from traceback import extract_tb
from typing import Any


def _arose_in(attempt: Any, error: Exception) -> bool:
    """Whether an error came out of the attempt, and not of the check alone."""
    own = {getattr(attempt, "__name__", ""), *dir(attempt)}
    return any(frame.name in own for frame in extract_tb(error.__traceback__))


def grade(check: Callable[[Any], None], attempt: Any) -> bool:
    """Run a check on a reader's attempt and print what it found.

    Prints `Correct`, `Not yet` with the mistake that the check names, or `Still to do`
    while the attempt raises a bare NotImplementedError. Other errors of the attempt
    come through. Returns True when it is correct, or else False.

    Book: 02_tokens.html#words
    """
    goal = (check.__doc__ or check.__name__).splitlines()[0]
    try:
        check(attempt)
    except AssertionError as mistake:
        print(f"Not yet: {str(mistake) or type(mistake).__name__}")
    except Exception as error:
        if type(error) is NotImplementedError and not error.args:
            print(f"Still to do: {goal}")
        elif _arose_in(attempt, error):
            raise
        else:
            reason = f"{type(error).__name__}: {error}"
            hint = " Does it return?" if "NoneType" in reason else ""
            print(f"Not yet: what came back is of no use ({reason}).{hint}")
    else:
        print(f"Correct: {goal}")
        return True
    return False


def catch(check: Callable[[Any], None], wrong: Any) -> None:
    """Run a check on a version known to be wrong and print the mistake it names.

    Raises AssertionError when the check lets the wrong version pass.

    Book: 02_tokens.html#words
    """
    try:
        check(wrong)
    except AssertionError as mistake:
        print(f"Caught: {mistake}")
    else:
        raise AssertionError(f"{check.__name__} did not notice the mistake")
