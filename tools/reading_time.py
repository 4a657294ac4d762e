"""Write into every chapter how long it takes to read, computed from its words and its code.

    python tools/reading_time.py             write the sentence into each first cell
    python tools/reading_time.py --check     change nothing; exit 1 where one is missing or differs

The sentence replaces `*READING-TIME*`, or the one that stood there before. Counted are the words of
the text and the lines of code that stand open, not what is folded, nor the time to solve exercises.
The speeds fit what readers of the first edition took: two hours for the chapter on tokens, 75 to 90
minutes for the one on attention. That is slower than a novel is read, since examples are checked.
"""

import argparse
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WORDS, LINES, EQUATIONS = 85, 13, 1  # in a minute
FOLDED = {"hide-cell", "hide-input", "remove-cell", "remove-input"}
PLACE = re.compile(r"\*(READING-TIME|About \d+ minutes to read[^*]*)\*")


def minutes(notebook):
    """Minutes to read a notebook, to the next five."""
    spent = 0.0
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            # Without the sentence itself, so that writing it changes nothing.
            text = PLACE.sub("", re.sub(r"(?s)<details>.*?</details>", "", source))
            spent += len(text.split()) / WORDS + text.count("$$") / 2 / EQUATIONS
        elif not FOLDED & set(cell["metadata"].get("tags", [])):
            spent += sum(1 for line in source.splitlines() if line.strip()) / LINES
    return max(5, 5 * round(spent / 5))


def sentence(notebook):
    """What the first cell says."""
    return f"*About {minutes(notebook)} minutes to read, and more to solve the exercises.*"


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="only compare; exit 1 on a difference")
    parser.add_argument("--book", type=Path, default=ROOT / "book", help="folder of the notebooks")
    options = parser.parse_args(arguments)
    wrong = 0
    for path in sorted(options.book.glob("*.ipynb")):
        notebook = json.loads(path.read_text("utf-8"))
        first = notebook["cells"][0]
        text, due = "".join(first["source"]), sentence(notebook)
        found = PLACE.findall(text)
        if len(found) != 1:
            print(f"{path}: its first cell needs one line *READING-TIME*, not {len(found)}")
            wrong += 1
        elif options.check and due not in text:
            print(f"{path}: say {due}")
            wrong += 1
        elif due not in text:
            first["source"] = PLACE.sub(due, text).splitlines(keepends=True)
            new = json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True) + "\n"
            path.write_text(new, "utf-8", newline="\n")
            print(f"{path}: {due}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
