"""``make demo``."""

from __future__ import annotations

from tests.processes import run


def test_make_demo(ray_address: str) -> None:
    """The command behind ``make demo``, in the cluster that is there."""
    shown = run("demo", timeout_s=110, RAY_ADDRESS=ray_address)
    assert shown.returncode == 0, shown.stderr
    assert "The capital of France is Paris." in shown.stdout
    for name in ("controller", "gateway-0", "attention-0", "router-0", "expert-0", "expert-1"):
        assert name in shown.stdout
