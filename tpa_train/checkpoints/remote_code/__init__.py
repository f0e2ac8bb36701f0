"""The modelling files that ``format=hf`` copies into an export: transformers runs them, tpa_train never does.

They import nothing of this package, so that the folder loads where it is not installed. That they compute what the
student computes is what ``tests/checkpoints/test_transformers_export.py`` holds them to.
"""
