"""Answers to the check of the command line."""

import sys
from pathlib import Path

from glassgpt.checks.cli import check_count


def count(words):
    if len(words) != 1:
        print("count: give it one FILE", file=sys.stderr)
        return 2
    try:
        print(len(Path(words[0]).read_text("utf-8")))
    except (OSError, UnicodeDecodeError) as error:
        print(f"count: {error}", file=sys.stderr)
        return 2
    return 0


def with_a_traceback(words):
    print(len(Path(words[0]).read_text("utf-8")))
    return 0


def that_smiles(words):
    count(words)
    return 0


def that_hides_faults(words):
    try:
        return count(words)
    except Exception as error:
        print(f"count: what is wrong: {error}", file=sys.stderr)
        return 2


RIGHT = {check_count: [count]}
WRONG = {
    check_count: [
        (with_a_traceback, "ended in"),
        (that_smiles, "left with exit code 0, not 2"),
        (that_hides_faults, "was hidden"),
    ]
}
