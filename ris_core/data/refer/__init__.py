"""The official REFER files of RefCOCO, RefCOCO+ and RefCOCOg, read with distrust and joined to records."""
