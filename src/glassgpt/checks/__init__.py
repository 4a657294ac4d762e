# Written by tools/tangle.py from book/a3_command_line.ipynb: change it there.
"""The checks of all chapters, each in the module of its chapter.

Each takes an implementation and raises AssertionError with a message that names the
mistake. They need nothing but PyTorch.
"""

from glassgpt.checks.grading import catch as catch
from glassgpt.checks.grading import grade as grade
