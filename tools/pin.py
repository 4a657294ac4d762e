"""Let the first cell of every chapter install the package of one commit.

    python tools/pin.py COMMIT

The chapters on the branch main install the newest package. Those on the branch `colab`, which the
page opens, install the one of the page: the workflow colab.yml writes them with this tool.
"""

import re
import sys
from pathlib import Path

import address

ROOT = Path(__file__).resolve().parent.parent


def pin(text, repository, commit):
    """The text of a notebook, with the commit behind the address that it installs from."""
    pinned, count = re.subn(rf"git\+{re.escape(repository)}(?![\w@-])", rf"\g<0>@{commit}", text)
    if count != 1:
        raise ValueError(f"a chapter names git+{repository} once, not {count} times")
    return pinned


if __name__ == "__main__":
    repository, _ = address.current(ROOT)
    for path in sorted((ROOT / "book").glob("*.ipynb")):
        path.write_text(pin(path.read_text("utf-8"), repository, sys.argv[1]), "utf-8")
