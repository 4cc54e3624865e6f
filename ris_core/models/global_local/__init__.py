"""Zero-shot Global-Local (Yu et al., CVPR 2023)."""

from ris_core.models.global_local.system import GlobalLocal, GlobalLocalConfig

SYSTEM = GlobalLocal

__all__ = ["SYSTEM", "GlobalLocal", "GlobalLocalConfig"]
