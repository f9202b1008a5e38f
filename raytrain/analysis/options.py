"""Options of an evaluation, as the command line and the measuring take them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from raytrain.utils.errors import UserError


@dataclass
class EvaluateOptions:
    """Measure a trained model on a split of a corpus, and the texts that it writes."""

    checkpoint: tyro.conf.Positional[str]
    """Folder or s3:// address of a checkpoint, a run or a search; MLflow run id; or models:/NAME@ALIAS."""
    split: Literal["train", "valid", "test"] = "valid"
    """Split of the corpus."""
    data: str | None = None
    """Source of another corpus, as in raytrain.train; default: the corpus of training."""
    data_path: str | None = None
    """File or folder that holds the source; default: where training found it."""
    data_field: str | None = None
    """Field or column that holds the text in .jsonl and .parquet sources; default: that of training."""
    evaluate_samples: int = 1024
    """Samples of the split, evenly spaced; 0 takes all."""
    iw_draws: int = 100
    """Draws of z for each importance-weighted estimate (models with a latent code)."""
    num_texts: int = 256
    """Texts to draw from the model, and as many texts of the split beside them; 0 leaves this out."""
    seed: int = 0
    """Seed of the texts that are drawn."""
    storage: str | None = None
    """Folder or s3:// address of training, where the corpus may lie ready; default: $RAYTRAIN_STORAGE or ./runs."""
    workers: int = 1
    """Tasks on a Ray cluster that share the samples of the split; 1 computes in this process, without Ray."""
    address: str | None = None
    """Address of the Ray cluster; default: the one that is found, otherwise a new one on this machine."""
    output: Path | None = None
    """JSON file to write, replaced if it is there; default: a new evaluation-SPLIT.json in the working directory."""
    log_to_mlflow: bool = True
    """Whether to log to the MLflow run of the checkpoint, if it has one."""

    def check(self) -> None:
        """Refuse numbers that are out of range.

        Raises:
            UserError: with the option's name.
        """
        for name, least in {"evaluate_samples": 0, "iw_draws": 1, "num_texts": 0, "seed": 0, "workers": 1}.items():
            if (value := getattr(self, name)) < least:
                raise UserError(f"--{name.replace('_', '-')} is {value}: must be at least {least}")
        if self.num_texts == 1:
            raise UserError(
                "--num-texts is 1: texts are measured against each other; draw at least 2, or 0 to leave this out"
            )
