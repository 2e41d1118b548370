"""Which apex is there: the real package's layout, PyPI's namesake, or none."""

import sys

import pytest
import torch
from torch import nn

from examples.lm import norms


@pytest.fixture
def fake_site(tmp_path, monkeypatch):
    """A folder at the front of the import path; packages put there are found and never imported."""
    monkeypatch.syspath_prepend(str(tmp_path))
    _forget_apex()
    yield tmp_path
    _forget_apex()


def _forget_apex():
    for name in [n for n in sys.modules if n.split(".")[0] in ("apex", "fused_layer_norm_cuda")]:
        del sys.modules[name]


def write_apex(folder, *, real: bool, body: str = "raise RuntimeError('was imported')\n"):
    package = folder / "apex"
    package.mkdir()
    (package / "__init__.py").write_text(body)
    if real:
        for name in ("normalization", "multi_tensor_apply"):
            (package / name).mkdir()
            (package / name / "__init__.py").write_text("")
    return package


def test_pypis_apex_is_recognized_without_running_it(fake_site, caplog):
    write_apex(fake_site, real=False)
    state, reason = norms.nvidia_apex_state()
    assert state == "wrong"
    assert "pip uninstall apex" in reason
    assert isinstance(norms.build_rms_norm(8, 1e-5), nn.RMSNorm)
    assert "torch.nn.RMSNorm is used" in caplog.text
    with pytest.raises(RuntimeError, match="norm='apex' was asked for, but the installed 'apex'"):
        norms.build_rms_norm(8, 1e-5, "apex")


def test_nvidias_apex_without_kernels_is_not_used(fake_site):
    write_apex(fake_site, real=True)
    state, reason = norms.nvidia_apex_state()
    assert state == "python-only"
    assert "without fused_layer_norm_cuda" in reason
    assert isinstance(norms.build_rms_norm(8, 1e-5), nn.RMSNorm)


def test_nvidias_apex_with_kernels_is_used(fake_site):
    package = write_apex(fake_site, real=True, body="")
    (fake_site / "fused_layer_norm_cuda.py").write_text("")
    (package / "normalization" / "__init__.py").write_text(
        "class FusedRMSNorm:\n    def __init__(self, width, eps):\n        self.made = width, eps\n"
    )
    assert norms.nvidia_apex_state()[0] == "cuda"
    assert norms.build_rms_norm(8, 1e-5).made == (8, 1e-5)
    assert isinstance(norms.build_rms_norm(8, 1e-5, "torch"), nn.RMSNorm)


def test_norm_is_the_formula_and_other_kinds_are_named():
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    expected = x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(norms.build_rms_norm(8, 1e-5, "torch")(x), expected)
    with pytest.raises(ValueError, match="norm is 'layer', expected 'auto', 'torch' or 'apex'"):
        norms.build_rms_norm(8, 1e-5, "layer")
