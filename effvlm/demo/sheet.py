"""The contact sheet: every sample as a tile, the answers under it in green or red."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

PICTURE, MARGIN, COLUMNS, LINE = 216, 14, 4, 18
_PAPER, _INK, _FAINT, _GREEN, _RED = (250, 250, 248), (32, 33, 36), (120, 122, 128), (24, 128, 56), (200, 38, 38)


@dataclass(frozen=True)
class Tile:
    """One picture, its question, the expected answer (None: nobody knows) and the given ones by share of tokens kept."""

    picture: Image.Image
    question: str
    expected: str | None
    answers: dict[str, str]


def contact_sheet(tiles: list[Tile]) -> Image.Image:
    """All tiles on one RGB page, four in a row."""
    width = PICTURE + 2 * MARGIN
    height = PICTURE + 2 * MARGIN + LINE * (4 + max(len(t.answers) for t in tiles))
    rows = -(-len(tiles) // COLUMNS)
    sheet = Image.new("RGB", (width * COLUMNS, height * rows), _PAPER)
    for i, tile in enumerate(tiles):
        _draw(sheet, tile, i % COLUMNS * width + MARGIN, i // COLUMNS * height + MARGIN)
    return sheet


def _draw(sheet: Image.Image, tile: Tile, x: int, y: int) -> None:
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=13)
    picture = tile.picture.copy()
    scale = PICTURE / max(picture.size)
    picture = picture.resize((round(picture.width * scale), round(picture.height * scale)), Image.Resampling.LANCZOS)
    sheet.paste(picture, (x + (PICTURE - picture.width) // 2, y + (PICTURE - picture.height) // 2))
    y += PICTURE + 6
    for line in textwrap.wrap(tile.question, 34)[:2]:
        draw.text((x, y), line, _INK, font)
        y += LINE
    if tile.expected is not None:
        draw.text((x, y), f"expected: {tile.expected}", _FAINT, font)
        y += LINE
    for share, given in tile.answers.items():
        color = _INK if tile.expected is None else _GREEN if given == tile.expected else _RED
        draw.text((x, y), f"{share:>4} of tokens: {given}", color, font)
        y += LINE
