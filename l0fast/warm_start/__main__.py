"""python -m l0fast.warm_start [geography|invented] --out DIR: see the package's docstring."""
