"""SECURITY.md says what results/attack.json holds, and in that nothing fell."""

import json
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_page_about_security_shows_what_was_measured() -> None:
    found = json.loads((ROOT / "results" / "attack.json").read_text(encoding="utf-8"))
    page = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    assert all(part["fell"] == [] for part in found.values())
    kills, disk, images, models, requests, day = (
        found[name] for name in ("kills", "disk", "images", "models", "requests", "day")
    )
    memory, slow = requests["megabytes"], requests["slow"]
    for text in (
        f"| {sum(kills['kills'].values())} kills |",
        f"| {sum(disk['filled'].values())} times |",
        f"| {images['kinds']} kinds | {images['read']} read, {images['refused']} refused; the readers agree; at most "
        f"{images['worst']['seconds']:.1f} s and {images['worst']['megabytes']:.0f} MB |",
        f"| {models['files']} files | {models['loaded']} loaded, {models['refused']} refused; at most "
        f"{models['worst']['seconds']:.1f} s and {models['worst']['megabytes']:.0f} MB |",
        f"| {requests['requests']} requests | 0 answers with a status of 500 or more |",
        f"| {sum(slow.values())} connections | let go within the time limit; others are answered within "
        f"{requests['answered_beside_slow']['slowest_seconds']:.1f} s |",
        f"| {memory['before']} MB and {max(memory['after_broken'], memory['after_slow'])} MB |",
        f"| {requests['sigterm_seconds']} s |",
        f"| {day['requests']} requests | each was answered as it should be; {day['before']['megabytes']} MB and "
        f"{day['after']['megabytes']} MB, {day['before']['threads']} and {day['after']['threads']} threads |",
    ):
        assert text in page, text
    assert not any(int(status) >= 500 for status in requests["statuses"] | slow)
    assert max(memory.values()) <= 1.2 * memory["before"]
    assert sum(day["answers"].values()) == day["requests"]
