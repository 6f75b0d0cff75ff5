"""Audits a model before its run: `diagnose(model, batch, loss_fn)`, which is `gradmon.doctor`.

The data's way: `trace` writes down the operations of a forward and `probe` the gradients of its backward; the checks in
`labels`, `weights`, `activations` (with `flow`, the order of operations) and `optimization` turn them into findings.

torch is imported with the first name that needs it, not here: the command line has no other way to this package.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__all__ = ["Diagnosis", "ModelError", "diagnose", "doctor"]

if TYPE_CHECKING:
    from gradmon.diagnose.doctor.audit import Diagnosis, ModelError, diagnose, doctor


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from gradmon.diagnose.doctor import audit

    return getattr(audit, name)
