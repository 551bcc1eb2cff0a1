"""`mssr doctor --integration NAME`: agreement if the framework is installed, a one-line error if not."""

import importlib.metadata

import pytest
import torch

from mssr.errors import UserError
from mssr.integrations import check
from mssr.integrations.versions import require_version
from mssr.versions import SUPPORTED
from mssr_kernels import FusedLMHead

FRAMEWORKS = ("trl", "verl", "openrlhf")


@pytest.mark.parametrize("name", ["transformers", "trl", "liger"])
def test_results_agree(name):
    found = check.check_integration(name)
    package = {"liger": "liger-kernel"}.get(name, name)
    assert found.framework == f"{package} {importlib.metadata.version(package)}"
    assert found.differences and all(value <= check.ALLOWED for value in found.differences.values())
    assert str(found).startswith(f"✓ {found.framework}: ")


@pytest.mark.parametrize("name", ["transformers", "trl"])
def test_a_difference_is_an_error(name, monkeypatch):
    right = FusedLMHead.forward

    def wrong(self, hidden, target=None, *args, **kwargs):
        found = right(self, hidden, target, *args, **kwargs)
        return found if target is None else found._replace(logp=found.logp + 0.01)

    monkeypatch.setattr(FusedLMHead, "forward", wrong)
    with pytest.raises(UserError, match="log-prob.* (differs by 1.0e-02|are 0.01 off)"):
        check.check_integration(name)


@pytest.mark.parametrize("name", ["transformers", "trl"])
def test_a_result_that_is_no_number_is_no_agreement(name, monkeypatch):
    right = FusedLMHead.forward

    def wrong(self, hidden, target=None, *args, **kwargs):
        found = right(self, hidden, target, *args, **kwargs)
        return found if target is None else found._replace(logp=found.logp * torch.nan)

    monkeypatch.setattr(FusedLMHead, "forward", wrong)
    with pytest.raises(UserError, match="log-prob.* (differs by nan|are nan off)"):
        check.check_integration(name)


def test_a_name_that_is_none():
    with pytest.raises(UserError, match="--integration tlr: unknown; choose from transformers, trl,"):
        check.check_integration("tlr")


@pytest.mark.parametrize("package", FRAMEWORKS)
@pytest.mark.parametrize("version", ["0.1.0", "99.0", None])
def test_other_versions_get_one_line_with_the_range(package, version, monkeypatch):
    def installed(name):
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(importlib.metadata, "version", installed)
    low, high = SUPPORTED[package]
    with pytest.raises(UserError, match=f"{package}>={low},<{high}") as caught:
        require_version(package)
    assert "\n" not in str(caught.value) and (version or "not installed") in str(caught.value)


@pytest.mark.parametrize("version", ["{low}", "{low}.post1", "{low}rc1"])
def test_versions_inside_of_the_range(version, monkeypatch):
    for package in FRAMEWORKS:
        low, _ = SUPPORTED[package]
        monkeypatch.setattr(importlib.metadata, "version", lambda name, low=low: version.format(low=low))
        assert require_version(package).startswith(low)


def test_the_seed_of_others_is_left_alone():
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    check.check_integration("transformers")
    assert torch.equal(torch.random.get_rng_state(), before)
