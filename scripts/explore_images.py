"""Draw docs/explore*.jpg: the page of `ulsam explore` in Chromium, light, dark and as wide as a phone.

The models and the drawn birds are those of explain_image.py; Chromium is `$ULSAM_CHROMIUM`, or the one on the PATH.

    python scripts/explore_images.py runs/slim/model.safetensors runs/base/model.safetensors \\
        birds/val/finebar-spotted-shortbill/0008.jpg
"""

import argparse
import io
import os
import shutil
import subprocess
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

from ulsam.base.files import write_atomic

SHOTS = {  # name: color scheme, width, and what is shown
    "explore": ("light", 1180, "attention"),
    "explore-dark": ("dark", 1180, "cam"),
    "explore-phone": ("light", 390, "attention"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="model file")
    parser.add_argument("base", help="model file of the base model")
    parser.add_argument("image", type=Path, help="a drawn bird")
    parser.add_argument("--out", type=Path, default=Path("docs"), help="folder (default: docs)")
    args = parser.parse_args()
    command = [sys.executable, "-m", "ulsam", "explore", args.model, args.base, "--port", "0"]
    chromium = os.environ.get("ULSAM_CHROMIUM") or shutil.which("chromium")
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server, sync_playwright() as playwright:
        assert server.stdout is not None
        address = server.stdout.readline().split()[0]
        browser = playwright.chromium.launch(executable_path=chromium)
        for name, (scheme, width, mode) in SHOTS.items():
            view = {"width": width, "height": 800}
            page = browser.new_page(color_scheme=scheme, viewport=view, device_scale_factor=1.25)  # type: ignore[arg-type]
            page.goto(address)
            page.set_input_files("#file", args.image)
            page.wait_for_selector("#result:not([hidden])")
            page.locator(f"[value={mode}]").check(force=True)
            page.wait_for_timeout(400)
            write_atomic(args.out / f"{name}.jpg", shot(page))
        browser.close()
        server.terminate()


def shot(page: Page) -> bytes:
    """The whole page as a JPEG, whose colors are not halved: letters stay sharp."""
    buffer = io.BytesIO()
    image = Image.open(io.BytesIO(page.screenshot(full_page=True))).convert("RGB")
    image.save(buffer, "jpeg", quality=85, subsampling=0, optimize=True)
    return buffer.getvalue()


if __name__ == "__main__":
    main()
