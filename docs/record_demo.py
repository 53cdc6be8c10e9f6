"""Records `p2pinfer demo --kill` as a moving picture: docs/demo-kill.svg.

    .venv/bin/python docs/record_demo.py

The picture is what the command shows, slowed down; it needs nothing but a browser.
"""

from __future__ import annotations

import io
import re
import time
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from p2pinfer.cli.demo import NODES, PROMPT, story_params
from p2pinfer.cli.demo_kill import KillPlay, Scene
from p2pinfer.cluster import LocalCluster, free_base_port

PICTURE = Path(__file__).with_name("demo-kill.svg")
COLUMNS = 80
SLOWER = 4.0
"""A second of the story is shown in so many seconds."""

LINES = 24
FRAMES = 60
"""At most: more make the file large."""

LAST_S = 4.0
"""How long the end is shown before it begins again."""

FRAME = """<g class="frame" id="f{number}"><style>{styles}</style>
{backgrounds}<g class="{unique_id}-matrix">{matrix}</g></g>"""

PICTURE_OF = """<svg viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg">
<style>
text {{ font-family: Menlo, Consolas, "DejaVu Sans Mono", monospace; font-size: 20px; }}
.frame {{ visibility: hidden; }}
{timing}
</style>
<rect width="{width}" height="{height}" rx="8" fill="#292929"/>
<g transform="translate(10 10)">
{frames}
</g>
</svg>
"""


def frame(scene: Scene, number: int) -> str:
    """One moment as a group of SVG."""
    console = Console(
        record=True,
        width=COLUMNS,
        file=io.StringIO(),
        force_terminal=True,
        color_system="truecolor",
    )
    console.print(scene)
    form = FRAME.replace("{number}", str(number))
    drawn = console.export_svg(title="", code_format=form, unique_id=f"u{number}")
    return re.sub(r' clip-path="url\(#[^"]*\)"', "", drawn)


def picture(moments: list[tuple[float, str]], lines: int) -> str:
    """All frames one after the other; the times are seconds since the first one."""
    whole = SLOWER * moments[-1][0] + LAST_S
    timing = []
    for number, (at, _) in enumerate(moments):
        begin = 100 * SLOWER * at / whole
        end = 100 * SLOWER * moments[number + 1][0] / whole if number + 1 < len(moments) else 100
        timing.append(
            f"@keyframes k{number} {{ 0% {{ visibility: hidden; }} "
            f"{begin:.3f}% {{ visibility: visible; }} {end:.3f}% {{ visibility: hidden; }} }}\n"
            f"#f{number} {{ animation: k{number} {whole:.2f}s step-end infinite; }}"
        )
    return PICTURE_OF.format(
        width=round(COLUMNS * 12.2 + 20),
        height=round(lines * 24.4 + 30),
        timing="\n".join(timing),
        frames="\n".join(text for _, text in moments),
    )


def main() -> None:
    """Play it once, and write the picture."""
    with LocalCluster(NODES, model="demo", base_port=free_base_port(NODES)) as cluster:
        play = KillPlay(cluster, PROMPT, story_params())
        seen = [(time.monotonic(), replace(scene)) for scene in play.scenes()]
    step = max(1, -(-len(seen) // FRAMES))
    kept = [each for n, each in enumerate(seen) if n % step == 0 or n + 1 == len(seen)]
    frames = [(at - seen[0][0], frame(scene, n)) for n, (at, scene) in enumerate(kept)]
    PICTURE.write_text(picture(frames, LINES))
    print(f"{PICTURE}: {len(kept)} frames, the story stood still for {play.pause_s:.2f} s")


if __name__ == "__main__":
    main()
