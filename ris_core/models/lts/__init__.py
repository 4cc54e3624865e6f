"""LTS (Jing et al., CVPR 2021), a re-implementation."""

from ris_core.models.lts.system import LTS, LTSConfig

SYSTEM = LTS

__all__ = ["LTS", "SYSTEM", "LTSConfig"]
