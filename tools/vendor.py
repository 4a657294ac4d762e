"""Write what the page serves into `_vendor/`: MathJax, the icon, the live model.

The page must ask nothing of the network, and no third-party JavaScript is committed. MathJax
comes with the package `django-static-mathjax`; one file of its code and its fonts are enough.
"""

import importlib.util
import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# The full build holds every TeX extension, so that none is loaded later.
SERVED = ["tex-chtml-full.js", "output/chtml/fonts/woff-v2"]


def copy_mathjax(target):
    """Copy the served files into the folder `target`, which is replaced."""
    package = importlib.util.find_spec("mathjax")
    if package is None:
        raise SystemExit("vendor: install the book's packages: pip install -e '.[book]'")
    source = Path(package.submodule_search_locations[0], "static", "mathjax")
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for name in SERVED:
        origin = source / "es5" / name
        copy = shutil.copytree if origin.is_dir() else shutil.copy
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        copy(origin, target / name)
    shutil.copy(source / "LICENSE", target)


def write_live(target):
    """Write the scripts of a model that runs in the page: its code, and its weights."""
    import glassgpt
    from glassgpt.publish import model_script, page_script

    target.mkdir(parents=True, exist_ok=True)
    (target / "glass-gpt.js").write_text(page_script(), "utf-8")
    model = model_script(*glassgpt.load("shakespeare"))
    (target / "shakespeare.js").write_text(model, "utf-8")


if __name__ == "__main__":
    write_live(ROOT / "_vendor" / "live")
    copy_mathjax(ROOT / "_vendor" / "mathjax")
    # What a browser asks for where a page names no icon, as the redirect at the root.
    shutil.copy(ROOT / "book" / "_static" / "favicon.svg", ROOT / "_vendor" / "favicon.ico")
