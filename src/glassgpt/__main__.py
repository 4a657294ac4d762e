# Written by tools/tangle.py from book/a3_command_line.ipynb: change it there.


"""The command line, as `python -m glassgpt`."""

import sys

from glassgpt.cli import main

if (__name__, __package__) == ("__main__", "glassgpt"):  # and not in a notebook
    sys.exit(main())
