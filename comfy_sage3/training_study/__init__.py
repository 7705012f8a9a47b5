"""Does training with 8-bit attention reach what exact attention reaches? Many short runs that differ in nothing else.

``python -m comfy_sage3 train-study run`` trains the arms (settings.py says which) and writes a JSON for each;
``train-study report`` makes tables, plots and conclusions of them, for docs/training.md.
"""
