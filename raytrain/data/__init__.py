"""From text to corpus to batches: sources, cleaning, the corpus format, and the embedded synthetic corpus."""
