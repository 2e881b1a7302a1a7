"""In processes of their own: the shim matters only before the first import of torchvision."""

import subprocess
import sys

import pytest

INSTALL = "from fl_dualpriv.models import torchvision_shim; torchvision_shim.install(); "


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.slow  # a process that imports open_clip and transformers
def test_imports_after_the_shim():
    code = (
        "torchvision_shim.install(); torchvision_shim.install(); "
        "import torchvision.transforms, open_clip; from transformers import CLIPModel, CLIPImageProcessor"
    )
    result = run(INSTALL + code)
    assert result.returncode == 0, result.stderr


def test_absent_torchvision_stays_absent():
    hide = (
        "import importlib.util as u, sys; find = u.find_spec; "
        "u.find_spec = lambda name, *a: None if name == 'torchvision' else find(name, *a); "
    )
    check = "import sys, torch; assert 'torchvision' not in sys.modules; print(hasattr(torch.ops.torchvision, 'nms'))"
    result = run(hide + INSTALL + check)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "False"


@pytest.mark.parametrize(
    ("raised", "shown"),
    [("RuntimeError('out of luck')", "RuntimeError: out of luck"), ("ImportError('broken')", "ImportError: broken")],
)
def test_other_errors_are_raised_as_they_are(tmp_path, raised: str, shown: str):
    (tmp_path / "torchvision.py").write_text(f"raise {raised}\n")
    result = run(f"import sys; sys.path.insert(0, {str(tmp_path)!r}); " + INSTALL)
    assert result.returncode == 1
    assert result.stderr.strip().endswith(shown)
