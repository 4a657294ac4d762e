"""The Chromium that looks at the page and prints it."""

import os
import shutil

NAMES = ["chromium", "chromium-browser", "google-chrome", "google-chrome-stable"]
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def find_browser():
    """The path of a Chromium, or None."""
    named = os.environ.get("GLASSGPT_BROWSER")
    return named or next(filter(None, map(shutil.which, NAMES)), None)
