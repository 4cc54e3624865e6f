"""Datasets of your own: photos, a table of expressions, and COCO annotations or masks, as `dataset.yaml` describes them."""
