"""Make the README's picture: the heads of SmolLM2-135M in the one-file report, as Chromium shows it.

pip install playwright            # drives the Chromium that is installed; downloads none
python examples/readme_picture.py docs/smollm2.png
"""

import sys
import tempfile
from pathlib import Path

from playwright.sync_api import sync_playwright

import sinkscope as ss

target = sys.argv[1] if len(sys.argv) > 1 else "docs/smollm2.png"
report = ss.scan("smollm2-135m", ss.texts("prose", prompts=16, length=256))
with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
    page_file = Path(folder) / "report.html"
    page_file.write_text(report.to_html(), encoding="utf-8")
    browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
    page = browser.new_page(viewport={"width": 1200, "height": 900}, device_scale_factor=1.5)
    page.goto(page_file.as_uri())
    page.wait_for_selector(".plot-container")
    page.wait_for_timeout(1000)
    page.locator("section[aria-labelledby=heads-title]").screenshot(path=target)
    browser.close()
print(f"wrote {target}")
