"""The page of `ulsam explore` in a real Chromium: what a person sees, hears, and reaches with keys alone."""

import io
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, Page, expect, sync_playwright

from exploring import serving, two
from ulsam.data.birds import draw_birds
from ulsam.explanation import Explanation

CHROMIUM = os.environ.get("ULSAM_CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
LIMIT = 200_000

pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium: install Debian's chromium, or name one in ULSAM_CHROMIUM"
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with serving(two(), max_bytes=LIMIT) as port:
        yield f"http://127.0.0.1:{port}"


@pytest.fixture(scope="module")
def bird(tmp_path_factory: pytest.TempPathFactory) -> Path:
    drawn = draw_birds(tmp_path_factory.mktemp("birds"), classes=2, train=1, val=1, size=96)
    return sorted(drawn.rglob("*.jpg"))[0]


@pytest.fixture
def page(browser: Browser, address: str) -> Iterator[Page]:
    """A page of its own, which at the end has printed no error, but for what it was refused, and asked nobody else."""
    context = browser.new_context(viewport={"width": 1100, "height": 900}, accept_downloads=True)
    page = context.new_page()
    page.set_default_timeout(20_000)
    errors: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: errors.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(address)
    expect(page.get_by_role("article")).to_have_count(2)
    yield page
    context.close()
    assert [text for text in errors if "status of 422" not in text and "ERR_INTERNET_DISCONNECTED" not in text] == []
    assert all(url.startswith((f"{address}/", f"blob:{address}/", "data:image/")) for url in asked)


def choose(page: Page, image: Any) -> None:
    page.set_input_files("#file", image)


def shown(page: Page, bird: Path) -> Page:
    choose(page, bird)
    expect(page.get_by_text(bird.name, exact=True)).to_be_visible()
    return page


def seen(page: Page, model: int = 0) -> Any:
    """The pixels of a model's image, with whatever lies on it."""
    stage = page.locator(".stage").nth(model)
    page.evaluate("Promise.all([...document.images].filter((image) => image.src).map((image) => image.decode()))")
    return np.asarray(Image.open(io.BytesIO(stage.screenshot())).convert("RGB")).astype(int)


def differ(one: Any, other: Any) -> bool:
    return one.shape != other.shape or bool(np.abs(one - other).max() > 30)


def explained(bird: Path) -> list[Explanation]:
    pixels = np.asarray(Image.open(bird))
    return [model.explainer([model.explainer.transform.pixels(pixels)])[0] for model in two()]


# ------------------------------------------------------------------------------------------ what is shown


def test_both_models_say_what_they_see(page: Page, bird: Path) -> None:
    shown(page, bird)
    found = explained(bird)
    for card, one in zip(page.get_by_role("article").all(), found, strict=True):
        for row, (name, share) in zip(card.locator("ol li").all(), one.top(), strict=True):
            words = row.locator("span").all_inner_texts()
            assert words[0] == name and float(words[1].strip("<> %")) == pytest.approx(100 * share, abs=0.6)
    said = page.locator("#said").inner_text()
    assert all(one.top(1)[0][0] in said for one in found)
    assert page.get_by_role("status").inner_text() == f"{bird.name}: {said}"
    expect(page.get_by_role("alert")).to_be_hidden()


def test_the_slider_and_the_layers_change_the_map(page: Page, bird: Path) -> None:
    shown(page, bird)
    page.get_by_role("radio", name="Attention").check(force=True)
    card = page.get_by_role("article").first
    slider, layer = card.get_by_role("slider", name="Subspace"), card.get_by_role("combobox", name="Layer")
    assert layer.locator("option").count() == 2
    seen_maps = [seen(page)]
    for key, text in (("ArrowRight", "2 of 2"), ("ArrowLeft", "1 of 2")):
        slider.press(key)
        expect(card.locator(".count")).to_have_text(text)
        seen_maps.append(seen(page))
    assert differ(seen_maps[0], seen_maps[1]) and not differ(seen_maps[0], seen_maps[2])
    layer.select_option(index=1)
    expect(card.locator(".strip img")).to_have_count(4)
    slider.fill("4")
    assert differ(seen(page), seen_maps[0])
    found = explained(bird)[0].layers[1]
    text = card.locator("figcaption").inner_text()
    assert text.startswith("Subspace 4: entropy") and f"peak {found.peak[3]:.2f}"[:8] in text
    assert text in str(card.locator("img.map").get_attribute("alt"))
    card.locator(".strip img").nth(1).click()
    expect(card.locator(".count")).to_have_text("2 of 4")
    assert slider.get_attribute("aria-valuetext").startswith("2 of 4: 2: entropy")


def test_cam_and_image_are_switched_for_both_models(page: Page, bird: Path) -> None:
    shown(page, bird)
    expect(page.get_by_role("radio").first).to_be_checked()  # which is Grad-CAM++
    expect(page.get_by_text("Grad-CAM++ for ")).to_have_count(2)
    page.get_by_role("radio", name="Attention").check(force=True)
    attention = [seen(page, model) for model in range(2)]
    without = page.get_by_role("article").nth(1)
    expect(without.get_by_text("no ULSAM layer")).to_be_visible()
    assert without.get_by_role("slider").count() == 0
    page.get_by_role("radio", name="Grad-CAM++").check(force=True)
    cams = [seen(page, model) for model in range(2)]
    assert differ(cams[0], attention[0]) and differ(cams[1], attention[1])
    expect(page.get_by_text("Grad-CAM++ for ")).to_have_count(2)
    page.get_by_role("radio", name="Image").check(force=True)
    plain = [seen(page, model) for model in range(2)]
    assert differ(plain[0], cams[0]) and not differ(plain[1], attention[1])
    page.get_by_role("radio", name="Grad-CAM++").check(force=True)
    page.get_by_role("slider", name="Map opacity").fill("10")
    assert differ(seen(page), cams[0])


def test_a_choice_stays_from_image_to_image(page: Page, bird: Path, tmp_path: Path) -> None:
    shown(page, bird)
    page.get_by_role("radio", name="Attention").check(force=True)
    card = page.get_by_role("article").first
    card.get_by_role("combobox", name="Layer").select_option(index=1)
    card.get_by_role("slider", name="Subspace").fill("3")
    other = tmp_path / "<img src=x onerror=alert(1)>.png"
    Image.new("RGB", (50, 60), "teal").save(other)
    shown(page, other)
    expect(card.locator(".count")).to_have_text("3 of 4")
    assert card.get_by_role("combobox", name="Layer").evaluate("it => it.selectedIndex") == 1
    assert page.locator("main img[src=x], main li b").count() == 0  # names of files and classes are text


def test_of_images_chosen_in_a_hurry_the_last_is_shown(page: Page, bird: Path) -> None:
    for number in range(8):
        choose(page, {"name": f"bird{number}.jpg", "mimeType": "image/jpeg", "buffer": bird.read_bytes()})
    expect(page.get_by_text("bird7.jpg", exact=True)).to_be_visible()
    expect(page.locator("main")).to_have_attribute("aria-busy", "false")
    expect(page.get_by_role("alert")).to_be_hidden()
    expect(page.get_by_text("bird7.jpg", exact=True)).to_be_visible()


def test_the_panel_is_downloaded_as_png(page: Page, bird: Path) -> None:
    shown(page, bird)
    for number, letter in enumerate("AB"):
        with page.expect_download() as waiting:
            page.get_by_role("button", name=f"Download panel of model {letter}").click()
        assert waiting.value.suggested_filename == f"{bird.stem}-panel-{letter}.png"
        drawn = Image.open(waiting.value.path())
        assert (drawn.format, drawn.width > 900, number) == ("PNG", True, number)


# ------------------------------------------------------------------------------------------ what is refused


def test_a_file_that_is_no_image_gets_a_message_and_the_last_image_stays(page: Page, bird: Path) -> None:
    shown(page, bird)
    choose(page, {"name": "notes.txt", "mimeType": "text/plain", "buffer": b"no image"})
    expect(page.get_by_role("alert")).to_contain_text("notes.txt: not an image in a known format")
    expect(page.get_by_text(bird.name, exact=True)).to_be_visible()
    assert page.locator("main").get_attribute("aria-busy") == "false"
    choose(page, bird)
    expect(page.get_by_role("alert")).to_be_hidden()


def test_a_file_that_is_too_large_is_not_even_sent(page: Page) -> None:
    sent: list[str] = []
    page.on("request", lambda request: sent.append(request.url))
    choose(page, {"name": "large.jpg", "mimeType": "image/jpeg", "buffer": bytes(LIMIT + 100_000)})
    expect(page.get_by_role("alert")).to_have_text(
        "large.jpg is too large: it has 0.3 MB, and the limit is 0.2 MB (--max-mb)."
    )
    assert not sent and page.locator("#result").is_hidden()


def test_a_server_that_is_gone_is_reported(page: Page, bird: Path) -> None:
    page.context.set_offline(True)
    choose(page, bird)
    expect(page.get_by_role("alert")).to_contain_text("Is ulsam explore still running?")
    page.context.set_offline(False)
    shown(page, bird)


def test_images_can_be_dropped_and_pasted_one_at_a_time(page: Page, bird: Path) -> None:
    def send(kind: str, count: int) -> None:
        page.evaluate(
            """([kind, bytes, count]) => {
                const data = new DataTransfer();
                for (let n = 0; n < count; n++) data.items.add(new File([new Uint8Array(bytes)], `${kind}${n}.jpg`));
                const event = kind === "drop"
                    ? new DragEvent(kind, { dataTransfer: data, bubbles: true, cancelable: true })
                    : new ClipboardEvent(kind, { clipboardData: data, bubbles: true });
                document.querySelector(".drop").dispatchEvent(event);
            }""",
            [kind, list(bird.read_bytes()), count],
        )

    send("drop", 2)
    expect(page.get_by_role("alert")).to_contain_text("these are 2 files")
    send("drop", 1)
    expect(page.get_by_text("drop0.jpg", exact=True)).to_be_visible()
    send("paste", 1)
    expect(page.get_by_text("paste0.jpg", exact=True)).to_be_visible()
    send("drop", 0)
    expect(page.get_by_role("alert")).to_have_text("That was no file.")


# ------------------------------------------------------------------------------------------ for everyone


def focused(page: Page) -> str:
    """What has the focus: its role or type, and its value; it must be seen to have it."""
    name, outlined = page.evaluate(
        """() => {
            const it = document.activeElement;
            const near = [it, it.nextElementSibling].filter((one) => one);
            const drawn = near.some((one) => getComputedStyle(one).outlineStyle !== "none");
            return [`${it.type ?? it.localName} ${it.id || it.value || it.className}`.trim(), drawn];
        }"""
    )
    assert outlined, f"{name} does not show that it has the focus"
    return str(name)


def test_everything_is_reached_with_keys_alone(page: Page, bird: Path) -> None:
    page.keyboard.press("Tab")
    assert focused(page) == "file file"
    page.set_input_files("input[type=file]", bird)  # what Enter opens is the browser's own
    expect(page.get_by_text(bird.name, exact=True)).to_be_visible()
    stops = []
    before = seen(page)
    for _ in range(7):
        page.keyboard.press("Tab")
        stops.append(focused(page))
        if stops[-1] == "radio cam":
            page.keyboard.press("ArrowRight")
            assert focused(page) == "radio attention" and differ(seen(page), before)
        if stops[-1].startswith("select-one"):
            page.keyboard.press("ArrowDown")
            expect(page.locator(".strip img")).to_have_count(4)
        if stops[-1] == "range 1":
            page.keyboard.press("End")
            expect(page.locator(".count").first).to_have_text("4 of 4")
    assert [stop.split()[0] for stop in stops] == [
        "radio",
        "range",
        "select-one",
        "range",
        "button",
        "button",
        "summary",
    ]
    page.keyboard.press("Enter")
    expect(page.get_by_text("A map is no proof.")).to_be_visible()
    page.keyboard.press("Shift+Tab")
    with page.expect_download():
        page.keyboard.press("Enter")


def test_every_image_has_a_text_and_every_control_a_name(page: Page, bird: Path) -> None:
    shown(page, bird)
    page.get_by_role("radio", name="Attention").check(force=True)  # whose controls are more
    unnamed = page.evaluate(
        """() => [...document.querySelectorAll("main img, svg")].filter((it) => it.checkVisibility()
            && !it.closest("[aria-hidden=true]") && !it.getAttribute("alt")).map((it) => it.outerHTML.slice(0, 99))"""
    )
    assert unnamed == []
    for role, names in (
        ("radio", ["Attention", "Grad-CAM++", "Image"]),
        ("slider", ["Map opacity", "Subspace"]),
        ("combobox", ["Layer"]),
        ("article", [f"Model A: {two()[0].name}", f"Model B: {two()[1].name}"]),
        ("group", ["Show"]),
        ("heading", [f"{two()[0].name}"]),
    ):
        for name in names:
            expect(page.get_by_role(role, name=name).first).to_be_attached()  # type: ignore[arg-type]


def luminance(color: str) -> float:
    """Of a CSS color (WCAG 2.2)."""
    shares = [int(value) / 255 for value in re.findall(r"\d+", color)[:3]]
    red, green, blue = (share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4 for share in shares)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_words_are_readable_in_light_and_dark(page: Page, bird: Path) -> None:
    papers = []
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme, reduced_motion="reduce")  # type: ignore[arg-type]
        shown(page, bird)
        choose(page, {"name": "notes.txt", "mimeType": "text/plain", "buffer": b"no image"})
        expect(page.get_by_role("alert")).to_be_visible()
        pairs = page.evaluate(
            """() => {
                const style = (it) => getComputedStyle(it);
                const clear = (it) => style(it).backgroundColor === "rgba(0, 0, 0, 0)";
                const words = (it) => [...it.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
                return [...document.querySelectorAll("main *, header *")]
                    .filter((it) => it.checkVisibility() && words(it)).map((it) => {
                        let behind = it;
                        while (behind && clear(behind)) behind = behind.parentElement;
                        return [it.textContent.trim().slice(0, 40), style(it).color, style(behind).backgroundColor];
                    });
            }"""
        )
        assert len(pairs) > 25
        papers.append(luminance(page.evaluate("getComputedStyle(document.body).backgroundColor")))
        for text, ink, paper in pairs:
            low, high = sorted((luminance(ink), luminance(paper)))
            assert (high + 0.05) / (low + 0.05) >= 4.5, f"{text!r} is {ink} on {paper} in {scheme}"
    assert papers[0] > 0.8 and papers[1] < 0.05


def test_nothing_is_wider_than_a_phone(page: Page, tmp_path: Path) -> None:
    page.set_viewport_size({"width": 390, "height": 844})
    wide = tmp_path / ("a" * 120 + ".png")
    Image.new("RGB", (300, 40), "teal").save(wide)

    def width() -> int:
        return int(page.evaluate("document.documentElement.scrollWidth"))

    assert width() <= 390
    choose(page, {"name": "b" * 120 + ".txt", "mimeType": "text/plain", "buffer": b"no image"})
    expect(page.get_by_role("alert")).to_be_visible()
    assert width() <= 390
    shown(page, wide)
    assert width() <= 390
    boxes = page.evaluate(
        """() => [...document.querySelectorAll("main *")]
            .filter((it) => it.checkVisibility() && !it.matches("#file, #status"))
            .map((it) => [it.className || it.localName, it.getBoundingClientRect().right])
            .filter(([, right]) => right > 390.5)"""
    )
    assert boxes == []
    page.set_viewport_size({"width": 320, "height": 640})
    assert width() <= 320
