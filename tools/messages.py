"""
Extract the messages of the program into the translation catalogs, and compile them.

    .venv/bin/python tools/messages.py          update every locale/*/LC_MESSAGES/qwenlocal.po and .mo
    .venv/bin/python tools/messages.py ja       start a Japanese translation

A new message has an empty `msgstr` and appears in English until it is translated; a message that the code no longer has
is dropped.
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
_DATE = datetime(2026, 1, 1, tzinfo=timezone.utc)  # fixed, so that the same input gives the same files


def main(languages: list[str]) -> None:
    for language in languages or sorted(path.name for path in LOCALE.iterdir()):
        catalog = collect(language)
        po = po_path(language)
        po.parent.mkdir(parents=True, exist_ok=True)
        po.write_bytes(format_po(catalog))
        po.with_suffix(".mo").write_bytes(compile_mo(catalog))
        missing = sum(1 for message in catalog if message.id and not message.string)
        print(f"{po.relative_to(ROOT)}: {len(catalog)} messages, {missing} not translated")


def po_path(language: str) -> Path:
    return LOCALE / language / "LC_MESSAGES" / "qwenlocal.po"


def collect(language: str) -> Catalog:
    """Extract all messages of the code, with the translations that the catalog has."""
    po = po_path(language)
    translations = read_po(io.BytesIO(po.read_bytes()), language) if po.exists() else Catalog(language)
    catalog = Catalog(
        language,
        project="qwenlocal",
        version="0.1.0",
        creation_date=_DATE,
        revision_date=_DATE,
        fuzzy=False,
        header_comment="# Messages of qwenlocal. Keep the placeholders in braces.",
    )
    extracted = extract_from_dir(
        ROOT / "qwenlocal", [("**.py", "python")], keywords=KEYWORDS, directory_filter=lambda folder: True
    )
    for file, _line, text, comments, context in sorted(extracted, key=lambda entry: (entry[0], entry[1])):
        translated = translations.get(text)
        catalog.add(
            text, translated.string if translated else "", [(file, None)], auto_comments=comments, context=context
        )
    for message in catalog:
        message.flags.discard("python-format")  # placeholders are in braces; % is a percent sign
    return catalog


def format_po(catalog: Catalog) -> bytes:
    out = io.BytesIO()
    write_po(out, catalog, width=110)
    return out.getvalue()


def compile_mo(catalog: Catalog) -> bytes:
    out = io.BytesIO()
    write_mo(out, catalog)
    return out.getvalue()


if __name__ == "__main__":
    main(sys.argv[1:])
