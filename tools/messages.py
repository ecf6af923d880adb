"""
Collects what the program says for translators, and compiles what they wrote.

    .venv/bin/python tools/messages.py          renew every locale/*/LC_MESSAGES/qwenlocal.po and .mo
    .venv/bin/python tools/messages.py ja       begin a translation into Japanese

Sentences that are new have an empty `msgstr`, and are said in English until somebody fills it in; those that the
program says no longer are dropped.
"""

from __future__ import annotations

import io
import sys
from datetime import datetime, timezone
from pathlib import Path

from babel.messages import Catalog
from babel.messages.extract import extract_from_dir
from babel.messages.mofile import write_mo
from babel.messages.pofile import read_po, write_po

ROOT = Path(__file__).resolve().parent.parent
LOCALE = ROOT / "qwenlocal" / "locale"
KEYWORDS = {"tr": None, "mark": None}
_ALWAYS = datetime(2026, 1, 1, tzinfo=timezone.utc)  # the same input makes the same files


def po_of(language: str) -> Path:
    return LOCALE / language / "LC_MESSAGES" / "qwenlocal.po"


def renewed(language: str) -> Catalog:
    """All sentences of the code, with the translations that there are."""
    po = po_of(language)
    known = read_po(io.BytesIO(po.read_bytes()), language) if po.exists() else Catalog(language)
    catalog = Catalog(
        language,
        project="qwenlocal",
        version="0.1.0",
        creation_date=_ALWAYS,
        revision_date=_ALWAYS,
        fuzzy=False,
        header_comment="# What qwenlocal says. Places in braces stay as they are.",
    )
    found = extract_from_dir(
        ROOT / "qwenlocal", [("**.py", "python")], keywords=KEYWORDS, directory_filter=lambda folder: True
    )
    for file, _line, message, comments, context in sorted(found, key=lambda one: (one[0], one[1])):
        translated = known.get(message)
        catalog.add(
            message, translated.string if translated else "", [(file, None)], auto_comments=comments, context=context
        )
    for message in catalog:
        message.flags.discard("python-format")  # places are in braces; a % is a per cent
    return catalog


def as_po(catalog: Catalog) -> bytes:
    out = io.BytesIO()
    write_po(out, catalog, width=110)
    return out.getvalue()


def as_mo(catalog: Catalog) -> bytes:
    out = io.BytesIO()
    write_mo(out, catalog)
    return out.getvalue()


def main(languages: list[str]) -> None:
    for language in languages or sorted(path.name for path in LOCALE.iterdir()):
        catalog = renewed(language)
        po = po_of(language)
        po.parent.mkdir(parents=True, exist_ok=True)
        po.write_bytes(as_po(catalog))
        po.with_suffix(".mo").write_bytes(as_mo(catalog))
        missing = sum(1 for message in catalog if message.id and not message.string)
        print(f"{po.relative_to(ROOT)}: {len(catalog)} sentences, {missing} of them not translated yet")


if __name__ == "__main__":
    main(sys.argv[1:])
