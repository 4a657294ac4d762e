"""Change the address of the repository everywhere it stands.

    python tools/address.py https://github.com/you/yours

The addresses stand in _config.yml (repository.url and html.baseurl); this writes them there and
in the other files that must repeat them: pyproject.toml, the texts in the root, and in each chapter
the first code cell and the citations, which link to the page. The page's address follows GitHub
Pages' rule, so the example gives https://you.github.io/yours/ . Outputs and ids of the notebooks
stay as they are.
"""

import argparse
import re
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
REPOSITORY = re.compile(r"https://github\.com/([\w-]+)/([\w.-]+)")


def current(root):
    """The addresses of the repository and of the page, from _config.yml."""
    config = yaml.safe_load((root / "_config.yml").read_text("utf-8"))
    return config["repository"]["url"], config["html"]["baseurl"]


def page_address(repository):
    """Where GitHub Pages puts the page of a repository. ValueError for anything else."""
    match = REPOSITORY.fullmatch(repository)
    if not match:
        raise ValueError(f"{repository} is not of the form https://github.com/OWNER/NAME")
    owner, name = match.groups()
    return f"https://{owner.lower()}.github.io/{name}/"


def on_colab(repository):
    """Where Colab opens the notebooks of a repository."""
    return repository.replace("github.com", "colab.research.google.com/github")


def carriers(root):
    """The files in which an address may stand."""
    names = [
        "_config.yml",
        "pyproject.toml",
        "README.md",
        "CONTRIBUTING.md",
        "AGENTS.md",
        "CHANGELOG.md",
        "CITATION.cff",
    ]
    files = [root / name for name in names]
    books = [*(root / "book").glob("*.ipynb"), *(root / "book").glob("*.md")]
    modules = (root / "src").rglob("*.py")
    return [path for path in [*files, *sorted(books), *sorted(modules)] if path.exists()]


def change(root, repository):
    """Write the new addresses; return {path: how many were replaced}."""
    old_repository, old_page = current(root)
    # The whole name only: github.com/a/b must not match in github.com/a/bc.
    new = {old_repository: repository, on_colab(old_repository): on_colab(repository)}
    pattern = "|".join(rf"{re.escape(old)}(?![\w-])" for old in new)
    pattern = re.compile(rf"{pattern}|{re.escape(old_page)}")
    new[old_page] = page_address(repository)
    counts = {}
    for path in carriers(root):
        text = path.read_text("utf-8")
        text, count = pattern.subn(lambda match: new[match[0]], text)
        if count:
            path.write_text(text, "utf-8", newline="\n")
            counts[path] = count
    return counts


def main(arguments=None, root=ROOT):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("repository", help="for example https://github.com/you/yours")
    repository = parser.parse_args(arguments).repository.removesuffix("/").removesuffix(".git")
    try:
        page = page_address(repository)
    except ValueError as error:
        print(f"address: {error}", file=sys.stderr)
        return 2
    for path, count in change(root, repository).items():
        print(f"{path.relative_to(root)}: {count}")
    print(f"The repository is {repository}, the page {page}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
