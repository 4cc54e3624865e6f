"""RISCLIP (Kim et al., NAACL 2024), a reconstruction."""

from ris_core.models.risclip.system import RISCLIP, RISCLIPConfig, RISCLIPLocator

SYSTEM = RISCLIP

__all__ = ["RISCLIP", "SYSTEM", "RISCLIPConfig", "RISCLIPLocator"]
