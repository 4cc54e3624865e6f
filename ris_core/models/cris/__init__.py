"""CRIS (Wang et al., CVPR 2022)."""

from ris_core.models.cris.system import CRIS, CRISConfig

SYSTEM = CRIS

__all__ = ["CRIS", "SYSTEM", "CRISConfig"]
