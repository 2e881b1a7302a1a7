"""The report in headless Chromium: every section, no console error, no horizontal scroll, nothing overlaps."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from fl_dualpriv.report.page import page
from fl_dualpriv.report.runs import read_run
from tests.fl_dualpriv.report.test_report import SECTIONS, make_run

_NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next((path for name in _NAMES if (path := shutil.which(name))), "")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not CHROMIUM, reason="no Chromium on this machine")]

PROBE = """
<script>addEventListener("load",()=>{const shown=[...document.querySelectorAll("h1,h2,p,li,table,svg,pre")]
.filter(e=>e.checkVisibility()&&!e.closest(".tall")&&!e.closest("details"));const box=e=>e.getBoundingClientRect();
const overlaps=[];for(const a of shown)for(const b of shown)if(a!==b&&!a.contains(b)&&!b.contains(a)){const p=box(a),
q=box(b);const w=Math.min(p.right,q.right)-Math.max(p.left,q.left),h=Math.min(p.bottom,q.bottom)-Math.max(p.top,q.top);
if(w>1&&h>1&&!(a.closest(".wide")&&b.closest(".wide")))overlaps.push(a.tagName+" "+b.tagName)}
document.querySelectorAll("table.sort th button")[3]?.click();
const gains=[...document.querySelectorAll("table.sort tbody tr")].map(r=>+r.cells[3].dataset.v);
const out=document.createElement("pre");out.id="probe";out.textContent=JSON.stringify({overlaps,gains,
width:innerWidth,scroll:document.documentElement.scrollWidth,sections:[...document.querySelectorAll("section")]
.map(s=>s.id),dark:matchMedia("(prefers-color-scheme:dark)").matches,ground:getComputedStyle(document.body)
.backgroundColor});document.body.append(out)})</script>
"""


@pytest.mark.parametrize("width", [390, 1440])
@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("runs", [1, 2])
def test_it_is_whole_at_every_width_and_theme(tmp_path: Path, width: int, theme: str, runs: int) -> None:
    folders = [make_run(tmp_path / f"run-{number}", number, 0.4 + number / 10, x=number) for number in range(runs)]
    file = tmp_path / "report.html"
    file.write_text(page([read_run(folder) for folder in folders], governance=True) + PROBE, encoding="utf-8")
    # A window of Chromium is at least 500 pixels wide; a frame is as wide as it is told to be.
    frame = tmp_path / "frame.html"
    frame.write_text(f'<iframe id=f src="report.html" width={width} height=2000 style="border:0"></iframe>')
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0"]
    command += ["--allow-file-access-from-files", f"--user-data-dir={tmp_path / 'profile'}", "--hide-scrollbars"]
    command += [f"--blink-settings=preferredColorScheme={0 if theme == 'dark' else 1}", f"--window-size={width},2000"]
    target = file if width >= 500 else frame
    script = '<script>f.onload=()=>setTimeout(()=>document.body.append(f.contentDocument.getElementById("probe")),200)'
    if target is frame:
        frame.write_text(frame.read_text() + script + "</script>")
    done = subprocess.run(
        [*command, "--virtual-time-budget=3000", "--dump-dom", target.as_uri()],
        capture_output=True,
        text=True,
        check=False,
        timeout=90,
    )
    assert not re.search(r"CONSOLE.*(Error|error)", done.stderr), done.stderr
    found = re.search(r'<pre id="probe">(.*?)</pre>', done.stdout)
    assert found is not None, done.stdout[-2000:]
    probe = json.loads(found[1].replace("&amp;", "&"))
    assert probe["width"] == width
    assert probe["scroll"] <= width
    assert probe["overlaps"] == []
    assert probe["dark"] == (theme == "dark")
    assert probe["ground"] == ("rgb(13, 17, 23)" if theme == "dark" else "rgb(255, 255, 255)")
    if runs == 1:
        assert set(probe["sections"]) >= SECTIONS
        assert probe["gains"] == sorted(probe["gains"])


def test_it_prints_on_four_pages_at_most(tmp_path: Path) -> None:
    file = tmp_path / "report.html"
    file.write_text(page([read_run(make_run(tmp_path / "run"))], governance=True), encoding="utf-8")
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    pdf = tmp_path / "report.pdf"
    subprocess.run([*command, f"--print-to-pdf={pdf}", file.as_uri()], capture_output=True, check=True, timeout=90)
    assert 1 <= len(re.findall(rb"/Type\s*/Page\b", pdf.read_bytes())) <= 4
