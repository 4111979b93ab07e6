"""Speed measurements over named cases; `python -m bench.run --help` and docs/benchmarks.md say how to use them."""
