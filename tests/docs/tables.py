"""The table of settings in docs/training.md. To write it anew: ``python -m tests.docs.tables``."""

from __future__ import annotations

from deltune.training import setting_rows
from tests.docs.markdown import ROOT

__all__ = ["TRAINING", "current", "settings_table"]

TRAINING = ROOT / "docs" / "training.md"
_BEGIN, _END = "<!-- settings -->\n", "\n<!-- end settings -->"


def settings_table() -> str:
    """Each setting with its default and meaning."""
    lines = ["| setting | default | meaning |", "|---|---|---|"]
    for row in setting_rows():
        default = "" if row["default"] is None else f"`{str(row['default']).lower()}`"
        choices = f": {', '.join(f'`{choice}`' for choice in row['choices'])}" if row["choices"] else ""
        lines.append(f"| `{row['name']}` | {default} | {row['help']}{choices} |")
    return "\n".join(lines)


def current() -> str:
    """The table as it stands in the page."""
    return TRAINING.read_text(encoding="utf-8").split(_BEGIN)[1].split(_END)[0]


if __name__ == "__main__":
    text = TRAINING.read_text(encoding="utf-8")
    before, rest = text.split(_BEGIN)
    TRAINING.write_text(f"{before}{_BEGIN}{settings_table()}{_END}{rest.split(_END)[1]}", encoding="utf-8")
