"""Train on your own text and read what the model writes.

    python examples/custom_text.py my_posts.txt

The file holds one text a line. Each line becomes one document: the model learns where a text ends. Everything is kept
in ``./runs`` and, for MLflow, in ``./mlflow.db``. Run it again to get the same model back; nothing is trained twice.
"""

from __future__ import annotations

import argparse

import raytrain


def main() -> None:
    """Train a byte-level LSTM on a text file, then print ten samples and how likely the model finds a line."""
    parser = argparse.ArgumentParser(description="Train on your own text and read what the model writes.")
    parser.add_argument("file", help="text file, one text a line")
    parser.add_argument("--steps", type=int, default=2000, help="training steps; 2,000 take a few minutes on a laptop")
    parser.add_argument("--length", type=int, default=128, help="longest text in bytes, its end included")
    arguments = parser.parse_args()

    run = raytrain.train(
        "byte_lstm",
        data=arguments.file,
        sampling="documents",
        length=arguments.length,
        steps=arguments.steps,
        evaluate_every=max(1, arguments.steps // 4),
        checkpoint_every=max(1, arguments.steps // 4),
    )
    best = run.outcome["best"]
    print(f"\nbest at step {run.outcome['best_step']}: {best['bits_per_byte']:.3f} bits/byte\n")

    model = raytrain.load_model(run.location)
    for sample in model.sample(10, temperature=0.8):
        print(f"  {sample}")
    with open(arguments.file, encoding="utf-8", errors="replace") as file:
        line = file.readline().rstrip("\n")[: arguments.length - 1]
    (score,) = model.score([line])
    print(f"\n{line!r}: {score.bits_per_byte:.3f} bits/byte")


if __name__ == "__main__":
    main()
