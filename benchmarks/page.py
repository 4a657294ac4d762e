"""How fast a published page writes, in a headless Chromium: tokens a second.

    python benchmarks/page.py [RUN]     a run's folder or a name; default: shakespeare

Each round reads a prompt and draws 200 tokens from the engine, as the page's button
does, without drawing the page. Needs the `test` extra and a Chromium.
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
WRITE = """async (count) => {
  const { ask } = document.querySelector("glass-gpt");
  const ids = await ask("encode", "ROMEO:");
  await ask("read", ids);
  const start = performance.now();
  for (let n = 0; n < count; n++) {
    ids.push((await ask("draw", ids, { temperature: 0.8 })) ?? 0);
  }
  return 1000 * count / (performance.now() - start);
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
        speeds = [page.evaluate(WRITE, TOKENS) for _ in range(ROUNDS)]
        print(f"Chromium {chromium.version}, {platform.machine()}")
        print(f"{model.parameter_count():,} parameters, {file.stat().st_size:,} bytes")
        print("tokens a second:", ", ".join(f"{speed:.0f}" for speed in speeds))
        print(f"median {statistics.median(speeds):.0f}")
        chromium.close()


if __name__ == "__main__":
    main()
