"""Whole models on a device that is no CPU: nothing mixes devices, nothing waits for the host but what must."""

from __future__ import annotations

import re

import pytest

from tests.components import other_device
from tests.components.fake_device import FAULTS
from tests.components.other_device import CASES, READS

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def errors(tmp_path_factory) -> dict[str, str | None]:
    return other_device.run(tmp_path_factory.mktemp("other_device") / "errors.json")


@pytest.mark.parametrize("case", CASES)
def test_the_host_goes_ahead(case, errors):
    assert errors[case] is None


@pytest.mark.parametrize("case", READS)
def test_what_waits_is_known(case, errors):
    """Where it does not any more, take it off the list."""
    assert (errors[case] or "").startswith("DataDependentOutputException")
    assert f"(at {READS[case][1]}:" in errors[case]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found(fault, errors):
    assert re.match(rf"({FAULTS[fault][1]}): ", errors[fault] or "no error")
