"""Write the live model, its code and its weights, into `_vendor/`, for the page."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


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
