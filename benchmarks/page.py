"""How fast a published page writes, in a headless Chromium: tokens a second.

    python benchmarks/page.py [RUN]     a run's folder or a name; default: shakespeare

Each round has the engine draw 200 tokens, without drawing the page, and then the button
*Write*, with everything that the page draws. Needs the `test` extra and a Chromium.
"""

import argparse
import platform
import shutil
import statistics
import tempfile
from pathlib import Path

from playwright.sync_api import sync_playwright

import glassgpt

ROUNDS, TOKENS = 7, 200
ENGINE = """async (count) => {
  const { ask } = document.querySelector("glass-gpt");
  const ids = await ask("encode", "ROMEO:");
  await ask("read", ids);
  const start = performance.now();
  for (let n = 0; n < count; n++) {
    ids.push((await ask("draw", ids, { temperature: 0.8 })) ?? 0);
  }
  return 1000 * count / (performance.now() - start);
}"""
BUTTON = """async (count) => {
  const figure = document.querySelector("glass-gpt");
  await figure.begin("ROMEO:");
  const before = figure.ids.length, start = performance.now();
  await figure.write(count);
  return 1000 * (figure.ids.length - before) / (performance.now() - start);
}"""


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", nargs="?", default="shakespeare")
    model, tokenizer = glassgpt.load(parser.parse_args().run)
    browsers = ("chromium", "google-chrome", "google-chrome-stable")
    path = next(filter(None, map(shutil.which, browsers)))
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as driver:
        file = Path(folder, "model.html")
        glassgpt.publish(model, tokenizer, file)
        chromium = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        page = chromium.new_page()
        page.goto(file.as_uri())
        page.locator(".live:not([hidden])").wait_for()
        ways = {"engine": ENGINE, "button": BUTTON}
        rounds = [
            [page.evaluate(way, TOKENS) for way in ways.values()] for _ in range(ROUNDS)
        ]
        print(f"Chromium {chromium.version}, {platform.machine()}")
        print(f"{model.parameter_count():,} parameters, {file.stat().st_size:,} bytes")
        print("tokens a second:")
        for name, speeds in zip(ways, zip(*rounds, strict=True), strict=True):
            each = ", ".join(f"{speed:.0f}" for speed in speeds)
            print(f"{name}: median {statistics.median(speeds):.0f} ({each})")
        chromium.close()


if __name__ == "__main__":
    main()
